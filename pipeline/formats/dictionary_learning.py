"""dictionary_learning: `ae.pt`, a state_dict, beside `config.json`, as its `load_dictionary` opens them.

Its linear layers hold matrices as [out, in]. JumpReluAutoEncoder does not subtract b_dec, so a dictionary that does is
written with the difference in b_enc. An AutoEncoder is opened with unit rows of its decoder, and latents times the
norms they had; what is read here has these latents, too, and what is written so has unit rows already. Of BatchTopKSAE
and its Matryoshka kin is read what they compute unless told otherwise, a threshold. Source: dictionary_learning 0.1.0
(`dictionary.py`, `trainers/`, `utils.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.cache.disk.durable import write_in
from sae.cache.disk.parsing import inner, shown, whole
from sae.cache.points import hook_name, point_of_hook
from sae.pipeline.saes.inference import Formula, GatedRule, ReLURule, Rule, ThresholdRule, TopKRule

from . import files
from .archives import read_pt, write_pt
from .base import Format, Metadata, register

CONFIG, WEIGHTS = "config.json", "ae.pt"
SUBMODULES = {"resid_post": "resid_post", "mlp_out": "mlp_out", "attn_out": "attention_out"}
"""Its name of a site, as in `mlp_out_layer_5`."""

TRAINERS = {
    "AutoEncoder": "StandardTrainer", "AutoEncoderNew": "StandardTrainerAprilUpdate", "AutoEncoderTopK": "TopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer", "GatedAutoEncoder": "GatedSAETrainer",
}  # fmt: skip
"""What trains each of its classes, which tools that are built on it ask for."""

MOST_LAYERS = 9999
Left = dict[str, Tensor]


@register
class DictionaryLearning(Format):
    """Folders of dictionary_learning: ae.pt and config.json."""

    name = "dictionary_learning"
    holds = (CONFIG, WEIGHTS)

    def formula(self, path: Path) -> tuple[Formula, Metadata]:
        said, _ = files.read_settings(path / CONFIG)
        trainer = inner(said, "trainer")
        kind = trainer.get("dict_class")
        if not isinstance(kind, str) or kind not in READERS:
            raise ValueError(f"dict_class is {shown(kind)}; read are {', '.join(READERS)}")
        left = read_pt(path / WEIGHTS)
        formula = READERS[kind](left, trainer)
        files.expect_taken(left)
        return formula, _metadata(trainer, said.get("buffer"))

    def write(self, formula: Formula, metadata: Metadata, folder: Path) -> None:
        files.expect_autoencoder(formula)
        kind, tensors, more = _written(formula)
        layer, submodule = _layer(metadata.hook)
        trainer = {
            "dict_class": kind, "trainer_class": TRAINERS[kind], "activation_dim": formula.d_in,
            "dict_size": formula.d_sae, "lr": None, "layer": layer, "lm_name": metadata.model,
            "submodule_name": submodule, **more,
        }  # fmt: skip
        said = {"trainer": trainer, "buffer": {"ctx_len": metadata.context_length, "d_submodule": formula.d_in}}
        write_in(folder, CONFIG, json.dumps(said, indent=2, allow_nan=False).encode())
        write_pt(folder, WEIGHTS, tensors)


def _written(formula: Formula) -> tuple[str, Left, dict[str, Any]]:
    """The class that a formula is there, its tensors, and what else its settings say."""
    rule = formula.rule
    match rule:
        case ReLURule() if formula.centred and formula.has_unit_rows:
            return "AutoEncoder", _linear(formula) | {"bias": formula.b_dec}, {}
        case ReLURule():
            return "AutoEncoderNew", _linear(formula.recentred(False)) | {"decoder.bias": formula.b_dec}, {}
        case TopKRule():
            numbers = {"k": torch.tensor(rule.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
            centred = formula.recentred(True)
            return "AutoEncoderTopK", _linear(centred) | {"b_dec": formula.b_dec} | numbers, {"k": rule.k}
        case ThresholdRule():
            plain = formula.recentred(False)
            tensors = {name: getattr(plain, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
            return "JumpReluAutoEncoder", tensors | {"threshold": rule.threshold}, {}
        case GatedRule():
            gated = formula.recentred(True)
            linear = _linear(gated)
            tensors = {"r_mag": rule.r_mag, "gate_bias": linear.pop("encoder.bias"), "mag_bias": rule.b_mag}
            return "GatedAutoEncoder", linear | tensors | {"decoder_bias": formula.b_dec}, {}
    raise ValueError(f"it has no {rule.name}")


def _linear(formula: Formula) -> Left:
    return {"encoder.weight": formula.W_enc.T, "encoder.bias": formula.b_enc, "decoder.weight": formula.W_dec.T}


def _read_linear(left: Left, b_dec: str, rule: Callable[[int], Rule], *, centred: bool = True) -> Formula:
    """A dictionary of two linear layers, whose decoder's bias has a name of its own; `rule` is given the latents."""
    d_sae, d_in = files.sides(left, "encoder.weight")
    return Formula(
        W_enc=files.take(left, "encoder.weight", d_sae, d_in).T.contiguous(),
        b_enc=files.take(left, "encoder.bias", d_sae),
        W_dec=files.take(left, "decoder.weight", d_in, d_sae).T.contiguous(),
        b_dec=files.take(left, b_dec, d_in),
        rule=rule(d_sae),
        centred=centred,
    )


def _relu(left: Left, trainer: dict[str, Any]) -> Formula:
    formula = _read_linear(left, "bias", lambda d_sae: ReLURule())
    return formula if formula.has_unit_rows else formula.unit_rows()


def _relu_new(left: Left, trainer: dict[str, Any]) -> Formula:
    return _read_linear(left, "decoder.bias", lambda d_sae: ReLURule(), centred=False)


def _topk(left: Left, trainer: dict[str, Any]) -> Formula:
    def rule(d_sae: int) -> Rule:
        k = whole(trainer, "k", 1, d_sae)
        if "k" in left and (other := files.take_whole(left, "k", 1, d_sae)) != k:
            raise ValueError(f"k is {k} in {CONFIG} and {other} in {WEIGHTS}")
        left.pop("threshold", None)  # which it computes with where it is told to alone
        return TopKRule(k)

    return _read_linear(left, "b_dec", rule)


def _threshold(left: Left, trainer: dict[str, Any], d_sae: int) -> Rule:
    """The one threshold that latents chosen from a batch have at inference; below 0 it was never set."""
    left.pop("k", None)
    threshold = files.take(left, "threshold")
    if threshold < 0:
        raise ValueError("threshold is below 0: training ended before there was one")
    return ThresholdRule(threshold.expand(d_sae).contiguous())


def _batch_topk(left: Left, trainer: dict[str, Any]) -> Formula:
    return _read_linear(left, "b_dec", lambda d_sae: _threshold(left, trainer, d_sae))


def _plain(left: Left, centred: bool, rule: Callable[[int], Rule]) -> Formula:
    """A dictionary whose tensors have the names and shapes of ours."""
    d_in, d_sae = files.sides(left, "W_enc")
    return Formula(*files.take_plain(left, d_in, d_sae, d_in), rule(d_sae), centred)


def _matryoshka(left: Left, trainer: dict[str, Any]) -> Formula:
    left.pop("group_sizes", None)  # all of them are active
    return _plain(left, True, lambda d_sae: _threshold(left, trainer, d_sae))


def _jumprelu(left: Left, trainer: dict[str, Any]) -> Formula:
    return _plain(left, False, lambda d_sae: ThresholdRule(files.take(left, "threshold", d_sae)))


def _gated(left: Left, trainer: dict[str, Any]) -> Formula:
    left["encoder.bias"] = left.pop("gate_bias", torch.empty(0))

    def rule(d_sae: int) -> Rule:
        return GatedRule(files.take(left, "r_mag", d_sae), files.take(left, "mag_bias", d_sae))

    return _read_linear(left, "decoder_bias", rule)


READERS: dict[str, Callable[[Left, dict[str, Any]], Formula]] = {
    "AutoEncoder": _relu, "AutoEncoderNew": _relu_new, "AutoEncoderTopK": _topk, "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka, "JumpReluAutoEncoder": _jumprelu, "GatedAutoEncoder": _gated,
}  # fmt: skip


def _metadata(trainer: dict[str, Any], buffer: Any) -> Metadata:
    """Where a dictionary belongs; a site that its trainer does not say is the stream after the layer."""
    layer = None if trainer.get("layer") is None else whole(trainer, "layer", 0, MOST_LAYERS)
    named = files.noted(trainer, "submodule_name")
    found = re.fullmatch(r"(\w+)_layer_\d+", named or "resid_post_layer_0")
    sites = {name: site for site, name in SUBMODULES.items()} | {"attn_out": "attn_out"}
    site = None if found is None else sites.get(found[1])
    said = buffer if isinstance(buffer, dict) else {}
    return Metadata(
        model=files.noted(trainer, "lm_name"),
        hook=named if layer is None or site is None else hook_name(layer, site),
        context_length=None if said.get("ctx_len") is None else whole(said, "ctx_len", 1),
    )


def _layer(hook: str | None) -> tuple[int | None, str | None]:
    """The layer and the submodule's name of a hook point; the stream before a layer is that after the one before."""
    point = None if hook is None else point_of_hook(hook)
    if point is None:
        return None, hook
    layer, site = point
    if site == "resid_pre" and layer:
        layer, site = layer - 1, "resid_post"
    return layer, f"{SUBMODULES.get(site, site)}_layer_{layer}"
