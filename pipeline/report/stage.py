"""Run folder + cache -> `eval/features.json` (of a toy's rows `eval/toy.json`) and `report.html`."""

from pathlib import Path

from sae.cache.disk.durable import expect_no_link, expect_writable
from sae.cache.errors import SaeError
from sae.cache.runs import FEATURES, Run
from sae.pipeline.formats import trained
from sae.pipeline.interpret.features import FeaturesConfig, records
from sae.pipeline.interpret.stage import statistics_of
from sae.pipeline.interpret.statistics import expect_latents
from sae.pipeline.report.page import write_report
from sae.pipeline.report.toys import TOY, DrawnToy
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
    config = config or FeaturesConfig()
    expect_latents(config.latents or (), trained.Described.of(run).d_sae)
    found = statistics_of(run, root, progress, config=config, activations=activations, device=device)
    run.write_json(FEATURES, records(found, dataset, config).model_dump(mode="json"))
    return write_report(run, run.path / REPORT)
