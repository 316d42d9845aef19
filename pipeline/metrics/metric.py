"""Metrics: a class under `@register` in a file of this folder each, its figures declared as literals.

    @register
    class Worst(Metric):
        \"\"\"The row that is reconstructed worst.\"\"\"

        name = "worst"
        needs = ("rows",)
        figures = (Figure("worst", "worst row", "largest squared error of a row", "low"),)

        def __init__(self) -> None:
            self._worst = torch.zeros(())

        def update(self, batch: Encoded) -> None:
            worst = (batch.y - batch.y_hat).square().sum(1).max()
            self._worst = worst.maximum(self._worst.to(worst.device))

        def result(self) -> dict[str, Value]:
            return {"worst": self._worst.item()}

What it overrides of `update`, `compare`, `search` and `splice` is called where what it `needs` is there. Tensors come
on the device that judges, which may run ahead: a metric keeps its sums there, and asks for numbers in `result`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from sae.cache.device import landing
from sae.pipeline.declared.importing import enter, import_files
from sae.pipeline.metrics.figures import Figure, Need, declared
from sae.pipeline.saes import Coder, Codes, Predictor
from sae.pipeline.saes.dictionary import Dictionary

Value = float | int | None
METRICS: dict[str, type[Metric]] = {}


class Places(NamedTuple):
    """Where tokens stand, of any shape. position: int64, in its context. rarity: by how many of the shares
    `breakdown.FREQUENCIES` each is rarer in the held-out text; -1 where that was not counted."""

    position: Tensor
    rarity: Tensor

    def to(self, device: torch.device) -> Places:
        """The same on a device, which is not waited for."""
        return Places(*(landing.moved(each, device) for each in self))


class Encoded(NamedTuple):
    """A batch of rows and what a dictionary makes of them."""

    x: Tensor  # [B, d_in]
    y: Tensor  # [B, d_out], what was to be reconstructed: of an autoencoder x itself
    codes: Codes | None  # None of what has none
    y_hat: Tensor  # [B, d_out]
    places: Places | None = None  # [B], of rows whose text is at hand


class Subject(NamedTuple):
    """A dictionary or less, which metrics judge, and what is known of the making of its rows.

    truth: the features [G, d_out] they were made of. effect: what each adds to a row for a coefficient of 1, [G, d_out],
    and `pairs` which of them come together or never both, where there are such. mlp: the layer of a model that makes y
    [n, d_out] of x [n, d_in], with a graph, where it is at hand.
    """

    sae: Predictor
    truth: Tensor | None = None
    effect: Tensor | None = None
    pairs: tuple[tuple[int, int], ...] = ()
    mlp: Callable[[Tensor], Tensor] | None = None
    stores: tuple[str, ...] = ()

    @property
    def coder(self) -> Coder:
        """The subject, for a metric that needs codes."""
        assert isinstance(self.sae, Coder), "`metrics_of` sees to it"
        return self.sae

    @property
    def dictionary(self) -> Dictionary:
        """The subject, for a metric that needs directions."""
        assert isinstance(self.sae, Dictionary), "`metrics_of` sees to it"
        return self.sae

    def lacks(self) -> set[Need]:
        """Return what a metric may need that this does not have, for it is no dictionary, or not even a coder."""
        directions: set[Need] = (
            set() if isinstance(self.sae, Dictionary) else {"directions", "truth", "coefficients", "pairs"}
        )
        codes: set[Need] = set() if isinstance(self.sae, Coder) else {"codes", "training"}
        return directions | codes


class Metric(ABC):
    """Figures of a dictionary. It is made for one, shown what it needs batch by batch, and asked at the end.

    name: how `sae list` calls it. needs: what there must be for it. figures: what `result` tells, all of it.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]
    figures: ClassVar[tuple[Figure, ...]]

    @classmethod
    def of(cls, subject: Subject) -> Metric:
        """The metric, for a dictionary. A class that is made of something overrides it."""
        return cls()

    def update(self, batch: Encoded) -> None:  # noqa: B027 - a metric overrides what it wants to see
        """Count a batch of held-out rows."""

    def compare(self, batch: Encoded, coefficients: Tensor) -> None:  # noqa: B027
        """Count a batch of held-out rows of which the coefficients [B, G] of the true features are known, on its device."""

    def search(self, codes: Codes) -> None:  # noqa: B027
        """Count a batch of training rows, which are searched for latents that fire."""

    def splice(  # noqa: B027
        self, clean: Tensor, spliced: Mapping[str, tuple[Tensor, Tensor]], mask: Tensor, places: Places
    ) -> None:
        """Count a batch of held-out contexts with P predictions each.

        clean: the model's cross-entropies [B, P]. spliced: its cross-entropies and its KLs from itself, both [B, P],
        with the activations replaced by their reconstruction ("sae"), by zeros ("zero") and by their mean ("mean").
        mask: bool [B, P], the predictions that count. places [B, P]: of the tokens that predict, whose activations
        are replaced.
        """

    @abstractmethod
    def result(self) -> Mapping[str, Value]:
        """The value of every one of `figures`; None where it is not defined."""

    def details(self) -> dict[str, Any]:
        """Return what else there is to know, for `details` of `eval.json`."""
        return {}

    def latents(self) -> dict[str, Tensor]:
        """Numbers of each latent [d_sae], for `eval/latents.safetensors`."""
        return {}


Kind = TypeVar("Kind", bound=type[Metric])


def register(kind: Kind) -> Kind:
    """Make a metric known. Its name and its figures' keys must be nobody else's."""
    known = [one for one in declared() if one.name != kind.name]
    if taken := {figure.key for one in known for figure in one.figures} & {figure.key for figure in kind.figures}:
        raise ValueError(f"metric {kind.name}: another has {', '.join(sorted(taken))}, too")
    enter(METRICS, "metric", kind.name, kind)
    return kind


def metrics_of(subject: Subject, needs: Collection[Need]) -> list[Metric]:
    """Every metric that asks for nothing but `needs`, new, for a dictionary."""
    import_files(__package__)
    there = {*needs} - subject.lacks()
    return [METRICS[one.name].of(subject) for one in declared() if {*one.needs} <= there]
