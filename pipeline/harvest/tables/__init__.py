"""Files of numbers, read as rows: `opened("rows.parquet", None, Choice())`. One line of `KINDS` a kind of file."""

from collections.abc import Callable
from pathlib import Path

from sae.cache.errors import SaeError

from .arrays import Npz, npy, safetensors, zarr_array
from .base import Choice, Name, Table, readable
from .columns import Arrow, Parquet, Text

__all__ = ["KINDS", "Choice", "Name", "Table", "opened"]

Open = Callable[[Path, str | None, Choice], Table]
KINDS: dict[str, Open] = {
    ".npy": npy,
    ".npz": lambda path, array, columns: Npz(path, array),
    ".safetensors": safetensors,
    ".parquet": lambda path, array, columns: Parquet(path, columns),
    ".arrow": lambda path, array, columns: Arrow(path, columns),
    ".feather": lambda path, array, columns: Arrow(path, columns),
    ".csv": lambda path, array, columns: Text(path, columns, ","),
    ".tsv": lambda path, array, columns: Text(path, columns, "\t"),
    ".zarr": zarr_array,
}
COLUMNS = (".parquet", ".arrow", ".feather", ".csv", ".tsv")  # kinds whose columns have names


def opened(path: Path, array: str | None, columns: Choice) -> Table:
    """The table in a file, or in the folder of a Zarr array. Raises SaeError where it is none."""
    where = f"table = {path}"
    is_zarr = path.is_dir() and any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup"))
    if not path.exists():
        raise SaeError(f"{where}: no such file")
    kind = ".zarr" if is_zarr else path.suffix.lower()
    if kind not in KINDS or (path.is_dir() != is_zarr) or not (is_zarr or path.is_file()):
        raise SaeError(f"{where}: is not a table; give one of {', '.join(KINDS)} (numpy.save makes one of others)")
    if array is not None and kind not in (".npz", ".safetensors", ".zarr"):
        raise SaeError(f"harvest.array = {array}: a {kind} file has one table; leave it out")
    with readable(path):
        table = KINDS[kind](path, array, columns)
        if any(columns) and kind not in COLUMNS:
            table.pick(columns)
        return table
