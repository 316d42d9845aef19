"""The content of `sae list`, gathered from the registries."""

from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sae import configs
from sae.cache.printable import printable
from sae.cache.runs import Run
from sae.cache.store.codecs import CODECS
from sae.pipeline.commands.described import shown, studies
from sae.pipeline.declared import Declared, imported, registered
from sae.pipeline.language_model import SITES
from sae.pipeline.metrics.figures import declared as metrics
from sae.pipeline.tokenize.sources import registered as text_sources


def choices(runs: Sequence[Run]) -> dict[str, list[dict[str, str]]]:
    """Name and one line of help for every run given, architecture, codec, format, site, metric, study, analysis, source, preset."""
    every = {
        "runs": {run.name: _state(run) for run in runs},
        "architectures": _summaries(registered("sae.pipeline.saes.base.ARCHITECTURES", "arch")),
        "codecs": _summaries({name: imported(kind) for name, kind in CODECS.items()}),
        "formats": _summaries(registered("sae.pipeline.formats.base.FORMATS")),
        "sites": SITES,
        "metrics": {one.name: one.help for one in metrics()},
        "studies": _summaries(studies()),
        "analyses": _summaries(registered("sae.pipeline.analyses.analysis.ANALYSES")),
        "sources": {source.name: source.help for source in text_sources()},
        "row_sources": _summaries(registered("sae.pipeline.harvest.sources.base.SOURCES")),
        "presets": {name: _first_comment(name) for name in configs.presets()},
    }
    return {kind: [{"name": name, "help": help} for name, help in each.items()] for kind, each in every.items()}


def _summaries(classes: dict[str, Declared]) -> dict[str, str]:
    return {name: one.summary for name, one in classes.items()}


def every_setting() -> list[dict[str, str]]:
    """Name, type, default and meaning of every setting of every stage and study, from their classes: this imports torch."""
    from sae.pipeline.analyses.analysis import AnalyzeConfig
    from sae.pipeline.decompose.config import KINDS
    from sae.pipeline.evaluate.stage import EvalConfig
    from sae.pipeline.explain.config import ExplainConfig
    from sae.pipeline.harvest.sources import settings_of_sources
    from sae.pipeline.harvest.sources.synthetic import SyntheticConfig
    from sae.pipeline.harvest.sources.toy import ToyConfig
    from sae.pipeline.interpret.features import FeaturesConfig
    from sae.pipeline.matching.config import MatchConfig
    from sae.pipeline.probing.config import ProbeConfig
    from sae.pipeline.steering.config import SteerConfig
    from sae.pipeline.studies.study import settings as study_settings
    from sae.pipeline.tokenize.stage import TokenizeConfig
    from sae.pipeline.train.stage import TrainConfig

    classes: list[Sequence[type[BaseModel]]] = [
        [TokenizeConfig], settings_of_sources(), [SyntheticConfig, ToyConfig], [TrainConfig], KINDS, [EvalConfig],
        [FeaturesConfig], [AnalyzeConfig], [ProbeConfig], [MatchConfig], [SteerConfig],
        [ExplainConfig], [study_settings()],
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
            yield {"name": name, "type": " or ".join(tags), "default": "", "help": f"one of {', '.join(tags)}"}
            continue
        of = [str(one.model_fields[tag].default) for one in having] if tag and len(having) < len(models) else []
        only = f" (of {', '.join(of)})" if of else ""
        inner = [kind for one in having for kind in configs.inner_models(one, key)]
        if field.description or not inner:
            defaults = [shown(one.model_fields[key].get_default(call_default_factory=True)) for one in having]
            default = "" if inner else " or ".join(dict.fromkeys(defaults))
            kinds = " or ".join(dict.fromkeys(filter(None, (kind_of(one.model_fields[key]) for one in having))))
            yield {"name": name, "type": kinds, "default": default, "help": f"{field.description or ''}{only}"}
        yield from _settings(name, list(dict.fromkeys(inner))) if inner else ()


def kind_of(field: FieldInfo) -> str:
    """The type of a setting in words, with its limits: `int, at least 1`; nothing of a section."""
    limits = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    said = [
        f"{words} {shown(getattr(one, key))}"
        for one in field.metadata
        for key, words in limits.items()
        if getattr(one, key, None) is not None
    ]
    kind = _words(field.annotation)
    return ", ".join([kind, *said]) if kind else ""


def _words(annotation: Any) -> str:
    inner = get_args(annotation)
    match get_origin(annotation):
        case None:
            return "" if issubclass(annotation, BaseModel) else str(annotation.__name__)
        case origin if origin is Literal:
            return " or ".join(map(str, inner))
        case origin if origin is Annotated:
            return _words(inner[0])
        case origin if origin in (Union, UnionType):
            kinds = [_words(one) for one in inner if one is not NoneType]
            return " or ".join(dict.fromkeys(filter(None, kinds)))
        case _:
            return f"list of {_words(inner[0])}"


def _state(run: Run) -> str:
    if (imported := run.imported) is not None:
        of = printable(str(imported.get("format")))
        return f"imported from {of}, on {run.seen.key}" if run.finished else "not wholly imported; import it again"
    state = "finished" if run.finished else "not finished; continue with --resume"
    if (failure := run.failure) is not None:
        state = f"diverged at step {failure['step']:,}; try a smaller --lr"
    if run.decomposes:
        return f"{state}, a decomposition ({printable(str(run.settings.get('kind')))})"
    return f"{state}, on {run.seen.key}"


def _first_comment(preset: str) -> str:
    line = (configs.FOLDER / f"{preset}.yaml").read_text().splitlines()[0]
    return line.removeprefix("#").strip()
