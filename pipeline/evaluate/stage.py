"""Run folder -> how good the dictionary is, on documents it was not trained on.

Reconstruction and sparsity come from the held-out rows of the cache. Cross-entropy comes from the language model, with
the site replaced by the dictionary's reconstruction, by zero, and by the mean of the training rows. Tokens that never
become rows (position 0, begin tokens) keep their own activations in every pass, and what they predict is not counted.

Latents are called dead when they fire in none of the held-out rows and none of the first `dead_rows` training rows.

Rows of no language model have no cross-entropy. Where the features are known that they were made of, the dictionary is
judged by how well it found those.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.durable import expect_no_link, expect_writable
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.runs import EVALUATION, LATENTS, Run
from sae.cache.tokens import TokenStore
from sae.pipeline.evaluate.judging import EvalConfig, Evaluation, judge
from sae.pipeline.language_model import LanguageModel, hints
from sae.pipeline.metrics.figures import WITHOUT_MODEL, amounts, available, completed, lacking
from sae.pipeline.metrics.metric import Subject
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import Progress, said_if_slow
from sae.pipeline.train import trained

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
            text = tokens, language_model or hints.boot(training, model, device, offline)
    elif model is not None:
        raise SaeError(f"--model {model}: the rows of {training.key} come from no language model; leave it out")
    for line in _not_so_many(config, held_out, None if text is None else text[0]):
        progress.note(line)
    sae.to(devices.device(device) if text is None else text[1].device)
    largest = trained.largest_norm(run, training)
    subject = Subject(sae, training.truth)
    result = judge(subject, training, held_out, config, progress, largest=largest, text=text)
    result.details["held_out"] = held_out.key
    found = result.as_json()
    if not replace_larger and (less := _less(run, found)):
        progress.note(f"{run.path / EVALUATION}: stays, {less}; --replace puts this one in its place")
        return result
    run.write_json(EVALUATION, found)
    run.save_latents(result.tensors())
    return result


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


def missing(
    run: Run, config: EvalConfig, store: ActivationStore, held_out: ActivationStore, root: Path
) -> EvalConfig | None:
    """What to evaluate a run on so that it was judged on no less than is asked for; None where it was.

    On no less than it was judged on before, either.
    """
    found = run.evaluation()
    if found is None:
        return config
    found = completed(found)
    rows, wanted = _amount(found, "rows"), config.rows_of(held_out)
    more: dict[str, Any] = {"rows": max(rows, wanted)}
    more["dead_rows"] = max(_amount(found, "dead_rows") - rows, config.dead_rows)
    enough = rows >= wanted and ("kept" in found or trained.largest_norm(run, store) is None)
    tokens = None
    if "tokens" in held_out.recipe:
        tokens = catalogue.of_recipe(root, TokenStore, held_out.recipe["tokens"])
    if tokens is not None:
        downstream = (found.get("details") or {}).get("downstream") or {}
        contexts, asked = int(downstream.get("contexts", 0)), config.contexts_of(tokens)
        more["tokens"] = max(contexts, asked) * tokens.context_length
        enough = enough and contexts >= asked
    # what an older version did not write is judged anew; of rows and weights alone it takes no evaluation to tell
    lacks = lacking(found, available(model=tokens is not None, truth=store.truth is not None))
    return None if enough and not {*lacks} - {*lacking(found, WITHOUT_MODEL)} else config.model_copy(update=more)


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


def _held_out(root: Path, training: ActivationStore) -> ActivationStore:
    found = catalogue.sibling_of(root, training, "validation")
    if found is None or not found.n_rows:
        remedy = "tokenize with a validation share, then harvest again"
        remedy = remedy if "tokens" in training.recipe else "repeat `sae synthesize`"
        raise NotFound(f"{training.key}: no held-out rows beside it; {remedy}")
    return found
