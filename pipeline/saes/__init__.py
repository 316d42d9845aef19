"""Sparse dictionaries: one file per architecture, one interface (`base`), exact sparsity (`sparse`).

`AnyConfig` is the union of all architectures' settings, told apart by `arch`; `create` makes the dictionary of one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, TypeAdapter

from sae.pipeline.declared.importing import import_files

from .base import ARCHITECTURES, SAE, register
from .config import FINISHED, Clock, Config, TrainableConfig
from .contract import Coder, Codes, Predictor, Trainable
from .latents import Latents
from .losses import Losses, Observed, PlainLosses, SparseLosses
from .widths import Width, widths

import_files(__name__)

if TYPE_CHECKING:
    AnyConfig = TrainableConfig
else:
    AnyConfig = Annotated[reduce(or_, (cls.config_type for cls in ARCHITECTURES.values())), Field(discriminator="arch")]

__all__ = [
    "ARCHITECTURES",
    "FINISHED",
    "SAE",
    "AnyConfig",
    "Clock",
    "Coder",
    "Codes",
    "Config",
    "Latents",
    "Losses",
    "Observed",
    "PlainLosses",
    "Predictor",
    "SparseLosses",
    "Trainable",
    "TrainableConfig",
    "Width",
    "create",
    "parse",
    "register",
    "trainable",
]


def parse(settings: object) -> TrainableConfig:
    """The settings that plain data (a dict with `arch`) describes; pydantic's ValidationError where it is not one."""
    adapter: TypeAdapter[TrainableConfig] = TypeAdapter(AnyConfig)
    return adapter.validate_python(settings)


def trainable(config: TrainableConfig, d_in: Width, d_out: Width | None = None, *, seed: int = 0) -> Trainable:
    """Make what settings describe, for inputs of width d_in; with d_out, for targets of their own, even if it is
    d_in. ValueError for rows of several stores where it is of one.
    """
    kind = ARCHITECTURES[config.arch]
    if not kind.several_stores and max(len(widths(one)) for one in (d_in, d_out or d_in)) > 1:
        raise ValueError(f"arch {config.arch} is of one store and these are several; crosscoder and clt take several")
    made: Callable[..., Trainable] = kind
    return made(
        config, *(one if one is None or len(widths(one)) > 1 else sum(widths(one)) for one in (d_in, d_out)), seed=seed
    )


def create(config: TrainableConfig, d_in: Width, d_out: Width | None = None, *, seed: int = 0) -> SAE:
    """As `trainable`, of an architecture that is a sparse dictionary. TypeError for another."""
    made = trainable(config, d_in, d_out, seed=seed)
    if not isinstance(made, SAE):
        raise TypeError(f"arch {config.arch} is not a sparse dictionary")
    return made
