"""Harvests of token stores and of synthetic rows in one call, for the tests of everything that reads their stores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae.cache.activations import ActivationStore
from sae.cache.tokens import TokenStore
from sae.pipeline.harvest.sources.language_model import HarvestConfig, LanguageModelSource
from sae.pipeline.harvest.sources.synthetic import SyntheticConfig, SyntheticSource
from sae.pipeline.harvest.stage import HarvestResult
from sae.pipeline.harvest.stage import harvest as stage
from sae.pipeline.runtime.progress import Progress


def harvest(
    config: HarvestConfig, stores: Sequence[TokenStore], root: Path, progress: Progress, **options: Any
) -> HarvestResult:
    """The activations that settings name, over some token stores."""
    booting = {name: options.pop(name) for name in ("model", "device", "offline") if name in options}
    return stage(LanguageModelSource.over(config, stores, progress, **booting), root, progress, **options)


def synthesize(config: SyntheticConfig, root: Path, progress: Progress, **options: Any) -> dict[str, ActivationStore]:
    """The stores of both splits of rows with known features."""
    made = stage(SyntheticSource(config), root, progress, **options).stores
    return {split: store for split, (store,) in made.items()}
