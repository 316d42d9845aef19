"""Run folder -> how good the dictionary is, on documents it was not trained on.

Reconstruction and sparsity come from the held-out rows of the cache. Cross-entropy comes from the language model, with
the site replaced by the dictionary's reconstruction, by zero, and by the mean of the training rows. Tokens that never
become rows (position 0, begin tokens) keep their own activations in every pass, and what they predict is not counted.

Latents are called dead when they fire in none of the held-out rows and none of the first `dead_rows` training rows.

Rows of no language model have no cross-entropy. Where the features are known that they were made of, the dictionary is
judged by how well it found those.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.durable import expect_no_link, expect_writable
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.massive import FarRows, far_rows
from sae.cache.provenance import LanguageModelRows
from sae.cache.runs import EVALUATION, LATENTS, Run
from sae.cache.tokens import TokenStore
from sae.pipeline.evaluate.judging import EvalConfig, Evaluation, judge, needs_of
from sae.pipeline.formats import trained
from sae.pipeline.language_model import LanguageModel, hints
from sae.pipeline.metrics.figures import WITHOUT_MODEL, amounts, completed, lacking
from sae.pipeline.metrics.metric import Subject
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import Progress, said_if_slow
from sae.pipeline.worlds.making import making_of

__all__ = ["EvalConfig", "Evaluation", "evaluate", "missing"]


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
    sae = trained.load_any(run)
    training = trained.dataset_of(run, root, activations)
    trained.expect_fits(training, sae, run)
    if run.settings.get("outliers") is None:  # it was trained on all rows, but is judged without massive ones as well
        training = training.kept_up_to(training.limits_by("auto"))
    held_out = training.held_out(root)
    source, target = training.provenance, (training.targets or training.inputs)[0]
    text: tuple[TokenStore, LanguageModel] | None = None
    if isinstance(source, LanguageModelRows):
        if len(training.inputs) > 1 and not _of_one_model(training.stores):
            progress.note(f"{training.key}: of two language models, so the dictionary is spliced into neither")
        else:
            expect_one_model(training.stores)
            tokens = _tokens(root, training, held_out)
            with said_if_slow(progress, f"loading {source.model}"):
                text = tokens, language_model or hints.boot(target, model, device, offline)
    elif model is not None:
        raise SaeError(f"model = {model}: the rows of {training.key} come from no language model; leave it out")
    for line in _not_so_many(config, held_out, None if text is None else text[0]):
        progress.note(line)
    sae.to(devices.resolve_device(device) if text is None else text[1].device)
    making = making_of((held_out.targets or held_out.inputs)[0])
    result = judge(Subject(sae, training.truth), training, held_out, config, progress, text=text, making=making)
    result.details["held_out"] = held_out.key
    if far := _far_rows(held_out, config.rows_of(held_out)):
        result.details["far_rows"] = {key: rows.as_json() for key, rows in far.items()}
    for key, rows in far.items():
        progress.note(f"{key}: {rows}")
    found = result.as_json()
    if not replace_larger and (less := _less(run, found)):
        progress.note(f"{run.path / EVALUATION}: stays, {less}; `replace` puts this one in its place")
        return result
    run.write_json(EVALUATION, found)
    run.save_latents(result.tensors())
    return result


def _far_rows(held_out: Dataset, rows: int) -> dict[str, FarRows]:
    """By store, the held-out rows above its largest norm."""
    limited = zip(held_out.stores, held_out.limits or (), strict=held_out.limits is not None)
    found = {store.key: far_rows(store, most, rows) for store, most in limited if most is not None}
    return {key: one for key, one in found.items() if one is not None}


def _less(run: Run, found: dict[str, Any]) -> str:
    """In what an evaluation is less than the one that is there already; empty where it is not."""
    try:
        before = completed(run.evaluation() or {})
    except DamagedStore:
        return ""
    less = [
        f"it is over {there:,} {amount.title}, this one over {here:,}"
        for amount in amounts()
        if (there := _amount(before, amount.key)) > (here := _amount(found, amount.key))
    ]
    key, other = found["details"]["held_out"], (before.get("details") or {}).get("held_out")
    if other is not None and other != key:
        less.append(f"it is of {other}, this one of {key}")
    return " and ".join(less)


def _amount(evaluation: dict[str, Any], key: str) -> int:
    return value if isinstance(value := evaluation.get(key), int) else 0


def missing(run: Run, config: EvalConfig, training: Dataset, held_out: Dataset, root: Path) -> EvalConfig | None:
    """Return what to evaluate a run on so that it was judged on no less than is asked for; None where it was.

    On no less than it was judged on before, either.
    """
    found = run.evaluation()
    if found is None:
        return config
    found = completed(found)
    rows, wanted = _amount(found, "rows"), config.rows_of(held_out)
    more: dict[str, Any] = {"rows": max(rows, wanted)}
    more["dead_rows"] = max(_amount(found, "dead_rows") - rows, config.dead_rows)
    enough = rows >= wanted and ("kept" in found or training.limits is None)
    tokens = None
    if held_out.provenance.text is not None:
        tokens = catalogue.of_recipe(root, TokenStore, held_out.provenance.text.recipe)
    if tokens is not None:
        downstream = (found.get("details") or {}).get("downstream") or {}
        contexts, asked = int(downstream.get("contexts", 0)), config.contexts_of(tokens)
        more["tokens"] = max(contexts, asked) * tokens.context_length
        enough = enough and contexts >= asked
    # what an older version did not write is judged anew; of rows and weights alone it takes no evaluation to tell
    making = making_of((held_out.targets or held_out.inputs)[0])
    lacks = lacking(found, needs_of(held_out, making, model=tokens is not None, truth=training.truth is not None))
    return None if enough and not {*lacks} - {*lacking(found, WITHOUT_MODEL)} else config.model_copy(update=more)


def expect_one_model(stores: Sequence[ActivationStore]) -> None:
    """Raise SaeError where aligned stores are of different language models: there is none to splice into."""
    first = stores[0]
    for other in stores[1:]:
        if not _of_one_model([first, other]):
            raise SaeError(
                f"{other.key}: is of another language model than {first.key}, so there is none to splice into; "
                "harvest both sites with one model"
            )


def _of_one_model(stores: Sequence[ActivationStore]) -> bool:
    return all(store.recipe.get("model") == stores[0].recipe.get("model") for store in stores)


def _not_so_many(config: EvalConfig, held_out: Dataset, tokens: TokenStore | None) -> Iterator[str]:
    """Yield a line wherever more was asked for than there is to judge on."""
    if config.rows != "all" and config.rows > held_out.n_rows:
        yield f"rows = {config.rows:,}: {held_out.key} has {held_out.n_rows:,}, all of which are judged"
    if "tokens" not in config.model_fields_set:
        return
    if tokens is None:
        yield f"tokens = {config.tokens}: the rows of {held_out.key} come from no language model, so none are judged"
    elif config.tokens != "all" and config.tokens > tokens.n_tokens:
        yield f"tokens = {config.tokens:,}: {tokens.key} has {tokens.n_tokens:,}, all of which are judged"


def _tokens(root: Path, training: Dataset, held_out: Dataset) -> TokenStore:
    """Return the tokens that cross-entropy is judged on."""
    text = held_out.provenance.text
    tokens = None if text is None else catalogue.of_recipe(root, TokenStore, text.recipe)
    if tokens is None:
        raise NotFound(f"{root}: the validation tokens of {training.key} are gone; run `tokenize()` again")
    return tokens
