"""Messages of the library in the words of the command line.

The library names what can be set and called (`cache/errors.py` says how); here that becomes what can be typed: a setting
an option, or `--set` where it has none; a call a command.
"""

import re
import shlex
import sys
from typing import Any

DECLARED: dict[str, str] = {}  # option by the path of its setting: {"train.sae.k": "--k"}
COMMANDS = {  # of calls that are not called as their command
    "adopt": "import",
    "choices": "list",
    "evaluate": "eval",
    "gc": "cache gc",
    "remove": "cache rm",
    "stores": "cache ls",
    "verify": "cache verify",
}
OPTIONS = {  # of arguments that are not called as their option
    "cross_entropy": "no-ce",
    "file": "config",
    "overrides": "set",
}
UNSAID = ("True", "...")  # values that are not typed


def typed(line: str) -> str:
    """A line of the library as the command line says it: `codec = int9: no such codec` of the option `--codec int9`."""
    head = re.match(r"([a-z][a-z0-9_]*) = (?:(?:True|\.\.\.)(?=:))?", line)
    if head and (option := _option(head[1])) in options():
        valued, here = head[0].endswith("= "), options_here() if sys.argv[1:2] == ["study"] else set()
        setting = f"train.{head[1]}"  # of what a study trains
        if valued and here and option not in here and DECLARED.get(setting) == option:
            option = f"--set {setting}="
        line = f"{option}{' ' if valued and not option.endswith('=') else ''}{line[head.end() :]}"
    line = re.sub(r"`([a-z]+)\(([^`]*)\)`", lambda found: f"`{_command(found[1], found[2])}`", line)
    return re.sub(r"`([a-z][a-z0-9_.]*)(?: = ([^`]+))?`", lambda found: _setting(found[1], found[2]), line)


def options_here() -> set[str]:
    """Return the options of the command that was typed."""
    from sae.pipeline.commands.app import tree

    command = tree()
    for word in sys.argv[1:]:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
    return {option for param in command.params for option in param.opts}


def options() -> set[str]:
    """Return every option there is, of any command."""
    from sae.pipeline.commands.app import tree  # which says what goes wrong through this module

    found: set[str] = set()
    waiting: list[Any] = [tree()]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        found |= {option for param in command.params for option in param.opts}
    return found


def _option(name: str) -> str:
    """The option of an argument."""
    return f"--{OPTIONS.get(name, name).replace('_', '-')}"


def _setting(name: str, value: str | None) -> str:
    """Return how a setting is given, by its own option or by `--set`; without a value, how it is called."""
    if "." in name and name not in DECLARED:
        return name if value is None else f"--set {name}={value}"
    flag = DECLARED.get(name) or _option(name)
    return flag if value in (None, "False") else f"{flag} {value}"


def _command(name: str, arguments: str) -> str:
    """A call as one types it: verify(key, repair=True) is `sae cache verify key --repair`."""
    words = ["sae", COMMANDS.get(name, name)]
    for argument in filter(None, arguments.split(", ")):
        option, equals, value = argument.rpartition("=")
        words += [_option(option)] if equals else []
        words += [] if value in UNSAID else [value if value.isupper() else shlex.quote(value)]
    return " ".join(words)
