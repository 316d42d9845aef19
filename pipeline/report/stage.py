"""Run folder + cache -> `eval/features.json` (of a toy's rows `eval/toy.json`) and `report.html`."""

from pathlib import Path

from sae.cache import catalogue
from sae.cache.disk.durable import expect_no_link, expect_writable
from sae.cache.errors import NotFound, SaeError
from sae.cache.runs import FEATURES, Run
from sae.cache.tokens import TokenStore
from sae.pipeline.formats import trained
from sae.pipeline.interpret.features import FeaturesConfig, find_features
from sae.pipeline.report.page import write_report
from sae.pipeline.report.toys import TOY, DrawnToy
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import Progress

REPORT = "report.html"


def report(
    run: Run, root: Path, progress: Progress, *,
    config: FeaturesConfig | None = None, activations: str | None = None, device: str = "auto",
) -> Path:  # fmt: skip
    """Find what a finished run's latents fire on and write its report. Needs no language model.

    Rows of a toy model have no text: the report shows the toy.
    """
    for name in (FEATURES, TOY, REPORT):
        expect_no_link(run.path, name)
        expect_writable(run.path / name)
    where = devices.resolve_device(device)
    dataset = trained.dataset_of(run, root, activations)
    text = dataset.provenance.text
    toy = (dataset.targets or dataset.inputs)[0].toy
    if toy is not None:
        drawn = DrawnToy.of(toy[0], trained.load_run(run).W_dec.detach().cpu())
        run.write_json(TOY, drawn.model_dump(mode="json"))
        return write_report(run, run.path / REPORT)
    if text is None:
        raise SaeError(
            f"{run.name}: a report shows text, and the rows of {dataset.key} come from none; see `evaluate()`"
        )
    tokens = catalogue.of_recipe(root, TokenStore, text.recipe)
    if tokens is None:
        raise NotFound(f"{root}: the tokens {dataset.key} was harvested from are gone; run `tokenize()` again")
    sae = trained.load_latents(run).to(where)
    trained.expect_fits(dataset, sae, run)
    features = find_features(sae, dataset, tokens, config or FeaturesConfig(), progress, device=where)
    run.write_json(FEATURES, features.model_dump(mode="json"))
    return write_report(run, run.path / REPORT)
