"""Run folder -> `batch-N.json`, the pages of latents as Neuronpedia's converter reads them from SAEDashboard.

They are what the report shows: the latents that it looked up, how often and how strongly each fires, and the text it
fires on. What takes the language model or all latents at once is left empty: the tokens that a latent makes likelier,
and the latents and neurons that fire together. Source: SAEDashboard 0.8 (`neuronpedia/neuronpedia_dashboard.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sae.cache.disk.durable import write_in
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.provenance import LanguageModelRows, provenance
from sae.cache.runs import FEATURES, Run
from sae.pipeline.formats.trained import load_run
from sae.pipeline.interpret.examples import Example, Feature, Features

BATCH = 128  # latents in a file
NEURONS = 3  # shown of those that a latent writes to most

UNKNOWN: dict[str, list[Any]] = {
    name: []
    for name in (
        "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
        "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values",
        "pos_str", "pos_values", "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
    )
}  # fmt: skip
"""What it has words for and a run folder has not."""


def write(run: Run, folder: Path, model: str | None = None) -> list[Path]:
    """Write the latents that the report of a run shows into a new or empty folder; the files.

    `model`: its name there, where that is not the run's. Raises NotFound where the report has not looked, SaeError
    where the rows come from no language model or the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SaeError(f"{folder}: is there already; name a folder that is not there or is empty")
    if len(run.seen.inputs) > 1:
        raise SaeError(f"{run.name}: a page there is of one point, and its latents read {run.seen.key}")
    origin = provenance(run.seen.inputs[0].recipe)
    if not isinstance(origin, LanguageModelRows):
        raise SaeError(f"{run.name}: its pages show text, and the rows of {run.seen.key} come from none")
    directions = load_run(run).W_dec.detach()
    features = found_features(run)
    if features is None:
        raise NotFound(f"{run.path}: no latent has been looked up yet; run `report({run.name})` first")
    head = {
        "model_id": origin.model if model is None else model, "layer": origin.layer,
        "sae_set": f"{origin.site}-{run.name}", "sae_id_suffix": None,
    }  # fmt: skip
    text = origin.text
    asked = {
        "n_prompts_total": -(-features.rows // text.context_length), "n_tokens_in_prompt": text.context_length,
        "dataset": text.dataset or text.described,
    }  # fmt: skip
    chosen = sorted(features.features, key=lambda feature: feature.latent)
    files = []
    for number, start in enumerate(range(0, len(chosen), BATCH)):
        pages = [_page(one, features, directions[one.latent]) | asked for one in chosen[start : start + BATCH]]
        data = json.dumps({**head, "features": pages}, allow_nan=False).encode()
        files.append(write_in(folder, f"batch-{number}.json", data))
    return files


def found_features(run: Run) -> Features | None:
    """Read the latents that `report` chose; None where it has not looked."""
    if not (run.path / FEATURES).exists():
        return None
    try:
        return Features.model_validate(run.read_json(FEATURES))
    except ValidationError as error:
        raise DamagedStore(f"{run.path / FEATURES}: is not what was written; find the features again") from error


def _page(feature: Feature, features: Features, direction: Tensor) -> dict[str, Any]:
    """Return the page of a latent that writes a direction [d_out]."""
    size = direction.abs()
    most = size.topk(min(NEURONS, len(size))).indices
    bins = [bin for bin in feature.histogram if bin.count]
    bands = [(0.0, 1.0, feature.top), *((band.low, band.high, band.examples) for band in feature.bands)]
    return {
        "feature_index": feature.latent,
        "neuron_alignment_indices": most.tolist(),
        "neuron_alignment_values": _short(direction[most].tolist()),
        "neuron_alignment_l1": _short((size[most] / size.sum().clamp(min=torch.finfo(size.dtype).tiny)).tolist()),
        **UNKNOWN,
        "frac_nonzero": feature.density,
        "freq_hist_data_bar_values": [(bin.low + bin.high) / 2 for bin in bins],
        "freq_hist_data_bar_heights": [bin.count for bin in bins],
        "vector": _short(direction.tolist()),
        "activations": [_activation(one, features, *ends) for *ends, examples in bands for one in examples],
    }


def _activation(example: Example, features: Features, low: float, high: float) -> dict[str, Any]:
    """A place in the text: the tokens around it, and the latent's value on each."""
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": high - low,
        "tokens": [features.bytes_of(token).decode("utf-8", "replace") for token in example.tokens],
        "values": [0.0 if value is None else value for value in example.activations],
        "qualifying_token_index": example.peak,
    }


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
