"""The pages of the site that nobody writes: made of the code's own declarations when mkdocs builds (its `hooks`).

Commands and options come from the command line, settings from their classes, architectures, metrics and other names
from the registries, the Python door from the docstrings of the public list. Pages that lie elsewhere in the repository
are taken in as they are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import sae

ROOT = Path(__file__).resolve().parents[1]
TAKEN_IN = {"benchmarks.md": "bench/RESULTS.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
HEADINGS = {
    "codecs": "Codecs", "formats": "Formats of other tools", "sites": "Sites", "studies": "Studies",
    "analyses": "Analyses", "sources": "Sources of text", "row_sources": "Sources of rows", "presets": "Presets",
}  # fmt: skip
ENDS = {"low": "lower", "high": "higher", None: ""}


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: add the pages."""
    from mkdocs.structure.files import File

    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files


def commands() -> str:
    """Every command: its help, its examples, its options."""
    import typer.main

    from sae.pipeline.commands.app import app

    return "# Commands\n\n" + "\n".join(_commands(typer.main.get_command(app), "sae"))


def settings() -> str:
    """Every setting by section, as a YAML file, `--set` and keyword arguments in Python have them."""
    from sae import configs
    from sae.pipeline.commands.registry_listing import every_setting

    every = every_setting()
    parts = [
        "# Settings\n\nIn a YAML file a section is a mapping; on the command line write `--set train.lr=3e-4`, in "
        "Python `lab.train(..., lr=3e-4)`. `sae list --settings` shows the same."
    ]
    for section in configs.SECTIONS:
        rows = [
            [_code(one["name"]), one["type"], _listed(one["default"]), one["help"]]
            for one in every
            if one["name"].startswith(f"{section}.")
        ]
        parts.append(f"## {section}\n\n{_table(['setting', 'type', 'default', 'what it is'], rows)}")
    return "\n\n".join(parts)


def architectures() -> str:
    """Every architecture: what it computes, what it is called in Python, the settings that not every other one has."""
    from sae.pipeline.commands.described import shown
    from sae.pipeline.commands.registry_listing import kind_of
    from sae.pipeline.saes import ARCHITECTURES
    from sae.pipeline.saes.config import Config

    parts = ["# Architectures\n\nThe settings that all have are under [`train.sae`](settings.md#train)."]
    for name, kind in sorted(ARCHITECTURES.items()):
        fields = kind.config_type.model_fields
        own = {key: field for key, field in fields.items() if key not in Config.model_fields and field.description}
        rows = [
            [
                _code(key),
                kind_of(field),
                _listed(shown(field.get_default(call_default_factory=True))),
                field.description,
            ]
            for key, field in own.items()
            if key != "arch"
        ]
        parts.append(f"## {name}\n\n{_prose(kind)}\n\nIn Python `sae.{kind.__name__}`.")
        parts += [_table(["setting", "type", "default", "what it is"], rows)] if rows else []
    return "\n\n".join(parts)


def metrics() -> str:
    """Every metric: what it needs, its figures, what they mean and which end of them is better."""
    from sae.pipeline.metrics.figures import declared

    parts = [
        "# Metrics\n\nFigures stand under their key in `eval.json`, in `sae eval --json` and in the columns of tables."
    ]
    for one in declared():
        rows = [[_code(figure.key), figure.title, figure.meaning, ENDS[figure.better]] for figure in one.figures]
        needs = ", ".join(one.needs)
        parts.append(f"## {one.name}\n\n{one.help}. Needs: {needs}.")
        parts.append(_table(["figure", "title", "what it is", "better"], rows))
    return "\n\n".join(parts)


def choices() -> str:
    """What else there is to choose from by name."""
    from sae.pipeline.commands.registry_listing import choices as listed

    found = listed([])
    parts = ["# Names to choose from\n\n`sae list` shows the same."]
    for kind, title in HEADINGS.items():
        rows = [[_code(one["name"]), one["help"]] for one in found[kind]]
        parts.append(f"## {title}\n\n{_table(['name', 'what it is'], rows)}")
    return "\n\n".join(parts)


def python() -> str:
    """The public list, for mkdocstrings to fill in from the docstrings."""
    parts = [
        "# The Python door\n\n[From Python](../python.md) teaches it; settings of architectures are "
        "[here](architectures.md)."
    ]
    homes = {name: home for home, names in sae._HOMES.items() for name in names}
    for name in dir(sae):
        if name in homes:
            parts.append(f"## `sae.{name}` {{ #sae.{name} }}\n\n::: {homes[name]}.{name}")
    return "\n\n".join(parts)


def taken_in(path: str) -> str:
    """A page that lies elsewhere, with its links as they are from the site's root."""
    text = (ROOT / path).read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    for page, source in TAKEN_IN.items():
        text = text.replace(f"]({source})", f"]({page})")
    return text


PAGES = {
    "reference/commands.md": commands,
    "reference/settings.md": settings,
    "reference/architectures.md": architectures,
    "reference/metrics.md": metrics,
    "reference/choices.md": choices,
    "reference/python.md": python,
    **{page: partial(taken_in, source) for page, source in TAKEN_IN.items()},
}


def _commands(command: Any, name: str) -> Iterator[str]:
    """A command and those below it."""
    yield f"## {name}\n\n{_help(command.help or '')}\n"
    panels: dict[str, list[list[str]]] = {}
    for param in command.params:
        if not getattr(param, "hidden", False) and getattr(param, "help", None):
            panel = getattr(param, "rich_help_panel", None) or (
                "Options" if param.opts[0].startswith("-") else "Arguments"
            )
            panels.setdefault(panel, []).append([_option(param), param.help])
    for panel, rows in panels.items():
        yield _table([panel.lower(), "what it is"], rows) + "\n"
    for below, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{name} {below}")


def _option(param: Any) -> str:
    """An option as it is typed, with the word for its value and the variable that gives it, too."""
    if not param.opts[0].startswith("-"):
        return _code(param.name.upper())
    word = "" if getattr(param, "is_flag", False) else f" {param.metavar or ''}".rstrip()
    flags = " ".join(_code(flag + word) for flag in param.opts)
    variable = param.envvar if isinstance(param.envvar, str) else ""
    return f"{flags} {_code(variable)}" if variable else flags


def _help(text: str) -> str:
    """Help with its indented examples as blocks of the shell."""
    found = []
    for part in inspect.cleandoc(text).split("\n\n"):
        lines = part.splitlines()
        if lines and all(line.startswith("    ") for line in lines):
            typed = "\n".join(f"$ {line.strip()}" for line in lines)
            found.append(f"```console\n{typed}\n```")
        else:
            found.append(part)
    return "\n\n".join(found)


def _prose(kind: type) -> str:
    """The docstring of a class; what is indented in it, formulas, as a block."""
    parts = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    blocks = [f"```text\n{inspect.cleandoc(part)}\n```" if part.startswith("    ") else _plain(part) for part in parts]
    return "\n\n".join(blocks)


def _plain(text: str) -> str:
    """Text in which a star and an underscore are only that."""
    return re.sub(r"`[^`]*`|([*_<|])", lambda found: f"\\{found[1]}" if found[1] else found[0], text)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _listed(default: str) -> str:
    """A default; a long list may be broken between its items."""
    return _code(default.replace(",", ", "))


def _table(headings: list[str], rows: Iterable[list[str]]) -> str:
    """A table; a line that a cell has in it ends a table, and a bar a cell."""
    lines = [headings, ["---"] * len(headings), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    text = " ".join(text.split())
    return text if text.startswith("`") and text.count("`") == 2 and text.endswith("`") else _plain(text)
