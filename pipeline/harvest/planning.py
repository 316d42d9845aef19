"""The plan of a harvest of one split, before it starts: rows, bytes, and for a dry run seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import Recipe
from sae.cache.errors import SaeError
from sae.cache.store.manifest import Windows
from sae.cache.store.space import folder_size, on_disk
from sae.pipeline.harvest.sources import RowSource, Supply
from sae.pipeline.runtime.progress import Progress


@dataclass(frozen=True)
class Plan:
    """The plan of a harvest of one split.

    Seconds, of this process alone, are measured for a dry run only; None when nothing is left to do, or nobody knows.
    """

    split: str
    streams: list[str]
    points: list[tuple[int, str]]  # (layer, site) of each, where they are of a language model
    rows: int  # rows each store will have
    rows_to_do: int  # rows of all stores still to be written
    forward_tokens: int
    stored_bytes: int  # of all stores when done, estimated
    seconds: float | None
    left_out: int = 0  # rows of those asked for that are not kept, since they do not fill a window
    why: str = ""  # they are not, and what to do about it
    new_bytes: int = 0  # of stored_bytes, those still to be written

    def __str__(self) -> str:
        what = f"{self.split}: {self.rows:,} rows of {', '.join(self.streams)}, about {self.stored_bytes / 1e6:,.1f} MB"
        if not self.rows_to_do:
            return f"{what}; all there already"
        if self.seconds is None:
            return f"{what}; {self.rows_to_do:,} rows to write"
        spent = f"{self.seconds / 60:,.1f} minutes" if self.seconds >= 90 else f"{self.seconds:,.0f} seconds"
        return f"{what}; {self.rows_to_do:,} rows to write, about {spent}"


def planned(
    source: RowSource, split: str, supply: Supply, folders: Mapping[str, Path], progress: Progress, *, timed: bool
) -> Plan:
    """Count the rows of each stream's store and estimate the bytes; and, if `timed`, the seconds.

    `folders` are the places of the stores by stream. Raises SaeError where what is asked for cannot be.
    """
    recipes = [source.recipe(stream, split) for stream in source.streams]
    windows = ActivationStore.layout(recipes[0])
    rows, asked = supply.rows, min(supply.asked, supply.rows)
    if asked < rows:
        rows = min(rows, windows.round_up(max(1, asked)))
    lacking = ""
    if not supply.ended and windows.round_up(rows) != rows:
        lacking = _lacking(source, split, supply, asked, windows)
        rows = windows.start(windows.count(rows) - 1)
        if not rows:
            raise SaeError(f"{source.slug(source.streams[0], split)}: {lacking}")
    if asked < rows:
        progress.note(f"{split}: {asked:,} rows wanted, {rows:,} are made: whole windows")
    there = [_rows_there(folder, rows) for folder in folders.values()]
    to_do = sum(max(rows - n, 0) for n in there)
    forward = int(max(rows - min(there), 0) * supply.tokens / supply.rows)
    rate = source.tokens_per_second(split) if timed and to_do else None
    folder = folder_size(next(iter(folders.values())).parent)
    total, before = (
        sum(_size(recipe, size, folder) for recipe, size in zip(recipes, sizes, strict=True))
        for sizes in ([max(rows, n) for n in there], there)
    )
    if to_do:
        _say_if_padded(recipes, rows, folder, total, split, progress)
    left_out = max(0, asked - rows)
    return Plan(
        split, [stream.name for stream in source.streams], list(source.points), rows, to_do, forward, total,
        None if rate is None else forward / rate, left_out, lacking if left_out else "", total - before,
    )  # fmt: skip


def _lacking(source: RowSource, split: str, supply: Supply, rows: int, windows: Windows) -> str:
    """Why the last of some rows are not kept, and what would keep them."""
    count = windows.count(rows)
    end, left = windows.start(count), rows - windows.start(count - 1)
    return f"{left:,} rows do not fill their window, which ends at row {end:,}; {source.remedy(split, supply, end)}"


def _size(recipe: Recipe, rows: int, folder: int) -> int:
    return on_disk(ActivationStore.specs(recipe), recipe, rows, folder)


def _say_if_padded(
    recipes: Sequence[Recipe], rows: int, folder: int, total: int, split: str, progress: Progress
) -> None:
    """Say it where the stores are padding for the most part."""
    packed = [{**recipe, "codec": {**recipe["codec"], "zstd": 1}} for recipe in recipes]
    smaller = sum(_size(recipe, rows, folder) for recipe in packed)
    if total > 2 * smaller:
        progress.note(
            f"{split}: chunks are padded to their whole size, and so small a store is padding for the most part; with "
            f"`codec = {recipes[0]['codec']['name']}:zstd=1` about {smaller / 1e6:,.1f} MB"
        )


def _rows_there(path: Path, wanted: int) -> int:
    """Rows of a stream's store. Raises SaeError where it has ended with fewer than are wanted."""
    if not (path / "recipe.json").exists():
        return 0
    store = ActivationStore(path)
    if store.closed and store.n_rows < wanted:
        raise SaeError(
            f"{store.key}: has ended, with a short window at row {store.n_rows:,}, and cannot grow to {wanted:,}; "
            "harvest without `harvest.rows.last_window = short`, or remove it first (`remove()`)"
        )
    return store.n_rows
