"""The parts that the studies' commands share: settings, the place of work, the showing of results."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.cache.disk.durable import expect_writable
from sae.cache.errors import SaeError
from sae.pipeline.commands.options import Here, Said, folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae.cache.loader.dataset import Dataset
    from sae.pipeline.studies.lab import Lab
    from sae.pipeline.studies.study import Study
    from sae.pipeline.studies.tables import Result
    from sae.pipeline.train.stage import TrainConfig


def settings_of_study(name: str, said: Said) -> "Study":
    """The study of a name, with its settings. Raises SaeError for one of another study, which would come to nothing."""
    from sae.pipeline.studies.study import settings

    for item in said.overrides:
        section, _, key = item.partition("=")[0].partition(".")
        if section.strip() == "study" and (other := key.partition(".")[0].strip()) != name:
            raise SaeError(f"--set {item}: `sae study {name}` reads study.{name}.*, not study.{other}")
    found: Study = getattr(said.resolved("study", settings()), name)
    return found


def training(study: "Study", said: Said) -> "tuple[TrainConfig, dict[str, Any]]":
    """The training that all dictionaries of a study have in common; and what options say of them, where it chooses them.

    Raises SaeError for a `--set` that would come to nothing.
    """
    from sae.configs import SECTIONS, settings_of
    from sae.pipeline.saes import Config
    from sae.pipeline.train.stage import TrainConfig

    for item in said.overrides:
        if (section := item.partition(".")[0]) in SECTIONS and section not in ("train", "eval", "study"):
            raise SaeError(
                f"--set {item}: `sae study` reads train.* and eval.*, and study.{study.name}.*; give this one to "
                f"`sae {section}`"
            )
    of = study.architectures
    flags = said.of("train")
    sae = flags.pop("sae", {}) if of else {}
    base = said.resolved("train", TrainConfig, flags=flags)
    for item in said.overrides:
        for key in settings_of(item, "train"):
            if study.sets(key):
                raise SaeError(f"--set {item}: this study decides {key} itself; its options say how")
            stage, _, name = key.partition(".")
            shared = {*Config.model_fields, *(["k"] if "topk" in of else [])} - {"arch"}
            if of and stage == "sae" and name not in shared and base.sae.arch not in of:
                raise SaeError(
                    f"--set {item}: this study trains {', '.join(of)}; say of which, as train.sae.arch={of[0]}"
                )
    return base, sae


def lab(here: Here, said: Said, *, cross_entropy: bool) -> "Lab":
    """Return the lab of a study."""
    from sae.pipeline.evaluate.stage import EvalConfig
    from sae.pipeline.runtime import devices
    from sae.pipeline.studies.lab import Lab

    devices.resolve_device(here.device)
    eval_config = said.resolved("eval", EvalConfig)
    devices.take_threads(here.threads, here.progress.note)
    return Lab(here, eval_config, cross_entropy)


def dataset_of(where: "Lab", name: str | None, *, any_of_the_last: bool) -> "Dataset":
    """The rows to train on, said on stderr. any_of_the_last: several that one harvest made are as good as one."""
    from sae.cache import catalogue
    from sae.cache.activations import ActivationStore
    from sae.cache.loader.dataset import Dataset

    if name is None and any_of_the_last:
        name = next(iter(catalogue.latest(where.place.cache).get(ActivationStore.kind, [])), None)
    store = catalogue.find(where.place.cache, ActivationStore, name)
    where.place.progress.note(f"activations: {store.key}{catalogue.unfinished(store)}")
    return Dataset.of(store)


def results_folder(out: Path | None, study: str) -> Path:
    """Return the folder of the results. Raises SaeError for a file, where they would replace what is no study's, and
    where nothing can be written.
    """
    from sae.pipeline.studies.tables import expect_results

    chosen = folder("--out", out or Path("studies") / study)
    expect_results(chosen)
    expect_writable(chosen / "results.json")
    return chosen


def tell(result: "Result", out: Path, json: bool, show: "Callable[[], None]") -> None:
    """Write what was found and tell it: its notes, what `show` prints and its files, or all of it as JSON."""
    from sae.pipeline.commands import console

    files = result.write(out)
    for note in result.notes:
        console.note(note)
    if json:
        console.as_json({**result.as_json(), "files": files})
        return
    show()
    for what, path in files.items():
        console.say(f"{what}: {path}")


def finish(result: "Result", out: Path, json: bool, lines: list[str] | None = None) -> None:
    """Write what a study found and show it: as a table (and further lines), or as JSON."""
    tell(result, out, json, lambda: _show(result, lines or []))


def _show(result: "Result", lines: list[str]) -> None:
    from sae.pipeline.commands import console

    several_seeds = "seeds" in result.table[0]
    columns = [*result.labels, *(["seeds"] if several_seeds else []), *result.unlike, *result.columns]
    shown = [name for name in columns if any(row[name] is not None for row in result.table)]
    cells = [[spread(row, name) if several_seeds else row[name] for name in shown] for row in result.table]
    console.table(f"study of {result.study}, {len(result.runs)} runs", shown, cells)
    for line in lines:
        console.say(line)


def spread(row: dict[str, Any], name: str) -> Any:
    """A figure as mean ± standard deviation where there is one."""
    from sae.pipeline.commands import console

    deviation = row.get(f"{name}_sd")
    return row[name] if deviation is None else f"{console.short(row[name])} ± {console.short(deviation)}"
