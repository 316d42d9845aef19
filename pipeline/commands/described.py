"""Options that give a setting: what they mean and default to is said once, in the setting's class.

It is read from the text of that class: importing one takes the seconds that torch takes, and `--help` has none.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import typer

from sae.pipeline.commands.voice import DECLARED, typed
from sae.pipeline.commands.words import AMOUNT, LIST, amount

PIPELINE = Path(__file__).parents[1]
CLASSES = {  # folder and names of the classes that hold the settings below a path
    "tokenize": ("tokenize", ["TokenizeConfig"]),
    "harvest": ("harvest", ["HarvestConfig", "TableConfig", "SourceConfig"]),
    "synthesize": ("harvest", ["SyntheticConfig", "SourceConfig"]),
    "synthesize.presence": ("harvest", ["Groups", "Independent"]),
    "train": ("train", ["TrainConfig"]),
    "train.sae": ("saes", ["Config", "FixedKConfig"]),
    "train.align": ("train", ["AlignConfig"]),
    "eval": ("evaluate", ["EvalConfig"]),
    "report": ("interpret", ["FeaturesConfig"]),
}
STUDIES = f"{__package__.rpartition('.')[0]}.studies"
METAVARS = {
    "bool": "", "int": "N", "float": "X", "str": "NAME", "list of int": f"N{LIST}", "list of float": f"X{LIST}",
    "list of str": f"NAME{LIST}",
}  # fmt: skip


class Described(NamedTuple):
    """A setting as its class has it: the text of its type, its default, what it means."""

    annotation: str
    default: Any
    description: str

    @property
    def kind(self) -> str:
        """What it holds: bool, int, float or str, or a list of int, float or str. Names of other types are str."""
        plain = self.annotation.removeprefix("Annotated[").removesuffix(" | None")
        listed = plain.startswith("tuple[")
        item = re.split(r"\W", plain.removeprefix("tuple["))[0].lower()
        known = next((kind for kind in ("bool", "int", "float") if item.endswith(kind)), "str")
        return f"list of {known}" if listed else known


def described(path: str) -> Described:
    """What the class of a setting says of it, as train.sae.k. Raises KeyError for a path that is no setting's."""
    owner, _, name = path.rpartition(".")
    if owner.startswith("study."):
        return {f"study.{study.name}": study.settings for study in studies()}[owner][name]
    folder, classes = CLASSES[owner]
    for kind in classes:
        if name in (fields := _fields(folder, kind)):
            return fields[name]
    raise KeyError(path)


class DescribedStudy(NamedTuple):
    """A study as its class has it: its name, its docstring, which options say something of its dictionaries."""

    name: str
    help: str
    dictionary: tuple[str, ...]
    settings: dict[str, Described]


def studies() -> list[DescribedStudy]:
    """Every study: the classes under `@register` in the folder of studies, and those registered elsewhere."""
    found = [_study(node) for path in (PIPELINE / "studies").glob("*.py") for node in _registered(path)]
    if (imported := sys.modules.get(f"{STUDIES}.study")) is not None:
        elsewhere = [kind for kind in imported.STUDIES.values() if kind.__module__.rpartition(".")[0] != STUDIES]
        found += [_study(ast.parse(dedent(inspect.getsource(kind))).body[0]) for kind in elsewhere]
    return sorted(found, key=lambda study: study.name)


def _registered(path: Path) -> Iterator[ast.ClassDef]:
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef) and "register" in map(ast.unparse, node.decorator_list):
            yield node


def _study(node: ast.stmt) -> DescribedStudy:
    assert isinstance(node, ast.ClassDef)
    said = {ast.unparse(one.targets[0]): one.value for one in node.body if isinstance(one, ast.Assign)}
    dictionary = ast.literal_eval(said["dictionary"]) if "dictionary" in said else ("arch", "k", "d_sae")
    return DescribedStudy(ast.literal_eval(said["name"]), ast.get_docstring(node) or "", dictionary, _fields_of(node))


def option(path: str, flag: str | None = None, *, metavar: str | None = None, unsaid: str | None = None) -> Any:
    """The option that gives a setting.

    flag: where it is not called as the setting. unsaid: what holds without it, where that is not the setting's default.
    """
    setting = described(path)
    name = DECLARED.setdefault(path, flag or "--" + path.rpartition(".")[2].replace("_", "-"))
    return typer.Option(
        name, metavar=metavar or METAVARS[setting.kind], show_default=False, help=_help(setting, unsaid)
    )


def study_option(study: str, name: str, setting: Described) -> Any:
    """The option that gives a setting of a study. A flag turns its setting into what it is not by default."""
    negative = "no-" if setting.default is True else ""
    flag = DECLARED.setdefault(f"study.{study}.{name}", f"--{negative}{name.replace('_', '-')}")
    text = _help(setting).partition(" Default: ")[0] if setting.kind == "bool" else _help(setting)
    unsaid = False if setting.kind == "bool" else None
    return typer.Option(unsaid, flag, metavar=METAVARS[setting.kind], show_default=False, help=text)


def count_option(path: str) -> Any:
    """The option that gives a setting which is an amount, as people write it."""
    setting = described(path)
    name = DECLARED.setdefault(path, "--" + path.rpartition(".")[2].replace("_", "-"))
    return typer.Option(name, parser=amount, metavar="N", show_default=False, help=f"{_help(setting)} {AMOUNT}")


def _help(setting: Described, unsaid: str | None = None) -> str:
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


@cache
def _fields(folder: str, kind: str) -> dict[str, Described]:
    """The settings of a class that have a plain default and are described in it."""
    (text,) = _texts(folder, kind)
    (node,) = ast.parse(text).body
    assert isinstance(node, ast.ClassDef)
    return _fields_of(node)


def _fields_of(node: ast.ClassDef) -> dict[str, Described]:
    found = {}
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(one.value, ast.Call):
            said = {key.arg: key.value for key in one.value.keywords}
            if one.value.args and isinstance(said.get("description"), ast.Constant):
                default, description = one.value.args[0], said["description"]
                if isinstance(default, ast.Constant | ast.Tuple):
                    plain = ast.literal_eval(default), ast.literal_eval(description)
                    found[one.target.id] = Described(ast.unparse(one.annotation), *plain)
    return found


def _texts(folder: str, kind: str) -> Iterator[str]:
    """The text of a class, from the one file of a folder of `pipeline` that has it."""
    for path in sorted((PIPELINE / folder).rglob("*.py")):
        if found := re.search(rf"^class {kind}\(.*?(?=^\S)", path.read_text("utf-8") + "#", re.M | re.S):
            yield found[0]
