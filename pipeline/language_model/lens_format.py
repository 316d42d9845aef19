"""Models in transformer_lens' own format -> Hugging Face's GPT-2, which computes the same.

The small models that its authors trained (GELU-1L and its kind) have a `config.json` of transformer_lens' words, a
`model_final.pth` of its names, and a tokenizer in a repository of its own. Their function is GPT-2's with an untied
unembedding: learned positions, LayerNorm before attention and MLP. Weights alone are read; every one must be there and
have its shape, so none is ever made up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from sae.cache.errors import SaeError
from sae.pipeline.formats.archives import read_pt
from sae.pipeline.language_model.files import CONFIG, LENS_WEIGHTS, one_line, read_json, shown

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "relu": "relu"}  # transformers' names of transformer_lens'
_SIZES = {  # and the largest that are no mistake
    "d_model": 1 << 16, "n_layers": 1000, "d_mlp": 1 << 20, "d_head": 1 << 12, "n_heads": 1 << 12, "n_ctx": 1 << 20,
    "d_vocab": 1 << 22,
}  # fmt: skip
_MADE = re.compile(r"\.(mask|IGNORE)$")  # what a model makes for itself


def load_lens(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """The model of a folder, as a GPT2LMHeadModel. Raises SaeError where it is not whole, or computes otherwise."""
    config = read_json(folder / CONFIG, name)
    sizes = {size: _whole(config, size, most, name) for size, most in _SIZES.items()}
    kept = str(config.get("normalization") or config.get("normalization_type") or "LN")
    unlike = {
        "act_fn": config.get("act_fn") not in _ACTIVATIONS,
        "attn_only": bool(config.get("attn_only")),
        "shortformer_pos": bool(config.get("shortformer_pos")),
        "final_rms": bool(config.get("final_rms")),
        "normalization": kept not in ("LN", "LNPre"),
        "d_head": sizes["d_head"] * sizes["n_heads"] != sizes["d_model"],
    }
    if wrong := [key for key, differs in unlike.items() if differs]:
        raise SaeError(
            f"model = {name}: {wrong[0]} in {CONFIG} is {shown(str(config.get(wrong[0])))}: of transformer_lens' own "
            "models only those with GPT-2's blocks are supported, such as gelu-1l"
        )
    gpt2 = GPT2Config(
        vocab_size=sizes["d_vocab"], n_embd=sizes["d_model"], n_layer=sizes["n_layers"], n_head=sizes["n_heads"],
        n_positions=sizes["n_ctx"], n_inner=sizes["d_mlp"], activation_function=_ACTIVATIONS[config["act_fn"]],
        layer_norm_epsilon=float(config.get("eps", 1e-5)), tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    named = {key: value for key, value in read_pt(folder / LENS_WEIGHTS).items() if not _MADE.search(key)}
    weights = _as_gpt2(named, sizes["n_layers"], kept == "LNPre", sizes["d_model"], name)
    model = GPT2LMHeadModel(gpt2)  # once all of its weights are there
    if "lm_head.bias" in weights:
        model.lm_head = nn.Linear(sizes["d_model"], sizes["d_vocab"])
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise SaeError(f"model = {name}: its weights are not those that {CONFIG} says ({one_line(error)})") from error
    return model.to(dtype)


def _as_gpt2(named: Mapping[str, Tensor], layers: int, folded: bool, d: int, name: str) -> dict[str, Tensor]:
    """Weights by transformers' names. A folded LayerNorm has no weights: it is ones and zeros."""
    left = dict(named)

    def take(key: str) -> Tensor:
        if key not in left:
            raise SaeError(f"model = {name}: {key} is missing from {LENS_WEIGHTS}; fetch it again")
        found = left.pop(key).float()
        if not found.isfinite().all():
            raise SaeError(f"model = {name}: {key} holds infinities or NaN; its weights are damaged")
        return found

    def norm(theirs: str, ours: str) -> dict[str, Tensor]:
        if folded and f"{theirs}.w" not in left:
            return {f"{ours}.weight": torch.ones(d), f"{ours}.bias": torch.zeros(d)}
        return {f"{ours}.weight": take(f"{theirs}.w"), f"{ours}.bias": take(f"{theirs}.b")}

    found = {
        "transformer.wte.weight": take("embed.W_E"), "transformer.wpe.weight": take("pos_embed.W_pos"),
        "lm_head.weight": take("unembed.W_U").T.contiguous(), **norm("ln_final", "transformer.ln_f"),
    }  # fmt: skip
    if "unembed.b_U" in left and (bias := take("unembed.b_U")).any():
        found["lm_head.bias"] = bias
    for layer in range(layers):
        theirs, ours = f"blocks.{layer}", f"transformer.h.{layer}"
        weights = [take(f"{theirs}.attn.W_{which}") for which in "QKV"]  # [heads, d_model, d_head] each
        if any(weight.dim() != 3 or weight.shape != weights[0].shape for weight in weights):
            raise SaeError(f"model = {name}: {theirs}.attn has weights of {[*weights[0].shape]}; fetch it again")
        biases = [take(f"{theirs}.attn.b_{which}").flatten() for which in "QKV"]
        found |= {
            f"{ours}.attn.c_attn.weight": torch.cat([w.transpose(0, 1).flatten(1) for w in weights], dim=1),
            f"{ours}.attn.c_attn.bias": torch.cat(biases),
            f"{ours}.attn.c_proj.weight": take(f"{theirs}.attn.W_O").flatten(0, 1),
            f"{ours}.attn.c_proj.bias": take(f"{theirs}.attn.b_O"),
            f"{ours}.mlp.c_fc.weight": take(f"{theirs}.mlp.W_in"), f"{ours}.mlp.c_fc.bias": take(f"{theirs}.mlp.b_in"),
            f"{ours}.mlp.c_proj.weight": take(f"{theirs}.mlp.W_out"),
            f"{ours}.mlp.c_proj.bias": take(f"{theirs}.mlp.b_out"),
            **norm(f"{theirs}.ln1", f"{ours}.ln_1"), **norm(f"{theirs}.ln2", f"{ours}.ln_2"),
        }  # fmt: skip
    if left:
        raise SaeError(f"model = {name}: {shown(min(left))} is in {LENS_WEIGHTS}, and {CONFIG} says of no such weight")
    return found


def _whole(config: dict[str, Any], key: str, most: int, name: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= most:
        raise SaeError(f"model = {name}: {key} in {CONFIG} is {shown(str(value))}, not a whole number up to {most:,}")
    return value
