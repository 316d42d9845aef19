"""Settings -> activation stores of rows with known features (`pipeline.harvest.synthetic`),
where later stages look for them.

Written window by window as a harvest is: a store is locked, killed, resumed and grown with the same bytes. The features
lie in the store (`truth`), so whoever has it can judge a dictionary against them.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sae.cache.activations import ActivationStore, ActivationWriter, WindowBuffer
from sae.cache.disk.identity import Recipe
from sae.cache.store.codecs import codec, codec_recipe
from sae.cache.store.space import expect_room, on_disk
from sae.pipeline.harvest.synthetic import HELD_OUT, GroundTruth, SyntheticConfig
from sae.pipeline.runtime.interrupts import telling
from sae.pipeline.runtime.progress import Progress

ROWS = 16_384  # drawn at a time

FIRST = {"train": 0, "validation": HELD_OUT}  # sample of each split


def synthesize(
    config: SyntheticConfig, root: Path, progress: Progress, *, wait: bool = False
) -> dict[str, ActivationStore]:
    """Make or continue the stores of both splits."""
    truth = GroundTruth(config)
    rows = {"train": config.rows, "validation": config.validation_rows}
    return {split: _write(truth, split, rows[split], root, progress, wait) for split in FIRST}


def synthetic_recipe(config: SyntheticConfig, split: str) -> Recipe:
    """Everything that decides the rows of a store."""
    return {
        "source": config.source(),
        "split": split,
        "d": config.d,
        "truth": config.features,
        "codec": codec_recipe(codec(config.codec)),
    }


def window_arrays(
    truth: GroundTruth, split: str, start: int, buffer: WindowBuffer, done: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """The arrays of the window that begins at row `start` of a split, as they are stored. `done` is told of rows."""
    first, rows = FIRST[split] + start, len(buffer.position)
    for low in range(first, first + rows, ROWS):
        high = min(low + ROWS, first + rows)
        buffer.add(truth.draw(low, high - low)[0], np.arange(low, high))
        done(high - low)
    return buffer.arrays() | ({} if start else {"truth": truth.features.numpy()})


def _write(truth: GroundTruth, split: str, rows: int, root: Path, progress: Progress, wait: bool) -> ActivationStore:
    config = truth.config
    held_out = "" if split == "train" else f"-{split}"
    slug = f"synthetic-{config.presence.mode}-{config.features}in{config.d}{held_out}-{codec(config.codec).name}"
    with ActivationWriter(root, slug, synthetic_recipe(config, split), wait=wait) as writer:
        if writer.notice:
            progress.note(writer.notice)
        windows = writer.store.windows
        asked, rows = rows, windows.round_up(rows)
        writer.request(max(rows, writer.store.requested))
        if asked < rows:
            progress.note(f"{split}: {asked:,} rows wanted, {rows:,} are made: whole windows")
        left = max(0, rows - writer.store.n_rows)
        progress.note(f"{split}: {rows:,} rows; {f'{left:,} to write' if left else 'all there already'}")
        if left:
            specs, recipe = list(writer.store.arrays.values()), writer.store.recipe
            there = on_disk(specs, recipe, writer.store.n_rows)
            expect_room(root, on_disk(specs, recipe, rows) - there, f"what synthesize would add ({split})")
        progress.start(f"synthesize {split}", rows, "rows", done=min(rows, writer.store.n_rows))
        with telling(lambda: f"{writer.store.n_rows:,} of {rows:,} {split} rows are committed"):
            try:
                while writer.store.n_rows < rows:
                    start, stop = windows.bounds(len(writer.store.manifest.windows))
                    arrays = window_arrays(truth, split, start, writer.window(stop - start), progress.advance)
                    writer.append(arrays, {})
            finally:
                progress.finish()
        return writer.store
