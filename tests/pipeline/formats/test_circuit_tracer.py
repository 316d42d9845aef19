"""circuit-tracer's folder: a transcoder for every layer, in its names and shapes, and as its lines compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from support.saes_kit import D, M, batches, made, one_thread, settings, train
from support.small_formats import D_OUT, numbers, rows

from sae.cache.errors import SaeError
from sae.pipeline import formats, saes
from sae.pipeline.formats import Metadata
from sae.pipeline.saes import Clock
from sae.pipeline.saes.clt import CLT
from sae.pipeline.saes.dictionary import Dictionary, FixedDictionary
from sae.pipeline.saes.inference import Formula, ReLURule, TopKRule

single = pytest.fixture(autouse=True, scope="module")(one_thread)
Part = tuple[Dictionary, Metadata]


def part(layer: int, case: dict[str, Any] | None = None, *, d_out: int | None = D, **said: Any) -> Part:
    """A trained transcoder of a layer's MLP."""
    sae = made(settings({"arch": "jumprelu"} if case is None else case), d_out)
    train(sae, batches(d_out, layer + 1), lr=1e-2)
    at = Metadata("owner/model", f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out")
    return sae.eval(), at._replace(**said)


def theirs(folder: Path, layer: int, x: torch.Tensor, k: int | None = None) -> torch.Tensor:
    """What its transcoder of a layer gives for rows: no ReLU beside a threshold or among the k largest."""
    t = safetensors.torch.load_file(folder / f"layer_{layer}.safetensors")
    assert t["W_enc"].shape == t["W_dec"].shape == (M, D)
    p = x @ t["W_enc"].T + t["b_enc"]
    if k is not None:
        f = torch.zeros_like(p).scatter(1, p.topk(k).indices, p.topk(k).values)
    else:
        f = p * (p > t["activation_function.threshold"]) if "activation_function.threshold" in t else p.relu()
    y = f @ t["W_dec"] + t["b_dec"]
    return y + x @ t["W_skip"].T if "W_skip" in t else y


@pytest.mark.parametrize(
    "case", [{"arch": "jumprelu"}, {"arch": "batchtopk"}, {"arch": "l1"}, {"arch": "topk"}], ids=str
)
def test_a_folder_of_every_layer(case: dict[str, Any], tmp_path: Path) -> None:
    parts = [part(layer, case) for layer in (2, 0, 1)]
    formats.write_set(parts, tmp_path / "set", "circuit-tracer")
    config = yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())
    topk = {"activation": "topk", "k": 4} if case["arch"] == "topk" else {}
    assert config == {
        "model_name": "owner/model", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out", "scan": "set", **topk,
    }  # fmt: skip
    for layer, (sae, _) in zip((2, 0, 1), parts, strict=True):
        y = theirs(tmp_path / "set", layer, rows(), topk.get("k"))
        torch.testing.assert_close(y, sae(rows()).detach(), rtol=1e-4, atol=1e-4)


def test_what_skips_the_latents(tmp_path: Path) -> None:
    matrices = numbers(D, M), numbers(M), numbers(M, D), numbers(D)
    formula = Formula(*matrices, ReLURule(), centred=False, transcoder=True, W_skip=numbers(D, D, seed=5))
    dictionary, metadata = FixedDictionary(formula), part(0)[1]
    formats.write(dictionary, metadata, tmp_path / "set", "circuit-tracer")
    torch.testing.assert_close(theirs(tmp_path / "set", 0, rows()), dictionary(rows()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (lambda: [part(0), part(2)], "there is none of layer 1"),
        (lambda: [part(1)], "there is none of layer 0"),
        (lambda: [part(0), part(0)], "there are two of layer 0"),
        (lambda: [part(0), part(1, {"arch": "l1"})], "these have several rules: "),
        (lambda: [part(0), part(1, {"arch": "jumprelu", "d_sae": 48})], "these have several numbers of latents"),
        (lambda: [part(0), part(1, hook_out="blocks.1.hook_resid_post")], "several points that are written"),
        (lambda: [part(0), part(1, model="other")], "these have several models"),
        (lambda: [part(0, d_out=D_OUT)], "these have several widths"),
        (lambda: [part(0, {"arch": "gated"})], "it has no gated"),
        (lambda: [part(0, {"arch": "topk", "input_scale": "per_token"})], "no scaling of each row by itself"),
        (lambda: [part(0, d_out=None)], "one of these reconstructs what it reads"),
        (lambda: [part(0, model=None)], "the name of the language model, or the point that is written, is not known"),
        (lambda: [part(0, hook="hook_embed")], "hook_embed is at no layer that is known"),
    ],
)  # fmt: skip
def test_what_is_no_set(parts: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(SaeError, match="circuit-tracer cannot say") as caught:
        formats.write_set(parts(), tmp_path / "set", "circuit-tracer")
    assert says in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "set").exists()


def test_ks_that_differ(tmp_path: Path) -> None:
    parts = []
    for layer, k in enumerate((2, 3)):
        sae, metadata = part(layer, {"arch": "topk", "k": k})
        assert isinstance(sae.rule, TopKRule)
        parts.append((sae, metadata))
    with pytest.raises(SaeError, match="these have several k: 2, 3"):
        formats.write_set(parts, tmp_path / "set", "circuit-tracer")


def test_several_in_one_folder_are_of_this_tool_alone(tmp_path: Path) -> None:
    with pytest.raises(SaeError, match="saelens cannot say these dictionaries: a folder of it holds one"):
        formats.write_set([part(0), part(1)], tmp_path / "x", "saelens")


# Cross-layer transcoders


def of_all_layers(case: dict[str, Any], into: int = D) -> CLT:
    """A transcoder of three layers, after a few steps."""
    config = saes.parse({"arch": "clt", "d_sae": M, "b_dec_init": "mean"} | case)
    clt = saes.trainable(config, (D, D, D), (into, into, into))
    assert isinstance(clt, CLT)
    x, y = 3 * numbers(20, 3 * D), numbers(20, 3 * into, seed=1) ** 2
    clt.initialise(x, y)
    optimiser = torch.optim.Adam(clt.parameters(), lr=1e-2, fused=True)
    for step in range(3):
        losses = clt.loss(x, y, Clock(step, 3, len(x)))
        optimiser.zero_grad()
        losses.total.backward()
        clt.before_step()
        optimiser.step()
        clt.after_step()
        clt.track(clt.observe(losses))
    hooks = [tuple(f"blocks.{layer}.{site}" for layer in range(3)) for site in ("mlp.hook_in", "hook_mlp_out")]
    clt.metadata = Metadata("owner/model", hooks[0][0], hooks[1][0], beside=hooks[0][1:], beside_out=hooks[1][1:])
    return clt.eval().requires_grad_(False)


def read_by_them(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """What it gives for rows of all layers: the latents of layer i write W_dec_i[:, j - i] to layer j."""
    encoders, decoders = (
        [safetensors.torch.load_file(folder / f"{name}_{layer}.safetensors") for layer in range(3)]
        for name in ("W_enc", "W_dec")
    )
    out = [encoders[j][f"b_dec_{j}"].expand(len(x), D) for j in range(3)]
    for i, part in enumerate(x.split(D, 1)):
        t = encoders[i]
        assert t[f"W_enc_{i}"].shape == (M, D) and decoders[i][f"W_dec_{i}"].shape == (M, 3 - i, D)
        p = part @ t[f"W_enc_{i}"].T + t[f"b_enc_{i}"]
        f = p * (p > t[f"threshold_{i}"])
        out = [y if j < i else y + f @ decoders[i][f"W_dec_{i}"][:, j - i] for j, y in enumerate(out)]
    return torch.cat(out, 1)


@pytest.mark.parametrize(
    "case", [{"sparsity": "jumprelu", "theta_init": 0.05}, {"sparsity": "batchtopk", "k": 4}], ids=str
)
def test_a_cross_layer_transcoder_is_a_folder_of_triangles(case: dict[str, Any], tmp_path: Path) -> None:
    clt = of_all_layers(case)
    formats.write(clt, clt.metadata, tmp_path / "clt", "circuit-tracer")
    assert yaml.safe_load((tmp_path / "clt" / "config.yaml").read_text()) == {
        "model_name": "owner/model", "model_kind": "cross_layer_transcoder", "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out", "scan": "clt",
    }  # fmt: skip
    x = numbers(20, 3 * D, seed=2)
    torch.testing.assert_close(read_by_them(tmp_path / "clt", x), clt(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(clt(x), clt.constant(len(x)))


def test_what_is_no_cross_layer_transcoder_of_theirs_is_one_line(tmp_path: Path) -> None:
    batch = {"sparsity": "batchtopk", "k": 4}
    clt, said = of_all_layers(batch), of_all_layers(batch).metadata
    for other, metadata, line in (
        (of_all_layers({"k": 4}), said, "no topk in cross-layer transcoders"),
        (of_all_layers(batch, into=D + 1), said, "its layers are all as wide"),
        (clt, said._replace(beside=said.beside[:1] * 2), "reads and writes every layer of the model from 0 on"),
        (clt, said._replace(model=None), "name of the language model is not known"),
        (
            clt,
            said._replace(beside_out=("blocks.1.hook_mlp_out", "blocks.2.hook_resid_post")),
            "one point in every layer",
        ),
    ):
        with pytest.raises(SaeError, match=line):
            formats.write(other, metadata, tmp_path / "out", "circuit-tracer")
    for name in ("saelens", "sparsify", "openmoss", "dictionary_learning"):
        with pytest.raises(SaeError, match="it has no cross-layer transcoders"):
            formats.write(clt, said, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()
