"""`sae explain`: latents in words, and how much the words foretell."""

from typing import Annotated

import typer

from sae.pipeline.commands.options import Here, Json, RunName, Said, TrainingStore, here_with, said_of

Estimate = Annotated[bool, typer.Option("--estimate", metavar="", help="Say what it would cost, and ask nothing.")]


def explain(
    *,
    run: Annotated[str | None, RunName] = None,
    said: Annotated[Said, said_of(
        "explain.backend", "explain.model", "explain.base_url", "explain.latents", "explain.count", "explain.scoring",
        "explain.rows", "explain.concurrency", "explain.price_in", "explain.price_out", "explain.most_tokens",
        "explain.most_cost",
    )],
    estimate: Estimate = False, activations: TrainingStore = None,
    here: Annotated[Here, here_with("device", "threads", "cache", "runs", "offline")], json: Json = False,
) -> None:  # fmt: skip
    """Say in words what latents fire on, and judge the words on text that they were not made from.

    Each score stands beside a control: what another latent's explanation scores on the same questions. Without a
    language model (`tokens`), the explanation is a table of tokens. A server's key is OPENAI_API_KEY. Answers of
    language models are kept in the run folder: nothing is asked twice, and what was interrupted goes on.

    Examples:

        sae explain l1-first
        sae explain l1-first --latents 3,17,256 --json
        sae explain --backend openai --model gpt-4.1-mini --price-in 0.4 --price-out 1.6 --most-cost 2
        sae explain --backend openai --base-url http://localhost:8000/v1 --model llama --scoring detection
        sae explain --backend local --model ~/models/smollm2 --count 8
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console

    found = catalogue.find_run(here.runs, run)
    with here.loading_torch():
        from sae.pipeline.explain.config import ExplainConfig
        from sae.pipeline.explain.stage import explain as stage
        from sae.pipeline.explain.stage import summary

    config = said.settings("explain", ExplainConfig)
    here.progress.note(f"run: {found.path}")
    explained = stage(found, here, config, activations=activations, estimate_only=estimate)
    if explained is None:
        if json:
            console.as_json({"run": str(found.path), "features": []})
        return
    if json:
        features = [one.model_dump(mode="json") for one in explained.features]
        console.as_json(
            {"run": str(found.path), "features": features, "summary": summary(explained), "made": explained.made}
        )
        return
    rows = [
        [one.feature, one.score, one.control, one.explanation or f"no explanation: {one.errors[0]}"]
        for one in explained.features
    ]
    console.table(
        f"explanations, judged by {config.scoring[0]}", ["latent", "score", "control", "explanation"], rows, prose=True
    )
    for name, figures in summary(explained).items():
        if isinstance(figures, dict):
            told = {
                key: console.short(figures[key]) for key in ("score", "score_sd", "control", "control_sd", "chance")
            }
            console.say(
                f"{name}: {told['score']} ± {told['score_sd']}, control {told['control']} ± {told['control_sd']}, "
                f"chance {told['chance']} ({figures['scores']} of {len(explained.features)} latents)"
            )
    if errors := [f"latent {one.feature}: {error}" for one in explained.features for error in one.errors]:
        console.note(f"{len(errors)} answers or latents could not be used, the first: {errors[0]}")
