"""Run folder + cache -> `analysis/NAME.json` and `analysis/NAME.png` in the run folder, for each analysis."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from sae.cache.disk.durable import expect_no_link, expect_writable, make_folder
from sae.cache.errors import SaeError
from sae.cache.runs import Run
from sae.pipeline.analyses.analysis import Analysed, Analysis, AnalyzeConfig, Finding, analyses
from sae.pipeline.formats import trained
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.studies.plots import draw

FOLDER = "analysis"


@dataclass(frozen=True)
class Written:
    """A finding, what its figures are, and the files that have it."""

    finding: Finding
    meanings: dict[str, str]
    json: Path
    plot: Path


def analyze(
    run: Run, root: Path, progress: Progress, names: Sequence[str] = (), *,
    config: AnalyzeConfig | None = None, activations: str | None = None, device: str = "auto",
    model: str | None = None, offline: bool = False,
) -> dict[str, Written]:  # fmt: skip
    """Look at a finished run's dictionary from the sides that are named, and write what is found.

    Without names, from all that are not only done where they are asked for.
    """
    chosen = named(names)
    make_folder(run.path / FOLDER)
    for name in chosen:
        for ending in ("json", "png"):
            expect_no_link(run.path, file := f"{FOLDER}/{name}.{ending}")
            expect_writable(run.path / file)
    sae = trained.load_run(run)
    dataset = trained.dataset_of(run, root, activations)
    trained.expect_fits(dataset, sae, run)
    where = devices.resolve_device(device)
    training = trained.in_training(run)
    subject = Analysed(
        run, sae.to(where), None if training is None else training.to(where), dataset.held_out(root), dataset.truth,
        config or AnalyzeConfig(), progress, root, model, offline,
    )  # fmt: skip
    found = {}
    for name, kind in chosen.items():
        finding = kind().find(subject)
        path = run.write_json(f"{FOLDER}/{name}.json", finding.as_json())
        plot = path.with_suffix(".png")
        draw(finding.panels, plot)
        found[name] = Written(finding, kind.meanings, path, plot)
    return found


def named(names: Sequence[str]) -> dict[str, type[Analysis]]:
    """The analyses of these names, each once and in their order; without names the usual ones. SaeError for another."""
    known = analyses()
    usual = [name for name, kind in known.items() if not kind.asked_for]
    chosen = [name.replace("-", "_") for name in names] or usual
    for given, name in zip(names, chosen, strict=False):
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise SaeError(f"{given}: no such analysis; {hint}")
    return {name: known[name] for name in dict.fromkeys(chosen)}
