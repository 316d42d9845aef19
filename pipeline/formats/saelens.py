"""SAELens: `cfg.json` beside `sae_weights.safetensors`, as its `SAE.load_from_disk` opens them; a run folder has them.

Read are standard, topk, jumprelu and gated dictionaries and transcoders, of version 6 and of those before it. BatchTopK
and Matryoshka have no class there: they are written, as SAELens itself writes them, as the jumprelu they are at
inference. Gated and topk transcoders have none either; they get a name all the same, which SAELens refuses and this
reads. The scale of `expected_average_only_in` is no part of a file: SAELens takes such weights as they are, and so does
this. Source: SAELens 6.54.12 (`saes/`, `loading/pretrained_sae_loaders.py`).
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from sae.cache.disk.parsing import inner, shown, whole
from sae.pipeline.saes.inference import RULES, Formula, Rule
from sae.pipeline.saes.latents import RowScaling

from . import files
from .base import Format, Metadata, register

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"
ARCHITECTURES = {"relu": "standard", "threshold": "jumprelu"}
"""Its name of a rule, where that is not ours."""

TENSORS = {"gated": {"b_enc": "b_gate"}}
"""Its name of a tensor, where that is not ours, by rule."""

ROW_SCALINGS: dict[str, RowScaling] = {
    "none": "none", "expected_average_only_in": "none", "layer_norm": "standard", "constant_norm_rescale": "norm",
}  # fmt: skip


@register
class SAELens(Format):
    """SAELens folders: cfg.json and sae_weights.safetensors."""

    name = "saelens"

    def detects(self, folder: Path) -> bool:
        return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()

    def formula(self, folder: Path) -> tuple[Formula, Metadata]:
        said, tensors = files.read_pair(folder, CONFIG, WEIGHTS)
        config = current(said)
        return formula_of(tensors, config), metadata_of(inner(config, "metadata"))

    def write(self, formula: Formula, metadata: Metadata, folder: Path) -> None:
        if formula.rule.name not in ("relu", "topk", "threshold", "gated"):
            raise ValueError(f"it has no {formula.rule.name}")
        if formula.transcoder and formula.rule.name in ("topk", "gated"):
            raise ValueError(f"it has no {formula.rule.name} transcoder")
        tensors, config = written(formula, metadata)
        files.write_pair(folder, CONFIG, config, WEIGHTS, tensors)


def written(formula: Formula, metadata: Metadata) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and cfg.json of a dictionary. A rule SAELens has no name for has its own, which SAELens refuses."""
    rule = formula.rule
    own = rule.values()
    tensors = {"W_enc": formula.W_enc, "b_enc": formula.b_enc, "W_dec": formula.W_dec, "b_dec": formula.b_dec}
    tensors |= {name: value for name, value in own.items() if isinstance(value, Tensor)}
    names = TENSORS.get(rule.name, {})
    config = {
        "architecture": _architecture(rule.name, formula.transcoder),
        **{name: value for name, value in own.items() if not isinstance(value, Tensor)},
        **({"rescale_acts_by_decoder_norm": False} if rule.name == "topk" else {}),
        "d_in": formula.d_in,
        "d_sae": formula.d_sae,
        "dtype": str(formula.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": formula.centred,
        "normalize_activations": next(name for name, kind in ROW_SCALINGS.items() if kind == formula.row_scaling),
        "reshape_activations": "none",
        **({"d_out": formula.d_out} if formula.transcoder else {}),
        "metadata": _metadata(metadata),
    }
    return {names.get(name, name): tensor.detach().contiguous() for name, tensor in tensors.items()}, config


def formula_of(tensors: dict[str, Tensor], config: dict[str, Any]) -> Formula:
    """The dictionary that tensors and a cfg.json of version 6 describe. Raises ValueError where they describe none."""
    left, known = dict(tensors), {_architecture(name, of): (name, of) for name in RULES for of in (False, True)}
    rule, transcoder = known[files.choice(config, "architecture", *sorted(known))]
    d_in, d_sae = files.width(config, "d_in"), files.width(config, "d_sae")
    d_out = files.width(config, "d_out") if transcoder else d_in
    centred = files.flag(config, "apply_b_dec_to_input", not transcoder)
    if transcoder and centred:
        raise ValueError("apply_b_dec_to_input is true, and a transcoder's b_dec is of its outputs")
    row_scaling = ROW_SCALINGS[files.choice(config, "normalize_activations", *ROW_SCALINGS)]
    files.choice(config, "reshape_activations", "none", "hook_z")  # rows are flat here
    names = TENSORS.get(rule, {})
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    W_enc, b_enc, W_dec, b_dec = (files.take(left, names.get(name, name), *shape) for name, shape in shapes.items())
    own = _rule(RULES[rule], left, config, d_sae)
    files.expect_taken(left)
    if rule == "topk" and files.flag(config, "rescale_acts_by_decoder_norm", False):
        norms = torch.linalg.vector_norm(W_dec, dim=1)
        if not bool((norms > 0).all()):
            raise ValueError("rescale_acts_by_decoder_norm divides by the norms of W_dec's rows, and some are 0")
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    return Formula(W_enc, b_enc, W_dec, b_dec, own, centred, row_scaling, transcoder)


def metadata_of(said: dict[str, Any]) -> Metadata:
    """Where a dictionary belongs, by the `metadata` of a cfg.json."""
    return Metadata(
        model=files.noted(said, "model_name"),
        hook=files.noted(said, "hook_name"),
        hook_out=files.noted(said, "hook_name_out"),
        context_length=None if said.get("context_size") is None else whole(said, "context_size", 1),
        begin_token=None if said.get("prepend_bos") is None else files.flag(said, "prepend_bos", False),
        dataset=files.noted(said, "dataset_path"),
    )


def current(config: dict[str, Any]) -> dict[str, Any]:
    """A cfg.json as version 6 says it; before, everything was at the top, and topk an activation function."""
    if "metadata" in config:
        return config
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    found = {renamed.get(name, name): value for name, value in config.items()}
    for name in ("finetuning_scaling_factor", "hook_head_index"):
        if found.get(name):
            raise ValueError(f"{name} is {shown(found[name])}, which is not read")
    if isinstance(scaled := found.get("normalize_activations"), bool):
        found["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    if files.choice(found, "activation_fn", "relu", "topk") == "topk":
        found |= {"architecture": "topk", "k": inner(found, "activation_fn_kwargs").get("k")}
    return {"architecture": "standard", "apply_b_dec_to_input": True, **found, "metadata": found}


def _architecture(rule: str, transcoder: bool) -> str:
    name = ARCHITECTURES.get(rule, rule)
    if not transcoder:
        return name
    return "transcoder" if name == "standard" else f"{name}_transcoder"


def _rule(kind: type[Rule], left: dict[str, Tensor], config: dict[str, Any], d_sae: int) -> Rule:
    """A rule from its tensors [d_sae] and its numbers of latents."""
    types = get_type_hints(kind)
    return kind(**{
        field.name: files.take(left, field.name, d_sae)
        if types[field.name] is Tensor
        else whole(config, field.name, 1, d_sae)
        for field in fields(kind)
    })  # fmt: skip


def _metadata(metadata: Metadata) -> dict[str, Any]:
    """The keys by which SAELens and what is built on it find the model, the hook point and the text."""
    if metadata.model is None:  # rows of no language model
        return {"sae_lens_version": VERSION, "dataset_path": metadata.dataset}
    return {
        "sae_lens_version": VERSION,
        "model_name": metadata.model,
        "hook_name": metadata.hook,
        **({} if metadata.hook_out is None else {"hook_name_out": metadata.hook_out}),
        "context_size": metadata.context_length,
        "prepend_bos": metadata.begin_token,
        "dataset_path": metadata.dataset,
        "model_from_pretrained_kwargs": {},
    }
