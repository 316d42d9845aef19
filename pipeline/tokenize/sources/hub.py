"""Text streamed from the Hugging Face hub: FineWeb's 10-billion-token sample, or any data set with a text column.

`fineweb`, `org/name`, `hub:org/name[@revision][:config[:split]]`. Nothing is downloaded ahead: documents arrive as they
are asked for, in the data set's own order. The recipe holds the commit, so that what was read yesterday is not silently
mixed with what the data set holds today.
"""

from __future__ import annotations

import functools
import re
import weakref
from typing import Any

from sae.cache.errors import SaeError
from sae.pipeline.runtime.network import Refused, ask, hub_address, hub_errors, offline_wanted, reachable
from sae.pipeline.tokenize.sources.base import (
    Document,
    DocumentStream,
    TextSource,
    Unreachable,
    document,
    field,
    missing_column,
    source,
)
from sae.pipeline.tokenize.sources.row_groups import RowGroupStream

FINEWEB = "hub:HuggingFaceFW/fineweb:sample-10BT"
_SPEC = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<config>[^:]*))?(?::(?P<split>[^:]+))?"
)
_OFFLINE = "without a network use `source = python` or local files"


class HubSource:
    """One split of one configuration of a data set on the hub."""

    def __init__(self, spec: str, column: str, slug: str | None = None, *, offline: bool = False) -> None:
        match = _SPEC.fullmatch(spec.removeprefix("hub:"))
        if match is None:
            raise SaeError(
                f"source = {spec}: not a data set's name; write hub:org/name, hub:org/name:config or "
                "hub:org/name:config:split"
            )
        self.repo: str = match["repo"]
        self.config: str | None = match["config"] or None
        self.split: str = match["split"] or "train"
        self.column = column
        self.slug = slug or "-".join(filter(None, [self.repo.split("/")[1], self.config]))
        self._wanted, self._offline = match["revision"], offline

    @functools.cached_property
    def revision(self) -> str:
        """The commit that is read: asked of the hub once, unless a whole commit hash was given."""
        if self._is_pinned():
            return str(self._wanted)
        import huggingface_hub

        self._reach()
        try:
            found = ask(
                self.repo, lambda: huggingface_hub.HfApi().dataset_info(self.repo, revision=self._wanted).sha, "dataset"
            )
        except Refused as error:
            raise self._error(error) from error
        assert found is not None
        return str(found)

    def _is_pinned(self) -> bool:
        return self._wanted is not None and re.fullmatch(r"[0-9a-f]{40}", self._wanted) is not None

    def __str__(self) -> str:
        """Return the spec by which `--source` reads this commit."""
        return ":".join(["hub", f"{self.repo}@{self.revision}", *self._part()])

    def _part(self) -> list[str]:
        """Configuration and split, as far as they have to be said."""
        split = [self.split] if self.split != "train" else []
        return [self.config or "", *split] if self.config or split else []

    def earlier(self, recipe: dict[str, Any]) -> HubSource | None:
        """The data set at the commit a recipe names; None where that recipe is of something else, or this one's."""
        if self._is_pinned() or recipe.get("source") != "hub":
            return None
        spec = ":".join(["hub", f"{self.repo}@{recipe['revision']}", *self._part()])
        found = HubSource(spec, self.column, self.slug, offline=self._offline)
        return found if found.recipe() == recipe else None

    def _reach(self) -> None:
        """Refuse at once what would otherwise fail after half a minute of retries."""
        if offline_wanted(self._offline):
            raise Unreachable(
                f"source = {self.repo}: not a local file, and the network is switched off (`offline` or "
                f"HF_HUB_OFFLINE); {_OFFLINE}"
            )
        if not reachable(hub_address()):
            raise Unreachable(
                f"source = {self.repo}: not a local file, and {hub_address()} cannot be reached; {_OFFLINE}"
            )

    def recipe(self) -> dict[str, Any]:
        """Identity: data set, commit, configuration, split, column."""
        return {
            "source": "hub",
            "dataset": self.repo,
            "revision": self.revision,
            "config": self.config,
            "split": self.split,
            "column": self.column,
        }

    def open(self, state: dict[str, Any] | None = None) -> DocumentStream:
        """All documents in the data set's order, or from `state` on."""
        self._reach()
        try:
            # a place as datasets says it is of an older store, and only datasets can continue there
            old = state is not None and state.get("place") is not None
            urls = None if old else ask(self.repo, self._parquet, "dataset")
            if urls is not None:
                return RowGroupStream(self.repo, self.column, urls, state if state and "file" in state else None)
            data = ask(self.repo, self._load, "dataset")
        except Refused as error:
            raise self._error(error) from error
        if data.column_names is not None and not {self.column, self.column.split(".")[0]} & set(data.column_names):
            raise missing_column(self.repo, self.column, data.column_names)
        return HubStream(self, data, state)

    def _parquet(self) -> list[str] | None:
        """Return the places of the split's files, in the data set's order; None where datasets has to read them."""
        import datasets
        from datasets.packaged_modules.parquet.parquet import Parquet

        builder = datasets.load_dataset_builder(self.repo, name=self.config, revision=self.revision)
        files = [str(file) for file in (builder.config.data_files or {}).get(self.split, [])]
        plain = isinstance(builder, Parquet) and all(file.startswith("hf://") and "::" not in file for file in files)
        return files if plain and files else None

    def _load(self) -> Any:
        import datasets

        return datasets.load_dataset(
            self.repo, name=self.config, split=self.split, revision=self.revision, streaming=True
        )

    def _error(self, error: BaseException) -> SaeError:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = SaeError if isinstance(error, Refused) and error.definite else Unreachable
        return kind(f"source = {self.repo}: {line[:300]}; check the name, or {_OFFLINE}")


class HubStream:
    """`state()` is the data set's own account of its place, and how many documents came before."""

    def __init__(self, owner: HubSource, data: Any, state: dict[str, Any] | None) -> None:
        self._owner, self._data = owner, data
        self._documents = 0
        if state is not None:
            self._documents = int(state["documents"])
            if state["place"] is not None:
                data.load_state_dict(state["place"])
        self._place = None if state is None else state["place"]
        self._rows = iter(data)
        # A generator of datasets that is still open when Python ends complains on stderr: close it first.
        weakref.finalize(self, self._rows.close)

    def __iter__(self) -> HubStream:
        return self

    def __next__(self) -> Document:
        while True:
            try:
                row = next(self._rows)
            except StopIteration:
                if self._documents:
                    raise
                raise SaeError(f"source = {self._owner.repo}: split {self._owner.split} holds no text") from None
            except hub_errors() as error:
                raise SaeError(
                    f"source = {self._owner.repo}: stopped after {self._documents} documents ({type(error).__name__}); "
                    "repeat the command to continue from there"
                ) from error
            self._place = None
            name, column = self._owner.repo, self._owner.column
            found = document(name, column, field(name, row, column), f"behind document {self._documents}")
            if len(found):
                self._documents += 1
                return found

    def state(self) -> dict[str, Any]:
        # Asked of datasets only when wanted: it is a deep copy.
        if self._documents and self._place is None:
            self._place = self._data.state_dict()
        return {"place": self._place, "documents": self._documents}


@source(
    "fineweb", order=0, help="HuggingFaceFW/fineweb, sample-10BT: 10 billion tokens of the web, streamed (the default)"
)
def _fineweb(spec: str, offline: bool, column: str) -> TextSource | None:
    return HubSource(FINEWEB, column, "fineweb-10BT", offline=offline) if spec == "fineweb" else None


@source(
    "hub:org/name[:config[:split]]", order=0, help="any data set of the Hugging Face hub with a text column, streamed"
)
def _prefixed(spec: str, offline: bool, column: str) -> TextSource | None:
    return HubSource(spec, column, offline=offline) if spec.startswith("hub:") else None


@source("org/name", order=20, help="the same, where no local file has that name")
def _bare(spec: str, offline: bool, column: str) -> TextSource | None:
    return HubSource(spec, column, offline=offline) if _SPEC.fullmatch(spec) else None
