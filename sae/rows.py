"""Rows that a session is given, as a dataset: stores of the cache by their names, or rows in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from sae import configs
from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.given import text_of
from sae.pipeline.harvest.sources.memory import MemoryConfig, MemorySource
from sae.pipeline.harvest.sources.table import TableConfig, TableSource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.harvest.tables.spool import spooled
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.runtime.workplace import Workplace


def dataset_of(
    place: Workplace, rows: Any, target: Any = None, *, first: int | None = None, name: str = "rows",
    validation: float = 0.05,
) -> Dataset:  # fmt: skip
    """The dataset of whatever `Session.dataset` takes."""
    if isinstance(rows, Dataset):
        if target is not None:
            raise SaeError("target: a dataset has its targets already; give the store of the inputs")
        return rows if first is None else rows.first(first)
    if rows is None or _names_stores(rows):
        if not (target is None or _names_stores(target)):
            raise SaeError("target: is in memory, and the rows are of a store; give both in one of these ways")
        x = _stores(place, rows, "rows")
        return Dataset.of(x, () if target is None else _stores(place, target, "target"), rows=first)
    if target is not None and _names_stores(target):
        raise SaeError("target: is a store, and the rows are in memory; give both in one of these ways")
    if isinstance(rows, Iterator):
        if target is not None:
            raise SaeError("target: rows of an iterator have none; write both as stores, or give both in memory")
        return Dataset.of(_of_parts(place, rows, name, validation), rows=first)
    config = configs.resolve("harvest", MemoryConfig, given={"validation": validation})
    source = MemorySource(config, rows, target, called=name)
    stores = harvest(source, place.cache, Silent()).stores["train"]
    return Dataset.of(stores[0], tuple(stores[1:]), rows=first)


def _of_parts(place: Workplace, parts: Iterator[Any], name: str, validation: float) -> ActivationStore:
    """The store of the rows that an iterator gives in parts, which is that of a file of them."""
    with spooled(parts, name) as path:
        given = {"table": str(path), "validation": validation, "codec": "float32"}
        table = configs.resolve("harvest", TableConfig, given=given)
        source = TableSource.of_settings(table, Origins(place.cache), Silent())
        return harvest(source, place.cache, Silent()).stores["train"][0]


def _names_stores(said: Any) -> bool:
    """Return True for a store or its name, and for a list of such."""
    each = said if isinstance(said, list) and said else [said]
    return all(isinstance(one, ActivationStore | str | os.PathLike) for one in each)


def _stores(place: Workplace, said: Any, what: str) -> tuple[ActivationStore, ...]:
    """The stores of one side, which a list names where there are several."""
    each = said if isinstance(said, list) else [said]
    return tuple(
        one if isinstance(one, ActivationStore) else catalogue.find(place.cache, ActivationStore, text_of(one), what)
        for one in each
    )
