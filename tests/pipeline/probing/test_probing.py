"""Probing of runs on the embedded model: pooled latents by hand, what is kept, and what is said of odd texts."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import done
from support.command_line import sae as typed
from support.small_models import small_stages

import sae
from sae.cache.errors import DamagedStore, SaeError
from sae.pipeline.language_model import Point
from sae.pipeline.probing import stage
from sae.pipeline.probing.config import ProbeConfig

pytest.importorskip("sklearn")

WORDS = ["def", "class", "import", "return", "self", "value", "the", "of", "in", "to", "is", "for", "with", "not"]
SHORT: dict[str, Any] = {"steps": 4, "batch": 128, "lr": 1e-2}


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with small_stages():
        yield


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> sae.Session:
    root = tmp_path_factory.mktemp("probing")
    return sae.Session(root / "cache", root / "runs", device="cpu", offline=True, progress=False)


@pytest.fixture(scope="module")
def runs(lab: sae.Session) -> dict[str, Any]:
    """A dictionary, a transcoder, one of two sites, and two whose codes are no latents or of no text."""
    lab.tokenize(preset="tiny", tokens=3_000, validation_tokens=500, validation=0.3)
    found = lab.harvest(preset="tiny", layer=1, site=["mlp_in", "mlp_out"], tokens=1_000, validation_tokens=100)
    names = [found[name].inputs[0].key for name in ("1.mlp_in", "1.mlp_out")]
    topk = sae.TopK(k=4, d_sae=40)
    return {
        "one": lab.train(topk, found["1.mlp_out"], name="one", **SHORT),
        "transcoder": lab.train(topk, (names[0], names[1]), name="transcoder", **SHORT),
        "both": lab.train(sae.Crosscoder(k=4, d_sae=40), lab.dataset(names), name="both", **SHORT),
        "vae": lab.train(sae.VAE(), found["1.mlp_out"], name="vae", **SHORT),
        "rows": lab.train(topk, torch.randn(300, 8), name="rows", **SHORT),
    }


@pytest.fixture(scope="module")
def labelled() -> tuple[list[str], list[str]]:
    random, ends = np.random.default_rng(0), [" import os", " return None"]
    texts = [" ".join(random.choice(WORDS, 10)) + ends[i % 2] for i in range(32)]
    return texts, ["ab"[i % 2] for i in range(32)]


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_pooled_rows_are_those_of_texts_alone(
    pool: Any, lab: sae.Session, runs: dict[str, Any], labelled: tuple[list[str], list[str]]
) -> None:
    """One text at a time, unpadded, its begin token first, without position 0; of several sites and in any order."""
    texts = [*labelled[0][:5], labelled[0][5] * 4]  # the last one is cut
    subjects = stage.subjects_of([runs["one"], runs["transcoder"], runs["both"]], lab, None, None)
    assert len({id(one.reader) for one in subjects}) == 1
    assert [one.site for one in subjects] == ["tiny 1.mlp_out", "tiny 1.mlp_in", "tiny 1.mlp_in + 1.mlp_out"]
    reader = subjects[0].reader
    read, cut = reader.read(texts, 24, pool)
    assert cut == 1 and len(read[5].ids) == 24
    pooled = reader.pooled(read, [(one.points, one.coder) for one in subjects], 50, "x")
    tok, begin = reader.tokenizer, reader.tokenizer.begin
    for i, text in enumerate(texts):
        ids = tok.encode_batch([text])[0].astype(np.int64)
        ids = np.array([begin, *(ids[:23] if pool == "mean" else ids[-23:])])
        assert np.array_equal(ids, read[i].ids)
        points = [Point(1, "mlp_in"), Point(1, "mlp_out")]
        seen = reader.model.activations(torch.from_numpy(ids)[None], points)
        for number, (one, names) in enumerate(zip(subjects, ([1], [0], [0, 1]), strict=True)):
            rows = torch.cat([seen[points[name]][0] for name in names], dim=1)
            rows = rows[1:] if pool == "mean" else rows[-1:]
            expected = one.coder.encode(rows).dense().mean(0)
            np.testing.assert_allclose(pooled.latents[number][i].toarray()[0], expected.numpy(), atol=2e-4)
            np.testing.assert_allclose(pooled.activations[one.points][i], rows.mean(0).numpy(), atol=2e-4)


def test_several_runs_share_a_pass_and_what_is_done_is_kept(
    lab: sae.Session, runs: dict[str, Any], labelled: tuple[list[str], list[str]], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    passes: list[int] = []
    once = stage.Reader.pooled
    monkeypatch.setattr(stage.Reader, "pooled", lambda self, *more: passes.append(1) or once(self, *more))
    data = {"words": labelled}
    first = lab.probe("one", data, ks=(1, 3), splits=2)
    assert passes == [1] and not first.notes
    both = lab.probe(["one", "transcoder"], data, ks=(1, 3), splits=2)
    assert passes == [1, 1], "only what is missing"
    assert [row for row in both.table if row["dictionary"] in ("one", "tiny 1.mlp_out")] == first.table
    lab.probe(["transcoder", "one"], data, ks=(1, 3), splits=2)
    assert passes == [1, 1]
    lab.probe("one", {"words": (labelled[0], labelled[1][::-1])}, ks=(1, 3), splits=2)
    assert passes == [1, 1, 1], "other labels are another set"
    kinds = {(row["probe"], row["k"]) for row in first.table}
    assert {("latents", 1), ("latents", 3), ("latents", "all"), ("best latent by AUROC", 1), ("random latents", 3),
            ("activations", 1), ("activations", "all"), ("majority class", 0)} <= kinds  # fmt: skip
    rows = {(row["dictionary"], row["probe"], row["k"]): row for row in first.table}
    assert rows["tiny 1.mlp_out", "activations", "all"]["auroc"] > 0.9, "the last words are there to be seen"
    assert rows["one", "latents", 3]["seeds"] == 2 and rows["one", "latents", 3]["classes"] == 2
    picked = first.extra["chosen"]["one"]["words"]["splits"]
    assert len(picked) == 2 and set(picked[0]) == {"b"} and len(picked[0]["b"]["latents"]) == 3
    files = first.write(tmp_path / "out")
    assert json.loads(Path(files["results"]).read_text())["means"][0]["sets"] == 1
    assert Path(files["plot"]).read_bytes().startswith(b"\x89PNG")
    for kept in (runs["one"].path / "probing").iterdir():
        kept.write_bytes(kept.read_bytes().replace(b"auroc", b"aurox", 1))
    with pytest.raises(DamagedStore):
        lab.probe("one", data, ks=(1, 3), splits=2)


def test_texts_that_are_the_same_tokens_are_on_one_side(lab: sae.Session, runs: dict[str, Any]) -> None:
    """Copies, texts alike as far as they are read, and texts of no row at all are left out, and said."""
    base = [" ".join(WORDS[i : i + 6]) for i in range(6)]
    texts = [*base, *base, *(f"{WORDS[0]} of the class {'x' * 90}{i}" for i in range(5)), ""]
    (subject,) = stage.subjects_of([runs["one"]], lab, None, None)
    config = ProbeConfig(max_tokens=12)
    labels = [str(i % 2) for i in range(len(texts))]
    with pytest.raises(SaeError, match="has 3 texts of the class '1'"):
        stage._drawn(config, subject.reader, stage.Labelled("x", "data = x", texts, labels))
    more = [*texts, "import value", "return self value", "not the value"]
    read, numbers, notes = stage._drawn(
        config, subject.reader, stage.Labelled("x", "data = x", more, [*labels, "1", "1", "1"])
    )
    assert len(read) == len(numbers) == len({one.ids.tobytes() for one in read}) == 10
    assert any("5 texts longer than that only the first 12 tokens" in note for note in notes)
    assert any("1 texts have no token that becomes a row" in note for note in notes)
    assert any("10 texts are the same tokens as an earlier one" in note for note in notes)


def test_what_cannot_be_probed_is_said(
    lab: sae.Session, runs: dict[str, Any], labelled: tuple[list[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"words": labelled}
    for call, said in (
        (lambda: lab.probe("vae", data), "trained a vae, whose codes are no latents"),
        (lambda: lab.probe("rows", data), "its rows come from no language model"),
        (lambda: lab.probe(["one", "one"], data), "one: is named twice"),
        (lambda: lab.probe([], data), "runs: an empty list"),
        (lambda: lab.probe("one"), "data: no labelled texts"),
        (lambda: lab.probe("one", data, ks=(41,)), r"^ks = 41: one has 40 latents"),
        (lambda: lab.probe("one", data, ks=()), "ks"),
        (lambda: lab.probe("one", data, tokenizer="gpt2x"), "gpt2x: no such folder or tokenizer"),
        (lambda: lab.probe("one", {"x": (["a"] * 8, [0, 1] * 4)}, ks=(1,)), "no text of the class '1' is left"),
        (lambda: lab.probe("one", {"x": (["a"], [0.5])}, ks=(1,)), "every label is '0.5'"),
    ):
        with pytest.raises(SaeError, match=said) as error:
            call()
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SaeError, match=r'probe: needs the package sklearn, .*pip install "sae-cache\[probing\]"'):
        lab.probe("one", data)


@pytest.mark.slow
def test_at_the_command_line(
    lab: sae.Session, runs: dict[str, Any], labelled: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "words.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": a, "kind": b}) for a, b in zip(*labelled, strict=True)))
    where = f"--cache {lab.cache} --runs {lab.runs} --device cpu --offline --out {tmp_path / 'out'}"
    columns = "--text-column prompt --label-column kind --ks 1 --splits 2"
    found = done(f"probe one both --data {file} {columns} --json {where}").json
    assert found["study"] == "probing" and len({row["dictionary"] for row in found["table"]}) == 4
    shown = done(f"probe both --data {file} {columns} {where}").out
    assert "both: 32 texts of words" in shown and "best latent by AUROC" in shown and "plot.png" in shown
    for wrong, said in (
        (f"--data {file}", "no column 'text'; it has prompt, kind; say which with --text-column and --label-column"),
        ("", "no labelled texts; name a file with --data, or the wheel with --sae-probes"),
        ("--sets 3", "--sets 3: are those of --sae-probes"),
        ("--data no.csv", "--data no.csv: no such file"),
        (f"--data {file} --ks 0", "ks"),
        (f"--data {file} {columns} --pool max", "--pool max"),
        (f"--sae-probes {tmp_path}", f"--sae-probes {tmp_path}: holds no cleaned_data"),
    ):
        answer = typed(f"probe one {wrong} {where}")
        assert answer.code == 2 and said in answer.complaint, answer.complaint
