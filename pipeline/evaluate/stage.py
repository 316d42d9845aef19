"""Run folders -> how good their dictionaries are, on documents they were not trained on.

Reconstruction and sparsity come from the held-out rows of the cache. Cross-entropy comes from the language model, with
the site replaced by the dictionary's reconstruction, by zero, and by the mean of the training rows. Tokens that never
become rows (position 0, begin tokens) keep their own activations in every pass, and what they predict is not counted.

Several runs are judged together: rows are read once for all that are judged on them, the language model is run as it is
once, with zeros and the mean in place once a site, and with each dictionary's reconstruction. All of their weights are
in memory at once. A run that cannot be judged leaves the others as they are.

Latents are called dead when they fire in none of the held-out rows and none of the first `dead_rows` training rows.

Rows of no language model have no cross-entropy. Where the features are known that they were made of, the dictionary is
judged by how well it found those.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.durable import expect_no_link, expect_writable
from sae.cache.disk.identity import canonical
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.massive import FarRows, far_rows
from sae.cache.provenance import LanguageModelRows
from sae.cache.runs import EVALUATION, LATENTS, Run
from sae.cache.tokens import TokenStore
from sae.pipeline.evaluate.judging import EvalConfig, Evaluation, evaluation, judge_all, needs_of
from sae.pipeline.evaluate.subjects import Attempt, Judged, alive, grouped, same, together
from sae.pipeline.formats import trained
from sae.pipeline.language_model import LanguageModel, hints
from sae.pipeline.metrics.figures import WITHOUT_MODEL, amounts, completed, lacking
from sae.pipeline.metrics.metric import Subject
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import Progress, said_if_slow
from sae.pipeline.worlds.making import making_of

__all__ = ["EvalConfig", "Evaluation", "Outcome", "evaluate", "evaluate_all", "missing"]


class Outcome(NamedTuple):
    """What came of a run: its evaluation, or why there is none."""

    run: Run
    evaluation: Evaluation | None
    error: SaeError | OSError | None


@dataclass(frozen=True)
class Evaluating:
    """How runs are evaluated.

    activations: the store they were trained on, where that is not the one they name. model: where the language model
    is, if not where the harvest found it; `language_model` is that model itself, where the caller has booted it.
    cross_entropy: whether they are spliced into it at all. An evaluation that is there and was judged on more stays,
    unless `replace_larger`.
    """

    config: EvalConfig
    root: Path
    activations: str | None = None
    model: str | None = None
    device: str = "auto"
    offline: bool = False
    language_model: LanguageModel | None = None
    cross_entropy: bool = True
    replace_larger: bool = False


def evaluate(config: EvalConfig, run: Run, root: Path, progress: Progress, **options: Any) -> Evaluation:
    """Judge a finished run and write `eval/eval.json` and `eval/latents.safetensors` into its folder.

    `options` are those of `Evaluating`.
    """
    (found,) = evaluate_all(config, [run], root, progress, **options)
    if found.error is not None:
        raise found.error
    assert found.evaluation is not None
    return found.evaluation


def evaluate_all(
    config: EvalConfig, runs: Sequence[Run], root: Path, progress: Progress, **options: Any
) -> list[Outcome]:
    """Judge finished runs together, each as `evaluate` does by itself; one that cannot be judged says why."""
    how, told = Evaluating(config, root, **options), _Once(progress)
    if not how.cross_entropy and (how.model or how.language_model) is not None:
        name = how.language_model.name if how.language_model is not None else how.model
        raise SaeError(f"model = {name}: none is spliced into with `cross_entropy = False`; leave one of the two out")
    every = [_Subject(run) for run in runs]
    for one in every:
        with one.failing():
            one.open(how, told)
    groups = grouped(alive(every), lambda one: one.of_model)
    if how.language_model is not None and len({one.of_model for one in alive(every)} - {None}) > 1:
        raise SaeError(
            "model: these runs are of several language models; leave it out, or evaluate those of each apart"
        )
    for group in groups:
        with together(group):
            _judge(group, how, progress, told)
    return [Outcome(one.run, one.found, one.error) for one in every]


def expect_evaluated(outcomes: Sequence[Outcome]) -> None:
    """Raise the error of the only run; where several were to be judged, one that names those that could not be."""
    failed = [one for one in outcomes if one.error is not None]
    if not failed:
        return
    first = failed[0].error
    assert first is not None
    if len(outcomes) == 1:
        raise first
    kind = DamagedStore if any(isinstance(one.error, DamagedStore) for one in failed) else SaeError
    told = "; ".join(f"{one.run.name}: {one.error}" for one in failed)
    raise kind(f"{len(failed)} of {len(outcomes)} runs could not be judged: {told}")


class _Once:
    """Says a line that several runs give rise to once."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.said = progress, set[str]()

    def note(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            self.progress.note(line)


class _Subject(Attempt):
    """A run on its way to an evaluation. of_model: the recipe of the language model it is spliced into, if any."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.judged: Judged | None = None
        self.source: ActivationStore | None = None
        self.of_model: str | None = None
        self.found: Evaluation | None = None

    def open(self, how: Evaluating, told: _Once) -> None:
        """Load the dictionary, and find what it is judged on."""
        run, root = self.run, how.root
        for name in (EVALUATION, LATENTS):
            expect_no_link(run.path, name)
            expect_writable(run.path / name)
        sae = trained.load_any(run)
        training = trained.dataset_of(run, root, how.activations)
        trained.expect_fits(training, sae, run)
        if (
            run.settings.get("outliers") is None
        ):  # it was trained on all rows, but is judged without massive ones as well
            training = training.kept_up_to(training.limits_by("auto"))
        held_out = training.held_out(root)
        tokens: TokenStore | None = None
        if isinstance(training.provenance, LanguageModelRows):
            tokens = self._in_model(how, training, held_out, told)
        elif how.model is not None:
            raise SaeError(f"model = {how.model}: the rows of {training.key} come from no language model; leave it out")
        for line in _not_so_many(how.config, held_out, tokens if self.source is not None else None):
            told.note(line)
        making = making_of((held_out.targets or held_out.inputs)[0])
        subject = Subject(sae, training.truth)
        self.judged = Judged(subject=subject, training=training, held_out=held_out, making=making, tokens=tokens)

    def _in_model(self, how: Evaluating, training: Dataset, held_out: Dataset, told: _Once) -> TokenStore | None:
        """Find the tokens, and where it is spliced into a language model, the store that says which that is."""
        if how.cross_entropy and len(training.inputs) > 1 and not _of_one_model(training.stores):
            told.note(f"{training.key}: of two language models, so the dictionary is spliced into neither")
        elif how.cross_entropy:
            expect_one_model(training.stores)
            self.source = (training.targets or training.inputs)[0]
            self.of_model = canonical(self.source.recipe["model"])
            return _tokens(how.root, training, held_out)
        text = held_out.provenance.text
        return None if text is None else catalogue.of_recipe(how.root, TokenStore, text.recipe)


def _judge(group: Sequence[_Subject], how: Evaluating, progress: Progress, told: _Once) -> None:
    """Judge runs of one language model, or of none, and write what is found of each."""
    model = None
    if (source := group[0].source) is not None:
        with said_if_slow(progress, f"loading {source.recipe['model']['model']}"):
            model = how.language_model or hints.boot(source, how.model, how.device, how.offline)
    device = devices.resolve_device(how.device) if model is None else model.device
    judged = [one.judged for one in group if one.judged is not None]
    for each in judged:
        each.subject.sae.to(device)
    judge_all(judged, how.config, progress, model)
    far: dict[Hashable, dict[str, FarRows]] = {}
    for one, each in zip(group, judged, strict=True):
        one.error = each.error
        if one.error is None:
            with one.failing():
                one.found = evaluation(each)
                _write(one.run, one.found, each.held_out, how, told, far)


def _write(
    run: Run,
    result: Evaluation,
    held_out: Dataset,
    how: Evaluating,
    told: _Once,
    known: dict[Hashable, dict[str, FarRows]],
) -> None:
    """Write an evaluation into the run's folder, unless the one there was judged on more."""
    result.details["held_out"] = held_out.key
    if (key := same(held_out)) not in known:
        known[key] = _far_rows(held_out, how.config.rows_of(held_out))
    if far := known[key]:
        result.details["far_rows"] = {store: rows.as_json() for store, rows in far.items()}
    for store, rows in far.items():
        told.note(f"{store}: {rows}")
    found = result.as_json()
    if not how.replace_larger and (less := _less(run, found)):
        told.note(f"{run.path / EVALUATION}: stays, {less}; `replace` puts this one in its place")
        return
    run.write_json(EVALUATION, found)
    run.save_latents(result.tensors())


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
    there = tokens is not None
    lacks = lacking(found, needs_of(held_out, making, model=there, tokens=there, truth=training.truth is not None))
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
