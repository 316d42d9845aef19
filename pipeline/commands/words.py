"""The words of a command line: counts, lists, numbers; and what is no word at all."""

import math
import os
import re
from decimal import Decimal
from typing import Any

import typer
from typer.core import TyperCommand

from sae.cache.errors import SaeError
from sae.cache.printable import printable

SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
AMOUNT = "Write 500, 300k, 10M, 1e8 or all."
LARGEST = 10**15
LIST = ",..."  # ends the metavar of an option that takes a list
MOST = 10_000  # items of a list of numbers
NUMBER = re.compile(
    r"(?P<whole>[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?:_[0-9]{3})+)(?P<part>\.[0-9]+)?"
    r"(?P<power>e[0-9]{1,2})?(?P<scale>[kmgb]?)",
    re.IGNORECASE,
)


class Command(TyperCommand):
    """A command that takes no empty words, and uses no last one of several words without saying so."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            given, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for param in self.get_params(ctx):
                values = given.get(param.name or "")
                if values is None and param.envvar and (variable := os.environ.get(str(param.envvar))):
                    values = variable  # an empty one is as good as none
                self._check(ctx, param, values, order.count(param))
        return super().parse_args(ctx, args)

    def _check(self, ctx: Any, param: Any, values: Any, times: int) -> None:
        words = [
            value for value in (values if isinstance(values, list | tuple) else [values]) if isinstance(value, str)
        ]
        if not all(word.strip() for word in words):
            raise typer.BadParameter("is empty; say what is meant, or leave it out", ctx=ctx, param=param)
        if times > 1 and not param.multiple and words:
            if (param.metavar or "").endswith(LIST):
                raise typer.BadParameter("is there twice; give it once, with commas: 4,6", ctx=ctx, param=param)
            typer.echo(f"{max(param.opts, key=len)}: is there {times} times; {printable(words[-1])} counts", err=True)
        if param.type_descriptor.annotation is int:
            for word in words:
                if not re.fullmatch(r"[-+]?[0-9][0-9_]*", word):
                    raise typer.BadParameter(
                        f"{word}: input should be a valid integer, as 12 or 12_000", ctx=ctx, param=param
                    )


def amount(text: str) -> str:
    """A count as people write it: 500, 300k, 10M, 1,000,000, 1e8, 1G, or all."""
    if text == "all":
        return text
    found = NUMBER.fullmatch(text)
    value = Decimal(-1)
    if found is not None and (found["part"] is None or found["power"] or found["scale"]):  # 1.000 may be a thousand
        plain = re.sub("[_,]", "", found["whole"]) + (found["part"] or "") + (found["power"] or "")
        value = Decimal(plain) * SCALES[found["scale"].lower()]
    if not 0 <= value < LARGEST or value % 1:
        raise typer.BadParameter(f"{text}: is not a number of rows or tokens; write 500, 300k, 10M, 1e8 or all")
    return str(int(value))


def count(help: str) -> Any:
    """An option that takes an amount."""
    return typer.Option(parser=amount, metavar="N", show_default=False, help=f"{help} {AMOUNT}")


def several(option: str, text: str | None) -> list[str] | None:
    """A comma-separated list, or None where the option was not given. Raises SaeError for an item twice, or an empty one."""
    if text is None:
        return None
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise SaeError(f"{option} {text}: between two commas nothing stands; write one,another")
    return _distinct(option, text, items)


def whole(option: str, text: str | None) -> list[int] | None:
    """Whole numbers and ranges of them, 0-3,7 for 0, 1, 2, 3 and 7, in the order they stand in; None for none given.

    Raises SaeError for what is not such, for one that is there twice, and for very many.
    """
    found: list[int] = []
    for item in several(option, text) or ():
        ends = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", item)
        if ends is None:
            raise SaeError(f"{option} {item}: is not a whole number from 0 on, nor a range; write 4,6 or 0-3 or 0-3,7")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise SaeError(f"{option} {item}: goes down; write {last}-{first}")
        if len(found) + last - first >= MOST:
            raise SaeError(f"{option} {text}: that is more than {MOST:,} numbers; name fewer")
        found += range(first, last + 1)
    return None if text is None else _distinct(option, text, found)


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers from 0 on, as they stand; None for none given. Raises SaeError for what is not such, or is there twice."""
    if text is None:
        return None
    try:
        found = [float(item) if item.isascii() else math.nan for item in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 <= number < math.inf for number in found):
        raise SaeError(f"{option} {text}: write numbers from 0 on with commas between them, as 0.01,0.1,1")
    if len(set(found)) < len(found):
        raise SaeError(f"{option} {text}: a number is there twice")
    return tuple(found)


def signed(option: str, text: str | None) -> tuple[float, ...]:
    """Finite numbers in the order they stand in; none for none given. Raises SaeError for what is no such number."""
    found = []
    for item in several(option, text) or ():
        try:
            number = float(item) if item.isascii() else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise SaeError(f"{option} {item}: is not a finite number; write one as 4 or -0.5, or several as 0,1,2")
        found.append(number)
    return tuple(found)


def _distinct(option: str, text: str, items: list[Any]) -> list[Any]:
    if len(set(items)) < len(items):
        twice = next(item for item in items if items.count(item) > 1)
        raise SaeError(f"{option} {text}: {twice} is there twice")
    return items
