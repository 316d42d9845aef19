"""Which rows are massive: what is said of planted ones is what was planted, and honest tails are left alone."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_stores import shrunk, write_activations
from support.small_tokens import CONTEXT
from torch import Tensor
from torch.nn.functional import normalize

from sae.cache import activations, massive
from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.massive import MEDIANS, beyond_usual, far_rows, limit_of
from sae.cache.store.manifest import Windows
from sae.cache.window_buffer import norms_of

ROWS, D, CHUNK = 3000, 48, 256
SINKS = [CONTEXT * context + 1 for context in range(0, 40, 2)] + [CONTEXT * 7 + 5]  # at position 1, and one at 5


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk() as patch:
        patch.setattr(activations, "CHUNK_ROWS", CHUNK)
        patch.setattr(activations, "WINDOWS", Windows(1024, 4096))
        yield


def rows_like(sizes: np.ndarray, seed: int = 0) -> Tensor:
    """Rows of any direction, of these sizes."""
    directions = torch.randn(len(sizes), D, generator=torch.Generator().manual_seed(seed))
    return normalize(directions, dim=1) * torch.from_numpy(sizes).float()[:, None]


def usual_rows() -> Tensor:
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(3)) + 0.5


def with_sinks(size: float = 400.0, spread: float = 0.3) -> Tensor:
    """Usual rows, and in the places of some rows of one direction, of sizes that differ."""
    rows = usual_rows()
    sizes = size * np.random.default_rng(1).lognormal(0, spread, len(SINKS))
    direction = normalize(torch.randn(D, generator=torch.Generator().manual_seed(5)), dim=0)
    rows[SINKS] += torch.from_numpy(sizes).float()[:, None] * direction
    return rows


@pytest.mark.parametrize("codec", ["float32", "int8", "bfloat16"])
def test_what_is_said_of_planted_rows_is_what_was_planted(tmp_path: Path, codec: str) -> None:
    rows = with_sinks()
    store = write_activations(tmp_path, rows, codec, ended=True)
    found = beyond_usual(store, ROWS)
    assert found is not None and found.massive and found.notable
    assert (found.rows, found.of, found.positions) == (len(SINKS), ROWS, {1: len(SINKS) - 1, 5: 1})
    apart = (rows - rows.mean(0)).double().square().sum(1)
    assert found.share == pytest.approx(
        float(apart[SINKS].sum() / apart.sum()), abs=1e-6 if codec == "float32" else 2e-3
    )
    norms = norms_of(rows)
    assert found.norm == pytest.approx(float(norms[SINKS].median()), rel=0.01) and found.alike > 0.99
    assert norms[SINKS].min() > found.largest_norm == MEDIANS * found.usual == limit_of(store, "auto", ROWS)
    assert found.usual == pytest.approx(float(norms.median()), rel=0.05)
    assert str(found).startswith(f"21 of 3,000 rows have a norm above {found.largest_norm:.3g} (their median ")
    assert ", at positions 1, 5) and hold 9" in str(found) and str(found).endswith(" % of the variance")
    said = found.as_json()
    assert said["positions"] == {"1": len(SINKS) - 1, "5": 1} and said["massive"] is True
    assert {*said} == {*found._fields, "massive"}


def test_the_rule_looks_at_the_first_rows_alone(tmp_path: Path) -> None:
    """A run is trained on so many of a store, however it has grown since."""
    store = write_activations(tmp_path, with_sinks(), "float32", ended=True)
    whole, first = beyond_usual(store, ROWS), beyond_usual(store, 1024)
    assert whole is not None and first is not None
    assert (first.rows, first.of) == (whole.rows, 1024) and first.share > whole.share
    assert first.largest_norm == whole.largest_norm
    none = write_activations(tmp_path, torch.cat([usual_rows()[:1024], with_sinks()]), "bfloat16", ended=True)
    assert limit_of(none, "auto", 1024) is None and limit_of(none, "auto", none.n_rows) is not None


def test_of_a_large_store_a_sample_tells_nearly_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the far rows are not among the first; how many there are is counted in any case."""
    late = torch.cat([usual_rows()[:2048], with_sinks()])
    store = write_activations(tmp_path, late, "float32", ended=True)
    exact = far_rows(store, 100.0, len(late))
    assert exact is not None and exact.rows == len(SINKS)
    monkeypatch.setattr(massive, "SAMPLE", 512)
    monkeypatch.setattr(massive, "FAR_SAMPLE", 3)
    far_rows.cache_clear()
    seen: list[int] = []
    monkeypatch.setattr(ActivationStore, "rows", watched(ActivationStore.rows, seen))
    sampled = far_rows(store, 100.0, len(late))
    far_rows.cache_clear()
    assert sampled is not None and sampled._replace(share=0, alike=0) == exact._replace(share=0, alike=0)
    assert sampled.share == pytest.approx(exact.share, abs=0.03) and sampled.alike == pytest.approx(
        exact.alike, abs=0.01
    )
    assert 512 < sum(seen) < len(late)


def watched(method: Callable[..., Tensor], to: list[int]) -> Callable[..., Tensor]:
    def rows(self: ActivationStore, start: int, stop: int) -> Tensor:
        to.append(stop - start)
        return method(self, start, stop)

    return rows


def honest(kind: str) -> Tensor:
    """Rows that are no less honest for being of very different sizes."""
    random = np.random.default_rng(0)
    signs = torch.Generator().manual_seed(1)
    match kind.split():
        case ["log-normal", sigma]:
            return rows_like(random.lognormal(0, float(sigma), ROWS))
        case ["cauchy"]:
            return rows_like(np.abs(random.standard_t(2, ROWS)))
        case ["sparse", often]:  # few features, in few rows; the others hold noise alone
            features = normalize(torch.randn(64, D, generator=signs), dim=1)
            there = torch.rand(ROWS, 64, generator=signs) < float(often)
            return 10 * there.float() @ features + 0.01 * torch.randn(ROWS, D, generator=signs)
        case ["bursts"]:  # oscillations of any phase over slow noise, as in recordings of a brain
            time = np.arange(D) / D
            slow = np.cumsum(random.normal(size=(ROWS, D)), axis=1) / D**0.5
            burst = (random.random(ROWS) < 0.03) * random.lognormal(2.5, 0.7, ROWS)
            wave = np.sin(2 * np.pi * (3 * time + random.random(ROWS)[:, None]))
            return torch.from_numpy(slow + burst[:, None] * wave).float()
        case ["classes"]:  # two, one of them far out: no few rows
            rows = usual_rows()
            rows[torch.rand(ROWS, generator=signs) < 0.3, 0] += 100
            return rows
        case ["faint"]:  # one direction, but nothing changes without them
            rows = usual_rows()
            rows[[100, 200], 5] += 45
            return rows
        case ["zeros"]:
            return torch.zeros(ROWS, D)
    raise AssertionError(kind)


HONEST = {
    "log-normal 0.5": False, "log-normal 1": True, "cauchy": True, "sparse 0.0001": True, "sparse 0.001": True,
    "bursts": True, "classes": True, "faint": False, "zeros": False,
}  # fmt: skip


@pytest.mark.parametrize("kind", HONEST)
def test_honest_rows_are_kept_and_said_where_they_decide(tmp_path: Path, kind: str) -> None:
    store = write_activations(tmp_path, honest(kind), "float32", ended=True)
    found = beyond_usual(store, ROWS)
    assert limit_of(store, "auto", ROWS) is None and not (found is not None and found.massive)
    assert (found is not None and found.notable) is HONEST[kind]


def test_one_row_may_be_massive(tmp_path: Path) -> None:
    rows = usual_rows()
    rows[1234, 3] = -1e5
    store = write_activations(tmp_path, rows, "float32", ended=True)
    found = beyond_usual(store, ROWS)
    assert found is not None and (found.rows, found.positions) == (1, {1234 % CONTEXT: 1})
    assert found.massive and found.share > 0.99 and found.alike == pytest.approx(1, abs=1e-6)
    assert f", at position {1234 % CONTEXT})" in str(found)


def test_rows_of_no_tokens_have_no_positions(tmp_path: Path) -> None:
    recipe = {"source": {"source": "table"}, "split": "train", "d": D, "codec": {"name": "float32", "zstd": None}}
    rows = with_sinks()
    with ActivationWriter(tmp_path, "table", recipe) as writer:
        buffer = writer.window(1024)
        buffer.add(rows[:1024], np.arange(1024))
        writer.append(buffer.arrays(), {})
    found = beyond_usual(writer.store, 1024)
    assert found is not None and found.massive and found.positions == {} and "position" not in str(found)


def test_rules_that_are_numbers_or_none(tmp_path: Path) -> None:
    store = write_activations(tmp_path, with_sinks(), "float32", ended=True)
    found = beyond_usual(store, ROWS)
    assert found is not None and limit_of(store, None, ROWS) is None
    assert limit_of(store, 20.0, ROWS) == 20 * found.usual
    zeros = write_activations(tmp_path, torch.zeros(ROWS, 3), "float32", ended=True)
    assert limit_of(zeros, "auto", ROWS) is None
    with pytest.raises(SaeError, match=r"outliers = 20: the first rows of .* are all zero"):
        limit_of(zeros, 20.0, ROWS)


def test_damage_is_said(tmp_path: Path) -> None:
    store = write_activations(tmp_path, with_sinks(), "float32", ended=True)
    (store.path / "row_norm" / "c" / "2").unlink()
    with pytest.raises(DamagedStore, match="row_norm/c/2: missing"):
        beyond_usual(ActivationStore(store.path), ROWS)
