"""Results that several commands show in the same way: stores, runs, damage."""

import re
from collections.abc import Callable
from typing import Any

from sae.cache.errors import DamagedStore, SaeError

REMEDY = "; `verify(repair=True)` makes it again, `remove()` removes the store"


def show_stores(
    stores: list[Any], json: bool, name: str, extra: Callable[[Any], int], about: dict[str, Any] | None = None
) -> None:
    """The stores a stage made, with one figure more, and what there is to say about them all: a table or JSON."""
    from sae.cache import catalogue
    from sae.pipeline.commands import console

    if json:
        listed = [{**catalogue.entry(store).as_json(), name: extra(store)} for store in stores]
        console.as_json({"stores": listed, **(about or {})})
        return
    rows = [[s.key, s.n_rows, extra(s), console.size(s.manifest.stored_bytes)] for s in stores]
    console.table("stores", ["key", "rows", name, "size"], rows)


def show_runs(rows: list[dict[str, Any]], title: str, json: bool, **files: str) -> None:
    """A comparison as a table without its empty columns, or as JSON."""
    from sae.pipeline.commands import console
    from sae.pipeline.metrics.figures import amounts
    from sae.pipeline.report.compare import unlike

    if json:
        console.as_json({"runs": rows, **files})
        return
    alike = {one.key for one in amounts()} - {one.key for one in unlike(rows)}
    filled = [key for key in rows[0] if key not in alike and any(row[key] is not None for row in rows)]
    console.table(title, filled, [[row[key] for key in filled] for row in rows])
    for what, path in files.items():
        console.say(f"{what}: {path}")


def report_damage(damage: list[str]) -> None:
    """Raise DamagedStore with the last of what is wrong, after a line of stderr for each of the others."""
    raise_last([DamagedStore(line) for line in damage])


def raise_last(problems: list[SaeError]) -> None:
    """Raise the last of some errors, after a line of stderr for each of the others."""
    from sae.pipeline.commands import console

    for error in problems:
        error.args = (re.sub(r"; `verify\(.*", REMEDY, str(error)),)
    for error in problems[:-1]:
        console.complain(str(error))
    if problems:
        raise problems[-1]
