"""The figures of all metrics: names, meanings, directions. Read from the metrics' text, for importing takes torch."""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args

from sae.pipeline.declared import registered

Need = Literal[
    "rows", "codes", "training", "stores", "text", "model", "mlp", "directions", "truth", "coefficients", "pairs"
]
"""What a metric may ask for: held-out rows and their reconstructions; the codes of these; training rows to search as
well; that several stores are reconstructed; the text that rows are of; a language model to splice into; the layer of it that gives the targets for
the inputs; a direction for every latent; the features that the rows were made of; how much of each is in a row; which of
them come in pairs, together or never both."""
Better = Literal["low", "high"] | None
METRICS = "sae.pipeline.metrics.metric.METRICS"
NEEDS: tuple[Need, ...] = get_args(Need)
OF_ROWS: frozenset[Need] = frozenset({"rows", "codes", "training"})
WITHOUT_MODEL: frozenset[Need] = OF_ROWS | {"directions"}


def available(
    *, model: bool, truth: bool, coefficients: bool = False, pairs: bool = False, mlp: bool = False,
    stores: bool = False, text: bool = False,
) -> frozenset[Need]:  # fmt: skip
    """Return what there is to judge a dictionary by, with a language model, the text, and with what is known of its rows."""
    more: tuple[tuple[Need, bool], ...] = (
        ("stores", stores), ("text", text), ("model", model), ("mlp", mlp), ("truth", truth), ("coefficients", coefficients), ("pairs", pairs),
    )  # fmt: skip
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
    """The declaration of a metric."""

    name: str
    help: str
    needs: tuple[Need, ...]
    figures: tuple[Figure, ...]


def declared() -> list[Declared]:
    """Return what every registered metric says of itself, in the order of all tables: what asks least is first."""
    found = [
        Declared(name, one.summary, one.values["needs"], tuple(map(_figure, one.values["figures"])))
        for name, one in registered(METRICS).items()
    ]
    return sorted(found, key=lambda metric: (max(map(NEEDS.index, metric.needs)), metric.name))


def _figure(said: Any) -> Figure:
    return said if isinstance(said, Figure) else Figure(*said.arguments, **said.named)


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


def meanings() -> dict[str, str]:
    """What every figure is, by its key."""
    return {figure.key: figure.meaning for figure in figures()}


def better(key: str) -> Better:
    """Return which end of a figure is better, where one is."""
    return _of(key)[1].better


def label(key: str) -> str:
    """Return the label of a figure's axis. That training has a figure of the same name is why some say more."""
    metric, figure = _of(key)
    return f"{figure.title}, held-out rows" if "rows" in metric.needs else figure.title


def title(key: str) -> str:
    """Return a few words for a figure."""
    return _of(key)[1].title


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


def largest_norms(kept: dict[str, Any]) -> list[float]:
    """The norms above which rows are not among the `kept` ones: of what is read, of what is reconstructed."""
    return [norm for key, norm in kept.items() if key.startswith("largest_norm") and norm is not None]


def lacking(evaluation: dict[str, Any], needs: Collection[Need]) -> list[str]:
    """The keys that today's metrics which ask for nothing but `needs` would have written into an evaluation, too."""
    return [figure.key for figure in figures(needs=needs) if figure.key not in evaluation]
