"""SAELens: `cfg.json` beside `sae_weights.safetensors`, as its `SAE.load_from_disk` opens them; a run folder has them.

Read are standard, topk, jumprelu and gated dictionaries, transcoders and skip transcoders, of version 6 and of those
before it. BatchTopK and Matryoshka have no class there: they are written, as SAELens itself writes them, as the
jumprelu they are at inference. Gated and topk transcoders have none either, nor dictionaries of several stores; in a
run folder they get a name all the same, which SAELens refuses and this reads. The scale of `expected_average_only_in`
is no part of a file: SAELens takes such weights as they are, and so does this. A jumprelu that is exported subtracts
nothing from its input, since dictionary_learning opens the same tensors and never does. Source: SAELens 6.54.12
(`saes/`, `loading/`).
"""

from __future__ import annotations

from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

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

WIDTHS = "widths_in", "widths_out"
"""Keys of our own, of a dictionary of several stores: how wide each of them is."""

TENSORS = {"gated": {"b_enc": "b_gate"}}
"""Its name of a tensor, where that is not ours, by rule."""

BESIDE = {"beside": "hook_names_beside", "beside_out": "hook_names_beside_out"}
"""Likewise, the hook points of the stores after the first."""

ROW_SCALINGS: dict[str, RowScaling] = {
    "none": "none", "expected_average_only_in": "none", "layer_norm": "standard", "constant_norm_rescale": "norm",
}  # fmt: skip


@register
class SAELens(Format):
    """SAELens folders: cfg.json and sae_weights.safetensors."""

    name = "saelens"
    holds = (CONFIG, WEIGHTS)

    def formula(self, path: Path) -> tuple[Formula, Metadata]:
        said, tensors = files.read_pair(path, CONFIG, WEIGHTS)
        config = current(said)
        return formula_of(tensors, config), metadata_of(inner(config, "metadata"))

    def write(self, formula: Formula, metadata: Metadata, folder: Path) -> None:
        if formula.rule.name not in ("relu", "topk", "threshold", "gated"):
            raise ValueError(f"it has no {formula.rule.name}")
        if formula.transcoder and formula.rule.name in ("topk", "gated"):
            raise ValueError(f"it has no {formula.rule.name} transcoder")
        if formula.W_skip is not None and (formula.row_scaling != "none" or not formula.transcoder):
            raise ValueError("it has a skip connection in transcoders alone, whose rows are not scaled by themselves")
        if formula.rule.name == "threshold":
            formula = formula.recentred(False)
        tensors, config = written(formula, metadata)
        files.write_pair(folder, CONFIG, config, WEIGHTS, tensors)


def written(formula: Formula, metadata: Metadata) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and cfg.json of a dictionary. A rule SAELens has no name for has its own, which SAELens refuses."""
    rule = formula.rule
    own = rule.values()
    tensors = {"W_enc": formula.W_enc, "b_enc": formula.b_enc, "W_dec": formula.W_dec, "b_dec": formula.b_dec}
    tensors |= {name: value for name, value in own.items() if isinstance(value, Tensor)}
    tensors |= {} if formula.W_skip is None else {"W_skip": formula.W_skip.T}
    names = TENSORS.get(rule.name, {})
    config = {
        "architecture": _architecture(
            rule.name, formula.transcoder, formula.W_skip is not None, formula.of_several_stores
        ),
        **{name: value for name, value in own.items() if not isinstance(value, Tensor)},
        **({"rescale_acts_by_decoder_norm": formula.has_unit_rows} if rule.name == "topk" else {}),
        "d_in": formula.d_in,
        "d_sae": formula.d_sae,
        "dtype": str(formula.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": formula.centred,
        "normalize_activations": next(name for name, kind in ROW_SCALINGS.items() if kind == formula.row_scaling),
        "reshape_activations": "hook_z" if (metadata.hook or "").endswith(".hook_z") else "none",
        **({"d_out": formula.d_out} if formula.transcoder else {}),
        **{name: list(each) for name in WIDTHS if (each := getattr(formula, name))},
        "metadata": said_of(metadata),
    }
    return {names.get(name, name): tensor.detach().contiguous() for name, tensor in tensors.items()}, config


def formula_of(tensors: dict[str, Tensor], config: dict[str, Any]) -> Formula:
    """The dictionary that tensors and a cfg.json of version 6 describe. Raises ValueError where they describe none."""
    kinds = product(RULES, (False, True), (False, True), (False, True))
    left, known = dict(tensors), {_architecture(*kind): kind for kind in kinds}
    rule, transcoder, skips, several = known[files.choice(config, "architecture", *sorted(known))]
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
    W_skip = files.take(left, "W_skip", d_out, d_in).T.contiguous() if skips else None
    files.expect_taken(left)
    if skips and row_scaling != "none":
        raise ValueError("its rows are scaled by themselves and skip the latents, which is not read together")
    each = (_widths(config, name, total) if several else () for name, total in zip(WIDTHS, (d_in, d_out), strict=True))
    formula = Formula(W_enc, b_enc, W_dec, b_dec, own, centred, row_scaling, transcoder, W_skip, *each)
    rescaled = rule == "topk" and files.flag(config, "rescale_acts_by_decoder_norm", False)
    return formula.unit_rows() if rescaled and not formula.has_unit_rows else formula


def metadata_of(said: dict[str, Any]) -> Metadata:
    """Read where a dictionary belongs from the `metadata` of a cfg.json."""
    return Metadata(
        model=files.noted(said, "model_name"),
        hook=files.noted(said, "hook_name"),
        hook_out=files.noted(said, "hook_name_out"),
        context_length=None if said.get("context_size") is None else whole(said, "context_size", 1),
        begin_token=None if said.get("prepend_bos") is None else files.flag(said, "prepend_bos", False),
        dataset=files.noted(said, "dataset_path"),
        positions=_positions(said.get("seqpos_slice")),
        left_out=_left_out(said.get("exclude_special_tokens")),
        **{name: _names(said, key) for name, key in BESIDE.items()},
    )


def _names(said: dict[str, Any], key: str) -> tuple[str, ...]:
    names = said.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key} is {shown(names)}, not a list of names")
    return tuple(names)


def _positions(said: Any) -> tuple[int, int | None] | None:
    """The part of a context that `slice(*said)` is, where it is one of every position."""
    if said is None or said in ([None], [None, None]):
        return None
    ends = said if isinstance(said, list) and 1 <= len(said) <= 2 else [...]
    start, stop = (0, *ends) if len(ends) == 1 else ends
    if not (start is None or (type(start) is int and start >= 0)) or not (
        stop is None or (type(stop) is int and stop > 0)
    ):
        raise ValueError(f"seqpos_slice is {shown(said)}, which is not read")
    return (start or 0, stop)


def _left_out(said: Any) -> tuple[int, ...] | None:
    """Tokens that were left out by number; those that a tokenizer calls special have none here."""
    if said is None or isinstance(said, bool):
        return None
    if not isinstance(said, list) or not all(type(token) is int and token >= 0 for token in said):
        raise ValueError(f"exclude_special_tokens is {shown(said)}, not true, false or a list of tokens")
    return tuple(said)


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


def _widths(config: dict[str, Any], name: str, total: int) -> tuple[int, ...]:
    """The widths of several stores, which add up to a total; none where they are of one."""
    if name not in config:
        return ()
    said = config[name]
    if not isinstance(said, list) or not all(type(d) is int and d > 0 for d in said) or sum(said) != total:
        raise ValueError(f"{name} is {shown(said)}, not widths that add up to {total}")
    return tuple(said)


def _architecture(rule: str, transcoder: bool, skips: bool, several: bool) -> str:
    name = ARCHITECTURES.get(rule, rule)
    plain = name == "standard" and (transcoder or several)
    parts = ["" if plain else name, "skip" * skips, "crosscoder" * several, "transcoder" * transcoder]
    return "_".join(part for part in parts if part)


def _rule(kind: type[Rule], left: dict[str, Tensor], config: dict[str, Any], d_sae: int) -> Rule:
    """A rule from its tensors [d_sae] and its numbers of latents."""
    types = get_type_hints(kind)
    return kind(**{
        field.name: files.take(left, field.name, d_sae)
        if types[field.name] is Tensor
        else whole(config, field.name, 1, d_sae)
        for field in fields(kind)
    })  # fmt: skip


def said_of(metadata: Metadata) -> dict[str, Any]:
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
        **({} if metadata.positions is None else {"seqpos_slice": list(metadata.positions)}),
        **({"exclude_special_tokens": list(metadata.left_out)} if metadata.left_out else {}),
        **{key: list(names) for name, key in BESIDE.items() if (names := getattr(metadata, name))},
        "model_from_pretrained_kwargs": {},
    }
