"""What a user can choose from, gathered from the registries: `sae list` shows it."""

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import configs
from cache.codecs import CODECS
from cache.runs import Run
from pipeline.language_model import SITES
from pipeline.metrics.figures import declared, summary
from pipeline.sources import registered

SAES = Path(__file__).parent / "saes"


def choices(runs: Sequence[Run]) -> dict[str, list[dict[str, str]]]:
    """Name and one line of help for every run given, architecture, codec, site, metric, source and preset."""
    return {
        "runs": [{"name": run.name, "help": _state(run)} for run in runs],
        "architectures": [{"name": name, "help": help} for name, help in sorted(architectures().items())],
        "codecs": [{"name": name, "help": summary(kind.__doc__)} for name, kind in CODECS.items()],
        "sites": [{"name": name, "help": help} for name, help in SITES.items()],
        "metrics": [{"name": one.name, "help": one.help} for one in declared()],
        "sources": [{"name": entry.name, "help": entry.help} for entry in registered()],
        "presets": [{"name": name, "help": _first_comment(name)} for name in configs.presets()],
    }


def _state(run: Run) -> str:
    state = "finished" if run.finished else "not finished; continue with --resume"
    if (failure := run.failure) is not None:
        state = f"diverged at step {failure['step']:,}; try a smaller --lr"
    return f"{state}, on {run.seen.key}"


def architectures() -> dict[str, str]:
    """Name and one line of help for every architecture, without importing them: torch takes seconds.

    An architecture is one file of its folder; those registered elsewhere are known where the registry is.
    """
    found = dict(
        entry for path in sorted(SAES.glob("*.py")) for entry in _registered(ast.parse(path.read_text("utf-8")))
    )
    if (imported := sys.modules.get("pipeline.saes")) is not None:
        found |= {name: summary(kind.__doc__) for name, kind in imported.ARCHITECTURES.items()}
    return found


def _registered(module: ast.Module) -> Iterator[tuple[str, str]]:
    """The `arch` of a module's Config, and the first sentence about the class it registers, where there is one."""
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    for one in classes:
        if any(isinstance(mark, ast.Name) and mark.id == "register" for mark in one.decorator_list):
            fields = [node for kind in classes for node in kind.body if isinstance(node, ast.AnnAssign)]
            tag = next(
                node.annotation for node in fields if isinstance(node.target, ast.Name) and node.target.id == "arch"
            )
            assert isinstance(tag, ast.Subscript) and isinstance(tag.slice, ast.Constant), ast.unparse(tag)
            yield str(tag.slice.value), summary(ast.get_docstring(one))


def _first_comment(preset: str) -> str:
    line = (configs.FOLDER / f"{preset}.yaml").read_text().splitlines()[0]
    return line.removeprefix("#").strip()
