"""A small cache of planted rows on several layers, for the tests of studies."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support.small_stores import activation_recipe, extend, shrunk
from torch import Tensor

from sae.cache import activations
from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.store.manifest import Windows
from sae.pipeline.evaluate.stage import EvalConfig
from sae.pipeline.runtime.progress import Progress, Silent
from sae.pipeline.runtime.workplace import Workplace
from sae.pipeline.studies.lab import Lab
from sae.pipeline.train.stage import TrainConfig

D, FEATURES = 12, 24
BASE = TrainConfig.model_validate({
    "sae": {"arch": "topk", "d_sae": 32, "k": 4}, "lr": 5e-3, "batch": 64, "steps": 24, "log_every": 4,
    "initial_rows": 256, "checkpoint_every": 8,
})  # fmt: skip

LONGER = BASE.model_copy(update={"steps": 100, "lr": 2e-2})  # enough for a penalty to empty the latents


@contextmanager
def small_stores() -> Iterator[None]:
    """Stores with windows of 64 to 256 rows."""
    with shrunk() as patch:
        patch.setattr(activations, "CHUNK_ROWS", 64)
        patch.setattr(activations, "WINDOWS", Windows(64, 256))
        yield


def planted(n: int, *, seed: int, truth: int = 0) -> Tensor:
    """Rows [n, D], each of about three of FEATURES directions that `truth` decides."""
    directions = torch.randn(FEATURES, D, generator=torch.Generator().manual_seed(truth))
    random = torch.Generator().manual_seed(1000 + seed)
    on = torch.rand(n, FEATURES, generator=random) < 3 / FEATURES
    return (on * torch.rand(n, FEATURES, generator=random)) @ directions + 0.02 * torch.randn(n, D, generator=random)


def write(root: Path, layer: int, *, truth: int, n: int = 1024) -> ActivationStore:
    """Training and held-out rows of a layer; the training store."""
    found = []
    for split, rows in (("train", planted(n, seed=1, truth=truth)), ("validation", planted(256, seed=2, truth=truth))):
        recipe = {**activation_recipe(D, "float32", site="resid_post", split=split), "layer": layer}
        with ActivationWriter(root, f"planted-{layer}-{split}", recipe) as writer:
            extend(writer, rows, ended=True)
            found.append(writer.store)
    return found[0]


def planted_cache(root: Path) -> Path:
    """Stores of layers 0, 1 and 3; 0 and 1 hold rows of the same directions."""
    for layer, truth in ((0, 0), (1, 0), (3, 5)):
        write(root, layer, truth=truth, n=1024 if layer else 960)
    return root


def first_layer(cache: Path) -> ActivationStore:
    """The training store of layer 1."""
    (path,) = [path for path in cache.glob("activations/*") if path.name.startswith("planted-1-train")]
    return ActivationStore(path)


def lab_in(cache: Path, runs: Path, progress: Progress | None = None, **options: Any) -> Lab:
    place = Workplace(cache, runs, progress or Silent(), "cpu")
    usual = {"eval_config": EvalConfig(dead_rows=128, batch_tokens=100), "cross_entropy": False}
    return Lab(place, **{**usual, **options})


class Noted(Silent):
    """A `Progress` that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)
