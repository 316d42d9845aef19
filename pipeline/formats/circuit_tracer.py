"""circuit-tracer: a folder with a transcoder for each layer, `layer_N.safetensors`, and `config.yaml` about them all.

W_enc is [m, d] there. A transcoder reads and writes the same points in every layer; all have as many latents, and
choose them alike. Thresholds below 0 are written as 0: its JumpReLU has no ReLU. Its TopK has none either, so a latent
that is negative and among the k largest would count there, and does not here.

A cross-layer transcoder is a folder with `W_enc_N.safetensors` (W_enc [m, d], both biases, thresholds) and
`W_dec_N.safetensors` ([m, layers - N, d]) for each layer N, all layers of the model from 0 on, with ReLU or thresholds.
Source: circuit-tracer 4bb8c0e and b00048e (`transcoder/single_layer_transcoder.py`,
`transcoder/cross_layer_transcoder.py`, `utils/hf_utils.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from sae.cache.disk.durable import write_in
from sae.cache.disk.tensors import write_tensors
from sae.cache.points import point_of_hook
from sae.pipeline.saes.clt import CLT
from sae.pipeline.saes.inference import Formula, ThresholdRule, TopKRule

from . import files
from .base import Format, Metadata, register

CONFIG, WEIGHTS = "config.yaml", "layer_{}.safetensors"
Part = tuple[Formula, Metadata]


@register
class CircuitTracer(Format):
    """Folders of circuit-tracer: a transcoder for each layer, of several runs at once, or one of all. Written alone."""

    name = "circuit-tracer"

    def formula(self, path: Path) -> Part:
        raise ValueError("its folders are written, not read")

    def write(self, formula: Formula, metadata: Metadata, folder: Path) -> None:
        self.write_set([(formula, metadata)], folder)

    def write_set(self, parts: Sequence[Part], folder: Path) -> None:
        layers = _by_layer(parts)
        tensors = [_tensors(formula) for formula, _ in layers]
        data = yaml.safe_dump(_config(layers, folder.name), sort_keys=False, allow_unicode=True).encode()
        write_in(folder, CONFIG, data)
        for layer, its in enumerate(tensors):
            write_tensors(folder, WEIGHTS.format(layer), its)

    def write_layers(self, clt: CLT, folder: Path) -> None:
        formulas, metadata = clt.formulas(), clt.metadata
        widths = {*clt.widths_in, *clt.widths_out}
        if len(widths) > 1:
            raise ValueError(f"its layers are all as wide, and these are {', '.join(map(str, sorted(widths)))}")
        if (rule := formulas[0].rule).name not in ("relu", "threshold"):
            raise ValueError(
                f"it has no {rule.name} in cross-layer transcoders; train with train.sae.sparsity = batchtopk"
            )
        sides = (metadata.hook, *metadata.beside), (metadata.hook_out, *metadata.beside_out)
        reads, writes = (_every_layer(side, len(formulas)) for side in sides)
        if metadata.model is None:
            raise ValueError("the name of the language model is not known")
        config = {
            "model_name": metadata.model, "model_kind": "cross_layer_transcoder", "feature_input_hook": reads,
            "feature_output_hook": writes, "scan": folder.name,
        }  # fmt: skip
        write_in(folder, CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
        biases = clt.constant(1)[0].split([*clt.widths_out])
        for layer, (formula, bias) in enumerate(zip(formulas, biases, strict=True)):
            files.expect_unscaled(formula)
            own = {"W_enc": formula.W_enc.T, "b_enc": formula.b_enc, "b_dec": bias}
            if isinstance(formula.rule, ThresholdRule):
                own["threshold"] = formula.rule.threshold.clamp(min=0)
            write_tensors(folder, f"W_enc_{layer}.safetensors", {f"{name}_{layer}": one for name, one in own.items()})
            decoders = formula.W_dec.view(formula.d_sae, -1, clt.widths_out[layer])
            write_tensors(folder, f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": decoders})


def _every_layer(hooks: Sequence[str | None], layers: int) -> str:
    """A hook point without its layer, of hooks that are at it in every layer from 0 on."""
    points = [None if hook is None else point_of_hook(hook) for hook in hooks]
    if [None if point is None else point[0] for point in points] != [*range(layers)]:
        named = ", ".join(map(str, hooks))
        raise ValueError(f"it reads and writes every layer of the model from 0 on, and these are {named}")
    inside = {str(_inside(hook)) for hook in hooks}
    if len(inside) > 1:
        raise ValueError(
            f"it reads and writes one point in every layer, and these are several: {', '.join(sorted(inside))}"
        )
    return inside.pop()


def _by_layer(parts: Sequence[Part]) -> list[Part]:
    """The transcoders by their layer, which must be 0, 1, ... without a gap."""
    found: dict[int, Part] = {}
    for formula, metadata in parts:
        if not formula.transcoder:
            raise ValueError("it has transcoders alone, and one of these reconstructs what it reads")
        point = None if metadata.hook is None else point_of_hook(metadata.hook)
        if point is None:
            raise ValueError(f"{metadata.hook} is at no layer that is known")
        if point[0] in found:
            raise ValueError(f"there are two of layer {point[0]}; give one for each layer")
        found[point[0]] = formula, metadata
    if lacking := sorted(set(range(max(found) + 1)) - found.keys()):
        some = ", ".join(map(str, lacking[:8])) + (", ..." if lacking[8:] else "")
        raise ValueError(f"it needs one for every layer of the model from 0 on, and there is none of layer {some}")
    return [found[layer] for layer in sorted(found)]


def _config(layers: Sequence[Part], name: str) -> dict[str, Any]:
    """Return the settings that all layers share. ValueError where they differ in them."""
    formulas, said = zip(*layers, strict=True)
    alike: dict[str, set[Any]] = {
        "numbers of latents": {formula.d_sae for formula in formulas},
        "widths": {width for formula in formulas for width in (formula.d_in, formula.d_out)},
        "rules": {formula.rule.name for formula in formulas},
        "k": {formula.rule.k for formula in formulas if isinstance(formula.rule, TopKRule)} or {None},
        "skip connections": {formula.W_skip is not None for formula in formulas},
        "models": {metadata.model for metadata in said},
        "points that are read": {_inside(metadata.hook) for metadata in said},
        "points that are written": {_inside(metadata.hook_out) for metadata in said},
    }
    for what, values in alike.items():
        if len(values) > 1:
            raise ValueError(f"its transcoders are alike, and these have several {what}: {', '.join(map(str, values))}")
    if (rule := formulas[0].rule).name not in ("relu", "threshold", "topk"):
        raise ValueError(f"it has no {rule.name}")
    model, reads, writes = said[0].model, _inside(said[0].hook), _inside(said[0].hook_out)
    if model is None or writes is None:
        raise ValueError("the name of the language model, or the point that is written, is not known")
    return {
        "model_name": model, "model_kind": "transcoder_set", "feature_input_hook": reads, "feature_output_hook": writes,
        "scan": name, **({"activation": "topk", "k": rule.k} if isinstance(rule, TopKRule) else {}),
    }  # fmt: skip


def _inside(hook: str | None) -> str | None:
    """A hook point without its layer."""
    return None if hook is None else hook.split(".", 2)[-1]


def _tensors(formula: Formula) -> dict[str, Tensor]:
    files.expect_unscaled(formula)
    tensors = {"W_enc": formula.W_enc.T, "W_dec": formula.W_dec, "b_enc": formula.b_enc, "b_dec": formula.b_dec}
    if isinstance(formula.rule, ThresholdRule):
        tensors["activation_function.threshold"] = formula.rule.threshold.clamp(min=0)
    return tensors | ({} if formula.W_skip is None else {"W_skip": formula.W_skip.T})
