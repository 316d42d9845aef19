"""`sae eval`: run folders to figures on held-out data."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae.cache.errors import DamagedStore, SaeError
from sae.pipeline.commands.options import (
    Here,
    Json,
    ModelNow,
    NoCe,
    Said,
    TrainingStore,
    complete_run,
    here_with,
    said_of,
)

if TYPE_CHECKING:
    from sae.pipeline.evaluate.stage import Outcome


def evaluate(
    *,
    names: Annotated[list[str] | None, typer.Argument(metavar="RUN", autocompletion=complete_run, show_default=False, help="Run folders or their names. Default: the newest finished run.")] = None,
    said: Annotated[Said, said_of("eval.rows", "eval.tokens")],
    activations: TrainingStore = None,
    model: ModelNow = None,
    no_ce: NoCe = False,
    replace: Annotated[bool, typer.Option("--replace", metavar="", help="Write the figures in the place of ones that were judged on more.")] = False,
    here: Annotated[Here, here_with("device", "threads", "cache", "runs", "offline")], json: Json = False,
) -> None:  # fmt: skip
    """Judge trained dictionaries on held-out documents: reconstruction, cross-entropy when spliced in, dead latents.

    Prints the figures with what each means, and writes them into the run folder (`eval/eval.json`), unless the ones
    there were judged on more. On rows of `sae synthesize`, which no language model made, it says instead how many of
    the true features were found.

    Several runs, of one layer or of many, share the passes over rows and of the language model; all of their weights are
    in memory at once. One that cannot be judged is named at the end, and the others are judged.

    Examples:

        sae eval
        sae eval l1-first --tokens 500k --json
        sae eval topk-k16 topk-k32 topk-k64
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console
    from sae.pipeline.commands.shown import raise_last

    if no_ce and "tokens" in said.of("eval"):
        raise SaeError(
            f"--tokens {said.of('eval')['tokens']}: no tokens are judged with --no-ce; leave one of the two out"
        )
    found = {run.path.resolve(): run for run in (catalogue.find_run(here.runs, name) for name in (names or (None,)))}
    with here.loading_torch():
        from sae.pipeline.evaluate.stage import EvalConfig, evaluate_all, expect_evaluated

    values = said.settings("eval", EvalConfig)
    for run in found.values():
        here.progress.note(f"run: {run.path}")
    outcomes = evaluate_all(
        values, [*found.values()], here.cache, here.progress, activations=activations, model=model, device=here.device,
        offline=here.offline, cross_entropy=not no_ce, replace_larger=replace,
    )  # fmt: skip
    if len(outcomes) == 1:
        expect_evaluated(outcomes)
        (result,) = judged_figures(outcomes)
        if json:
            console.as_json(result)
        else:
            console.evaluation(result, f"run {outcomes[0].run.path}")
        return
    show(outcomes, json)
    raise_last([as_error(one) for one in outcomes if one.error is not None])


def judged_figures(outcomes: "list[Outcome]") -> list[dict[str, Any]]:
    """What was found of the runs that could be judged."""
    return [one.evaluation.as_json() for one in outcomes if one.evaluation is not None]


def show(outcomes: "list[Outcome]", json: bool) -> None:
    """Show several evaluations, a row each, or all of them as JSON."""
    from sae.pipeline.commands import console
    from sae.pipeline.commands.voice import typed
    from sae.pipeline.metrics.figures import evaluation_table

    fine = [one.run for one in outcomes if one.evaluation is not None]
    rows = [{"run": run.name, **figures} for run, figures in zip(fine, judged_figures(outcomes), strict=True)]
    if json:
        failed = [
            {"run": one.run.name, "path": str(one.run.path), "error": typed(str(one.error))}
            for one in outcomes
            if one.error is not None
        ]
        told = [{"run": run.name, "path": str(run.path), **row} for run, row in zip(fine, rows, strict=True)]
        console.as_json({"runs": told, "failed": failed})
    elif rows:
        keys = [one.key for one in evaluation_table() if any(row.get(one.key) is not None for row in rows)]
        console.table(
            f"{len(rows)} runs", ["run", *keys], [[row["run"], *(row.get(key) for key in keys)] for row in rows]
        )


def as_error(one: "Outcome") -> SaeError:
    """The error of a run, with its name."""
    from sae.pipeline.commands.voice import typed

    kind = DamagedStore if isinstance(one.error, DamagedStore) else SaeError
    return kind(f"{one.run.name}: {typed(str(one.error))}")
