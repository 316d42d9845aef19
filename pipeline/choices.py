"""What a user can choose from, gathered from the registries: `sae list` shows it."""

from pathlib import Path

import configs
from cache import catalogue
from cache.codecs import CODECS
from cache.runs import Run
from pipeline.language_model import SITES
from pipeline.saes import ARCHITECTURES
from pipeline.sources import registered


def choices(runs: Path) -> dict[str, list[dict[str, str]]]:
    """Name and one line of help for every run, architecture, codec, site, source and preset."""
    return {
        "runs": [{"name": run.name, "help": _state(run)} for run in catalogue.runs(runs)],
        "architectures": [{"name": name, "help": _summary(kind)} for name, kind in ARCHITECTURES.items()],
        "codecs": [{"name": name, "help": _summary(kind)} for name, kind in CODECS.items()],
        "sites": [{"name": name, "help": help} for name, help in SITES.items()],
        "sources": [{"name": entry.name, "help": entry.help} for entry in registered()],
        "presets": [{"name": name, "help": _first_comment(name)} for name in configs.presets()],
    }


def _state(run: Run) -> str:
    state = "finished" if run.finished else "not finished; continue with --resume"
    if (failure := run.failure) is not None:
        state = f"diverged at step {failure['step']:,}; try a smaller --lr"
    return f"{state}, on {run.config['activations']['key']}"


def _summary(kind: type) -> str:
    """The first sentence of a docstring."""
    return (kind.__doc__ or "").strip().split("\n\n")[0].split(". ")[0].replace("\n", " ").rstrip(".")


def _first_comment(preset: str) -> str:
    line = (configs.FOLDER / f"{preset}.yaml").read_text().splitlines()[0]
    return line.removeprefix("#").strip()
