"""The result of a study is a row a run; it is written as a table, a plot and JSON."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.cache.disk.durable import make_folder, read, write_atomic
from sae.cache.errors import SaeError
from sae.pipeline.report.compare import Row, as_csv, over_seeds

FILES = {"table": "table.csv", "results": "results.json", "plot": "plot.png"}


@dataclass(frozen=True)
class Result:
    """The result of a study.

    rows: one a run. columns: the labels and figures the table shows. draw: makes the plot from the table's rows and
    writes it to a path.
    """

    study: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: list[Row]
    draw: Callable[[list[Row], Path], None]
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> list[Row]:
        """A row a run: its name, labels, seed and the study's figures."""
        kept = ("run", *self.labels, "seed", *self.unlike, *self.columns)
        return [{key: row[key] for key in kept} for row in self.rows]

    @property
    def unlike(self) -> tuple[str, ...]:
        """Return which of `rows` and `tokens` differ between runs: those that were not judged on equally many."""
        return tuple(name for name in ("rows", "tokens") if len({row.get(name) for row in self.rows}) > 1)

    @property
    def table(self) -> list[Row]:
        """The rows to read: without names, and where there are several seeds their mean and standard deviation."""
        if len({repr([row[label] for label in self.labels]) for row in self.rows}) < len(self.rows):
            return over_seeds(self.runs, self.columns)
        return [{key: value for key, value in row.items() if key not in ("run", "seed")} for row in self.runs]

    def write(self, out: Path) -> dict[str, str]:
        """Write table.csv, results.json and plot.png into a folder, and return their paths by what they are."""
        expect_results(out)
        make_folder(out)
        paths = {name: out / file for name, file in FILES.items()}
        write_atomic(paths["table"], as_csv(self.runs).encode())
        write_atomic(paths["results"], json.dumps(self.as_json(), indent=2, allow_nan=False).encode())
        self.draw(self.table, paths["plot"])  # last: there may be nothing to draw
        return {name: str(path) for name, path in paths.items()}

    def as_json(self) -> dict[str, Any]:
        """Return everything that was found, as results.json has it."""
        return {"study": self.study, "runs": self.runs, "table": self.table, "notes": self.notes, **self.extra}


def expect_results(out: Path) -> None:
    """Raise SaeError where results would replace files that are no study's."""
    if not any((out / file).exists() for file in FILES.values()):
        return
    try:
        said = json.loads(read(out / FILES["results"]) or b"")
    except ValueError:
        said = None
    if not isinstance(said, dict) or "study" not in said:
        there = next(file for file in FILES.values() if (out / file).exists())
        raise SaeError(f"out = {out}: {there} there is no study's; move it away or name another folder")
