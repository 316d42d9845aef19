"""OpenMOSS (Language-Model-SAEs, llamascopium): `config.json` beside `sae_weights.safetensors`.

p = x @ W_E + b_E without any centring, where x is scaled to a norm of sqrt(d): by the average norm over a data set,
which is folded into the weights here (thresholds included), or row by row. The tool scales before it encodes, so its
`encode` gives latents of scaled rows: these times the average norm over sqrt(d). Where p counts times the norm of a
latent's decoder row, thresholds are over that norm; a topk that chooses so gives latents times it. What chooses over a
batch is no function of a row, and is refused: its own converter makes a jumprelu of it. Source: llamascopium
(`models/sae.py`, `models/sparse_dictionary.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.cache.disk.parsing import field, shown, text, whole
from sae.pipeline.saes.inference import Formula, ReLURule, Rule, ThresholdRule, TopKRule
from sae.pipeline.saes.latents import RowScaling

from . import files
from .base import Format, Metadata, register

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
THRESHOLD = "activation_function.log_jumprelu_threshold"
NORM = "dataset_average_activation_norm."
LEAST = torch.finfo(torch.float32).tiny


@register
class OpenMOSS(Format):
    """Folders of OpenMOSS: config.json and sae_weights.safetensors."""

    name = "openmoss"
    holds = (CONFIG, WEIGHTS)

    def detects(self, path: Path) -> bool:
        return super().detects(path) and not (path / "cfg.json").is_file()  # as SAELens and our runs have

    def formula(self, path: Path) -> tuple[Formula, Metadata]:
        said, left = files.read_pair(path, CONFIG, WEIGHTS)
        files.choice(said, "sae_type", "sae")
        if files.flag(said, "use_glu_encoder", False):
            raise ValueError("use_glu_encoder is true, which is not read")
        d_in, d_sae = files.width(said, "d_model"), _latents(said)
        hook, hook_out = (text(said, name) for name in ("hook_point_in", "hook_point_out"))
        norms = {name: left.pop(name) for name in list(left) if name.startswith(NORM)}
        W_dec = files.take(left, "W_D", d_sae, d_in)
        formula = Formula(
            W_enc=files.take(left, "W_E", d_in, d_sae),
            b_enc=files.take(left, "b_E", d_sae),
            W_dec=W_dec,
            b_dec=files.take(left, "b_D", d_in) if files.flag(said, "use_decoder_bias", True) else torch.zeros(d_in),
            rule=_rule(said, left, d_sae),
            centred=False,
            transcoder=hook != hook_out,
        )
        files.expect_taken(left)
        if files.flag(said, "sparsity_include_decoder_norm", True):
            formula = _by_norm(formula)
        return _in_data_units(formula, said, norms, hook, hook_out), Metadata(
            hook=hook, hook_out=None if hook == hook_out else hook_out
        )

    def write(self, formula: Formula, metadata: Metadata, folder: Path) -> None:
        rule = formula.rule
        names: dict[str, str] = {"relu": "relu", "topk": "topk", "threshold": "jumprelu"}
        if rule.name not in names:
            raise ValueError(f"it has no {rule.name}")
        if formula.row_scaling == "standard" or (formula.transcoder and formula.row_scaling != "none"):
            files.expect_unscaled(formula)
        if formula.W_skip is not None or formula.d_in != formula.d_out:
            raise ValueError("it has no skip connection, and gives as many values as it takes")
        if formula.d_sae != int(formula.d_in * (formula.d_sae / formula.d_in)):
            raise ValueError(f"it cannot say {formula.d_sae} latents as {formula.d_in} times a number")
        formula = formula.recentred(False)
        hook = metadata.hook or "unknown"
        config = {
            "sae_type": "sae", "d_model": formula.d_in, "expansion_factor": formula.d_sae / formula.d_in,
            "use_decoder_bias": True, "act_fn": names[rule.name],
            "norm_activation": "inference" if formula.row_scaling == "none" else "token-wise",
            "sparsity_include_decoder_norm": False, "hook_point_in": hook,
            "hook_point_out": metadata.hook_out or "unknown.out" if formula.transcoder else hook,
            "use_glu_encoder": False, **({"top_k": rule.k} if isinstance(rule, TopKRule) else {}),
        }  # fmt: skip
        tensors = {"W_E": formula.W_enc, "b_E": formula.b_enc, "W_D": formula.W_dec, "b_D": formula.b_dec}
        if isinstance(rule, ThresholdRule):  # it keeps logarithms; from 0 on down a threshold is a ReLU
            tensors[THRESHOLD] = rule.threshold.clamp(min=LEAST).log()
        files.write_pair(folder, CONFIG, config, WEIGHTS, tensors)


def _latents(said: dict[str, Any]) -> int:
    """Latents: the width times a factor, which need not be whole."""
    factor = field(said, "expansion_factor")
    if type(factor) not in (int, float) or not 0 < factor * files.width(said, "d_model") < files.MOST_WIDTH:
        raise ValueError(f"expansion_factor is {shown(factor)}, not a number above 0")
    return max(1, int(files.width(said, "d_model") * factor))


def _rule(said: dict[str, Any], left: dict[str, Tensor], d_sae: int) -> Rule:
    match files.choice(said, "act_fn", "relu", "topk", "jumprelu"):
        case "topk":
            return TopKRule(whole(said, "top_k", 1, d_sae))
        case "jumprelu":
            return ThresholdRule(files.take(left, THRESHOLD, d_sae).exp())
    return ReLURule()


def _by_norm(formula: Formula) -> Formula:
    """The function whose latents are chosen by p times the norm of their decoder rows."""
    if isinstance(formula.rule, TopKRule):
        return formula if formula.has_unit_rows else formula.unit_rows()
    norms = torch.linalg.vector_norm(formula.W_dec, dim=1)
    if isinstance(formula.rule, ThresholdRule) and not bool((norms > 0).all()):
        raise ValueError("thresholds are over the norms of the decoder's rows, and some are 0")
    return replace(formula, rule=formula.rule.scaled(1 / norms))


def _in_data_units(
    formula: Formula, said: dict[str, Any], norms: dict[str, Tensor], hook: str, hook_out: str
) -> Formula:
    """The function of rows as they are, by what the tool does to them before it encodes and after it decodes."""
    match files.choice(said, "norm_activation", "dataset-wise", "inference", "token-wise", "batch-wise"):
        case "inference":
            return formula
        case "dataset-wise":
            by_in, by_out = (
                formula.d_in**0.5 / _average(norms, name) for name in (hook, hook_out)
            )  # f / by_in, so that latents are in the data's units, too
            rule = formula.rule.scaled(torch.full((formula.d_sae,), 1 / by_in))
            return replace(
                formula, b_enc=formula.b_enc / by_in, W_dec=formula.W_dec * (by_in / by_out),
                b_dec=formula.b_dec / by_out, rule=rule,
            )  # fmt: skip
        case "token-wise" if not formula.transcoder:
            scaling: RowScaling = "norm"
            return replace(formula, row_scaling=scaling)
    raise ValueError("norm_activation scales outputs by norms of their own, or by those of a batch, which is not read")


def _average(norms: dict[str, Tensor], hook: str) -> float:
    average = float(files.take(dict(norms), NORM + hook))
    if average <= 0:
        raise ValueError(f"{NORM}{hook} is {average}, not above 0")
    return average
