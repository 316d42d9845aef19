"""What is written about the tool is true of it: help, README, changelog."""

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel
from support.pages import PAGES, README, typed

from sae import configs
from sae.pipeline.analyses.analysis import AnalyzeConfig
from sae.pipeline.commands import voice
from sae.pipeline.commands.app import app
from sae.pipeline.commands.described import UNSAID, described
from sae.pipeline.commands.registry_listing import every_setting
from sae.pipeline.commands.voice import DECLARED
from sae.pipeline.decompose import config as decompose
from sae.pipeline.evaluate.stage import EvalConfig
from sae.pipeline.explain.config import ExplainConfig
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.harvest.sources.series import SeriesConfig
from sae.pipeline.harvest.sources.synthetic import SyntheticConfig
from sae.pipeline.harvest.sources.table import TableConfig
from sae.pipeline.harvest.sources.toy import ToyConfig
from sae.pipeline.interpret.features import FeaturesConfig
from sae.pipeline.language_model import SITES
from sae.pipeline.matching.config import MatchConfig
from sae.pipeline.probing.config import ProbeConfig
from sae.pipeline.saes import ARCHITECTURES
from sae.pipeline.steering.config import SteerConfig
from sae.pipeline.studies.study import settings as study_settings
from sae.pipeline.tokenize.stage import TokenizeConfig
from sae.pipeline.train.stage import TrainConfig
from scripts import docs_reference

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = {"README.md": README, **PAGES}
STAGES: dict[str, type[BaseModel]] = {
    "tokenize": TokenizeConfig, "harvest": HarvestConfig, "train": TrainConfig, "eval": EvalConfig,
    "report": FeaturesConfig,
}  # fmt: skip
EVERY = {
    **STAGES, "synthesize": SyntheticConfig, "decompose": decompose.LocalConfig, "analyze": AnalyzeConfig,
    "probe": ProbeConfig,
    "match": MatchConfig, "steer": SteerConfig, "explain": ExplainConfig, "study": study_settings(),
}  # fmt: skip
OTHERS = {  # classes told apart by a tag
    "harvest": [TableConfig, SeriesConfig], "synthesize": [ToyConfig],
    "decompose": [decompose.LiveConfig, decompose.ToyConfig],
}  # fmt: skip


TREE: Any = typer.main.get_command(app)


def commands(group: Any = None, prefix: str = "sae") -> Iterator[tuple[str, Any]]:
    """Every command as it is typed, and what typer made of it."""
    for name, command in (group or TREE).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


COMMANDS = dict(commands())


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The values a command line gives its command, without running it. Raises typer's error where it is wrong."""
    command: Any = TREE
    context = command.make_context("sae", arguments)
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return dict(context.params)


def test_there_is_something_to_look_at() -> None:
    assert {"sae tokenize", "sae harvest", "sae train", "sae eval", "sae cache ls", "sae cache rm"} <= set(COMMANDS)
    assert sum(len(typed(text, "sae")) for text in WRITTEN.values()) > 100
    page = (
        "```console\n$ A=1 sae x \\\n  --y 'a b' && sae z # c\nout\n```\n```python\nsae no\n```\n```bash\nsae w\n```\n"
    )
    assert typed(page, "sae") == [["x", "--y", "a b"], ["z"], ["w"]]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    first, *rest = (command.help or "").strip().split("\n\n")
    assert len(first) > 10 and first.endswith((".", "`"))
    assert name in "\n".join(rest), "an example"
    for param in command.params:
        assert param.help and param.help.strip().endswith(".") and "Default: ." not in param.help, param.name
        assert all("_" not in option for option in param.opts if option.startswith("--"))


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_the_help_are_right(name: str) -> None:
    text = COMMANDS[name].help
    examples = re.findall(r"^    (sae .*)$", text, re.MULTILINE) + re.findall(r"`(sae [^`]*)`", text)
    assert examples
    for example in examples:
        parsed(shlex.split(example, comments=True)[1:])


def test_everything_reads_the_same_everywhere() -> None:
    """An option means one thing: with one help, one variable and one default wherever it is, but for the listed."""
    own = {
        "tokens", "rows", "seed", "activations", "workers", "store", "stores", "model", "name", "source", "tokenizer",
        "site", "layer", "features", "probability", "steps", "codec", "target", "out", "input_", "resume", "lr",
        "batch", "hidden", "components", "ks", "what", "repository", "names", "mode", "top", "latents",
    }  # fmt: skip
    seen: dict[str, set[tuple[Any, ...]]] = {}
    for command in COMMANDS.values():
        for param in command.params:
            seen.setdefault(param.name, set()).add((param.help, param.envvar, str(param.default), tuple(param.opts)))
    assert {name for name, meanings in seen.items() if len(meanings) > 1} <= own
    assert all("json_" in {p.name for p in c.params} or "json" in {p.name for p in c.params} for c in COMMANDS.values())


def in_its_class(path: str) -> list[tuple[str, Any]]:
    """The fields that a setting is in its stage's class, one for every class of a union that has it, and its name."""
    section, *way, name = path.split(".")
    models = [EVERY[section], *OTHERS.get(section, [])]
    for key in way:
        models = [kind for one in models if key in one.model_fields for kind in configs.inner_models(one, key)]
    return [(one.__name__, one.model_fields[name]) for one in models if name in one.model_fields]


@pytest.mark.parametrize("path", sorted(DECLARED))
def test_options_say_what_the_class_of_their_setting_says(path: str) -> None:
    """They are made of the text of that class; this is the class itself."""
    fields = in_its_class(path)
    assert fields
    helps = {p.help for c in COMMANDS.values() for p in c.params if DECLARED[path] in p.opts}
    for kind, field in fields:
        read = described(path, of=kind if path.split(".")[:-1] in (["synthesize"], ["harvest"]) else None)
        assert field.description == read.description
        assert field.default == read.default or path in UNSAID
        text = voice.typed(re.split("; (?:null|unset): ", read.description)[0])[1:]
        flag = read.kind == "bool"
        assert any(text in (help or "") and (flag or "Default: " in (help or "")) for help in helps)


def test_every_setting_is_listed() -> None:
    listed = {entry["name"]: entry for entry in every_setting()}
    assert set(DECLARED) <= set(listed) and all(entry["help"] for entry in listed.values())
    for section, kind in EVERY.items():
        assert all(any(f"{name}.".startswith(f"{section}.{key}.") for name in listed) for key in kind.model_fields)


def test_the_gpt2_preset_has_every_key() -> None:
    """As the help of `--config` says; that the values are the defaults is tested beside the settings."""
    text = (configs.FOLDER / "gpt2.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"^(\w+):$", text, re.MULTILINE)) == set(STAGES)
    for section, kind in STAGES.items():
        part = re.split(r"^\w", text.split(f"{section}:\n")[1], flags=re.MULTILINE)[0]
        assert set(re.findall(r"^  (\w+):", part, re.MULTILINE)) == set(kind.model_fields), section


@pytest.mark.parametrize("page", sorted(set(WRITTEN) - {"docs/extending.md"}))  # it types what the page adds
def test_every_command_on_a_page_is_right(page: str) -> None:
    """It parses, its settings exist and its architecture does; what it does is another test's."""
    for arguments in typed(WRITTEN[page], "sae"):
        values = parsed(arguments)
        if (overrides := values.get("set_")) and arguments[0] in STAGES:
            arch = {"sae": {"arch": values["arch"]}} if values.get("arch") else {}
            configs.resolve(arguments[0], STAGES[arguments[0]], overrides=list(overrides), flags=arch)
        assert values.get("arch") in {None, *ARCHITECTURES}, arguments


def test_the_settings_named_on_pages_exist() -> None:
    listed = {entry["name"] for entry in every_setting()}
    sections = "|".join(configs.SECTIONS)
    for page in sorted(set(WRITTEN) - {"docs/extending.md"}):
        for name in re.findall(rf"`((?:{sections})\.[a-z0-9_.]+)(?: = [^`]*)?`", WRITTEN[page]):
            if not name.endswith((".py", ".json")):
                assert name in listed or any(other.startswith(f"{name}.") for other in listed), f"{page}: {name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    assert any(re.search(rf"\b{re.escape(name)}\b", text) for text in WRITTEN.values())


def test_the_readme_is_one_page_and_counts_right() -> None:
    assert len(README.splitlines()) < 150
    assert f"[{len(ARCHITECTURES)} architectures]" in README
    assert f"{['seven', 'eight', 'nine', 'ten'][len(SITES) - 7]} sites" in README


def test_every_make_target_on_a_page_exists() -> None:
    targets = re.findall(r"^([\w./$()-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = [target.replace("$(VENV)", ".venv") for target in targets]
    every = "\n".join(WRITTEN.values())
    wanted = {words[0] for words in typed(every, "make")} | set(re.findall(r"`make ([\w-]+)", every))
    assert {"demo", "test", "docs", "lock", "wheel"} <= wanted <= set(targets)


@pytest.mark.parametrize("page", WRITTEN)
def test_links_lead_somewhere(page: str) -> None:
    """To a file, or to a page that is made when the site is built; mkdocs looks at anchors, in tests/test_site.py."""
    for target in re.findall(r"\]\(([^)#\s]+)", WRITTEN[page]):
        if not re.match(r"\w+:", target):
            path = (ROOT / page).parent.joinpath(target).resolve()
            made = path in {ROOT / "docs" / name for name in docs_reference.PAGES}
            assert path.exists() or made, target


def test_the_changelog_is_kept() -> None:
    """Keep a Changelog: unreleased first, then versions with dates, newest first, in the known groups."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.startswith("# Changelog\n") and "keepachangelog.com" in text and "semver.org" in text
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert released and all(released)
    found = [(tuple(map(int, match.groups()[:3])), match[4]) for match in released if match]
    assert found == sorted(found, reverse=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert ".".join(map(str, found[0][0])) == project["version"]
    groups = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    """No absolute path of a home, a mount or a work folder in what is kept."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = "|".join(["home", "root", "Users", "work", "mnt", "opt", "private", "workspace"])
    machine = re.compile(rf"(?<![\w.~:/$}}])/(?:{folders})/\w".encode())
    found = []
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and b"\0" not in (data := path.read_bytes()):
            found += [f"{name}: {line.decode(errors='replace')}" for line in data.splitlines() if machine.search(line)]
    assert found == []
