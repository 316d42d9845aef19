"""Results as they are shown in a notebook: lists of dicts and dicts, which pandas and everything else reads."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from sae.cache.printable import printable
from sae.pipeline.metrics.figures import figures


class Table(list[dict[str, Any]]):
    """Rows by column; `pandas.DataFrame(table)` takes it as it is."""

    def _repr_html_(self) -> str:
        columns = list(dict.fromkeys(key for row in self for key in row if row[key] is not None))
        return _table(columns, ([row.get(column) for column in columns] for row in self))


class Figures(dict[str, Any]):
    """Figures by name (None: not defined), and `details`."""

    def _repr_html_(self) -> str:
        meanings = {figure.key: figure.meaning for figure in figures()}
        shown = [(key, value, meanings.get(key, "")) for key, value in self.items() if not isinstance(value, dict)]
        return _table(["figure", "value", "meaning"], (row for row in shown if row[1] is not None))


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_cell(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return html.escape(printable(f"{value:.4g}" if isinstance(value, float) else str(value)))
