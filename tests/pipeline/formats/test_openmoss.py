"""OpenMOSS' folders are read as what it computes of rows as they are, and written so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.saes_kit import CASES, D, batches, made, one_thread, settings, train
from support.small_formats import D_OUT, one_line, openmoss, put_tensors, rows

from sae.cache.errors import SaeError
from sae.pipeline import formats
from sae.pipeline.formats import Metadata
from sae.pipeline.saes import create, parse, trainable
from sae.pipeline.saes.dictionary import Dictionary

single = pytest.fixture(autouse=True, scope="module")(one_thread)
FOLDERS = openmoss()
HOOK = "blocks.3.hook_resid_post"


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_is_read_as_it_computes(kind: str, tmp_path: Path) -> None:
    reading = formats.read(FOLDERS[kind].put(tmp_path))
    FOLDERS[kind].expect(reading.dictionary)
    transcoder = kind.startswith("transcoder")
    assert reading.dictionary.is_transcoder == transcoder
    expected = ("blocks.3.hook_mlp_in", "blocks.3.hook_mlp_out") if transcoder else (HOOK, None)
    assert reading.metadata[1:3] == expected


def test_a_topk_by_norm_is_the_same_function_in_units_of_the_rows(tmp_path: Path) -> None:
    """Its latents times the norms of their decoder rows, by which they are chosen."""
    folder = FOLDERS["topk"].put(tmp_path)
    said = json.loads((folder / "config.json").read_text()) | {"sparsity_include_decoder_norm": True}
    (folder / "config.json").write_text(json.dumps(said))
    t, x = FOLDERS["topk"].tensors, rows()
    norms = t["W_D"].norm(dim=1)
    p = ((x @ t["W_E"] + t["b_E"]) * norms).relu()
    f = torch.zeros_like(p).scatter(1, p.topk(3).indices, p.topk(3).values)
    dictionary = formats.read(folder).dictionary
    torch.testing.assert_close(dictionary.encode(x).dense(), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dictionary(x), f / norms @ t["W_D"] + t["b_D"], rtol=1e-4, atol=1e-4)


REFUSED = [
    ({"sae_type": "molt"}, 'sae_type is "molt"; read are sae, crosscoder'),
    ({"sae_type": "crosscoder", "act_fn": "topk"}, 'act_fn is "topk"; read are relu'),
    ({"sae_type": "crosscoder", "act_fn": "relu"}, "hook_points"),
    ({"act_fn": "batchtopk"}, 'act_fn is "batchtopk"; read are relu, topk, jumprelu'),
    ({"norm_activation": "batch-wise"}, "by those of a batch, which is not read"),
    ({"norm_activation": "dataset-wise"}, f"tensors lack dataset_average_activation_norm.{HOOK}"),
    ({"norm_activation": "token-wise", "hook_point_out": "y"}, "scales outputs by norms of their own"),
    ({"use_glu_encoder": True}, "use_glu_encoder is true"),
    ({"expansion_factor": -1}, "expansion_factor is -1, not a number above 0"),
    ({"expansion_factor": 1e300}, "expansion_factor is 1e+300"),
    ({"top_k": 0, "act_fn": "topk"}, "top_k is 0"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_read(change: dict[str, object], said: str, tmp_path: Path) -> None:
    folder = FOLDERS["relu"].put(tmp_path)
    assert FOLDERS["relu"].said is not None
    (folder / "config.json").write_text(json.dumps(FOLDERS["relu"].said | change))
    assert said in one_line(lambda: formats.read(folder))


def test_an_average_norm_of_0_is_none(tmp_path: Path) -> None:
    folder = FOLDERS["transcoder of a data set"].put(tmp_path)
    name = "dataset_average_activation_norm.blocks.3.hook_mlp_in"
    tensors = FOLDERS["transcoder of a data set"].tensors | {name: torch.tensor(0.0)}
    put_tensors(folder / "sae_weights.safetensors", tensors)
    assert "is 0.0, not above 0" in one_line(lambda: formats.read(folder))


@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_architecture_is_written_as_what_it_computes(
    case: dict[str, object], transcoder: bool, tmp_path: Path
) -> None:
    d_out = D if transcoder else None
    sae = made(settings(case), d_out)
    train(sae, batches(d_out, 3), lr=1e-2)
    sae.eval()
    metadata = Metadata("m", "blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out" if transcoder else None)
    if sae.row_scaling != "none" or sae.rule.name in ("gated", "signed_topk"):
        with pytest.raises(SaeError, match="openmoss cannot say this dictionary: it has no"):
            formats.write(sae, metadata, tmp_path / "out", "openmoss")
        return
    formats.write(sae, metadata, tmp_path / "out", "openmoss")
    again, said = formats.read(tmp_path / "out")
    torch.testing.assert_close(again(rows()), sae(rows()), rtol=1e-4, atol=1e-4)
    assert said == metadata._replace(model=None)


def test_a_crosscoder_is_written_as_its_heads_compute(tmp_path: Path) -> None:
    """p is the sum of the heads'; each head's latents are activation(p n) / n with its own decoder's norms n."""
    settings = {"arch": "crosscoder", "d_sae": 6, "sparsity": "l1"}
    crosscoder = trainable(parse(settings), (4, 4))
    assert isinstance(crosscoder, Dictionary)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0] * 4 + [0.2] * 4) + 1
    crosscoder.initialise(x)
    hooks = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    formats.write(crosscoder, Metadata(hook=hooks[0], beside=hooks[1:]), tmp_path / "out", "openmoss")
    t = load_file(tmp_path / "out" / "sae_weights.safetensors")
    p = (torch.einsum("bhd,hdm->bhm", x.view(64, 2, 4), t["W_E"]) + t["b_E"]).sum(1, keepdim=True)
    n = t["W_D"].norm(dim=2)
    theirs = torch.einsum("bhm,hmd->bhd", (p * n).relu() / n, t["W_D"]) + t["b_D"]
    torch.testing.assert_close(theirs.flatten(1), crosscoder(x), rtol=1e-4, atol=1e-4)
    again, said = formats.read(tmp_path / "out")
    torch.testing.assert_close(again(x), crosscoder(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.encode(x).dense(), crosscoder.encode(x).dense(), rtol=1e-4, atol=1e-4)
    assert said == Metadata(hook=hooks[0], beside=hooks[1:]) and again.widths_in == (4, 4)
    for wrong, of, line in (
        ({"sparsity": "batchtopk", "k": 2}, hooks, "no threshold that is the same at every store"),
        ({}, (hooks[0], hooks[0]), "by hook points, and these are blocks.1"),
    ):
        other = trainable(parse(settings | wrong), (4, 4))
        assert isinstance(other, Dictionary)
        other.get_buffer("threshold").fill_("k" in wrong)  # as it is learned
        with pytest.raises(SaeError, match=line):
            formats.write(other, Metadata(hook=of[0], beside=of[1:]), tmp_path / "x", "openmoss")


def test_what_it_has_no_words_for(tmp_path: Path) -> None:
    with pytest.raises(SaeError, match="gives as many values as it takes"):
        formats.write(create(settings({"arch": "topk"}), D, D_OUT), Metadata(), tmp_path / "x", "openmoss")
