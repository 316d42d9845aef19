"""Run folder + cache -> `eval/explanations.json`: what latents fire on in words, and how much that foretells."""

import statistics
from collections.abc import Sequence
from typing import Any

from sae.cache import catalogue
from sae.cache.disk.durable import expect_no_link, expect_writable
from sae.cache.errors import NotFound, SaeError
from sae.cache.runs import EXPLANATIONS, Run
from sae.cache.tokens import TokenStore
from sae.pipeline.explain.answers import expect_within
from sae.pipeline.explain.backend import Job, Surroundings, opened
from sae.pipeline.explain.config import ExplainConfig, Scoring
from sae.pipeline.explain.corpus import Corpus, Material
from sae.pipeline.explain.questions import CHANCE, Scored, questions, scored
from sae.pipeline.explain.work import Work
from sae.pipeline.formats import trained
from sae.pipeline.interpret.explanations import Explained, Explanations, Judged, explanations, joined
from sae.pipeline.interpret.statistics import expect_latents
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.workplace import Workplace

ANSWERS = "explain"  # folder of the run folder that keeps answers of language models


def explain(
    run: Run, place: Workplace, config: ExplainConfig | None = None, *, activations: str | None = None,
    estimate_only: bool = False,
) -> Explanations | None:  # fmt: skip
    """Explain latents of a finished run and judge the explanations, each beside another latent's on the same questions.

    Keeps them in the run folder beside those of other latents from before, and returns the new ones; None where only
    an estimate of the cost was asked for. Raises SaeError where no answer was of use and, before anything is asked,
    where the cost would go beyond a limit.
    """
    config = config or ExplainConfig()
    expect_no_link(run.path, EXPLANATIONS)
    expect_writable(run.path / EXPLANATIONS)
    backend = opened(config, Surroundings(run.path / ANSWERS, place.device, place.offline, place.progress))
    try:
        old = explanations(run)
        materials = _materials(run, place, config, activations)
        work = Work(backend, _jobs(materials, config), place.progress)
        estimate = backend.estimate(work.jobs)
        if estimate is not None:
            place.progress.note(f"estimate: {estimate.says(config)}")
            expect_within(config, estimate, "are estimated")
        if estimate_only:
            return None
        work.explain()
        work.judge()
        about = backend.about()
    finally:
        backend.close()
    asked = [one for one in materials if config.latents is None or one.latent in config.latents]
    asked.sort(key=lambda one: one.latent)
    found = [_explained(one, work, config, about["model"]) for one in asked]
    if not any(judged.score is not None for one in found for judged in one.scores):
        raise SaeError(
            f"backend = {config.backend}: no latent got a score, the first one since {found[0].errors[0]}; nothing is "
            "written"
        )
    made = {"settings": config.model_dump(mode="json"), **about, "errors": work.failed}
    new = Explanations(features=found, made=made)
    run.write_json(EXPLANATIONS, joined(new, old).model_dump(mode="json"))
    return new


def _materials(run: Run, place: Workplace, config: ExplainConfig, activations: str | None) -> list[Material]:
    """What the latents to explain are explained from and judged on, and where one is alone, those of a control.

    Raises SaeError where there is no text, or none on which latents fire.
    """
    dataset = trained.dataset_of(run, place.cache, activations)
    text = dataset.provenance.text
    if text is None:
        raise SaeError(f"{run.name}: explanations are of text, and the rows of {dataset.key} come from none")
    tokens = catalogue.of_recipe(place.cache, TokenStore, text.recipe)
    if tokens is None:
        raise NotFound(f"{place.cache}: the tokens {dataset.key} was harvested from are gone; run `tokenize()` again")
    device = devices.resolve_device(place.device)
    sae = trained.load_latents(run).to(device)
    trained.expect_fits(dataset, sae, run)
    expect_latents(config.latents or (), sae.d_sae)
    rows = dataset.n_rows if config.rows == "all" else min(config.rows, dataset.n_rows)
    corpus = Corpus(dataset, tokens, rows, window=config.window, seed=config.seed)

    def made(latents: Sequence[int]) -> list[Material]:
        sizes = config.examples, config.active, config.silent
        return corpus.materials(sae, latents, sizes, place.progress, device)

    named = made(config.latents) if config.latents else []
    if sum(one.lacks is None for one in named) > 1:
        return named
    drawn = [one for one in corpus.candidates(sae, place.progress, device) if one not in (config.latents or ())]
    wanted = 1 if named else config.count
    usable = [one for one in made(drawn[: 2 * wanted + 8]) if one.lacks is None]  # some fire in too few contexts
    if named:
        return named + usable[:1]
    if not usable:
        raise SaeError(
            f"rows = {rows:,}: no latent of {run.name} fires in enough contexts of different documents; search more, "
            "or name some by `latents`"
        )
    if len(usable) < wanted:
        place.progress.note(f"{len(usable)} latents fire in enough contexts, of {wanted} asked for")
    return usable[:wanted]


def _jobs(materials: Sequence[Material], config: ExplainConfig) -> list[Job]:
    """The work on the latents of which there is enough text, each with the next as its control.

    A latent that was not asked for is there to be a control, and has no questions.
    """
    usable = [one for one in materials if one.lacks is None]
    jobs = []
    for i, one in enumerate(usable):
        wanted: Sequence[Scoring] = config.scoring if config.latents is None or one.latent in config.latents else ()
        asked = [question for scoring in wanted for question in questions(scoring, one, config.seed)]
        control = usable[(i + 1) % len(usable)].latent if len(usable) > 1 else None
        jobs.append(Job(one.latent, one.examples, asked, control))
    return jobs


def _explained(material: Material, work: Work, config: ExplainConfig, model: str | None) -> Explained:
    """The record of one latent."""
    job = next((job for job in work.jobs if job.latent == material.latent), None)
    explanation = work.explained.get(material.latent)
    scores = [] if job is None or explanation is None else [_judged(job, one, work) for one in config.scoring]
    return Explained(
        feature=material.latent,
        explanation=None if explanation is None else explanation.text,
        score=scores[0].score if scores else None,
        control=scores[0].control if scores else None,
        scores=scores,
        control_feature=None if job is None else job.control,
        density=material.density,
        backend=config.backend,
        model=model,
        errors=work.errors.get(material.latent, []) if material.lacks is None else [material.lacks],
    )


def _judged(job: Job, scoring: Scoring, work: Work) -> Judged:
    """How a latent's explanation, and its control's, did on the questions of one scoring."""
    asked = [i for i, question in enumerate(job.questions) if question.scoring == scoring]

    def side(of: int | None) -> tuple[Scored, int]:
        there = [i for i in asked if (job.latent, i, of) in work.answers]
        return scored([job.questions[i] for i in there], [work.answers[job.latent, i, of] for i in there]), len(there)

    (own, answered), (control, control_answered) = side(job.latent), side(job.control)
    return Judged(
        scoring=scoring, score=own.score, control=control.score, chance=CHANCE[scoring],
        balanced_accuracy=own.balanced_accuracy, control_balanced_accuracy=control.balanced_accuracy,
        accuracy=own.accuracy, asked=len(asked), answered=answered, control_answered=control_answered,
    )  # fmt: skip


def summary(found: Explanations) -> dict[str, Any]:
    """Figures over explanations: for each scoring how many have a score, its mean and deviation, and the control's."""
    told: dict[str, Any] = {"features": len(found.features), "errors": sum(len(one.errors) for one in found.features)}
    for scoring, chance in CHANCE.items():
        each = [judged for one in found.features for judged in one.scores if judged.scoring == scoring]
        if each:
            spreads = _spread("score", [one.score for one in each]), _spread("control", [one.control for one in each])
            told[scoring] = {"chance": chance, **spreads[0], **spreads[1]}
    return told


def _spread(name: str, values: Sequence[float | None]) -> dict[str, Any]:
    there = [value for value in values if value is not None]
    mean, deviation = statistics.fmean(there) if there else None, statistics.stdev(there) if len(there) > 1 else None
    return {f"{name}s": len(there), name: mean, f"{name}_sd": deviation}
