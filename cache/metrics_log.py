"""metrics.jsonl: one line a logged step, of which a checkpoint says how far it follows them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from sae.cache.disk.durable import append_line, checksum, flush_file, read, whole_lines_end, write_in
from sae.cache.disk.parsing import as_written, figure, parsed_mapping, text, whole
from sae.cache.errors import DamagedStore

METRICS = "metrics.jsonl"
MOST = 1 << 30  # bytes


class Extent(NamedTuple):
    """The first so many bytes of a file, and their checksum."""

    size: int
    crc32c: str

    @classmethod
    def of(cls, data: bytes) -> "Extent":
        return cls(len(data), checksum(data))

    @classmethod
    def from_json(cls, said: str) -> "Extent":
        """Return what `as_json` wrote. Raises ValueError for anything else."""
        values = parsed_mapping(said.encode())
        return cls(whole(values, "bytes"), text(values, "crc32c"))

    def as_json(self) -> str:
        return json.dumps({"bytes": self.size, "crc32c": self.crc32c})


class MetricsLog:
    """The metrics of a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / METRICS

    def append(self, entry: dict[str, Any]) -> None:
        """Append one line."""
        append_line(self.path, json.dumps(entry), flush=False)

    def entries(self, known: Extent | None) -> list[dict[str, Any]]:
        """Return all whole lines: `step`, and figures by name. Raises DamagedStore where they are not what was written.

        known: what a checkpoint says of the file.
        """
        data = self._data()
        if known is not None and Extent.of(data[: known.size]) != known:
            raise DamagedStore(f"{self.path}: damaged (its checksum differs up to byte {known.size:,})")
        lines = []
        for number, line in enumerate(data[: whole_lines_end(data)].split(b"\n")[:-1], 1):
            with as_written(self.path, f"line {number} "):
                said = parsed_mapping(line, nan_is_null=True)
                lines.append({name: figure(said, name) for name in said} | {"step": whole(said, "step")})
        return lines

    def rewind(self, step: int, known: Extent | None) -> None:
        """Forget what was logged after what is known; where nothing is, after `step`."""
        entries = self.entries(known) if known is None or known.size else []  # which checks them
        if known is None:
            kept = [json.dumps(entry) + "\n" for entry in entries if entry["step"] <= step]
            write_in(self.folder, METRICS, "".join(kept).encode())
        else:
            write_in(self.folder, METRICS, self._data()[: known.size])

    def flushed(self) -> Extent:
        """Put on the disk what was logged, so that no checkpoint is there before it; return how much that is."""
        data = self._data()
        if data:
            flush_file(self.path)
        return Extent.of(data[: whole_lines_end(data)])

    def _data(self) -> bytes:
        return read(self.path, MOST) or b""
