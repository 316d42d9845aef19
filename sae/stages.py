"""The stages without a session: in the usual places, those of the command line (`SAE_CACHE`, `SAE_RUNS`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.cache.tokens import TokenStore
from sae.dictionaries import Named
from sae.pipeline.saes import TrainableConfig
from sae.pipeline.saes.dictionary import Dictionary
from sae.runs import TrainedRun
from sae.session import Session
from sae.tables import Figures


def tokenize(**settings: Any) -> TokenStore:
    """`Session.tokenize` in the usual places."""
    return Session().tokenize(**settings)


def harvest(tokens_from: TokenStore | Named | None = None, **settings: Any) -> dict[str, Dataset]:
    """`Session.harvest` in the usual places."""
    return Session().harvest(tokens_from, **settings)


@overload
def train(dictionary: TrainableConfig | None, rows: Any = None, /, **settings: Any) -> TrainedRun: ...
@overload
def train(dictionary: Sequence[TrainableConfig], rows: Any = None, /, **settings: Any) -> list[TrainedRun]: ...


def train(
    dictionary: TrainableConfig | Sequence[TrainableConfig] | None, rows: Any = None, /, **settings: Any
) -> TrainedRun | list[TrainedRun]:
    """`Session.train` in the usual places."""
    return Session().train(dictionary, rows, **settings)


@overload
def evaluate(what: Dictionary | Run | Named | None = None, rows: Any = None, /, **settings: Any) -> Figures: ...
@overload
def evaluate(what: list[Run | Named], /, **settings: Any) -> list[Figures]: ...


def evaluate(what: Any = None, rows: Any = None, /, **settings: Any) -> Figures | list[Figures]:
    """`Session.evaluate` in the usual places."""
    return Session().evaluate(what, rows, **settings)
