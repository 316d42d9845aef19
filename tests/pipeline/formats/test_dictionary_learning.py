"""dictionary_learning's folders are read as what it computes, and what is written is read there as what we compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.saes_kit import CASES, D, M, batches, made, one_thread, settings, train
from support.small_formats import K, dictionary_learning, numbers, one_line, put_tensors, rows

from sae.cache.errors import SaeError
from sae.pipeline import formats
from sae.pipeline.formats import Metadata
from sae.pipeline.saes import create

single = pytest.fixture(autouse=True, scope="module")(one_thread)
FOLDERS = dictionary_learning()


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_class_is_read_as_it_computes(kind: str, tmp_path: Path) -> None:
    reading = formats.read(FOLDERS[kind].put(tmp_path))
    FOLDERS[kind].expect(reading.dictionary)
    assert reading.metadata == Metadata("EleutherAI/pythia-70m", "blocks.4.hook_resid_post", None, 128)


@pytest.mark.parametrize(
    ("submodule", "hook"),
    [
        ("mlp_out_layer_4", "blocks.4.hook_mlp_out"),
        ("attention_out_layer_4", "blocks.4.hook_attn_out"),
        (None, "blocks.4.hook_resid_post"),
        ("something", "something"),
    ],
)
def test_the_hook_point_is_what_the_submodule_says(submodule: str | None, hook: str, tmp_path: Path) -> None:
    folder = FOLDERS["AutoEncoder"].put(tmp_path)
    said = json.loads((folder / "config.json").read_text())
    said["trainer"]["submodule_name"] = submodule
    (folder / "config.json").write_text(json.dumps(said))
    assert formats.read(folder).metadata.hook == hook


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_architecture_is_written_as_what_it_computes(case: dict[str, object], tmp_path: Path) -> None:
    sae = made(settings(case))
    train(sae, batches(None, 3), lr=1e-2)
    sae.eval()
    metadata = Metadata("m", "blocks.8.hook_resid_pre", None, 128)
    if sae.row_scaling != "none":
        with pytest.raises(SaeError, match="no scaling of each row by itself"):
            formats.write(sae, metadata, tmp_path / "out", "dictionary_learning")
        assert not (tmp_path / "out").exists()
        return
    if sae.rule.name == "signed_topk":
        with pytest.raises(SaeError, match="it has no signed_topk"):
            formats.write(sae, metadata, tmp_path / "out", "dictionary_learning")
        return
    formats.write(sae, metadata, tmp_path / "out", "dictionary_learning")
    again, said = formats.read(tmp_path / "out")
    torch.testing.assert_close(again(rows()), sae(rows()), rtol=1e-4, atol=1e-4)
    assert said == Metadata("m", "blocks.7.hook_resid_post", None, 128)  # the same place, as its readers call it


def test_what_subtracts_nothing_there_has_the_difference_in_its_bias(tmp_path: Path) -> None:
    sae = made(settings({"arch": "batchtopk"})).eval()
    formats.write(sae, Metadata(), tmp_path / "out", "dictionary_learning")
    weights = torch.load(tmp_path / "out" / "ae.pt", weights_only=True)
    assert (
        sae.b_dec_applied_to_input
        and json.loads((tmp_path / "out" / "config.json").read_text())["trainer"]["dict_class"] == "JumpReluAutoEncoder"
    )
    with torch.no_grad():
        expected = sae.formula().b_enc - sae.formula().b_dec @ sae.formula().W_enc
    torch.testing.assert_close(weights["b_enc"], expected, rtol=1e-4, atol=1e-5)


def test_what_it_has_no_words_for(tmp_path: Path) -> None:
    with pytest.raises(SaeError, match="it has no transcoders"):
        formats.write(create(settings({"arch": "topk"}), D, 7), Metadata(), tmp_path / "x", "dictionary_learning")


def test_a_threshold_that_was_never_set_is_none(tmp_path: Path) -> None:
    folder = FOLDERS["BatchTopKSAE"].put(tmp_path)
    put_tensors(folder / "ae.pt", FOLDERS["BatchTopKSAE"].tensors | {"threshold": torch.tensor(-1.0)})
    assert "threshold is below 0: training ended before" in one_line(lambda: formats.read(folder))


def test_two_ks_are_none(tmp_path: Path) -> None:
    folder = FOLDERS["AutoEncoderTopK"].put(tmp_path)
    put_tensors(folder / "ae.pt", FOLDERS["AutoEncoderTopK"].tensors | {"k": torch.tensor(K + 1)})
    assert f"k is {K} in config.json and {K + 1} in ae.pt" in one_line(lambda: formats.read(folder))
    put_tensors(folder / "ae.pt", FOLDERS["AutoEncoderTopK"].tensors | {"k": torch.tensor(0.5)})
    assert "k is of type float32, not of whole numbers" in one_line(lambda: formats.read(folder))


def test_rows_of_norm_0_are_divided_by_none(tmp_path: Path) -> None:
    folder = FOLDERS["AutoEncoder"].put(tmp_path)
    decoder = numbers(D, M)
    decoder[:, 3] = 0
    put_tensors(folder / "ae.pt", FOLDERS["AutoEncoder"].tensors | {"decoder.weight": decoder})
    assert "norms of the decoder's rows are divided by, and some are 0" in one_line(lambda: formats.read(folder))
