"""What a user can choose from, gathered from the registries: `sae list` shows it."""

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from sae import configs
from sae.cache.runs import Run
from sae.cache.store.codecs import CODECS
from sae.pipeline.commands.described import shown, studies
from sae.pipeline.language_model import SITES
from sae.pipeline.metrics.figures import declared, summary
from sae.pipeline.tokenize.sources import registered

PIPELINE = Path(__file__).parent.parent


def choices(runs: Sequence[Run]) -> dict[str, list[dict[str, str]]]:
    """Name and one line of help for every run given, architecture, codec, format, site, metric, study, source, preset."""
    return {
        "runs": [{"name": run.name, "help": _state(run)} for run in runs],
        "architectures": [{"name": name, "help": help} for name, help in sorted(architectures().items())],
        "codecs": [{"name": name, "help": summary(kind.__doc__)} for name, kind in CODECS.items()],
        "formats": [{"name": name, "help": help} for name, help in sorted(formats().items())],
        "sites": [{"name": name, "help": help} for name, help in SITES.items()],
        "metrics": [{"name": one.name, "help": one.help} for one in declared()],
        "studies": [{"name": one.name, "help": summary(one.help)} for one in studies()],
        "sources": [{"name": entry.name, "help": entry.help} for entry in registered()],
        "row_sources": [{"name": name, "help": help} for name, help in sorted(row_sources().items())],
        "presets": [{"name": name, "help": _first_comment(name)} for name in configs.presets()],
    }


def every_setting() -> list[dict[str, str]]:
    """Name, default and meaning of every setting of every stage and study, from their classes: this imports torch."""
    from sae.pipeline.evaluate.stage import EvalConfig
    from sae.pipeline.harvest.sources import settings_of_sources
    from sae.pipeline.harvest.sources.synthetic import SyntheticConfig
    from sae.pipeline.interpret.features import FeaturesConfig
    from sae.pipeline.studies.study import settings as study_settings
    from sae.pipeline.tokenize.stage import TokenizeConfig
    from sae.pipeline.train.stage import TrainConfig

    classes: list[Sequence[type[BaseModel]]] = [
        [TokenizeConfig], settings_of_sources(), [SyntheticConfig], [TrainConfig], [EvalConfig], [FeaturesConfig],
        [study_settings()],
    ]  # fmt: skip
    stages = dict(zip(configs.SECTIONS, classes, strict=True))
    return [entry for stage, kinds in stages.items() for entry in _settings(stage, kinds)]


def _settings(prefix: str, models: Sequence[type[BaseModel]]) -> Iterator[dict[str, str]]:
    """The settings below a path that is of one of several classes, told apart by a tag."""
    tag = configs.tag_of(models)
    for key in dict.fromkeys(key for one in models for key in one.model_fields):
        having = [one for one in models if key in one.model_fields]
        field = having[0].model_fields[key]
        name = f"{prefix}.{key}"
        if key == tag:
            tags = [str(one.model_fields[key].default) for one in models]
            yield {"name": name, "default": "", "help": f"one of {', '.join(tags)}"}
            continue
        of = [str(one.model_fields[tag].default) for one in having] if tag and len(having) < len(models) else []
        only = f" (of {', '.join(of)})" if of else ""
        inner = [kind for one in having for kind in configs.inner_models(one, key)]
        if field.description or not inner:
            defaults = [shown(one.model_fields[key].get_default(call_default_factory=True)) for one in having]
            default = "" if inner else " or ".join(dict.fromkeys(defaults))
            yield {"name": name, "default": default, "help": f"{field.description or ''}{only}"}
        yield from _settings(name, list(dict.fromkeys(inner))) if inner else ()


def _state(run: Run) -> str:
    state = "finished" if run.finished else "not finished; continue with --resume"
    if (failure := run.failure) is not None:
        state = f"diverged at step {failure['step']:,}; try a smaller --lr"
    return f"{state}, on {run.seen.key}"


def architectures() -> dict[str, str]:
    """Name and one line of help for every architecture, without importing them: torch takes seconds.

    An architecture is one file of its folder; those registered elsewhere are known where the registry is.
    """
    found = dict(_registered("saes", "arch"))
    if (imported := sys.modules.get("sae.pipeline.saes")) is not None:
        found |= {name: summary(kind.__doc__) for name, kind in imported.ARCHITECTURES.items()}
    return found


def formats() -> dict[str, str]:
    """Name and one line of help for every format of other tools' dictionaries, likewise."""
    found = dict(_registered("formats", "name"))
    if (imported := sys.modules.get("sae.pipeline.formats")) is not None:
        found |= {name: summary(format.__doc__) for name, format in imported.FORMATS.items()}
    return found


def row_sources() -> dict[str, str]:
    """Name and one line of help for every source of rows that can be harvested, likewise."""
    found = dict(_registered("harvest/sources", "name"))
    if (imported := sys.modules.get("sae.pipeline.harvest.sources")) is not None:
        found |= {name: summary(kind.__doc__) for name, kind in imported.SOURCES.items()}
    return found


def _registered(folder: str, tag: str) -> Iterator[tuple[str, str]]:
    """The tag of every class that a file of the folder registers, and the first sentence about it.

    The tag is what an attribute of this name is set to in that file.
    """
    for path in sorted((PIPELINE / folder).glob("*.py")):
        classes = [node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
        for one in classes:
            if any(isinstance(mark, ast.Name) and mark.id == "register" for mark in one.decorator_list):
                yield next(_values(classes, tag)), summary(ast.get_docstring(one))


def _values(classes: Sequence[ast.ClassDef], name: str) -> Iterator[str]:
    """The texts that attributes of this name are set to, `name = "text"` or `name: ... = Field("text", ...)`."""
    for node in (node for kind in classes for node in kind.body if isinstance(node, ast.Assign | ast.AnnAssign)):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        value = node.value.args[0] if isinstance(node.value, ast.Call) and node.value.args else node.value
        if isinstance(target, ast.Name) and target.id == name and isinstance(value, ast.Constant):
            yield str(value.value)


def _first_comment(preset: str) -> str:
    line = (configs.FOLDER / f"{preset}.yaml").read_text().splitlines()[0]
    return line.removeprefix("#").strip()
