"""Run folder -> how good the dictionary is, on documents it was not trained on.

Reconstruction and sparsity come from the held-out rows of the cache. Cross-entropy comes from the language model, with
the site replaced by the dictionary's reconstruction, by zero, and by the mean of the training rows. Tokens that never
become rows (position 0, begin tokens) keep their own activations in every pass, and what they predict is not counted.

Latents are called dead when they fire in none of the held-out rows and none of the first `dead_rows` training rows.

Rows of no language model have no cross-entropy. Where the features are known that they were made of, the dictionary is
judged by how well it found those.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cache import catalogue
from cache.activations import ActivationStore
from cache.durable import expect_no_link, expect_writable
from cache.errors import DamagedStore, NotFound, SaeError
from cache.runs import EVALUATION, LATENTS, Run
from cache.tokens import TokenStore
from pipeline import devices, hints, trained
from pipeline.judging import EvalConfig, firing, judge_rows, judge_tokens, mean_row
from pipeline.language_model import LanguageModel
from pipeline.metrics import DownstreamScores, ReconstructionScores, SparsityScores
from pipeline.metrics.agreement import RecoveryScores, recovery
from pipeline.progress import Progress, said_if_slow

__all__ = ["EvalConfig", "Evaluation", "boot", "evaluate", "missing"]


@dataclass(frozen=True)
class Evaluation:
    """What was found. `spliced` is of rows of a language model, `recovery` of rows whose features are known.

    kept: the same over the rows up to the norm above which training left rows out (`largest_norm`), where it did.
    """

    reconstruction: ReconstructionScores
    sparsity: SparsityScores
    spliced: DownstreamScores | None
    recovery: RecoveryScores | None
    dead_fraction: float
    dead_rows: int
    kept: "Evaluation | None" = None
    largest_norm: float | None = None
    held_out: str | None = None  # the store of the rows

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
            **({} if self.kept is None else {"kept": {"largest_norm": self.largest_norm, **self.kept.as_json()}}),
            "details": {
                "dead_rows": self.dead_rows,
                "reconstruction": asdict(self.reconstruction),
                "sparsity": asdict(self.sparsity),
                **({} if self.spliced is None else {"downstream": asdict(self.spliced)}),
                **({} if self.held_out is None else {"held_out": self.held_out}),
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
    language_model: LanguageModel | None = None, replace_larger: bool = False,
) -> Evaluation:  # fmt: skip
    """Judge a finished run and write `eval/eval.json` and `eval/latents.safetensors` into its folder.

    `model` says where the language model is, if not where the harvest found it; `language_model` is that model itself,
    where the caller has booted it already. An evaluation that is there and was judged on more stays, unless
    `replace_larger`.
    """
    for name in (EVALUATION, LATENTS):
        expect_no_link(run.path, name)
        expect_writable(run.path / name)
    sae = trained.load(run)
    training = catalogue.trained_on(root, run, activations)
    if training.d != sae.d_in:
        raise SaeError(
            f"--activations {training.key}: its rows have {training.d} values, {run.name} reads {sae.d_in}; "
            "give a store of the site it was trained on"
        )
    held_out = _held_out(root, training)
    text: tuple[TokenStore, LanguageModel] | None = None
    if "tokens" in training.recipe:
        tokens = _tokens(root, training, held_out)
        with said_if_slow(progress, f"loading {training.recipe['model']['model']}"):
            text = tokens, language_model or boot(training, model, device, offline)
    elif model is not None:
        raise SaeError(f"--model {model}: the rows of {training.key} come from no language model; leave it out")
    for line in _not_so_many(config, held_out, None if text is None else text[0]):
        progress.note(line)
    sae.to(devices.device(device) if text is None else text[1].device)
    largest = trained.largest_norm(run, training)
    limits = [None] if largest is None else [None, largest]
    judged = judge_rows(sae, held_out, config.rows_of(held_out), config.batch_tokens, progress, largest)
    searched = firing(sae, training, min(config.dead_rows, training.n_rows), config.batch_tokens, progress, largest)
    fired = [one.sparsity.fired | more.fired for one, more in zip(judged, searched, strict=True)]
    spliced: list[DownstreamScores | None] = [None for _ in limits]
    if text is not None:
        for i, limit in enumerate(limits):
            mean = mean_row(training, min(config.mean_rows, training.n_rows), limit)
            spliced[i] = judge_tokens(sae, text[1], text[0], held_out, mean, config, progress, limit)
    every, *kept = [
        Evaluation(
            one.reconstruction.result(), one.sparsity.result(), down, None,
            dead_fraction=1 - alive.double().mean().item(), dead_rows=one.sparsity.rows + more.rows,
        )
        for one, more, alive, down in zip(judged, searched, fired, spliced, strict=True)
    ]  # fmt: skip
    truth = training.truth
    result = replace(
        every, recovery=None if truth is None else recovery(sae.W_dec.cpu(), truth), kept=kept[0] if kept else None,
        largest_norm=largest, held_out=held_out.key,
    )  # fmt: skip
    found = result.as_json()
    if not replace_larger and (less := _less(run, found)):
        progress.note(f"{run.path / EVALUATION}: stays, {less}; --replace puts this one in its place")
        return result
    run.write_json(EVALUATION, found)
    tensors: dict[str, Tensor] = {}
    for name, one, alive in zip(("", "_kept"), judged, fired, strict=False):
        tensors |= {f"density{name}": one.sparsity.density().float(), f"fired{name}": alive}
    run.save_latents(tensors)
    return result


AMOUNTS = {"rows": "rows", "tokens": "predictions", "dead_rows": "rows searched for latents that fire"}


def amounts(evaluation: dict[str, Any]) -> dict[str, int | None]:
    """What an evaluation was judged on, by `AMOUNTS`; None where it does not apply."""
    found = {**evaluation, "dead_rows": (evaluation.get("details") or {}).get("dead_rows")}
    return {name: value if isinstance(value := found.get(name), int) else None for name in AMOUNTS}


def _less(run: Run, found: dict[str, Any]) -> str:
    """In what an evaluation is less than the one that is there already; empty where it is not."""
    try:
        before = run.evaluation() or {}
    except DamagedStore:
        return ""
    mine, its = amounts(found), amounts(before)
    less = [
        f"it is over {there:,} {unit}, this one over {here:,}"
        for name, unit in AMOUNTS.items()
        if (there := its[name]) is not None and there > (here := mine[name] or 0)
    ]
    key, other = found["details"]["held_out"], (before.get("details") or {}).get("held_out")
    if other is not None and other != key:
        less.append(f"it is of {other}, this one of {key}")
    return " and ".join(less)


def missing(
    run: Run, config: EvalConfig, store: ActivationStore, held_out: ActivationStore, root: Path
) -> EvalConfig | None:
    """What to evaluate a run on so that it was judged on no less than is asked for; None where it was.

    On no less than it was judged on before, either.
    """
    found = run.evaluation()
    if found is None:
        return config
    judged, wanted = amounts(found), config.rows_of(held_out)
    rows = judged["rows"] or 0
    more: dict[str, Any] = {"rows": max(rows, wanted)}
    more["dead_rows"] = max((judged["dead_rows"] or 0) - rows, config.dead_rows)
    enough = rows >= wanted and ("kept" in found or trained.largest_norm(run, store) is None)
    tokens = None
    if "tokens" in held_out.recipe:
        tokens = catalogue.of_recipe(root, TokenStore, held_out.recipe["tokens"])
    if tokens is not None:
        downstream = (found.get("details") or {}).get("downstream") or {}
        contexts, asked = int(downstream.get("contexts", 0)), config.contexts_of(tokens)
        more["tokens"] = max(contexts, asked) * tokens.context_length
        enough = enough and contexts >= asked
    return None if enough else config.model_copy(update=more)


def _not_so_many(config: EvalConfig, held_out: ActivationStore, tokens: TokenStore | None) -> Iterator[str]:
    """What to say where more was asked for than there is to judge on."""
    if config.rows != "all" and config.rows > held_out.n_rows:
        yield f"--rows {config.rows:,}: {held_out.key} has {held_out.n_rows:,}, all of which are judged"
    if "tokens" not in config.model_fields_set:
        return
    if tokens is None:
        yield f"--tokens {config.tokens}: the rows of {held_out.key} come from no language model, so none are judged"
    elif config.tokens != "all" and config.tokens > tokens.n_tokens:
        yield f"--tokens {config.tokens:,}: {tokens.key} has {tokens.n_tokens:,}, all of which are judged"


def _tokens(root: Path, training: ActivationStore, held_out: ActivationStore) -> TokenStore:
    """What cross-entropy is judged on."""
    tokens = catalogue.of_recipe(root, TokenStore, held_out.recipe["tokens"])
    if tokens is None:
        raise NotFound(f"{root}: the validation tokens of {training.key} are gone; run `sae tokenize` again")
    return tokens


def boot(store: ActivationStore, model: str | None, device: str, offline: bool) -> LanguageModel:
    """The language model a store was harvested from. Raises SaeError when what is found has other weights."""
    name = hints.model_of(store, model, offline)
    wanted = store.recipe["model"]
    found = LanguageModel.boot(name, device=device, dtype=wanted["dtype"], revision=wanted["revision"], offline=offline)
    differs = [key for key, value in found.recipe().items() if key != "model" and wanted[key] != value]
    if differs:
        raise hints.other_model(store, name, differs)
    return found


def _held_out(root: Path, training: ActivationStore) -> ActivationStore:
    found = catalogue.sibling_of(root, training, "validation")
    if found is None or not found.n_rows:
        remedy = "tokenize with a validation share, then harvest again"
        remedy = remedy if "tokens" in training.recipe else "repeat `sae synthesize`"
        raise NotFound(f"{training.key}: no held-out rows beside it; {remedy}")
    return found
