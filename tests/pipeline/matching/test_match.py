"""`sae match` on small runs: seeds, other widths, transcoders, layers, several at once, and what cannot be compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import done
from support.command_line import sae as typed

import sae
from sae.cache.errors import SaeError
from sae.pipeline.matching import stage
from sae.pipeline.matching.pairs import MEANINGS
from sae.pipeline.metrics.similarity import symmetric_mmcs

D, WIDE, M = 8, 12, 20
SHORT: dict[str, Any] = {"steps": 12, "batch": 128, "lr": 1e-2}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> sae.Session:
    root = tmp_path_factory.mktemp("matching")
    return sae.Session(root / "cache", root / "runs", device="cpu", offline=True, progress=False)


@pytest.fixture(scope="module")
def runs(lab: sae.Session) -> dict[str, Any]:
    """Two seeds, one on rows of another width of the same samples, a transcoder, and one on rows of others."""
    random = torch.Generator().manual_seed(0)
    f = torch.rand(700, 16, generator=random).pow(4)
    x, y = f @ torch.randn(16, D, generator=random), f @ torch.randn(16, WIDE, generator=random)
    pairs = lab.dataset(x, y, name="pairs", validation=0.3)
    topk = sae.TopK(k=3, d_sae=M)
    one, other = lab.train([topk, topk.model_copy(update={"k": 4})], lab.dataset(pairs.inputs[0]), **SHORT)
    return {
        "one": one,
        "other": other,
        "wide": lab.train(topk, lab.dataset(pairs.targets[0]), name="wide", **SHORT),
        "transcoder": lab.train(topk, pairs, name="transcoder", **SHORT),
        "square": lab.train(topk, lab.dataset(x, x.flip(1), name="square"), name="square", **SHORT),
        "foreign": lab.train(topk, lab.dataset(torch.randn(400, D), validation=0.3), name="foreign", **SHORT),
        "same": lab.train(sae.L1(d_sae=M), lab.dataset(pairs.inputs[0]), name="same", **SHORT),
        "vae": lab.train(sae.VAE(), lab.dataset(pairs.inputs[0]), name="vae", **SHORT),
    }


def test_two_runs(lab: sae.Session, runs: dict[str, Any], tmp_path: Path) -> None:
    found = lab.match([runs["one"], runs["other"]], correlate=True)
    a, b = (runs[name].load().W_dec for name in ("one", "other"))
    (row,) = found.table
    assert {*row} == {"a", "b", *MEANINGS}
    assert row["mmcs"] == found.extra["mmcs"] == pytest.approx(symmetric_mmcs(a, b).item(), rel=1e-5)
    assert (row["a"], row["b"], row["latents_a"]) == (runs["one"].name, runs["other"].name, M)
    pairs = found.extra["pairs"]
    assert sorted(one["a"] for one in pairs) == sorted(one["b"] for one in pairs) == list(range(M))
    cosines = [torch.cosine_similarity(a[one["a"]], b[one["b"]], dim=0).item() for one in pairs]
    assert [one["cosine"] for one in pairs] == pytest.approx(cosines, abs=1e-5)
    assert found.extra["hungarian"] == pytest.approx(np.mean(cosines), rel=1e-5)
    x = stage.Subject(runs["one"], runs["one"].load(), lab).held_out.sample(10_000).x
    f, g = (runs[name].load().encode(x).dense().double().numpy() for name in ("one", "other"))
    living = [one for one in pairs if f[:, one["a"]].std() and g[:, one["b"]].std()]
    agreed = [np.corrcoef(f[:, one["a"]], g[:, one["b"]])[0, 1] for one in living]
    assert row["correlation_of_matched"] == pytest.approx(np.mean(agreed), abs=1e-6)
    stable = found.extra["stability"][runs["one"].name]
    assert stable["in_all_07"] == row["above_07_ab"] and stable["latents"] == list(range(M))
    files = found.write(tmp_path / "out")
    assert json.loads(Path(files["results"]).read_text())["hungarian"] == found.extra["hungarian"]
    assert Path(files["plot"]).read_bytes().startswith(b"\x89PNG")


def test_several_runs_and_what_all_have_found(lab: sae.Session, runs: dict[str, Any]) -> None:
    three = [runs[name] for name in ("one", "other", "same")]
    found = lab.match(three, living=True)
    names = [run.name for run in three]
    matrix = found.extra["matrix"]["mmcs"]
    assert [row["mmcs"] for row in found.table] == [matrix[0][1], matrix[0][2], matrix[1][2]]
    assert matrix[0][0] == 1 and matrix[2][0] == matrix[0][2]
    assert found.extra["mmcs"] == pytest.approx(np.mean([row["mmcs"] for row in found.table]))
    assert found.extra["names"] == names and "pairs" not in found.extra
    x = stage.Subject(three[0], three[0].load(), lab).held_out.sample(10_000).x
    kept = [(run.load().encode(x).fired() > 0).nonzero().view(-1) for run in three]
    tables = [torch.nn.functional.normalize(run.load().W_dec[its], dim=1) for run, its in zip(three, kept, strict=True)]
    for i, name in enumerate(names):
        best = torch.stack([(tables[i] @ tables[j].T).amax(1) for j in range(3) if j != i])
        told = found.extra["stability"][name]
        assert told["latents"] == kept[i].tolist()
        assert told["least"] == pytest.approx(best.amin(0).tolist(), abs=1e-5)
        assert told["mean"] == pytest.approx(best.mean().item(), abs=1e-5)
        assert told["in_all_07"] == pytest.approx((best > 0.7).all(0).double().mean().item())


def test_other_widths_are_compared_by_when_they_fire(lab: sae.Session, runs: dict[str, Any], tmp_path: Path) -> None:
    found = lab.match([runs["one"], runs["wide"], runs["transcoder"]], correlate=True)
    assert found.extra["mmcs"] is found.extra["hungarian"] is None and found.extra["likeness"] == "correlation"
    assert all("do not compare" in note for note in found.notes) and len(found.notes) == 2
    rows = {(row["a"], row["b"]): row for row in found.table}
    assert rows["wide", "transcoder"]["mmcs"] is not None, "the transcoder writes what the other one is of"
    assert rows[runs["one"].name, "wide"]["mmcs"] is None
    assert all(row["correlation_ab"] > row["correlation_ab_chance"] for row in found.table)
    assert found.extra["matrix"]["correlation"][0][1] == found.table[0]["correlation"]
    found.write(tmp_path)


def test_what_cannot_be_compared_is_said(lab: sae.Session, runs: dict[str, Any]) -> None:
    for names, settings, said in (
        (["one"], {}, "runs: 1 given; name two or more"),
        ([], {}, "runs: an empty list; name at least one"),
        (["one", "other", "one"], {}, "is named twice, and is like itself"),
        (["one", "wide"], {}, r"writes rows of 8 values, wide of 12, .* compares when they fire"),
        (["one", "transcoder"], {}, r"writes rows of 8 values, transcoder of 12"),
        (["one", "square"], {}, r"square is a transcoder that writes square-.*, topk-.* an autoencoder of pairs-"),
        (["one", "vae"], {}, "trained a vae, not a sparse dictionary"),
        (["one", "foreign"], {"correlate": True}, "so their rows do not align"),
        (["one", "other"], {"correlate": True, "rows": 1}, r"match\.rows = 1: that is 1 held-out rows"),
        (["one", "other"], {"rows": 0}, "rows"),
    ):
        with pytest.raises(SaeError, match=said) as error:
            lab.match([runs[name] for name in names], **settings)
        assert "\n" not in str(error.value)
    large = lab.match([runs["one"], runs["other"]], hungarian=4)
    assert large.extra["hungarian"] is None and "not matched one to one" in large.notes[0]


def test_neighbouring_layers_are_named(lab: sae.Session, runs: dict[str, Any]) -> None:
    """By the points that runs were trained at: pairs with no other layer of the site between them."""

    class At(stage.Subject):
        point: Any = None

        @property
        def written(self) -> list[tuple[str, Any]]:
            return [("m", self.point)]

    def at(name: str, layer: int, site: str) -> stage.Subject:
        run = type("Named", (), {"name": name})()
        subject = At(run, runs["one"].load(), lab)
        object.__setattr__(subject, "point", (layer, site))
        return subject

    four = [at("c", 7, "resid_post"), at("a", 2, "resid_post"), at("b", 4, "resid_post"), at("m", 4, "mlp_out")]
    rows = [
        {"a": one.run.name, "b": other.run.name, "mmcs": i}
        for i, (one, other) in enumerate((x, y) for n, x in enumerate(four) for y in four[n + 1 :])
    ]
    told = stage._adjacent(four, rows)
    assert [(one["layers"], one["a"], one["b"]) for one in told] == [([2, 4], "a", "b"), ([4, 7], "c", "b")]


def test_at_the_command_line(lab: sae.Session, runs: dict[str, Any], tmp_path: Path) -> None:
    where = f"--cache {lab.cache} --runs {lab.runs} --device cpu --out {tmp_path / 'out'}"
    names = [runs[name].name for name in ("one", "other", "same")]
    told = done(f"match {names[0]} {names[1]} --json {where}").json
    assert 0 < told["hungarian"] <= told["mmcs"] <= 1 and Path(told["files"]["plot"]).exists()
    shown = done(f"match {' '.join(names)} --living {where}").out
    assert "mmcs_chance" in shown and "latents that all others have found, too" in shown
    assert "what it is" in shown and "share of one-to-one pairs above 0.7" in shown
    for wrong, said in (
        (f"{names[0]} wide", "--correlate compares when they fire"),
        (f"{names[0]} {lab.runs / names[0]}", "is named twice"),
        (f"{names[0]} nothing", "nothing: no such run"),
        (f"{names[0]}", "name two or more"),
    ):
        answer = typed(f"match {wrong} {where}")
        assert answer.code == 2 and said in answer.complaint, answer.complaint
