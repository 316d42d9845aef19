"""What is judged, and how passes that many dictionaries share leave out those that failed."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.provenance import LanguageModelRows, provenance
from sae.cache.tokens import TokenStore
from sae.pipeline.evaluate.splicing import point_of
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.metrics.figures import OF_ROWS, Need, available
from sae.pipeline.metrics.metric import Metric, Subject, metrics_of
from sae.pipeline.worlds.making import Making

One = TypeVar("One")


@dataclass(kw_only=True, eq=False)
class Attempt:
    """Something that may fail while others go on. error: what it failed with."""

    error: SaeError | OSError | None = None

    @contextmanager
    def failing(self) -> Iterator[None]:
        """What is raised in this context is its error."""
        try:
            yield
        except (SaeError, OSError) as error:
            self.error = self.error or error


Tried = TypeVar("Tried", bound=Attempt)


def alive(attempts: Iterable[Tried]) -> list[Tried]:
    """Those that have not failed."""
    return [one for one in attempts if one.error is None]


@contextmanager
def together(attempts: Sequence[Attempt]) -> Iterator[None]:
    """What is raised in this context ends them all."""
    try:
        yield
    except (SaeError, OSError) as error:
        for one in alive(attempts):
            one.error = error


def grouped(items: Iterable[One], key: Callable[[One], Hashable]) -> list[list[One]]:
    """The items of one key together, in the order of the first of each."""
    found: dict[Hashable, list[One]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return [*found.values()]


def same(dataset: Dataset) -> Hashable:
    """What two datasets have in common that give the same rows."""
    return tuple(str(one.path) for one in dataset.inputs), tuple(str(one.path) for one in dataset.targets), \
        dataset.n_rows, dataset.limits  # fmt: skip


@dataclass(kw_only=True, eq=False)
class Judged(Attempt):
    """A dictionary on its way through the passes, and the metrics that they are shown to.

    making: of the held-out rows' (targets'). tokens: those the held-out rows come from, where they are at hand.
    sides: metrics over all rows, and where the datasets have limits over those kept as well.
    """

    subject: Subject
    training: Dataset
    held_out: Dataset
    making: Making | None = None
    tokens: TokenStore | None = None
    sides: list[list[Metric]] = field(default_factory=list)
    needs: frozenset[Need] = frozenset()

    def begin(self, model: LanguageModel | None) -> None:
        """Make the metrics that there is enough for, with a language model to splice into or without one."""
        self.needs = needs_of(
            self.held_out, self.making, model=model is not None, tokens=self.tokens is not None,
            truth=self.subject.truth is not None,
        )  # fmt: skip
        more: dict[str, Any] = {"stores": _names(self.training.written)}
        if self.making is not None:
            more |= {"effect": self.making.effect, "pairs": self.making.pairs}
        if model is not None and (layer := _layer_between(self.held_out)) is not None:
            more["mlp"] = model.mlp(layer)
        self.subject = self.subject._replace(**more)
        self.sides = [metrics_of(self.subject, self.needs)]
        if self.held_out.limits is not None:  # of what does not depend on rows there is one value
            on_rows = {*OF_ROWS, "model"}
            self.sides.append([one for one in metrics_of(self.subject, self.needs) if {*one.needs} & on_rows])


def needs_of(dataset: Dataset, making: Making | None, *, model: bool, tokens: bool, truth: bool) -> frozenset[Need]:
    """Return what there is to judge a dictionary of a dataset by.

    Pairs are tried on rows of one feature alone, which a transcoder does not read.
    """
    pairs = making is not None and bool(making.pairs) and not dataset.targets
    known = making is not None and making.coefficients is not None
    mlp = model and _layer_between(dataset) is not None
    stores = len(dataset.written) > 1
    return available(
        model=model, truth=truth, coefficients=known, pairs=pairs, mlp=mlp, stores=stores, text=tokens
    )  # fmt: skip


def _layer_between(dataset: Dataset) -> int | None:
    """The layer whose MLP makes the targets of the inputs; None where that is not what they are."""
    stores = dataset.stores
    points = [point_of(one) for one in stores if isinstance(provenance(one.recipe), LanguageModelRows)]
    if len(points) != 2 or len(dataset.targets) != 1 or points[0].layer != points[1].layer:
        return None
    return points[0].layer if [point.site for point in points] == ["mlp_in", "mlp_out"] else None


def _names(stores: Sequence[ActivationStore]) -> tuple[str, ...]:
    """How figures of several stores are called: by points, or by keys where stores have none or several have one."""
    of_model = all(isinstance(provenance(store.recipe), LanguageModelRows) for store in stores)
    names = tuple(str(point_of(store)) if of_model else store.key for store in stores)
    return names if len({*names}) == len(names) else tuple(store.key for store in stores)


@dataclass(frozen=True, eq=False)
class Site:
    """A place in a language model: that of a held-out dataset's rows. mean: [d_out], of training rows."""

    dataset: Dataset
    mean: Tensor


@dataclass(kw_only=True, eq=False)
class Splice(Attempt):
    """A function of rows [n, d_in] -> [n, d_out] in the place of a site's, and metrics that see what it costs.

    sound: bool, whether what it cost has been a number so far; None before anything was seen.
    """

    sae: Callable[[Tensor], Tensor]
    site: Site
    metrics: Sequence[Metric]
    sound: Tensor | None = None
