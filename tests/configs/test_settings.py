"""What is said is done: every setting of every class, by every way of saying it, is in what comes out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from support.command_line import sae
from support.small_settings import other_values
from support.small_stores import shrunk, write_activations

from sae import configs
from sae.cache.runs import Run
from sae.configs import SECTIONS, resolve
from sae.configs.layers import inner_models, tag_of
from sae.configs.reading import nested
from sae.pipeline.analyses.analysis import AnalyzeConfig
from sae.pipeline.decompose.config import LocalConfig
from sae.pipeline.evaluate.stage import EvalConfig
from sae.pipeline.explain.config import ExplainConfig
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.harvest.sources.synthetic import SyntheticConfig
from sae.pipeline.interpret.features import FeaturesConfig
from sae.pipeline.matching.config import MatchConfig
from sae.pipeline.probing.config import ProbeConfig
from sae.pipeline.saes import Config
from sae.pipeline.saes.config import TrainableConfig
from sae.pipeline.steering.config import SteerConfig
from sae.pipeline.studies.study import settings
from sae.pipeline.tokenize.stage import TokenizeConfig
from sae.pipeline.train.stage import TrainConfig
from sae.pipeline.train.sweep import combinations

STAGES: dict[str, type[BaseModel]] = {
    "tokenize": TokenizeConfig, "harvest": HarvestConfig, "synthesize": SyntheticConfig, "train": TrainConfig,
    "decompose": LocalConfig,
    "eval": EvalConfig, "report": FeaturesConfig, "analyze": AnalyzeConfig, "probe": ProbeConfig,
    "match": MatchConfig, "steer": SteerConfig,
    "explain": ExplainConfig,
    "study": settings(),
}  # fmt: skip


def every_class(section: str, model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """A stage's settings class and all those inside it: section, path, class, and what chooses it there."""
    yield section, path, model, {}
    for key in model.model_fields:
        inner = inner_models(model, key)
        tag = tag_of(inner)
        for one in inner:
            for found in every_class(section, one, (*path, key)):
                yield (*found[:3], {tag: one.model_fields[tag].default}) if tag else found


CLASSES = [found for section, model in STAGES.items() for found in every_class(section, model)]
CASES = [
    pytest.param(section, path, chosen, values, name, id=f"{section}.{model.__name__}.{name}")
    for section, path, model, chosen in CLASSES
    for name, values in other_values(model).items()
]


def found_at(settings: BaseModel, path: tuple[str, ...], name: str) -> Any:
    value: Any = settings.model_dump(mode="json")
    for key in (*path, name):
        value = value[key]
    return value


def overrides(section: str, path: tuple[str, ...], values: dict[str, Any]) -> list[str]:
    return [f"{'.'.join((section, *path, key))}={json.dumps(value)}" for key, value in values.items()]


def test_there_is_something_to_set() -> None:
    assert set(STAGES) == set(SECTIONS) and len(CASES) > 200
    chosen = {value for _, _, _, chosen in CLASSES for value in chosen.values()}
    assert {"topk", "l1", "jumprelu", "gated", "p_anneal", "jl", "resample", "reinitialise", "iid", "groups"} <= chosen


@pytest.mark.parametrize(("section", "path", "chosen", "values", "name"), CASES)
def test_every_setting_by_every_way(
    section: str, path: tuple[str, ...], chosen: dict[str, Any], values: dict[str, Any], name: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its class chosen by an option, by `--set` or where the setting itself is said, after it or before it."""
    stage = STAGES[section]
    for folder in ("presets", "files"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(configs, "FOLDER", tmp_path / "presets")
    said = overrides(section, path, values)
    choice, flags = overrides(section, path, chosen), nested(path, chosen)
    for where in ("presets", "files"):
        (tmp_path / where / "plain.yaml").write_text(json.dumps({section: nested(path, values)}))
        (tmp_path / where / "whole.yaml").write_text(json.dumps({section: nested(path, {**chosen, **values})}))
    plain, whole = tmp_path / "files" / "plain.yaml", tmp_path / "files" / "whole.yaml"
    axes = {".".join((*path, key)): value for key, value in values.items()}
    ways: list[dict[str, Any]] = [
        {"overrides": said, "flags": flags},
        {"overrides": [*said, *choice]},
        {"overrides": [*choice, *said]},
        {"file": plain, "flags": flags},
        {"file": plain, "overrides": choice},
        {"file": whole},
        {"preset": "plain", "flags": flags},
        {"preset": "plain", "overrides": choice},
        {"preset": "whole"},
        {"axes": axes, "flags": flags},
        {"axes": axes, "overrides": choice},
        {"flags": nested(path, {**chosen, **values})},
        {"file": plain, "axes": {".".join((*path, tag)): value for tag, value in chosen.items()}},
    ]
    if section == "train":
        (swept,) = combinations([f"train.{key}={json.dumps(value)}" for key, value in axes.items()])
        ways.append({"axes": swept, "flags": flags})
    for way in ways:
        found = found_at(resolve(section, stage, **way), path, name)
        if isinstance(values[name], dict):  # more settings: what is not said of them is as ever
            found = {key: found[key] for key in values[name]}
        assert found == values[name], way


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with one small store; its path."""
    import torch

    with shrunk():
        rows = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
        yield write_activations(tmp_path_factory.mktemp("cache"), rows, "float32", ended=True).path


def fits(model: type[BaseModel], values: dict[str, Any]) -> bool:
    """Whether the values go together."""
    try:
        config = model.model_validate(values)
        if isinstance(config, TrainableConfig):
            config.expect_length(1000)
    except ValueError:
        return False
    return True


ARCHITECTURES = [
    (model, chosen["arch"])
    for _, _, model, chosen in CLASSES
    if chosen.get("arch", "clt") != "clt"  # which is of pairs of stores
]


@pytest.mark.parametrize(("model", "arch"), ARCHITECTURES, ids=[arch for _, arch in ARCHITECTURES])
def test_the_settings_an_architecture_has_of_its_own_are_in_the_run(
    store: Path, model: type[BaseModel], arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed at the command line: with `--arch`, by `--set`, by a file, and by a sweep."""
    monkeypatch.setattr("sae.pipeline.train.sweep.sweep_each", lambda *_, **__: None)  # nothing is trained, only begun
    monkeypatch.setattr("sae.pipeline.report.compare.compare", lambda _: [{"run": "one"}])
    values: dict[str, Any] = {"d_sae": 64} if "d_sae" in model.model_fields else {}
    for name, more in other_values(model).items():
        values |= more if name not in Config.model_fields and fits(model, values | more) else {}
    assert len(values) > 1
    (tmp_path / "mine.yaml").write_text(json.dumps({"train": {"sae": values}}))
    base = f"train --arch {arch} --activations {store} --batch 16 --cache {tmp_path}"
    ways = {
        "set": [word for one in overrides("train", ("sae",), values) for word in ("--set", one)],
        "file": ["--config", str(tmp_path / "mine.yaml")],
        "sweep": [word for key, value in values.items() for word in ("--sweep", f"sae.{key}={json.dumps(value)}")],
    }
    for name, words in ways.items():
        answer = sae(base, "--runs", tmp_path / name, *words)
        assert answer.code == 0, answer.err
        (folder,) = (tmp_path / name).iterdir()
        run = Run(folder)
        assert run.metrics() == []
        said = run.config["train"]["sae"]
        assert {key: said[key] for key in values} == values
