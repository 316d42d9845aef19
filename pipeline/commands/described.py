"""Options that give a setting: what they mean and default to is said once, in the setting's class.

It is read from the text of that class: importing one takes the seconds that torch takes, and `--help` has none.
"""

import re
from collections.abc import Callable
from inspect import Parameter
from typing import Annotated, Any, NamedTuple

import typer

from sae.pipeline.commands.voice import DECLARED, typed
from sae.pipeline.commands.words import AMOUNT, LIST, amount, numbers, several, whole
from sae.pipeline.declared import Declared, Setting, declared, registered

CLASSES = {  # room and names of the classes that hold the settings below a path
    "tokenize": ("tokenize", ["TokenizeConfig"]),
    "harvest": ("harvest", ["HarvestConfig", "TableConfig", "SourceConfig", "SeriesConfig"]),
    "synthesize": ("harvest", ["SyntheticConfig", "SourceConfig", "ToyConfig"]),
    "synthesize.presence": ("worlds", ["Groups", "Independent", "Hierarchy"]),
    "train": ("train", ["TrainConfig"]),
    "train.sae": ("saes", ["Config", "FixedKConfig", "CoefficientConfig"]),
    "train.align": ("train", ["AlignConfig"]),
    "decompose": ("decompose", ["LocalConfig", "DecomposeConfig", "ToyConfig"]),
    "eval": ("evaluate", ["EvalConfig"]),
    "report": ("interpret", ["FeaturesConfig", "StatisticsConfig"]),
    "analyze": ("analyses", ["AnalyzeConfig"]),
    "probe": ("probing", ["ProbeConfig"]),
    "match": ("matching", ["MatchConfig"]),
    "steer": ("steering", ["SteerConfig"]),
    "explain": ("explain", ["ExplainConfig"]),
}
CHOICES = {  # options that choose the class of further settings: no single class describes them
    "train.sae.arch": "Architecture; `sae list` explains each. Default: topk.",
    "harvest.source": "Where rows come from, with settings by `--set`; `sae list` explains each. Default: language_model.",
    "synthesize.presence.mode": "groups: a row has some members of one group of features; iid: each feature is in a row "
    "or not, independently; hierarchy: features have parents, rarities and correlations. Default: groups.",
}
FLAGS = {"train.align.by": "align"}  # options that are not called as their setting
UNSAID = {  # what holds without an option, where that is not the setting's default, or not that of every class
    "train.align.by": "nothing",
    "train.sae.k": "32; all for vsae_iso, vsae_mix and vsae_multi",
    "train.sae.target_l0": "32, 4 for molt; none for hybrid, shifted_relu, vsae_iso, vsae_mix and vsae_multi",
    "decompose.matrices": "every one of the MLP",
    "decompose.components": "256; 20 of toys",
    "decompose.batch": "1024 rows, 8 contexts, 2048 samples of toys",
}
AMOUNTS = ("rows", "tokens", "texts")  # settings that people write as 300k, 10M or all
METAVARS = {
    "bool": "", "int": "N", "float": "X", "str": "NAME", "list of int": f"N{LIST}", "list of float": f"X{LIST}",
    "list of str": f"NAME{LIST}",
}  # fmt: skip
TYPES: dict[str, Any] = {"bool": bool, "int": int | None, "float": float | None}
READERS: dict[str, Callable[[str, str | None], Any]] = {
    "list of int": whole, "list of float": numbers, "list of str": several,
}  # fmt: skip


class SettingOption(NamedTuple):
    """An option that gives a setting: the parameter that typer makes it of, and the reader of what was typed."""

    parameter: Parameter
    read: Callable[[Any], Any]


def described(path: str, of: str | None = None) -> Setting:
    """Return what the class of a setting says of it, as train.sae.k. Raises KeyError for a path that is no setting's.

    of: the class that is asked first, where several have settings of the same path.
    """
    owner, _, name = path.rpartition(".")
    if owner.startswith("study."):
        return studies()[owner.removeprefix("study.")].settings[name]
    room, classes = CLASSES[owner]
    for kind in sorted(classes, key=lambda kind: kind != of):
        if name in (settings := declared(f"sae.pipeline.{room}", kind).settings):
            return settings[name]
    raise KeyError(path)


def studies() -> dict[str, Declared]:
    """Return every study by its name."""
    return registered("sae.pipeline.studies.study.STUDIES")


def option(said: str, of: str | None = None) -> SettingOption:
    """Make the option of a setting, as `train.lr`; with another word for its value than usual, as `report.top COUNT`.

    The option of a flag turns its setting into what it is not by default. `of` is that of `described`.
    """
    path, _, metavar = said.partition(" ")
    name = FLAGS.get(path, path.rpartition(".")[2])
    flag = f"--{name.replace('_', '-')}"
    if path in CHOICES:
        return _option(name, str | None, typer.Option(flag, metavar="NAME", help=CHOICES[path]))
    setting = described(path, of)
    text = _help(setting, UNSAID.get(path))
    if setting.kind == "bool":
        flag = f"--no-{flag[2:]}" if setting.default is True else flag
        text = text.partition(" Default: ")[0]
    elif name in AMOUNTS:
        text = f"{text} {AMOUNT}"
    DECLARED.setdefault(path, flag)
    made = typer.Option(
        flag, metavar=metavar or ("N" if name in AMOUNTS else METAVARS[setting.kind]), show_default=False, help=text,
        parser=amount if name in AMOUNTS else None,
    )  # fmt: skip
    if setting.kind == "bool":
        return _option(name, bool, made, False, lambda given: not setting.default if given else None)
    if reader := READERS.get(setting.kind):
        return _option(name, str | None, made, None, lambda given: reader(flag, given))
    return _option(name, str | None if name in AMOUNTS else TYPES.get(setting.kind, str | None), made)


def _option(
    name: str, kind: Any, option: Any, default: Any = None, read: Callable[[Any], Any] = lambda given: given
) -> SettingOption:
    parameter = Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
    return SettingOption(parameter, read)


def _help(setting: Setting, unsaid: str | None = None) -> str:
    """A sentence and the default, which words of the description stand for where it is None."""
    text, _, none = re.sub(r"; (?:null|unset): ", "\0", setting.description).partition("\0")
    default = none if setting.default is None else shown(setting.default)
    first = re.split(r"\W", text)[0]
    text = text if first == default else text[:1].upper() + text[1:]
    return typed(f"{text}. Default: {unsaid or default}.")


def shown(default: Any) -> str:
    """A default as one would type it."""
    if default is None or isinstance(default, bool):
        return "null" if default is None else str(default).lower()
    if isinstance(default, tuple):
        return ",".join(map(shown, default))
    if isinstance(default, int) and default and default % 1_000_000 == 0:
        return f"{default // 1_000_000}M"
    return f"{default:g}" if isinstance(default, float) else str(default)
