"""Gemma Scope's and Qwen-Scope's files, read as the function their cards describe."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.saes_kit import one_thread
from support.small_formats import K, gemma_scope, one_line, put_tensors, qwen_scope, rows

from sae.cache.errors import SaeError
from sae.pipeline import formats
from sae.pipeline.formats import Metadata

single = pytest.fixture(autouse=True, scope="module")(one_thread)


def test_gemma_scope(tmp_path: Path) -> None:
    folder = gemma_scope()["npz"]
    dictionary, metadata = formats.read(folder.put(tmp_path))
    folder.expect(dictionary)
    assert metadata == Metadata("google/gemma-2-2b", "blocks.20.hook_resid_post") and not dictionary.is_transcoder


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("gemma-scope-9b-it-mlp/layer_3/width_16k", Metadata("google/gemma-2-9b-it", "blocks.3.hook_mlp_out")),
        ("gemma-scope-2b-pt-att/layer_3/width_16k", Metadata("google/gemma-2-2b", "blocks.3.attn.hook_z")),
        ("models--google--gemma-scope-2b-pt-res/snapshots/abc/layer_7/width_16k",
         Metadata("google/gemma-2-2b", "blocks.7.hook_resid_post")),
        ("somewhere/else", Metadata()),
        ("gemma-scope-2-1b-pt/resid_post/layer_5_width_16k_l0_small",
         Metadata("google/gemma-3-1b-pt", "blocks.5.hook_resid_post")),
        ("gemma-scope-2b-pt-transcoders/layer_3/width_16k",
         Metadata("google/gemma-2-2b", "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out")),
    ],
)  # fmt: skip
def test_the_path_says_what_it_is_of(inside: str, expected: Metadata, tmp_path: Path) -> None:
    folder = gemma_scope()["npz"]
    folder.inside = inside
    dictionary, metadata = formats.read(folder.put(tmp_path))
    assert metadata == expected and dictionary.is_transcoder == (expected.hook_out is not None)


def test_gemma_scope_2_adds_what_skips_the_latents(tmp_path: Path) -> None:
    folder = gemma_scope()["second"]
    dictionary, metadata = formats.read(folder.put(tmp_path))
    folder.expect(dictionary)
    assert dictionary.is_transcoder and metadata.hook_out == "blocks.12.hook_mlp_out"
    latents = dictionary.encode(rows())
    with pytest.raises(ValueError, match="adds a part of each row itself to its output"):
        dictionary.decode(latents.dense())
    edited = dictionary.decode(latents.edited(latents.dense()))
    assert edited.allclose(dictionary(rows()), atol=1e-5)


def test_an_embedding_is_not_read(tmp_path: Path) -> None:
    folder = gemma_scope()["npz"]
    folder.inside = "gemma-scope-2b-pt-res/embedding/width_4k"
    assert "is in units of its own" in one_line(lambda: formats.read(folder.put(tmp_path)))


def test_qwen_scope(tmp_path: Path) -> None:
    folder = qwen_scope()
    where = folder.put(tmp_path)
    for path in (where, where / "layer5.sae.pt"):
        dictionary, metadata = formats.read(path)
        folder.expect(dictionary)
        assert metadata == Metadata("Qwen/Qwen3-8B-Base", "blocks.5.hook_resid_post")


def test_one_of_the_layers_of_qwen_scope_is_named(tmp_path: Path) -> None:
    where = qwen_scope().put(tmp_path)
    put_tensors(where / "layer11.sae.pt", qwen_scope().tensors)
    said = one_line(lambda: formats.read(where))
    assert "it holds 2 of them; name one of the files (layer5.sae.pt, layer11.sae.pt" in said
    assert formats.read(where / "layer11.sae.pt").metadata.hook == "blocks.11.hook_resid_post"


def test_k_is_said_by_the_folder_alone(tmp_path: Path) -> None:
    folder = qwen_scope()
    folder.inside = "renamed"
    assert "k is said by the name of the folder alone" in one_line(lambda: formats.read(folder.put(tmp_path)))
    folder.inside = "SAE-Res-Qwen3-8B-Base-W64K-L0_5000"
    assert "says k = 5000, and there are 32 latents" in one_line(lambda: formats.read(folder.put(tmp_path)))
    assert K < 32


@pytest.mark.parametrize("name", ["gemma-scope", "qwen-scope"])
def test_they_are_read_alone(name: str, tmp_path: Path) -> None:
    dictionary = formats.read(qwen_scope().put(tmp_path)).dictionary
    with pytest.raises(SaeError, match="its layout is read alone"):
        formats.write(dictionary, Metadata(), tmp_path / "x", name)
