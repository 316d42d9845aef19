"""A finished run -> the figures that studies put side by side, computed once and kept in `eval/study.json`.

Reconstruction and sparsity come from the held-out rows: from `sae eval` where it has judged the run, else from a pass
over the rows that needs no language model. How the directions lie comes from the weights alone. Cross-entropies, and
how many of the true features were found where those are known, are those of `eval/eval.json`.
"""

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache import catalogue
from cache.activations import ActivationStore
from cache.errors import DamagedStore
from cache.parsing import figure, inner
from cache.runs import EVALUATION, LATENTS, Run
from pipeline import devices, trained
from pipeline.judging import EvalConfig, firing, judge_rows
from pipeline.metrics.geometry import encoder_decoder_cosine, mean_abs_cosine
from pipeline.progress import Progress
from pipeline.saes import SAE
from pipeline.saes.coherence import jl

STUDY = "eval/study.json"

Figures = dict[str, float | None]

JUDGED = ("ce_degradation", "ce_recovered_zero", "ce_recovered_mean", "true_to_learned", "recovered")

MEANING = {
    "rows": "held-out rows judged; where training left rows out by their norm, the figures are over the others of them",
    "fvu": "share of variance left unexplained, held-out rows",
    "mse": "squared error a feature in the data's units, held-out rows",
    "l0": "latents that fire in a row",
    "sparsity": "share of activations that are zero: 1 - L0 / latents",
    "dead_fraction": "latents that fired in no row looked at",
    "dense_share": "latents that fire in more than a tenth of the rows",
    "rate_q25": "firing rate that a quarter of the living latents stay below",
    "rate_median": "half of them",
    "rate_q75": "three quarters",
    "orthogonality": "mean |cosine| of two decoder rows",
    "jl": "Johnson-Lindenstrauss penalty of the decoder, coefficient 1",
    "encoder_decoder_cosine": "mean cosine of a latent's encoder and decoder rows",
    "train_loss": "total loss of the last logged step, in the run's own terms",
}


def of_run(
    run: Run, store: ActivationStore, root: Path, config: EvalConfig, progress: Progress, device: str
) -> Figures:
    """The figures of `MEANING`. Raises NotFound while training has not finished.

    What is kept serves where it has every figure and was judged on no fewer rows than are asked for.
    """
    held_out = catalogue.sibling_of(root, store, "validation")
    assert held_out is not None, "checked before training"
    kept = run.read_json(STUDY) if (run.path / STUDY).exists() else {}
    if MEANING.keys() - kept.keys() or kept["rows"] < config.rows_of(held_out):
        sae = trained.load(run).to(devices.device(device))
        kept = _of_rows(run, sae, store, held_out, config, progress) | _of_weights(sae)
        kept["train_loss"] = (run.metrics() or [{}])[-1].get("loss")
        run.write_json(STUDY, kept)
    try:
        return {name: figure(kept, name) for name in MEANING}
    except ValueError as error:
        raise DamagedStore(f"{run.path / STUDY}: {error}; remove it and repeat the study") from error


def judged(run: Run) -> Figures:
    """What `sae eval` alone can tell, by `JUDGED`, and on how many `tokens`; None where it does not apply."""
    found = on_kept_rows(run.evaluation() or {})
    clean, spliced = found.get("ce_clean"), found.get("ce_spliced")
    degradation = None if clean is None or spliced is None else spliced - clean
    return {**{name: found.get(name) for name in (*JUDGED, "tokens")}, "ce_degradation": degradation}


def on_kept_rows(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation over rows as the run was trained on, where it left some out."""
    return {**evaluation, **evaluation.get("kept", {})}


def _of_rows(
    run: Run, sae: SAE, store: ActivationStore, held_out: ActivationStore, config: EvalConfig, progress: Progress
) -> Figures:
    rows, largest = config.rows_of(held_out), trained.largest_norm(run, store)
    if (run.path / EVALUATION).exists() and (run.path / LATENTS).exists():
        judged = run.evaluation() or {}
        if judged["rows"] >= rows and (largest is None or "kept" in judged):
            found = on_kept_rows(judged)
            try:
                details = inner(found, "details")
                named = _named(
                    inner(details, "reconstruction"), inner(details, "sparsity"), found["dead_fraction"], _density(run)
                )
            except KeyError as error:
                raise DamagedStore(
                    f"{run.path / EVALUATION}: lacks {error}; run `sae eval {run.name}` again"
                ) from error
            except ValueError as error:
                raise DamagedStore(f"{run.path / EVALUATION}: {error}; run `sae eval {run.name}` again") from error
            return {**named, "rows": judged["rows"]}
    scores = judge_rows(sae, held_out, rows, config.batch_tokens, progress, largest)[-1]
    searched = firing(sae, store, min(config.dead_rows, store.n_rows), config.batch_tokens, progress, largest)[-1]
    dead = 1 - (scores.sparsity.fired | searched.fired).double().mean().item()
    reconstruction, sparsity = asdict(scores.reconstruction.result()), asdict(scores.sparsity.result())
    return {**_named(reconstruction, sparsity, dead, scores.sparsity.density()), "rows": rows}


def _density(run: Run) -> Tensor:
    try:
        found = run.load_latents() or {}
        return found.get("density_kept", found["density"]).double()
    except (DamagedStore, KeyError) as error:
        raise DamagedStore(f"{run.path / LATENTS}: is not what was written; run `sae eval {run.name}` again") from error


def _named(reconstruction: dict[str, Any], sparsity: dict[str, Any], dead: float, density: Tensor) -> Figures:
    living = density[density > 0].tolist()
    rates = statistics.quantiles(living, n=4, method="inclusive") if len(living) > 1 else [None, None, None]
    return {
        "fvu": reconstruction["fvu"],
        "mse": reconstruction["mse_per_feature"],
        "l0": sparsity["l0"],
        "sparsity": sparsity["zeros"],
        "dead_fraction": dead,
        "dense_share": sparsity["dense_share"],
        **dict(zip(("rate_q25", "rate_median", "rate_q75"), rates, strict=True)),
    }


@torch.no_grad()
def _of_weights(sae: SAE) -> Figures:
    cosines = encoder_decoder_cosine(sae.W_enc.T, sae.W_dec) if sae.d_in == sae.d_out else None
    return {
        "orthogonality": mean_abs_cosine(sae.W_dec),
        "jl": jl(sae.W_dec).item(),
        "encoder_decoder_cosine": None if cosines is None else cosines.mean().item(),
    }
