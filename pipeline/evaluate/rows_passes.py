"""The passes over rows: each is read once for all the dictionaries that are judged on it."""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from sae.cache.device import landing
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Batch
from sae.pipeline.evaluate.places import TokenPlaces
from sae.pipeline.evaluate.subjects import Judged, alive
from sae.pipeline.metrics.coefficients import KEPT, most_rows
from sae.pipeline.metrics.metric import Encoded
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes import Coder, Predictor


def judge_rows(group: Sequence[Judged], rows: int, batch: int, progress: Progress, places: TokenPlaces | None) -> None:
    """Show metrics a dataset's first rows; where there is a second side it is shown those kept alone."""
    seen = [0 for _ in group[0].sides]

    def show(part: Batch, kept: bool) -> None:
        where = None
        if places is not None and part.position is not None:
            where = places.of(part.position).to(part.x.device)
        for one in alive(group):
            with one.failing():
                encoded = _encoded(one.subject.sae, part)._replace(places=where)
                for side in one.sides if kept else one.sides[:1]:
                    for metric in side:
                        metric.update(encoded)
        for i in range(len(seen) if kept else 1):
            seen[i] += len(part.x)

    _each_batch(group, group[0].held_out, rows, batch, "eval rows", show, progress, positions=places is not None)
    if alive(group) and not seen[-1]:
        raise SaeError(f"rows = {rows}: training would have left all of them out for their norm; judge on more")


@torch.no_grad()
def compare_rows(group: Sequence[Judged], rows: int, batch: int, progress: Progress) -> None:
    """Show metrics a dataset's first rows, in stored order, with the coefficients of the true features."""
    making, dataset = group[0].making, group[0].held_out
    assert making is not None and making.coefficients is not None
    features = len(making.effect)
    rows, device = min(rows, most_rows(features)), device_of(group[0].subject.sae)
    widest = max(one.subject.coder.width for one in group)
    step = max(1, min(batch, KEPT // max(features, widest)))
    progress.start("eval coefficients", rows, "rows")
    try:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part, coefficients = dataset.rows(start, stop), making.coefficients(start, stop)
            assert coefficients is not None
            part, known = part.to(device), landing.moved(coefficients, device)
            for one in alive(group):
                with one.failing():
                    encoded = _encoded(one.subject.sae, part)
                    for metric in one.sides[0]:
                        metric.compare(encoded, known)
            progress.advance(stop - start)
    finally:
        progress.finish()


def search_rows(group: Sequence[Judged], rows: int, batch: int, progress: Progress) -> None:
    """Show metrics the latents that fire in a dataset's first rows; a second side is shown those of kept rows alone."""

    def show(part: Batch, kept: bool) -> None:
        for one in alive(group):
            with one.failing():
                codes = one.subject.coder.encode(part.x)
                for side in one.sides if kept else one.sides[:1]:
                    for metric in side:
                        metric.search(codes)

    _each_batch(group, group[0].training, rows, batch, "eval dead latents", show, progress)


def mean_target(dataset: Dataset, rows: int) -> Tensor:
    """float32 [d_out]: the mean of the kept ones of the first target rows, one chunk in memory at a time."""
    total, count = torch.zeros(dataset.d_out, dtype=torch.float64), 0
    for batch in dataset.in_order(rows):
        total, count = total + batch.y.sum(0, dtype=torch.float64), count + len(batch.y)
    if not count:
        raise SaeError(f"eval.mean_rows = {rows}: training left all of them out for their norm; give more")
    return (total / count).float()


def device_of(sae: Predictor) -> torch.device:
    """Return the device of its numbers."""
    return next(chain(sae.parameters(), sae.buffers())).device


def _encoded(sae: Predictor, part: Batch) -> Encoded:
    codes = sae.encode(part.x) if isinstance(sae, Coder) else None
    return Encoded(part.x, part.y, codes, sae.decode(codes) if isinstance(sae, Coder) else sae(part.x))


@torch.no_grad()
def _each_batch(
    group: Sequence[Judged], dataset: Dataset, rows: int, batch: int, title: str, call: Callable[[Batch, bool], None],
    progress: Progress, *, positions: bool = False,
) -> None:  # fmt: skip
    """Call with every batch of a dataset's first rows, and with whether they are kept: those first, then the others."""
    if not rows:
        return
    device = device_of(group[0].subject.sae)
    progress.start(title, rows, "rows")
    try:
        with dataset.first(rows).batches(batch, positions=positions, epochs=1, device=device) as loader:
            for part in loader:
                call(part, True)
                progress.advance(len(part.x))
                if not alive(group):
                    return
        for part in dataset.left_out(rows, batch):
            call(part.to(device), False)
            progress.advance(len(part.x))
    finally:
        progress.finish()
