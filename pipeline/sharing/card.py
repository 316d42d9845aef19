"""The page of a repository: what lies in it, its figures, its recipe, and how it is read. Texts are in `pages`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae.cache.provenance import LanguageModelRows, provenance
from sae.cache.runs import Run
from sae.cache.store.store import Store
from sae.pipeline.metrics.figures import figures
from sae.pipeline.runtime.network import Kind


def of_repository(repository: str, kind: Kind) -> bytes:
    """The page of the whole, which says nothing that another push would have to change."""
    return _page(kind, title=repository.rpartition("/")[2], repository=repository)


def of_run(run: Run) -> bytes:
    """The page of a run: where it belongs, what was found, and the command that makes it again."""
    evaluation = run.evaluation() or {}
    found = [(one, evaluation[one.key]) for one in figures() if isinstance(evaluation.get(one.key), int | float)]
    table = [f"| {one.title} | {value:.4g} | {one.meaning} |" for one, value in found]
    head = ["| figure | value | what it is |", "|---|---|---|"] if table else ["It has not been judged yet."]
    rows = "\n".join(_rows(store.recipe) for store in run.seen.stores)
    return _page(
        "run", name=run.name, rows=rows, figures="\n".join(head + table), settings=json.dumps(run.settings, indent=2)
    )


def of_store(store: Store) -> bytes:
    """The page of a store: its recipe, which decides every byte of it."""
    rows = "Tokens." if store.kind == "tokens" else _rows(store.recipe)
    return _page("store", key=store.key, rows=rows, recipe=json.dumps(store.recipe, indent=2))


def _page(template: str, /, **said: str) -> bytes:
    text = (Path(__file__).parent / "pages" / f"{template}.md").read_text(encoding="utf-8")
    return text.format(**said).encode()


def _rows(recipe: dict[str, Any]) -> str:
    origin = provenance(recipe)
    if isinstance(origin, LanguageModelRows):
        return f"Rows of `{origin.hook}` of `{origin.model}`, on `{origin.text.dataset}`."
    return f"Rows of the source {origin.kind}."
