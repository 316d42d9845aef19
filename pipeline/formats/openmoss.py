"""OpenMOSS (Language-Model-SAEs, llamascopium): `config.json` beside `sae_weights.safetensors`.

p = x @ W_E + b_E without any centring, where x is scaled to a norm of sqrt(d): by the average norm over a data set,
which is folded into the weights here (thresholds included), or row by row. The tool scales before it encodes, so its
`encode` gives latents of scaled rows: these times the average norm over sqrt(d). Where p counts times the norm of a
latent's decoder row, thresholds are over that norm; a topk that chooses so gives latents times it. What chooses over a
batch is no function of a row, and is refused: its own converter makes a jumprelu of it.

A crosscoder has a head for every hook point, W_E [heads, d, m], b_E [heads, m], W_D [heads, m, d], b_D [heads, d]. The
heads' pre-activations are added up, and each head's latents are activation(p n_h) / n_h with the norms n_h of its own
decoder rows. Of a ReLU these are ReLU(p) in every head; a threshold, or a choice of k, would be another in each, and is
refused. Source: llamascopium (`models/sae.py`, `models/sparse_dictionary.py`, `models/crosscoder.py`).
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
    several_stores = True

    def detects(self, path: Path) -> bool:
        return super().detects(path) and not (path / "cfg.json").is_file()  # as SAELens and our runs have

    def formula(self, path: Path) -> tuple[Formula, Metadata]:
        said, left = files.read_pair(path, CONFIG, WEIGHTS)
        if files.choice(said, "sae_type", "sae", "crosscoder") == "crosscoder":
            return _crosscoder(said, left)
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
        if formula.of_several_stores:
            _write_crosscoder(formula, metadata, folder)
            return
        names: dict[str, str] = {"relu": "relu", "topk": "topk", "threshold": "jumprelu"}
        if rule.name not in names:
            raise ValueError(f"it has no {rule.name}")
        if formula.row_scaling == "standard" or (formula.transcoder and formula.row_scaling != "none"):
            files.expect_unscaled(formula)
        if formula.W_skip is not None or formula.d_in != formula.d_out:
            raise ValueError("it has no skip connection, and gives as many values as it takes")
        _expect_factor(formula.d_sae, formula.d_in)
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


def _crosscoder(said: dict[str, Any], left: dict[str, Tensor]) -> tuple[Formula, Metadata]:
    """A crosscoder of ReLUs, its heads side by side."""
    files.choice(said, "act_fn", "relu")
    files.choice(said, "norm_activation", "inference")
    hooks = field(said, "hook_points")
    if not isinstance(hooks, list) or not hooks or not all(isinstance(hook, str) for hook in hooks):
        raise ValueError(f"hook_points is {shown(hooks)}, not a list of names")
    heads, d, d_sae = len(hooks), files.width(said, "d_model"), _latents(said)
    formula = Formula(
        W_enc=files.take(left, "W_E", heads, d, d_sae).flatten(0, 1),
        b_enc=files.take(left, "b_E", heads, d_sae).sum(0),
        W_dec=files.take(left, "W_D", heads, d_sae, d).transpose(0, 1).flatten(1),
        b_dec=files.take(left, "b_D", heads, d).flatten(),
        rule=ReLURule(),
        centred=False,
        widths_in=(d,) * heads,
        widths_out=(d,) * heads,
    )
    files.expect_taken(left)
    return formula, Metadata(hook=hooks[0], beside=tuple(hooks[1:]))


def _write_crosscoder(formula: Formula, metadata: Metadata, folder: Path) -> None:
    if formula.transcoder or len({*formula.widths_in}) > 1:
        raise ValueError("its crosscoders reconstruct what they read, from stores of one width")
    silent = isinstance(formula.rule, ThresholdRule) and bool((formula.rule.threshold <= 0).all())
    if not silent and not isinstance(formula.rule, ReLURule):
        raise ValueError(
            f"it has no {formula.rule.name} that is the same at every store; train with train.sae.sparsity = l1"
        )
    heads, d = len(formula.widths_in), formula.widths_in[0]
    hooks = [metadata.hook or "unknown", *metadata.beside]
    if len({*hooks}) < heads:
        raise ValueError(f"it tells stores apart by hook points, and these are {', '.join(hooks)}")
    _expect_factor(formula.d_sae, d)
    formula = formula.recentred(False)
    W_D = formula.W_dec.view(formula.d_sae, heads, d).transpose(0, 1).contiguous()
    if not bool((torch.linalg.vector_norm(W_D, dim=2) > 0).all()):
        raise ValueError("the norms of decoder rows at each store are divided by, and some are 0")
    config = {
        "sae_type": "crosscoder", "d_model": d, "expansion_factor": formula.d_sae / d, "use_decoder_bias": True,
        "act_fn": "relu", "norm_activation": "inference", "sparsity_include_decoder_norm": True, "hook_points": hooks,
    }  # fmt: skip
    W_E = formula.W_enc.view(heads, d, formula.d_sae)
    b_E = torch.zeros(heads, formula.d_sae)
    b_E[0] = formula.b_enc  # they are added up
    tensors = {"W_E": W_E, "b_E": b_E, "W_D": W_D, "b_D": formula.b_dec.view(heads, d)}
    files.write_pair(folder, CONFIG, config, WEIGHTS, tensors)


def _expect_factor(d_sae: int, d: int) -> None:
    if d_sae != int(d * (d_sae / d)):
        raise ValueError(f"it cannot say {d_sae} latents as {d} times a number")


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
