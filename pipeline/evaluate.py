"""Run folder -> how good the dictionary is, on documents it was not trained on.

Reconstruction and sparsity come from the held-out rows of the cache. Cross-entropy comes from the language model, with
the site replaced by the dictionary's reconstruction, by zero, and by the mean of the training rows. Tokens that never
become rows (position 0, begin tokens) keep their own activations in every pass, and what they predict is not counted.

Latents are called dead when they fire in none of the held-out rows and none of the first `dead_rows` training rows.

Rows of no language model have no cross-entropy. Where the features are known that they were made of, the dictionary is
judged by how well it found those.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from cache import catalogue
from cache.activations import ActivationStore
from cache.durable import write_atomic
from cache.errors import NotFound, SaeError
from cache.loader import Loader
from cache.runs import EVALUATION, LATENTS, Run
from cache.tokens import TokenStore
from configs.base import Amount, Settings
from pipeline import devices, trained
from pipeline.language_model import LanguageModel, Point
from pipeline.metrics import (
    Downstream,
    DownstreamScores,
    Reconstruction,
    ReconstructionScores,
    Sparsity,
    SparsityScores,
)
from pipeline.metrics.agreement import RecoveryScores, recovery
from pipeline.progress import Progress
from pipeline.rows import RowRule
from pipeline.saes import SAE


class EvalConfig(Settings):
    """How much to judge on."""

    rows: Amount = Field("all", description="held-out rows for reconstruction and sparsity, or all")
    tokens: Amount = Field(65_536, description="held-out tokens for cross-entropy, or all")
    dead_rows: int = Field(262_144, ge=0, description="training rows that are searched, too, for latents that fire")
    mean_rows: int = Field(65_536, ge=1, description="training rows whose mean is the mean ablation")
    batch_tokens: int = Field(4096, ge=1, description="tokens in one forward pass, rows in one batch")


@dataclass(frozen=True)
class Evaluation:
    """What was found. `spliced` is of rows of a language model, `recovery` of rows whose features are known."""

    reconstruction: ReconstructionScores
    sparsity: SparsityScores
    spliced: DownstreamScores | None
    recovery: RecoveryScores | None
    dead_fraction: float
    dead_rows: int

    def as_json(self) -> dict[str, Any]:
        """The figures by name, and everything else under `details`. Undefined ones are null."""
        return {
            "fvu": self.reconstruction.fvu,
            "explained_variance": self.reconstruction.explained_variance,
            "l0": self.sparsity.l0,
            "dead_fraction": self.dead_fraction,
            **({} if self.recovery is None else asdict(self.recovery)),
            **({} if self.spliced is None else self._downstream(self.spliced)),
            "rows": self.reconstruction.rows,
            **({} if self.spliced is None else {"tokens": self.spliced.tokens}),
            "details": {
                "dead_rows": self.dead_rows,
                "reconstruction": asdict(self.reconstruction),
                "sparsity": asdict(self.sparsity),
                **({} if self.spliced is None else {"downstream": asdict(self.spliced)}),
            },
        }

    @staticmethod
    def _downstream(down: DownstreamScores) -> dict[str, Any]:
        assert down.ce_zero is not None and down.ce_mean is not None
        return {
            "ce_clean": down.ce_clean.value,
            "ce_spliced": down.ce.value,
            "ce_zero": down.ce_zero.value,
            "ce_mean": down.ce_mean.value,
            "ce_recovered_zero": None if down.recovered_zero is None else down.recovered_zero.value,
            "ce_recovered_mean": None if down.recovered_mean is None else down.recovered_mean.value,
            "kl": down.kl.value,
        }


def evaluate(
    config: EvalConfig, run: Run, root: Path, progress: Progress, *,
    activations: str | None = None, model: str | None = None, device: str = "auto", offline: bool = False,
    language_model: LanguageModel | None = None,
) -> Evaluation:  # fmt: skip
    """Judge a finished run and write `eval/eval.json` and `eval/latents.safetensors` into its folder.

    `model` says where the language model is, if not where the harvest found it; `language_model` is that model itself,
    where the caller has booted it already.
    """
    sae = trained.load(run)
    training = catalogue.find(
        root, ActivationStore, activations or run.config["activations"]["key"], "--activations", "sae harvest"
    )
    if training.d != sae.d_in:
        raise SaeError(
            f"--activations {training.key}: its rows have {training.d} values, {run.name} reads {sae.d_in}; "
            "give a store of the site it was trained on"
        )
    held_out = _held_out(root, training)
    text: tuple[TokenStore, LanguageModel] | None = None
    if "tokens" in training.recipe:
        text = _tokens(root, training, held_out), language_model or boot(training, model, device, offline)
    elif model is not None:
        raise SaeError(f"--model {model}: the rows of {training.key} come from no language model; leave it out")
    sae.to(devices.device(device) if text is None else text[1].device)
    reconstruction, sparsity = judge_rows(sae, held_out, config.rows, config.batch_tokens, progress)
    fired = sparsity.density() > 0
    if searched := min(config.dead_rows, training.n_rows):
        fired |= firing(sae, training, searched, config.batch_tokens, progress) > 0
    downstream = None
    if text is not None:
        mean = mean_row(training, min(config.mean_rows, training.n_rows))
        downstream = judge_tokens(sae, text[1], text[0], held_out, mean, config, progress)
    truth = training.truth
    result = Evaluation(
        reconstruction.result(), sparsity.result(), downstream,
        None if truth is None else recovery(sae.W_dec.cpu(), truth),
        dead_fraction=1 - fired.double().mean().item(), dead_rows=reconstruction.result().rows + searched,
    )  # fmt: skip
    run.write_json(EVALUATION, result.as_json())
    tensors = {"density": sparsity.density().float(), "fired": fired}
    write_atomic(run.path / LATENTS, safetensors.torch.save(tensors))
    return result


def _tokens(root: Path, training: ActivationStore, held_out: ActivationStore) -> TokenStore:
    """What cross-entropy is judged on."""
    tokens = catalogue.of_recipe(root, TokenStore, held_out.recipe["tokens"])
    if tokens is None:
        raise NotFound(f"{root}: the validation tokens of {training.key} are gone; run `sae tokenize` again")
    return tokens


def boot(store: ActivationStore, model: str | None, device: str, offline: bool) -> LanguageModel:
    """The language model a store was harvested from. Raises SaeError when what is found has other weights."""
    wanted = store.recipe["model"]
    name = model or store.hints.get("model", wanted["model"])
    found = LanguageModel.boot(name, device=device, dtype=wanted["dtype"], revision=wanted["revision"], offline=offline)
    differs = [key for key, value in found.recipe().items() if key != "model" and wanted[key] != value]
    if differs:
        raise SaeError(
            f"--model {name}: its {', '.join(differs)} differ from those {store.key} was harvested with; "
            "give that model, or harvest again"
        )
    return found


def _held_out(root: Path, training: ActivationStore) -> ActivationStore:
    found = catalogue.sibling_of(root, training, "validation")
    if found is None or not found.n_rows:
        remedy = "tokenize with a validation share, then harvest again"
        remedy = remedy if "tokens" in training.recipe else "repeat `sae synthesize`"
        raise NotFound(f"{training.key}: no held-out rows beside it; {remedy}")
    return found


def mean_row(store: ActivationStore, rows: int) -> Tensor:
    """float32 [d]: the mean of a store's first rows, one chunk in memory at a time."""
    total = torch.zeros(store.d, dtype=torch.float64)
    for start in range(0, rows, store.chunk_rows):
        total += store.rows(start, min(start + store.chunk_rows, rows)).sum(0, dtype=torch.float64)
    return (total / rows).float()


def judge_rows(
    sae: SAE, store: ActivationStore, rows: Amount, batch: int, progress: Progress
) -> tuple[Reconstruction, Sparsity]:
    """Reconstruction and sparsity over a store's rows."""
    reconstruction, sparsity = Reconstruction(), Sparsity(sae.d_sae)
    n = store.n_rows if rows == "all" else min(rows, store.n_rows)

    def judge(x: Tensor) -> None:
        latents = sae.encode(x)
        reconstruction.update(x, sae.decode(latents))
        _count(sparsity, latents)

    _each_batch(sae, store, n, batch, "eval rows", judge, progress)
    return reconstruction, sparsity


def firing(sae: SAE, store: ActivationStore, rows: int, batch: int, progress: Progress) -> Tensor:
    """float64 [d_sae]: share of a store's first rows in which each latent fires."""
    sparsity = Sparsity(sae.d_sae)
    _each_batch(sae, store, rows, batch, "eval dead latents", lambda x: _count(sparsity, sae.encode(x)), progress)
    return sparsity.density()


def _count(sparsity: Sparsity, latents: Any) -> None:
    if latents.entries is None:
        sparsity.update(latents.values)
    elif latents.values.dim() == 2:
        sparsity.update(latents.values, latents.indices)
    else:
        sparsity.update(latents.values, latents.indices, rows=latents.entries.rows, batch=latents.batch)


@torch.no_grad()
def _each_batch(
    sae: SAE,
    store: ActivationStore,
    rows: int,
    batch: int,
    title: str,
    call: Callable[[Tensor], None],
    progress: Progress,
) -> None:
    progress.start(title, rows, "rows")
    try:
        with Loader(store, batch, epochs=1, rows=rows, device=sae.W_dec.device) as loader:
            for x in loader:
                call(x)
                progress.advance(len(x))
    finally:
        progress.finish()


def judge_tokens(
    sae: Callable[[Tensor], Tensor], model: LanguageModel, tokens: TokenStore, store: ActivationStore, mean: Tensor,
    config: EvalConfig, progress: Progress,
) -> DownstreamScores:  # fmt: skip
    """Cross-entropy with the site of `store` replaced by `sae`'s reconstruction, by zero and by `mean` [d]."""
    point = Point(store.recipe["layer"], store.recipe["site"])
    rule = RowRule.model_validate(store.recipe["rows"])
    begin = int(tokens.recipe["tokenizer"]["begin"])
    length = tokens.context_length
    contexts = tokens.n_contexts
    if config.tokens != "all":
        contexts = min(contexts, -(-config.tokens // length))
    downstream = Downstream()
    step = max(1, config.batch_tokens // length)
    mean = mean.to(model.device)
    progress.start("eval cross-entropy", contexts * length, "tokens")
    try:
        for start in range(0, contexts, step):
            stop = min(start + step, contexts)
            ids, lengths = tokens.contexts(start, stop), tokens.lengths(start, stop)
            rows = rule.mask(ids, lengths, begin)
            mask = torch.from_numpy(rows).to(model.device)
            found = model.compare(
                torch.from_numpy(ids),
                point,
                {
                    "sae": _replacing(mask, sae),
                    "zero": _replacing(mask, torch.zeros_like),
                    "mean": _replacing(mask, lambda x: mean.to(x.dtype).expand_as(x)),
                },
            )
            counted = rows[:, :-1] & (np.arange(1, length) < lengths[:, None])
            downstream.update(found.clean, found.spliced, torch.from_numpy(counted))
            progress.advance((stop - start) * length)
    finally:
        progress.finish()
    try:
        return downstream.result()["sae"]
    except ValueError as error:
        raise SaeError(f"--tokens {config.tokens}: none of their predictions counts; judge on more") from error


def _replacing(mask: Tensor, new: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A replacement of activations [B, T, d] at the masked positions, row by row; the others stay as they are."""

    def replace(value: Tensor) -> Tensor:
        out = value.clone()
        out[mask] = new(value[mask].float()).to(value.dtype)
        return out

    return replace
