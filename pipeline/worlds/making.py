"""What is known of how the rows of a store were made, for whoever judges what was learned from them."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.disk.parsing import whole
from sae.cache.errors import DamagedStore
from sae.cache.store.head import RECIPE
from sae.pipeline.worlds.features import GroundTruth, Said
from sae.pipeline.worlds.superposition import pairs


class Making(NamedTuple):
    """Of a store whose true features are known.

    effect: what each feature adds to a row for a coefficient of 1, float32 [G, d]. pairs: those that come together, or
    never both. coefficients: of rows [start, stop) as they are stored, float32 [stop - start, G]; None: not known.
    """

    effect: Tensor
    pairs: tuple[tuple[int, int], ...] = ()
    coefficients: Callable[[int, int], Tensor | None] | None = None


def making_of(store: ActivationStore) -> Making | None:
    """The making of a store; None where its true features are not known.

    Coefficients are those that lie in the store, or are drawn again as its recipe says. Of a world that is none of ours
    the directions of the features are all that is known.
    """
    truth, toy = store.truth, store.toy
    if truth is None:
        return None
    source = store.recipe.get("source", {})
    try:
        if toy is not None:
            count = sum(whole(source, f"{kind}_pairs", 0, len(truth) // 2) for kind in ("correlated", "anticorrelated"))
            return Making(toy[0], pairs(min(count, len(truth) // 2)), store.coefficients)
        if source.get("source") != "synthetic":
            return Making(truth)
        drawn = GroundTruth(Said.of(source))
    except ValueError as error:
        raise DamagedStore(f"{store.path / RECIPE}: is not of a world of this version ({error})") from error
    return Making(truth, (), lambda start, stop: drawn.coefficients_at(store.positions(start, stop)))
