"""Presets, files, --set and flags, and what a mistake in any of them says."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, model_validator

from sae import configs
from sae.cache.errors import SaeError
from sae.configs import SECTIONS, presets, resolve
from sae.configs.base import Settings


class TopK(Settings):
    arch: Literal["topk"] = "topk"
    k: int = Field(32, ge=1)
    d_sae: int = 8192


class L1(Settings):
    arch: Literal["l1"] = "l1"
    penalty: float = 1e-3
    d_sae: int = 4096


class Rows(Settings):
    skip_first: int = 1


class Train(Settings):
    alternatives = (("steps", "epochs"),)

    sae: Annotated[TopK | L1, Field(discriminator="arch")] = TopK()
    lr: float = Field(1e-4, gt=0)
    warmup: float = 0.0
    steps: int | None = None
    epochs: int | None = None
    amount: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    layers: tuple[int, ...] = (6,)
    rows: Rows = Rows()
    name: str = "run"

    @model_validator(mode="after")
    def _warm(self) -> "Train":
        if self.warmup > 1:
            raise ValueError(f"warmup = {self.warmup}: is a share, 0 to 1")
        return self


def train(*overrides: str, **options: Any) -> Train:
    return resolve("train", Train, overrides=overrides, **options)


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of presets with one, `small`."""
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    (tmp_path / "small.yaml").write_text("train:\n  sae: {arch: topk, k: 8, d_sae: 64}\n  lr: 0.01\n  steps: 100\n")
    return tmp_path


def test_of_alternatives_the_highest_layer_counts(preset: Path) -> None:
    """The preset says steps: whatever lies above it and says epochs takes the place of them."""
    file = preset / "mine.yml"
    file.write_text("train:\n  epochs: 2\n")
    both = {"steps": None, "epochs": 2}
    assert train(preset="small", file=file).model_dump(include={*both}) == both
    assert train("train.epochs=2", preset="small").model_dump(include={*both}) == both
    assert train(preset="small", flags={"epochs": 2, "steps": None}).model_dump(include={*both}) == both
    assert train(preset="small", given={"epochs": 2}).model_dump(include={*both}) == both
    found = train(preset="small", file=file, flags={"steps": 7})
    assert (found.steps, found.epochs) == (7, None)
    assert train(preset="small", flags={"epochs": None}).steps == 100
    with pytest.raises(SaeError, match=r"^steps = 5: `epochs = 6` says otherwise; give one of the two$"):
        train(flags={"steps": 5, "epochs": 6})


def test_the_defaults() -> None:
    assert train() == Train()


def test_later_layers_win(preset: Path) -> None:
    """Defaults < preset < file < command line."""
    file = preset / "mine.yml"
    file.write_text("train:\n  lr: 0.02\n  warmup: 0.2\n")
    assert train(preset="small") == Train(sae=TopK(k=8, d_sae=64), lr=0.01, steps=100)
    assert train(preset="small", file=file).lr == 0.02
    assert train("train.lr=0.03", preset="small", file=file).lr == 0.03
    flags = {"lr": 0.04, "steps": None, "sae": {"k": None, "d_sae": 65}}
    found = train("train.sae.k=9", preset="small", file=file, flags=flags)
    assert found == Train(sae=TopK(k=9, d_sae=65), lr=0.04, warmup=0.2, steps=100)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"flags": {"lr": 0.04}}, "lr = 0.04: `overrides = train.lr=0.03` says otherwise; give one of the two"),
        ({"axes": {"lr": 0.04}}, "sweep = lr=0.04: `overrides = train.lr=0.03` says otherwise; give one of the two"),
        (
            {"more": ["train.lr=0.04"]},
            "overrides = train.lr=0.04: `overrides = train.lr=0.03` says otherwise; give one of the two",
        ),
        (
            {"more": ["train.sae.k=3", "train.sae={k: 4}"]},
            "overrides = train.sae={k: 4}: `overrides = train.sae.k=3` says otherwise",
        ),
        (
            {"more": ["train.rows.skip_first=3", "train.rows=null"]},
            "overrides = train.rows=null: `overrides = train.rows.skip_first",
        ),
        (
            {"flags": {"layers": ["1", "2"]}, "more": ["train.layers=[2, 1]"]},
            "layers = 1,2: `overrides = train.layers=[2, 1]",
        ),
        (
            {"flags": {"sae": {"arch": "l1"}}, "more": ["train.sae.arch=topk"]},
            "arch = l1: `overrides = train.sae.arch=topk",
        ),
    ],
)
def test_a_command_line_that_contradicts_itself(said: dict[str, Any], message: str) -> None:
    more = said.pop("more", [])
    with pytest.raises(SaeError) as caught:
        train("train.lr=0.03", *more, **said)
    assert str(caught.value).startswith(message)


def test_the_same_thing_may_be_said_twice() -> None:
    flags = {"layers": ["1", "2"], "amount": "500", "sae": {"k": 3}}
    same = ["train.layers=[1,2]", "train.amount=500", "train.sae={k: 3}", "train.sae={arch: topk}", "train.sae.k=3"]
    assert train(*same, flags=flags) == Train(layers=(1, 2), amount=500, sae=TopK(k=3))


def test_one_key_of_a_default_can_be_changed() -> None:
    assert train("train.sae.k=3").sae == TopK(k=3)
    assert train(flags={"sae": {"arch": None, "k": 4}}).sae == TopK(k=4)
    assert train("train.rows.skip_first=0").rows == Rows(skip_first=0)


def test_another_architecture_drops_the_fields_of_the_old_one(preset: Path) -> None:
    """But for those it has, too, where something else than the old one's default was asked for."""
    assert train("train.sae.arch=l1", preset="small").sae == L1(d_sae=64)
    assert train("train.sae.penalty=0.5", "train.sae.arch=l1", preset="small").sae == L1(penalty=0.5, d_sae=64)
    (preset / "written_out.yaml").write_text("train:\n  sae: {arch: topk, k: 8, d_sae: 8192}\n")
    assert train("train.sae.arch=l1", preset="written_out").sae == L1()
    assert train(preset="small", flags={"sae": {"arch": "l1", "d_sae": 5}}).sae == L1(d_sae=5)
    assert train("train.sae.arch=l1").sae == L1()
    assert train("train.sae.arch=topk", preset="small").sae == TopK(k=8, d_sae=64)


def test_another_architecture_drops_what_it_means_otherwise() -> None:
    """A penalty that is a form of the L1 norm says nothing of one on L0, though both are named `penalty`."""
    from sae.pipeline.train.stage import TrainConfig

    for preset in ("gpt_sae_l1", "gpt_sae_hybrid"):
        found = resolve("train", TrainConfig, preset=preset, flags={"sae": {"arch": "jumprelu"}})
        assert found.sae.model_dump()["penalty"] == "l0"


@pytest.mark.parametrize("value", ["null", "3", "[]", "x"])
def test_no_settings_where_settings_are_chosen_from(preset: Path, value: str) -> None:
    """Nothing says which class is meant; an option on top does not, either."""
    (file := preset / "mine.yml").write_text(f"train:\n  sae: {value}\n")
    for flags in ({}, {"sae": {"d_sae": 5}}):
        with pytest.raises(SaeError, match=r"train\.sae = "):
            train(file=file, flags=flags)
    assert train(file=file, flags={"sae": {"arch": "l1"}}).sae == L1()


def test_the_architecture_is_chosen_before_anything_is_said_of_it(preset: Path) -> None:
    file = preset / "mine.yml"
    file.write_text("train:\n  sae: {penalty: 0.25}\n")
    arch = {"sae": {"arch": "l1"}}
    assert train("train.sae.penalty=0.5", flags=arch).sae == L1(penalty=0.5)
    assert train("train.sae.penalty=0.5", preset="small", flags=arch).sae == L1(penalty=0.5, d_sae=64)
    assert train(file=file, flags=arch).sae == L1(penalty=0.25)
    assert train(file=file, axes={"sae.arch": "l1"}).sae == L1(penalty=0.25)
    assert train(axes={"sae.penalty": 0.75}, flags=arch).sae == L1(penalty=0.75)
    assert train("train.sae.arch=l1", axes={"sae.penalty": 0.75}).sae == L1(penalty=0.75)


def test_what_the_chosen_architecture_has_not_is_refused(preset: Path) -> None:
    """With where it was said. A preset alone may speak of another architecture."""
    file = preset / "mine.yml"
    file.write_text("train:\n  sae: {arch: topk, k: 32, d_sae: 8192}\n")
    arch = {"sae": {"arch": "l1"}}
    assert train(preset="small", flags=arch).sae == L1(d_sae=64)
    for said, message in [
        ({"file": file, "flags": arch}, f"{file}: train.sae.k: arch l1 has no k; it is of topk"),
        ({"overrides": ["train.sae.k=3"], "flags": arch}, "train.sae.k: arch l1 has no k; it is of topk"),
        ({"axes": {"sae.k": 3}, "flags": arch}, "sweep = sae.k=3: arch l1 has no k; it is of topk"),
        ({"flags": {"sae": {"arch": "l1", "k": 3}}}, "k = 3: arch l1 has no k; it is of topk"),
        ({"overrides": ["train.sae.kk=3"], "flags": arch}, "train.sae.kk: unknown key; there are arch, d_sae, penalty"),
    ]:
        with pytest.raises(SaeError) as caught:
            resolve("train", Train, **said)  # type: ignore[arg-type]
        assert str(caught.value) == message
    file.write_text("train:\n  sae: {arch: topk, d_sae: 8192}\n")
    assert train(file=file, flags=arch).sae == L1(d_sae=8192)


def test_the_file_that_said_it_is_named(preset: Path) -> None:
    file = preset / "mine.yml"
    file.write_text("train:\n  lr: -1\n")
    with pytest.raises(SaeError, match=rf"{file}: train\.lr = -1: input should be greater than 0"):
        train(file=file)
    (preset / "small.yaml").write_text("train: {lr: -1}")
    with pytest.raises(SaeError, match=r"preset small: train\.lr = -1: input"):
        train(preset="small")


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("train.lr=3e-4", "lr", 3e-4),
        ("train.lr=1E-3", "lr", 1e-3),
        ("train.lr=.5", "lr", 0.5),
        ("train.steps=1e6", "steps", 1_000_000),
        ("train.steps=10_000", "steps", 10_000),
        ("train.steps=null", "steps", None),
        ("train.amount=2e3", "amount", 2000),
        ("train.amount=all", "amount", "all"),
        ("train.layers=[4, 6]", "layers", (4, 6)),
        ("train.name=a=b", "name", "a=b"),
        ("train.name=1e5x", "name", "1e5x"),
        ("train.name=no", "name", "no"),
        ("train.name=true", "name", "true"),
        ("train.name=2020-01-01", "name", "2020-01-01"),
        ("train.steps=010", "steps", 10),
        ("train.steps=0x10", "steps", 16),
        (" train.name =x", "name", "x"),
    ],
)
def test_values_as_people_write_them(text: str, field: str, value: object) -> None:
    assert getattr(train(text), field) == value


def test_numbers_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# mine\ntrain:\n  lr: 3e-4\n  steps: 1e3\n  name: e3\ntokenize:\n")
    assert train(file=file) == Train(lr=3e-4, steps=1000, name="e3")
    file.write_text("")
    assert train(file=file) == Train()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lrr=1", "train.lrr: unknown key; did you mean 'lr'?"),
        ("train.xyz=1", "train.xyz: unknown key; there are amount, epochs, layers, lr, name, rows, sae, steps, warmup"),
        ("train.sae.kk=1", "train.sae.kk: unknown key; did you mean 'k'?"),
        ("train.rows.skip=1", "train.rows.skip: unknown key; did you mean 'skip_first'?"),
        ("trian.lr=1", "overrides = trian.lr=1: unknown section 'trian'; did you mean 'train'?"),
        ("x.lr=1", "overrides = x.lr=1: unknown section 'x'; there are tokenize, harvest, synthesize, train, "
         "decompose, eval, report, analyze, probe, match, steer, explain, study"),
        ("train.sae.arch=l3", "train.sae.arch = l3: unknown architecture; did you mean 'l1'?"),
        ("train.sae.arch=xyz", "train.sae.arch = xyz: unknown architecture; there are topk, l1"),
        ("train.lr=-1", "train.lr = -1: input should be greater than 0"),
        ("train.sae.k=0", "train.sae.k = 0: input should be greater than or equal to 1"),
        ("train.sae.k=x", "train.sae.k = 'x': input should be a valid integer, unable to parse string as an integer"),
        ("train.layers=[1,x]", "train.layers.1 = 'x': input should be a valid integer, unable to parse string as an "
         "integer"),
        ("train.amount=0", "train.amount = 0: input should be greater than or equal to 1; or input should be 'all'"),
        ("train.warmup=2", "train: warmup = 2.0: is a share, 0 to 1"),
        ("train.lr", "overrides = train.lr: write it as section.key=value, for example train.lr=3e-4"),
        ("train=1", "overrides = train=1: write it as section.key=value, for example train.lr=3e-4"),
        ("train..lr=1", "overrides = train..lr=1: write it as section.key=value, for example train.lr=3e-4"),
        ("train.lr=[", "overrides = train.lr=[: the value is not YAML"),
        ("train.sae={k: 3, k: 4}", "overrides = train.sae={k: 3, k: 4}: the value is not YAML"),
        ("train.sae=&a {k: *a}", "overrides = train.sae=&a {k: *a}: the value is not YAML"),
        ("train.steps=", "overrides = train.steps=: has no value; write null where none is meant"),
        ("train.name=''", "train.name = '': string should have at least 1 character"),
        ("train.steps=true", "train.steps = 'true': input should be a valid integer, unable to parse string as an "
         "integer"),
        ("train.layers=[true]", "train.layers.0 = 'true': input should be a valid integer, unable to parse string as "
         "an integer"),
        ("train.steps=1:30", "train.steps = '1:30': input should be a valid integer, unable to parse string as an "
         "integer"),
        ("train.steps=٣", "train.steps = '٣': input should be a valid integer, unable to parse string as an integer"),
        ("train.steps=1,000", "train.steps = '1,000': input should be a valid integer, unable to parse string as an "
         "integer"),
        ("train.steps=9223372036854775808", "train.steps = 9223372036854775808: input should fit into 64 bits"),
        ("train.layers=[9223372036854775808]", "train.layers = [9223372036854775808]: input should fit into 64 bits"),
        ("train.lr=.inf", "train.lr = inf: input should be a finite number"),
        ("train.lr=inf", "train.lr = 'inf': input should be a finite number"),
        ("train.lr=.nan", "train.lr = nan: input should be a finite number"),
        ("train.lr=1e400", "train.lr = inf: input should be a finite number"),
        ("train.lr=1e308", "train.lr = 1e+308: input should be 0, or between 1e-30 and 1e+30"),
        ("train.lr=1e-308", "train.lr = 1e-308: input should be 0, or between 1e-30 and 1e+30"),
    ],
)  # fmt: skip
def test_mistakes(text: str, message: str) -> None:
    """One line: the key as the user wrote it, the value, what is wrong, what to try."""
    with pytest.raises(SaeError) as caught:
        train(text)
    assert str(caught.value) == message


def test_a_key_of_the_other_architecture(preset: Path) -> None:
    with pytest.raises(SaeError, match=r"train\.sae\.penalty: arch topk has no penalty; it is of l1"):
        train("train.sae.penalty=1", preset="small")
    with pytest.raises(SaeError, match=r"train\.sae\.penalt: unknown key; did you mean 'penalty'\?"):
        train("train.sae.arch=l1", "train.sae.penalt=1", preset="small")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a", f"expected sections ({', '.join(SECTIONS)}) with settings inside"),
        (b"3", f"expected sections ({', '.join(SECTIONS)}) with settings inside"),
        (b"lr: 3", f"unknown section 'lr'; there are {', '.join(SECTIONS)}"),
        (b"train: 3", "section train should hold settings, not 3"),
        (b"a: [", "is not YAML"),
        (b"train: {lr: 1}\ntrain: {lr: 2}", "is not YAML ('train' is there twice"),
        (b"train: {lr: 1, lr: 2}", "is not YAML ('lr' is there twice"),
        (b"train: &a {sae: *a}", "is not YAML"),
        (b"[" * 1500, "is not YAML"),
        (b"train: {steps: " + b"9" * 5000 + b"}", "is not YAML"),
        (b"a:\tb: c", "is not YAML"),
        (b"!!python/object/apply:os.getcwd []", "is not YAML"),
        (b"\xff\xfe\x00\xd8", "is not UTF-8 text"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(SaeError) as caught:
        train(file=file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SaeError, match=r"file = .*none\.yaml: cannot be read \(No such file or directory\)"):
        train(file=tmp_path / "none.yaml")


def test_a_preset_that_is_not_there() -> None:
    with pytest.raises(SaeError, match=f"preset = huge: no such preset; there are {', '.join(presets())}"):
        train(preset="huge")


def stages() -> dict[str, type[BaseModel]]:
    """The settings of every stage."""
    from sae.pipeline.analyses.analysis import AnalyzeConfig
    from sae.pipeline.decompose.config import LocalConfig
    from sae.pipeline.evaluate.stage import EvalConfig
    from sae.pipeline.explain.config import ExplainConfig
    from sae.pipeline.harvest.sources.language_model import HarvestConfig
    from sae.pipeline.harvest.sources.synthetic import SyntheticConfig
    from sae.pipeline.interpret.features import FeaturesConfig
    from sae.pipeline.matching.config import MatchConfig
    from sae.pipeline.probing.config import ProbeConfig
    from sae.pipeline.steering.config import SteerConfig
    from sae.pipeline.studies.study import settings
    from sae.pipeline.tokenize.stage import TokenizeConfig
    from sae.pipeline.train.stage import TrainConfig

    return {
        "tokenize": TokenizeConfig, "harvest": HarvestConfig, "synthesize": SyntheticConfig, "train": TrainConfig,
        "decompose": LocalConfig,
        "eval": EvalConfig, "report": FeaturesConfig, "analyze": AnalyzeConfig, "probe": ProbeConfig,
        "match": MatchConfig, "steer": SteerConfig,
        "explain": ExplainConfig,
        "study": settings(),
    }  # fmt: skip


def test_every_preset_is_valid_for_every_stage() -> None:
    from sae.pipeline.harvest.sources.toy import ToyConfig

    assert {"tiny", "gpt2"} <= set(presets())
    assert set(stages()) == set(SECTIONS)
    for name in presets():
        for section, settings in stages().items():
            kinds = (settings, ToyConfig) if section == "synthesize" else (settings,)
            assert isinstance(resolve(section, kinds, preset=name), kinds)


def test_the_gpt2_preset_writes_the_defaults_out() -> None:
    """Its first line says so."""
    assert "These are the defaults, written out." in (configs.FOLDER / "gpt2.yaml").read_text()
    for section, settings in stages().items():
        assert resolve(section, settings, preset="gpt2") == settings()


def test_every_setting_says_what_it_is() -> None:
    """The description of a field is its help."""
    for settings in stages().values():
        for name, field in settings.model_fields.items():
            inner = isinstance(field.default, BaseModel)
            assert field.description or inner, f"{settings.__name__}.{name}"
