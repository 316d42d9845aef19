"""The figures of all metrics: names, meanings, directions. Read from the metrics' text, for importing takes torch."""

import ast
import sys
from collections.abc import Collection
from functools import cache
from pkgutil import iter_modules
from typing import Any, Literal, NamedTuple, get_args

Need = Literal["rows", "codes", "training", "model", "directions", "truth"]
"""What a metric may ask for: held-out rows and their reconstructions; the codes of these; training rows to search as
well; a language model to splice into; a direction for every latent; the features that the rows were made of."""
Better = Literal["low", "high"] | None
NEEDS: tuple[Need, ...] = get_args(Need)
OF_ROWS: frozenset[Need] = frozenset({"rows", "codes", "training"})
WITHOUT_MODEL: frozenset[Need] = OF_ROWS | {"directions"}


def available(*, model: bool, truth: bool) -> frozenset[Need]:
    """What there is to judge a dictionary of a store by, with a language model and true features or without."""
    more: tuple[tuple[Need, bool], ...] = (("model", model), ("truth", truth))
    return WITHOUT_MODEL | {need for need, is_there in more if is_there}


class Figure(NamedTuple):
    """A number that a metric tells of a dictionary, under `key` in `eval.json` and in the columns of tables.

    title: a few words for a heading or an axis. meaning: one line. better: which end of it is, where one is.
    shown: by the evaluation's own table and the report, by comparisons and studies, or both ("everywhere").
    share: whether it is shown as a percentage. amount: whether it is no result but says on how much others were judged.
    """

    key: str
    title: str
    meaning: str
    better: Better = None
    shown: Literal["everywhere", "evaluation", "studies"] = "everywhere"
    share: bool = False
    amount: bool = False


class Declared(NamedTuple):
    """What a metric says of itself."""

    name: str
    help: str
    needs: tuple[Need, ...]
    figures: tuple[Figure, ...]


def declared() -> list[Declared]:
    """Every metric: the files beside this one, and those registered elsewhere once they are. What asks least is first.

    The order is that of all tables.
    """
    found = {**_in_files()}
    if (imported := sys.modules.get(f"{__package__}.metric")) is not None:
        found |= {
            name: Declared(name, summary(kind.__doc__), kind.needs, kind.figures)
            for name, kind in imported.METRICS.items()
        }
    return sorted(found.values(), key=lambda metric: (max(map(NEEDS.index, metric.needs)), metric.name))


def figures(*, shown: Collection[str] | None = None, needs: Collection[Need] = NEEDS) -> list[Figure]:
    """The figures of the metrics that ask for nothing but `needs`, those shown in one of the places named."""
    return [
        figure
        for metric in declared()
        if {*metric.needs} <= {*needs}
        for figure in metric.figures
        if shown is None or figure.shown in shown
    ]


def compared() -> list[Figure]:
    """The results that comparisons and studies show of every dictionary."""
    return [figure for figure in figures(shown=("everywhere",)) if not figure.amount]


def amounts() -> list[Figure]:
    """The figures that say on how much a dictionary was judged."""
    return [figure for figure in figures() if figure.amount]


def evaluation_table() -> list[Figure]:
    """The figures of one evaluation, for its table: results first, then on how much they were judged."""
    return sorted(figures(shown=("everywhere", "evaluation")), key=lambda figure: figure.amount)


def better(key: str) -> Better:
    """Which end of a figure is better, where one is."""
    return _of(key)[1].better


def label(key: str) -> str:
    """What the axis of a figure is labelled. That training has a figure of the same name is why some say more."""
    metric, figure = _of(key)
    return f"{figure.title}, held-out rows" if "rows" in metric.needs else figure.title


def judged_on(key: str) -> tuple[str, ...]:
    """The keys of the amounts that a figure was judged on."""
    return ("rows", "tokens") if "model" in _of(key)[0].needs else ("rows",)


def _of(key: str) -> tuple[Declared, Figure]:
    return next((metric, one) for metric in declared() for one in metric.figures if one.key == key)


def completed(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An `eval.json` with the figures that follow from others and that older versions did not write."""
    found = {**evaluation}
    if isinstance(kept := found.get("kept"), dict):
        found["kept"] = completed(kept)
    details = found.get("details")
    if "dead_rows" not in found and isinstance(details, dict) and type(rows := details.get("dead_rows")) is int:
        found["dead_rows"] = rows
    clean, spliced = found.get("ce_clean"), found.get("ce_spliced")
    if "ce_degradation" not in found and clean is not None and spliced is not None:
        found["ce_degradation"] = spliced - clean
    return found


def lacking(evaluation: dict[str, Any], needs: Collection[Need]) -> list[str]:
    """The keys that today's metrics which ask for nothing but `needs` would have written into an evaluation, too."""
    return [figure.key for figure in figures(needs=needs) if figure.key not in evaluation]


def summary(docstring: str | None) -> str:
    """The first sentence of a docstring."""
    return (docstring or "").strip().split("\n\n")[0].split(". ")[0].replace("\n", " ").rstrip(".")


@cache
def _in_files() -> dict[str, Declared]:
    """What the classes under `@register` in the files of this folder declare, which must be literals."""
    found = {}
    for finder, name, _ in iter_modules(sys.modules[str(__package__)].__path__):
        loader = finder.find_spec(name, None).loader  # type: ignore[union-attr]
        for node in ast.parse(loader.get_source(name)).body:  # type: ignore[union-attr]
            if isinstance(node, ast.ClassDef) and "register" in map(ast.unparse, node.decorator_list):
                said = {ast.unparse(one.targets[0]): one.value for one in node.body if isinstance(one, ast.Assign)}
                metric, needs = ast.literal_eval(said["name"]), ast.literal_eval(said["needs"])
                told = tuple(
                    _figure(call) for call in ast.iter_child_nodes(said["figures"]) if isinstance(call, ast.Call)
                )
                found[metric] = Declared(metric, summary(ast.get_docstring(node)), needs, told)
    return found


def _figure(call: ast.Call) -> Figure:
    named = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    return Figure(*map(ast.literal_eval, call.args), **named)
