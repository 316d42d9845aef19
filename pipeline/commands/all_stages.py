"""The four stages and the report, one after the other, on a preset: what `sae demo` does.

A composition, not a stage: between the steps everything goes through the cache and the run folder, as it would when the
commands are typed one by one.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from sae import configs
from sae.cache import catalogue
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.run_folder import CONFIG, discarding
from sae.pipeline.evaluate.stage import EvalConfig, evaluate
from sae.pipeline.harvest.sources.language_model import HarvestConfig, LanguageModelSource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.interpret.features import FeaturesConfig
from sae.pipeline.report.stage import report
from sae.pipeline.runtime.workplace import Workplace
from sae.pipeline.tokenize.stage import TokenizeConfig, tokenize
from sae.pipeline.train.stage import TrainConfig, open_run, train

PRESET = "tiny"
Result = TypeVar("Result")


def all_stages(place: Workplace, *, overrides: list[str], workers: int, name: str = "demo") -> dict[str, Any]:
    """Run everything on the embedded preset; the evaluation, the seconds each stage took, and the report's path.

    Repeating it takes up what is there: tokens, rows and training steps are not made again; judging and the report are.
    """
    seconds: dict[str, float] = {}

    def timed(stage: str, call: Callable[[], Result]) -> Result:
        begun = time.perf_counter()
        result = call()
        seconds[stage] = round(time.perf_counter() - begun, 2)
        return result

    def settings(section: str, kind: type[configs.Kind]) -> configs.Kind:
        return configs.resolve(section, kind, preset=PRESET, overrides=overrides)

    root, runs, progress, device = place.cache, place.runs, place.progress, place.device
    # all of them first: what is wrong with the last should not wait for the others
    tokenizing, harvesting = settings("tokenize", TokenizeConfig), settings("harvest", HarvestConfig)
    training, judging = settings("train", TrainConfig), settings("eval", EvalConfig)
    showing = settings("report", FeaturesConfig)
    tokens = timed("tokenize", lambda: tokenize(tokenizing, root, progress, workers=workers))
    stores = list(tokens.stores.values())
    over = LanguageModelSource.over
    rows = timed("harvest", lambda: harvest(over(harvesting, stores, progress, device=device), root, progress))
    activations = rows.stores["train"][0]
    catalogue.remember(root, "tokens", [tokens.stores["train"].key])
    catalogue.remember(root, "activations", [activations.key])
    dataset = Dataset.of(activations)
    started = (runs / name / CONFIG).exists()
    try:
        run = open_run(training, dataset, runs, name, resume=started)
    except SaeError as error:
        if not started:
            raise
        raise SaeError(f"{runs / name}: is of other settings; remove it, or name another folder with --runs") from error
    with discarding([run]):
        timed("train", lambda: train([run], dataset, progress, device=device))
    found = timed("eval", lambda: evaluate(judging, run, root, progress, device=device))
    path = timed("report", lambda: report(run, root, progress, config=showing, device=device))
    return {**found.as_json(), "seconds": seconds, "run": str(run.path), "report": str(path)}
