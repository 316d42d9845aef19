"""Run folders + cache -> `eval/features.json` (of a toy's rows `eval/toy.json`) and a page, `report.html`."""

from collections.abc import Sequence
from pathlib import Path

from sae.cache.disk.durable import expect_no_link, expect_writable
from sae.cache.errors import SaeError
from sae.cache.runs import FEATURES, STATISTICS, Run
from sae.pipeline.formats import trained
from sae.pipeline.interpret.features import FeaturesConfig, records
from sae.pipeline.interpret.stage import statistics_of
from sae.pipeline.interpret.statistics import expect_latents
from sae.pipeline.report.page import write_report
from sae.pipeline.report.toys import TOY, DrawnToy
from sae.pipeline.runtime.progress import Progress

REPORT = "report.html"


def report(
    runs: Run | Sequence[Run], root: Path, progress: Progress, *,
    config: FeaturesConfig | None = None, activations: str | None = None, device: str = "auto",
) -> Path:  # fmt: skip
    """Find what the latents of finished runs fire on, and write their report: in the folder of one, beside several.

    Needs no language model. Rows of a toy model have no text: the report shows the toy.
    """
    runs = [runs] if isinstance(runs, Run) else runs
    out = runs[0].path / REPORT if len(runs) == 1 else runs[0].path.parent / REPORT
    expect_no_link(out.parent)
    expect_writable(out)
    for run in runs:
        for name in (FEATURES, TOY, STATISTICS):
            expect_no_link(run.path, name)
            expect_writable(run.path / name)
    config = config or FeaturesConfig()
    for run in runs:
        _look_up(run, root, progress, config, activations, device)
    return write_report(runs, out, first=config.latents or ())


def _look_up(
    run: Run, root: Path, progress: Progress, config: FeaturesConfig, activations: str | None, device: str
) -> None:
    """Put what the report of a run needs into its folder."""
    dataset = trained.dataset_of(run, root, activations)
    toy = (dataset.targets or dataset.inputs)[0].toy
    if toy is not None:
        drawn = DrawnToy.of(toy[0], trained.load_run(run).W_dec.detach().cpu())
        run.write_json(TOY, drawn.model_dump(mode="json"))
        return
    if dataset.provenance.text is None:
        raise SaeError(
            f"{run.name}: a report shows text, and the rows of {dataset.key} come from none; see `evaluate()`"
        )
    expect_latents(config.latents or (), trained.Described.of(run).d_sae)
    found = statistics_of(run, root, progress, config=config, activations=activations, device=device)
    run.write_json(FEATURES, records(found, dataset, config).model_dump(mode="json"))
