"""The harvest against the plain Hugging Face model, and against itself: grown, interrupted, repeated."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.harvesting import harvest
from support.killing import Killed
from support.late_card import rows_come_late
from support.small_models import (
    BEGIN,
    CONTEXT,
    LAYERS,
    VOCAB,
    made_up,
    plain_values,
    row_places,
    save_model,
    small_stages,
    token_store,
)
from support.small_stores import files
from torch import Tensor

from sae.cache import activations
from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.disk.identity import canonical
from sae.cache.errors import Busy, SaeError
from sae.cache.store import manifest
from sae.cache.store.manifest import Manifest
from sae.cache.tokens import TokenStore
from sae.pipeline.harvest import stage
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.harvest.stage import HarvestResult
from sae.pipeline.language_model import SITES, LanguageModel, Point
from sae.pipeline.language_model.token_mask import TokenMask
from sae.pipeline.runtime.progress import Silent

KINDS = ("gpt2", "llama", "mistral")
PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[pytest.MonkeyPatch]:
    with small_stages() as patch:
        yield patch


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, root / kind) for kind in KINDS}


@pytest.fixture
def gpt2(models: dict[str, Path]) -> Path:
    return models["gpt2"]


def run(model: Path, root: Path, *tokens: TokenStore, **settings: Any) -> HarvestResult:
    given = {"layer": [1], "site": ["mlp_out"], "batch_tokens": 5 * CONTEXT, "codec": "float32", **settings}
    options = {name: given.pop(name) for name in ("dry_run", "progress", "wait") if name in given}
    config = HarvestConfig(model=str(model), **{"validation_tokens": "all", **given})
    return harvest(config, list(tokens), root, options.pop("progress", Silent()), **options)


def one(result: HarvestResult) -> ActivationStore:
    (store,) = result.stores["train"]
    return store


def everything(root: Path) -> dict[str, dict[str, bytes]]:
    """All files of all activation stores."""
    return {path.name: files(path) for path in sorted((root / "activations").glob("*"))}


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


# Rows that lie far out


def test_massive_rows_are_told_of_when_they_are_made(tmp_path: Path, gpt2: Path) -> None:
    """How many, where, what share; nothing is said of a store without any, and no byte differs for it."""
    shutil.copytree(gpt2, tmp_path / "model")
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    weights["transformer.wpe.weight"][1, 2] = 900.0
    safetensors.torch.save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    tokens, told = token_store(tmp_path, made_up(40)), Notes()
    settings = {"site": ["resid_mid", "mlp_out"], "codec": "int8", "progress": told}
    result = run(tmp_path / "model", tmp_path, tokens, **settings)
    far, _ = result.stores["train"]
    planted = int((far.positions(0, far.n_rows) % CONTEXT == 1).sum())
    assert {*result.far} == {far.key} and result.far[far.key].positions == {1: planted}
    assert result.far[far.key].massive and result.far[far.key].share > 0.9
    (line,) = [line for line in told.lines if "variance" in line]
    assert line.startswith(f"{far.key}: {planted} of {far.n_rows} rows have a norm above ")
    assert line.endswith(" % of the variance; by default training leaves them out")
    assert result.about()["far_rows"][far.key]["positions"] == {"1": planted}
    before = everything(tmp_path)
    assert run(tmp_path / "model", tmp_path, tokens, **settings).far == result.far and everything(tmp_path) == before


# Against the plain model


@pytest.fixture(scope="module", params=KINDS)
def twin(request: pytest.FixtureRequest, models: dict[str, Path]) -> tuple[Path, dict[tuple[int, str], Tensor]]:
    return models[request.param], plain_values(models[request.param], made_up(7))


@pytest.mark.parametrize("codec", ["int8", "bfloat16", "float16", "float32"])
def test_every_row_is_what_the_plain_model_computes(
    tmp_path: Path, twin: tuple[Path, dict[tuple[int, str], Tensor]], codec: str
) -> None:
    """All sites of all layers in one pass, row by row, within what the codec promises."""
    model, plain = twin
    tokens = token_store(tmp_path, made_up(7))
    layers = range(LAYERS) if codec == "float32" else [1]
    found = run(model, tmp_path, tokens, layer=layers, site=list(SITES), codec=codec).stores["train"]
    assert [(s.recipe["layer"], s.recipe["site"]) for s in found] == [(i, s) for i in layers for s in SITES]
    for store in found:
        positions = store.positions(0, store.n_rows)
        expected = plain[store.recipe["layer"], store.recipe["site"]][positions]
        rows = store.rows(0, store.n_rows)
        encoded = store.codec.encode(rows, store.columns)
        bound = store.codec.error_bound(expected, encoded, store.columns)
        rounding = 1e-5 * expected.abs() + 2e-6
        assert rows.shape == (len(row_places(made_up(7))), expected.shape[1])
        assert ((rows - expected).abs() <= bound + rounding).all(), store.key
        assert expected.std() > 50 * (bound + rounding).mean() or codec == "int8"


def test_every_token_comes_once_except_the_first_and_the_begin_tokens(tmp_path: Path, gpt2: Path) -> None:
    tokens = made_up(40)
    store = one(run(gpt2, tmp_path, token_store(tmp_path, tokens)))
    places = row_places(tokens)
    positions = store.positions(0, store.n_rows)
    assert sorted(positions) == places
    assert (positions % CONTEXT > 0).all() and (tokens.flatten()[positions] != BEGIN).all()
    assert len(store.manifest.windows) > 4 and store.closed
    for window in store.manifest.windows:  # a window is a stretch of the tokens, in an order of its own
        assert sorted(positions[window.start : window.stop]) == places[window.start : window.stop]
        assert list(positions[window.start : window.stop]) != places[window.start : window.stop]


@pytest.mark.parametrize("skip_first", [0, 3])
@pytest.mark.parametrize("skip_begin", [True, False])
def test_which_tokens_become_rows_can_be_chosen(tmp_path: Path, gpt2: Path, skip_first: int, skip_begin: bool) -> None:
    tokens = made_up(6)
    rule = TokenMask(skip_first=skip_first, skip_begin=skip_begin)
    store = one(run(gpt2, tmp_path, token_store(tmp_path, tokens), rows=rule))
    expected = [
        place
        for place, token in enumerate(tokens.flatten())
        if place % CONTEXT >= skip_first and not (skip_begin and token == BEGIN)
    ]
    assert sorted(store.positions(0, store.n_rows)) == expected


def test_tokens_and_positions_can_be_left_out(tmp_path: Path, gpt2: Path) -> None:
    """In a store of its own: which tokens are rows is part of what a store is."""
    tokens = made_up(9)
    kept = token_store(tmp_path, tokens)
    store = one(run(gpt2, tmp_path, kept, rows={"skip_tokens": [7, 9], "positions": [2, 12]}))
    expected = [p for p in row_places(tokens) if 2 <= p % CONTEXT < 12 and tokens.flat[p] not in (7, 9)]
    assert sorted(store.positions(0, store.n_rows)) == expected
    assert store.key != one(run(gpt2, tmp_path, kept)).key
    refused(r"^harvest.rows.skip_tokens = 99: the tokenizer of ", gpt2, tmp_path, kept, rows={"skip_tokens": [99]})
    refused(r"no token of it becomes a row", gpt2, tmp_path, kept, rows={"positions": [CONTEXT, CONTEXT + 1]})


def test_padding_is_never_a_row(tmp_path: Path, models: dict[str, Path]) -> None:
    """Padded by begin tokens, as the tokenizer does, and kept in by nothing but the lengths."""
    tokens, lengths = made_up(20), np.random.default_rng(1).integers(2, CONTEXT + 1, 20)
    for context, length in enumerate(lengths):
        tokens[context, length:] = BEGIN
    padded = token_store(tmp_path, tokens, lengths, packing="document")
    store = one(run(models["llama"], tmp_path, padded, rows=TokenMask(skip_begin=False)))
    positions = store.positions(0, store.n_rows)
    assert len(positions) == (lengths - 1).sum()
    assert (positions % CONTEXT < lengths[positions // CONTEXT]).all()
    plain = plain_values(models["llama"], tokens)[1, "mlp_out"]
    torch.testing.assert_close(store.rows(0, store.n_rows), plain[positions], rtol=1e-5, atol=2e-6)


# One pass


@pytest.mark.parametrize("codec", ["int8", "float32"])
def test_one_pass_equals_separate_harvests(tmp_path: Path, gpt2: Path, codec: str) -> None:
    layers, sites = range(LAYERS), ("resid_pre", "attn_z", "mlp_post")
    tokens = token_store(tmp_path, made_up(7))
    together = run(gpt2, tmp_path / "together", tokens, layer=layers, site=sites, codec=codec)
    apart = [run(gpt2, tmp_path / "apart", tokens, layer=[i], site=[s], codec=codec) for i in layers for s in sites]
    assert everything(tmp_path / "together") == everything(tmp_path / "apart")
    assert len(everything(tmp_path / "apart")) == len(apart) == 6
    positions = {s.positions(0, s.n_rows).tobytes() for s in together.stores["train"]}
    assert len(positions) == 1


def test_rows_of_two_models_and_two_precisions_align(tmp_path: Path, models: dict[str, Path]) -> None:
    tokens = token_store(tmp_path, made_up(20))
    stores = [one(run(models[kind], tmp_path, tokens, codec=c)) for kind in KINDS for c in ("int8", "float32")]
    assert len({store.key for store in stores}) == 6
    assert len({store.positions(0, store.n_rows).tobytes() for store in stores}) == 1
    other = one(run(models["gpt2"], tmp_path, token_store(tmp_path, made_up(20, seed=1), seed=1)))
    assert other.positions(0, 32).tobytes() != stores[0].positions(0, 32).tobytes()


@pytest.mark.parametrize("twice", [{"layer": [1, 0, 1]}, {"site": ["mlp_out", "mlp_out"]}])
def test_a_site_asked_for_twice_is_refused(twice: dict[str, Any]) -> None:
    with pytest.raises(SaeError, match="is there twice"):
        HarvestConfig(**twice)


def test_the_stores_name_says_what_it_is(tmp_path: Path, gpt2: Path) -> None:
    validation = token_store(tmp_path, made_up(8, seed=2), split="validation")
    result = run(gpt2, tmp_path, token_store(tmp_path, made_up(8)), validation, codec="int8")
    (train,), (held_out,) = result.stores["train"], result.stores["validation"]
    assert train.key.startswith("gpt2-1.mlp_out-made-up-int8-")
    assert held_out.key.startswith("gpt2-1.mlp_out-made-up-validation-int8-")
    assert (train.split, held_out.split) == ("train", "validation")
    assert train.hints == {"model": str(gpt2)}
    assert str(gpt2) not in canonical(train.recipe)
    assert train.recipe["hook"] == "blocks.1.hook_mlp_out"


# Growth and interruption


@pytest.mark.parametrize("codec", ["int8", "float32"])
def test_a_grown_harvest_equals_one_harvest(tmp_path: Path, gpt2: Path, codec: str) -> None:
    """First fewer tokens of a store, then a store that has itself grown, then one that has ended."""
    tokens = made_up(70)
    whole = one(run(gpt2, tmp_path / "whole", token_store(tmp_path / "whole", tokens), codec=codec))
    grown = tmp_path / "grown"
    sizes = []
    for contexts, wanted in ((16, 2 * CONTEXT), (16, "all"), (32, "all"), (64, 50 * CONTEXT), (64, "all")):
        store = one(run(gpt2, grown, token_store(grown, tokens[:contexts], ended=False), codec=codec, tokens=wanted))
        sizes.append(store.n_rows)
        assert not store.closed
        assert {**files(whole.path), **files(store.path)}.keys() == files(whole.path).keys()
    assert sizes == [32, 128, 384, 768, 768]
    assert one(run(gpt2, grown, token_store(grown, tokens), codec=codec)).closed
    assert everything(grown) == everything(tmp_path / "whole")


def test_the_batches_of_a_window_are_its_own(tmp_path: Path, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's rounding depends on the batch's shape, so no batch may know where a growing token store ended then."""
    seen: list[np.ndarray] = []
    activate = LanguageModel.activations

    def noted(self: LanguageModel, tokens: Tensor, points: list[Point]) -> dict[Point, Tensor]:
        seen.append(tokens.numpy().copy())
        return activate(self, tokens, points)

    monkeypatch.setattr(LanguageModel, "activations", noted)
    settings = {"batch_tokens": 12 * CONTEXT}
    tokens = made_up(70)
    store = one(run(gpt2, tmp_path / "whole", token_store(tmp_path / "whole", tokens), **settings))
    whole, seen = seen, []
    run(gpt2, tmp_path, token_store(tmp_path, tokens[:16], ended=False), **settings)
    run(gpt2, tmp_path, token_store(tmp_path, tokens), **settings)
    assert len(whole) == len(seen)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(seen, whole, strict=True))
    assert max(map(len, seen)) <= 12
    # nothing is computed but the context that straddles two windows, and that twice
    assert sum(map(len, seen)) <= 70 + len(store.manifest.windows) - 1


def test_fewer_tokens_than_are_there_change_nothing(tmp_path: Path, gpt2: Path) -> None:
    tokens = token_store(tmp_path, made_up(70))
    run(gpt2, tmp_path, tokens)
    before = everything(tmp_path)
    notes = Notes()
    assert one(run(gpt2, tmp_path, tokens, tokens=100, progress=notes)).closed
    assert everything(tmp_path) == before
    assert any("all there already" in line for line in notes.lines)


def test_a_token_store_that_ends_without_more_tokens_closes_the_harvest(tmp_path: Path, gpt2: Path) -> None:
    """Its rows end on a window, so there is no window left to write, only the end to be told."""
    contexts = next(n for n in range(16, 400, 16) if len(row_places(full(n))) % 128 == 0)
    tokens = full(contexts)
    assert not one(run(gpt2, tmp_path, token_store(tmp_path, tokens, ended=False))).closed
    assert one(run(gpt2, tmp_path, token_store(tmp_path, tokens))).closed
    whole = tmp_path / "whole"
    run(gpt2, whole, token_store(whole, tokens))
    assert everything(tmp_path) == everything(whole)


def full(contexts: int) -> np.ndarray:
    """Tokens without begin tokens: 15 rows a context."""
    tokens = made_up(contexts)
    tokens[tokens == BEGIN] = BEGIN + 1
    return tokens


class Countdown:
    """Lets `left` calls of the functions it wraps through, then raises at every one."""

    def __init__(self, left: int, error: type[BaseException]) -> None:
        self.left, self.error = left, error

    def __call__(self, call: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise self.error
            return call(*args, **options)

        return counted


SITE_PAIR = {"site": ["mlp_out", "resid_post"], "batch_tokens": 3 * CONTEXT}


def test_stopped_inside_the_model_and_repeated(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> None:
    """Wherever it stops, the next call ends with the same bytes; two sites, in one pass."""
    whole = tmp_path_factory.mktemp("whole")
    tokens = token_store(whole, made_up(14))
    run(gpt2, whole, tokens, **SITE_PAIR)
    sizes = set()
    for batches in range(100):
        error = (Killed, KeyboardInterrupt, RuntimeError)[batches % 3]
        root = tmp_path_factory.mktemp("stopped")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LanguageModel, "activations", Countdown(batches, error)(LanguageModel.activations))
            try:
                run(gpt2, root, tokens, **SITE_PAIR)
            except error:
                pass
            else:
                break
        sizes |= {ActivationStore(path).n_rows for path in (root / "activations").glob("*")}
        run(gpt2, root, tokens, **SITE_PAIR)
        assert everything(root) == everything(whole), batches
    assert sizes == {0, 32, 64, 128}
    assert batches >= 6


def test_stopped_on_a_card_and_continued_on_the_cpu(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> None:
    """Rows that come late to the host, of two sites, are stored as those that are there at once; and the other way."""
    whole = tmp_path_factory.mktemp("whole")
    tokens = token_store(whole, made_up(14))
    run(gpt2, whole, tokens, **SITE_PAIR)
    for batches, card_first in ((100, True), (2, True), (5, True), (3, False)):
        root, sent = tmp_path_factory.mktemp("stopped"), 0
        for on_card, stop in ((card_first, batches), (not card_first, 100)):
            with pytest.MonkeyPatch.context() as patch, suppress(Killed):
                card = rows_come_late(patch, 3 * CONTEXT) if on_card else None
                patch.setattr(LanguageModel, "activations", Countdown(stop, Killed)(LanguageModel.activations))
                run(gpt2, root, tokens, **SITE_PAIR)
            sent += card.sent if card is not None else 0
        assert everything(root) == everything(whole) and sent, batches


@pytest.mark.parametrize(("sites", "stride"), [(["mlp_out"], 1), (["mlp_out", "resid_pre"], 3)])
def test_killed_at_every_step_of_writing(
    tmp_path_factory: pytest.TempPathFactory, gpt2: Path, sites: list[str], stride: int
) -> None:
    """Between the stores of a pass, between a window and its manifest line, between the last window and the end."""
    whole = tmp_path_factory.mktemp("whole")
    tokens = token_store(whole, made_up(3))
    run(gpt2, whole, tokens, site=sites)
    for stop in range(0, 1000, stride):
        root = tmp_path_factory.mktemp("killed")
        with pytest.MonkeyPatch.context() as patch:
            countdown = Countdown(stop, Killed)
            patch.setattr(os, "replace", countdown(os.replace))
            patch.setattr(manifest, "append_line", countdown(manifest.append_line))
            try:
                run(gpt2, root, tokens, site=sites)
            except Killed:
                pass
            else:
                break
        run(gpt2, root, tokens, site=sites)
        assert everything(root) == everything(whole), stop
    assert stop > 20 * len(sites)


def test_a_window_is_written_while_the_next_is_computed(
    tmp_path: Path, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for window 0, whose columns the others are coded by; and never two at a time."""
    append, compute = ActivationWriter.append, stage.compute
    computing: list[int] = []
    writing: list[int] = []
    begun = threading.Condition()

    def noted(source: Any, task: Any, *args: Any) -> Any:
        with begun:
            computing.append(task.window)
            begun.notify_all()
        return compute(source, task, *args)

    def waiting(self: ActivationWriter, arrays: Any, notes: Any) -> Any:
        window = len(self.store.manifest.windows)
        writing.append(window)
        if 0 < window < 4:
            with begun:
                assert begun.wait_for(lambda: window + 1 in computing, timeout=60)
        done = append(self, arrays, notes)
        assert max(computing) <= window + 1
        writing.remove(window)
        assert not writing
        return done

    monkeypatch.setattr(stage, "compute", noted)
    monkeypatch.setattr(ActivationWriter, "append", waiting)
    assert len(one(run(gpt2, tmp_path, token_store(tmp_path, made_up(20)))).manifest.windows) == 5


ENDLESS = """
import sys
from pathlib import Path
sys.path[:0] = ["tests"]
from support.small_models import small_stages, token_store, made_up
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from support.harvesting import harvest
from sae.pipeline.runtime.progress import Silent
with small_stages():
    root, model = Path(sys.argv[1]), sys.argv[2]
    config = HarvestConfig(model=model, layer=(0, 1), site=("mlp_out", "resid_post"), batch_tokens=80)
    harvest(config, [token_store(root, made_up(4000))], root, Silent(), device="cpu")
"""


@pytest.mark.slow
def test_kill_9(tmp_path: Path, gpt2: Path) -> None:
    """A real process, killed twice by SIGKILL wherever it happens to be."""
    settings = {"layer": (0, 1), "site": ("mlp_out", "resid_post"), "codec": "int8"}
    root, rows = tmp_path / "killed", 0
    for delay in (0.0, 0.2):
        with subprocess.Popen([sys.executable, "-c", ENDLESS, str(root), str(gpt2)], cwd=PROJECT) as process:
            while sum(rows_now(root)) <= rows:  # until it has committed something new
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        assert sum(rows_now(root)) > rows
        rows = sum(rows_now(root))
    wanted = max(rows_now(root)) + 200
    notes = Notes()
    run(gpt2, root, token_store(root, made_up(4000)), tokens=wanted * 2, progress=notes, **settings)
    assert any("took over the lock" in line for line in notes.lines)
    whole = tmp_path / "whole"
    run(gpt2, whole, token_store(whole, made_up(4000)), tokens=wanted * 2, **settings)
    assert everything(root) == everything(whole)


def rows_now(root: Path) -> list[int]:
    return [Manifest.read(path).rows for path in (root / "activations").glob("*")]


# Requests


def test_an_unclosed_token_store_gives_whole_windows_only(tmp_path: Path, gpt2: Path) -> None:
    tokens = token_store(tmp_path, made_up(16), ended=False)
    result = run(gpt2, tmp_path, tokens)
    available = len(row_places(made_up(16)))
    assert one(result).n_rows == result.plans[0].rows == 128 < available
    assert not one(result).closed and one(result).complete
    closed = token_store(tmp_path, made_up(16))
    assert one(run(gpt2, tmp_path, closed)).n_rows == available


def test_less_than_one_window_of_a_growing_token_store(
    tmp_path: Path, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = activations.Windows(512, 1024)
    monkeypatch.setattr(activations, "WINDOWS", windows)
    with pytest.raises(SaeError, match=r"200 rows do not fill their window, .* 512; .* `tokens = 512` "):
        run(gpt2, tmp_path, token_store(tmp_path, first_rows(200), ended=False))
    assert not (tmp_path / "activations").exists()
    closed = one(run(gpt2, tmp_path, token_store(tmp_path, first_rows(200))))
    assert (closed.n_rows, closed.closed) == (200, True)


def test_rows_that_fill_no_window_are_said_and_kept_on_request(tmp_path: Path, gpt2: Path) -> None:
    """In a store of its own that has ended: it shares its whole windows with the other, aligns, and does not grow."""
    tokens = token_store(tmp_path, made_up(16), ended=False)
    available = len(row_places(made_up(16)))
    notes = Notes()
    usual = one(run(gpt2, tmp_path, tokens, progress=notes))
    left = available - 128
    assert usual.n_rows == 128 and not usual.closed and 0 < left < 128
    assert any(f"{left} rows do not fill their window, which ends at row 256;" in line for line in notes.lines)
    assert notes.lines[-1] == f"train: kept 128 rows, left out {left} as said above"
    short = {"rows": {"last_window": "short"}}
    notes = Notes()
    stores = run(gpt2, tmp_path, tokens, progress=notes, site=["mlp_out", "resid_post"], **short).stores["train"]
    assert all((store.n_rows, store.closed) == (available, True) for store in stores)
    assert not any("do not fill" in line or "left out" in line for line in notes.lines)
    assert stores[0].key != usual.key and stores[0].recipe["rows"]["last_window"] == "short"
    assert torch.equal(stores[0].rows(0, 128), usual.rows(0, 128))
    assert stores[0].positions(0, available).tolist() == stores[1].positions(0, available).tolist()
    assert sorted(stores[0].positions(0, available)) == row_places(made_up(16))
    before = everything(tmp_path)
    assert "all there already" in "".join(noted(gpt2, tmp_path, tokens, **short))
    grown = token_store(tmp_path, made_up(32), ended=False)
    refused(r"has ended, with a short window at row \d+, and cannot grow to \d+; ", gpt2, tmp_path, grown, **short)
    assert everything(tmp_path) == before
    assert one(run(gpt2, tmp_path, grown)).n_rows == 384  # the one of whole windows does


def test_a_short_window_of_so_many_tokens(tmp_path: Path, gpt2: Path) -> None:
    tokens = token_store(tmp_path, made_up(32), ended=False)
    store = one(run(gpt2, tmp_path, tokens, tokens=9 * CONTEXT, rows={"last_window": "short"}))
    assert sorted(store.positions(0, store.n_rows)) == row_places(made_up(32)[:9]) and store.closed


def noted(model: Path, root: Path, tokens: TokenStore, **settings: Any) -> list[str]:
    notes = Notes()
    run(model, root, tokens, progress=notes, **settings)
    return notes.lines


def first_rows(rows: int) -> np.ndarray:
    """Tokens of 16 contexts of which so many become rows."""
    tokens = full(16)
    tokens[:, 1:].flat[: 240 - rows] = BEGIN
    return np.concatenate([tokens[:, :1], tokens[:, 1:].copy()], axis=1)


def test_a_wish_for_tokens_is_rounded_up_to_a_window(tmp_path: Path, gpt2: Path) -> None:
    tokens = token_store(tmp_path, made_up(70))
    validation = token_store(tmp_path, made_up(70, seed=1), split="validation")
    for wanted, rows in ((1, 32), (40, 64), (200, 256), (70 * CONTEXT - 1, len(row_places(made_up(70))))):
        result = run(gpt2, tmp_path / str(wanted), tokens, validation, tokens=wanted, validation_tokens=wanted)
        assert result.plans[0].rows == one(result).n_rows == rows
        assert result.stores["validation"][0].n_rows >= 32


def test_a_few_tokens_that_give_no_row_still_make_a_window(tmp_path: Path, gpt2: Path) -> None:
    tokens = made_up(20)
    tokens[:2] = BEGIN
    assert one(run(gpt2, tmp_path, token_store(tmp_path, tokens), tokens=1)).n_rows == 32


def test_a_dry_run_writes_nothing_and_says_the_truth(tmp_path: Path, gpt2: Path) -> None:
    tokens = token_store(tmp_path, made_up(70))
    notes = Notes()
    settings = {"site": ["mlp_out", "resid_pre"], "codec": "float32"}
    planned = run(gpt2, tmp_path, tokens, dry_run=True, progress=notes, **settings)
    assert planned.stores == {} and not (tmp_path / "activations").exists()
    (plan,) = planned.plans
    assert plan.rows == len(row_places(made_up(70))) and plan.rows_to_do == 2 * plan.rows
    assert plan.forward_tokens == 70 * CONTEXT and plan.seconds is not None and plan.seconds > 0
    size = f"{plan.stored_bytes / 1e6:,.1f} MB"
    assert notes.lines[-1].startswith(f"train: {plan.rows:,} rows of 1.mlp_out, 1.resid_pre, about {size}; ")
    run(gpt2, tmp_path, tokens, **settings)
    again = run(gpt2, tmp_path, tokens, dry_run=True, **settings).plans[0]
    assert (again.rows_to_do, again.forward_tokens, again.seconds) == (0, 0, None)


def test_progress_counts_the_rows(tmp_path: Path, gpt2: Path) -> None:
    class Bars(Silent):
        def __init__(self) -> None:
            self.total = self.done = self.finished = 0

        def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
            self.total, self.done = total or 0, done

        def advance(self, n: int, **fields: object) -> None:
            self.done += n

        def finish(self) -> None:
            self.finished += 1

    tokens = token_store(tmp_path, made_up(30))
    for settings in ({"tokens": 100}, {"site": ["mlp_out", "resid_mid"]}):
        bars = Bars()
        run(gpt2, tmp_path, tokens, progress=bars, **settings)
        assert bars.done == bars.total > 0
        assert bars.finished == 1


# Errors: one line each, and nothing touched


def refused(match: str, *args: Any, **settings: Any) -> None:
    with pytest.raises(SaeError, match=match) as caught:
        run(*args, **settings)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_harvested(tmp_path: Path, gpt2: Path) -> None:
    tokens = token_store(tmp_path, made_up(8))
    refused(r"^layer = 2: gpt2 has layers 0 to 1$", gpt2, tmp_path, tokens, layer=[0, 2])
    refused(r"^layer = -1: gpt2 has layers 0 to 1$", gpt2, tmp_path, tokens, layer=[-1])
    refused(r"^site = mlp_output: the sites are resid_pre, ", gpt2, tmp_path, tokens, site=["mlp_output"])
    refused(r"^codec = int4: no such codec; there are int8, ", gpt2, tmp_path, tokens, codec="int4")
    refused(r"^harvest.dtype = float8: the forward pass runs in ", gpt2, tmp_path, tokens, dtype="float8")
    refused(r"no token of it becomes a row", gpt2, tmp_path, tokens, rows=TokenMask(skip_first=CONTEXT))
    refused(r"no such folder", tmp_path / "nothing" / "there", tmp_path, tokens)
    long = token_store(tmp_path, made_up(4, length=40))
    refused(r"^context = 40: gpt2 reads at most 32 tokens; tokenize again", gpt2, tmp_path, long)
    other = token_store(tmp_path, made_up(4), tokenizer={"name": "other", "n_vocab": VOCAB + 1, "begin": BEGIN})
    refused(r"^tokens_from = \S+: its tokenizer has 62 tokens, gpt2 61; tokenize with", gpt2, tmp_path, other)
    assert not (tmp_path / "activations").exists()


def test_a_vocabulary_that_the_model_rounds_up(tmp_path: Path, gpt2: Path) -> None:
    recipe = {"tokenizer": {"name": "smaller", "n_vocab": VOCAB - 8, "begin": BEGIN}}
    assert one(run(gpt2, tmp_path, token_store(tmp_path, made_up(8) % 50, **recipe))).n_rows > 0


def test_the_validation_tokens_are_checked_before_the_training_tokens_are_run(
    tmp_path: Path, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = activations.Windows(512, 1024)
    monkeypatch.setattr(activations, "WINDOWS", windows)
    validation = token_store(tmp_path, made_up(16, seed=1), split="validation", ended=False)
    refused(
        r"do not fill their window, .* `tokenize.validation_tokens = 512` ",
        gpt2,
        tmp_path,
        token_store(tmp_path, made_up(70)),
        validation,
    )
    assert not (tmp_path / "activations").exists()


def test_activations_that_are_not_numbers(tmp_path: Path, gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A token whose embedding is NaN: the windows before it stay, and the message says where."""
    broken = tmp_path / "broken"
    shutil.copytree(gpt2, broken)
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights["transformer.wte.weight"][7] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    tokens = made_up(40)
    tokens[tokens == 7] = 8
    tokens[30, 5] = 7
    refused(
        r"^broken 0\.resid_post: activations hold NaN or infinity",
        broken, tmp_path, token_store(tmp_path, tokens), layer=[0], site=["resid_post"],
    )  # fmt: skip
    (store,) = [ActivationStore(path) for path in (tmp_path / "activations").glob("*")]
    assert store.n_rows == 384 and torch.isfinite(store.rows(0, 384)).all()
    assert not store.closed and not store.complete


def test_a_store_that_is_being_written(tmp_path: Path, gpt2: Path) -> None:
    from sae.cache.disk.locks import Lock

    tokens = token_store(tmp_path, made_up(30))
    path = one(run(gpt2, tmp_path, tokens, tokens=100)).path
    before = files(path)
    with Lock(path), pytest.raises(Busy, match="is writing here"):
        run(gpt2, tmp_path, tokens)
    assert files(path) == before
