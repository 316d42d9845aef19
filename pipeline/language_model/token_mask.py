"""The mask of tokens that become rows, and where each window of rows starts.

Decided by tokens and positions only, never by values, so that the rows of all sites align, and so that the place of
every window is known before anything is computed: windows may then be computed in any order, by anyone.
"""

from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import AfterValidator, Field, ValidationError, model_validator

from sae.cache.activations import ActivationStore
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.store.head import RECIPE
from sae.cache.store.manifest import Windows
from sae.cache.tokens import TokenStore
from sae.configs.base import Settings

SCAN_CONTEXTS = 8192


class TokenMask(Settings):
    """The rule by which tokens become rows."""

    skip_first: int = Field(
        1, ge=0, description="positions left out at the start of every context (position 0 holds massive activations)"
    )
    skip_begin: bool = Field(True, description="leave out the begin token wherever it stands")
    skip_tokens: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(lambda ids: tuple(sorted(set(ids))))
    ] = Field((), description="token ids to leave out wherever they stand, as [198, 628]")
    positions: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None = Field(
        None, description="keep only these positions of a context, as [first, last]; last itself is left out"
    )

    last_window: Literal["whole", "short"] = Field(
        "whole",
        description="rows that do not fill the last window: whole leaves them to a later, larger harvest; short keeps "
        "them in a store of its own, which ends there",
    )

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.positions is not None and not max(self.positions[0], self.skip_first) < self.positions[1]:
            raise ValueError(f"positions {list(self.positions)} with skip_first {self.skip_first} keeps no position")
        return self

    def recipe(self) -> dict[str, Any]:
        """The JSON form that goes into a store's recipe. What is not used is left out: it changes no row."""
        added: dict[str, Any] = {
            "skip_tokens": list(self.skip_tokens),
            "positions": self.positions and list(self.positions),
        }
        added |= {"last_window": self.last_window} if self.last_window == "short" else {}
        used = {name: value for name, value in added.items() if value}
        return {"skip_first": self.skip_first, "skip_begin": self.skip_begin, **used}

    def mask(self, tokens: np.ndarray, lengths: np.ndarray, begin: int) -> np.ndarray:
        """bool [n, T] from tokens [n, T] and the number of real tokens of each context [n]."""
        place = np.arange(tokens.shape[1])
        inside = place >= self.skip_first
        if self.positions is not None:
            inside &= (place >= self.positions[0]) & (place < self.positions[1])
        kept = inside & (place < lengths[:, None])
        if self.skip_begin:
            kept &= tokens != begin
        if self.skip_tokens:
            kept &= ~np.isin(tokens, self.skip_tokens)
        return kept


def rule_of(store: ActivationStore) -> TokenMask:
    """The rule by which the rows of a store were chosen. Raises DamagedStore where its recipe says none."""
    try:
        return TokenMask.model_validate(store.recipe["rows"])
    except ValidationError as error:
        raise DamagedStore(f"{store.path / RECIPE}: rows: no rule of ours; remove the store") from error


class TokenPosition(NamedTuple):
    """The place of the next row: a context, and how many of its rows are used already."""

    context: int
    row: int


class TokenRows:
    """The rows of a token store under a rule: which tokens they are, how many, where each window of them starts."""

    def __init__(self, tokens: TokenStore, rule: TokenMask) -> None:
        self.tokens, self.rule = tokens, rule
        self.begin = int(tokens.recipe["tokenizer"]["begin"])
        if rule.skip_tokens and rule.skip_tokens[-1] >= tokens.n_vocab:
            raise SaeError(
                f"harvest.rows.skip_tokens = {rule.skip_tokens[-1]}: the tokenizer of {tokens.key} has tokens 0 to "
                f"{tokens.n_vocab - 1}"
            )

    def batch(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Contexts [start, stop): tokens int64 [n, T], and which of them become rows, bool [n, T]."""
        tokens = self.tokens.contexts(start, stop)
        return tokens, self.rule.mask(tokens, self.tokens.lengths(start, stop), self.begin)

    def count(self, windows: Windows, contexts: int) -> "Counted":
        """Go through all contexts once: all rows, those of the first `contexts`, and the place of every window.

        Where the last window may be short, there is nothing beyond the first `contexts`.
        """
        starts, rows, within = [TokenPosition(0, 0)], 0, 0
        end = starts[0]
        every = contexts if self.rule.last_window == "short" else self.tokens.n_contexts
        for start in range(0, every, SCAN_CONTEXTS):
            stop = min(start + SCAN_CONTEXTS, every)
            here = self.batch(start, stop)[1].sum(axis=1)
            ends = rows + np.cumsum(here)
            if start < contexts:
                within = int(ends[min(stop, contexts) - start - 1])
            rows = int(ends[-1])
            while (stop_row := windows.start(len(starts))) <= rows:
                last = int(np.searchsorted(ends, stop_row))  # the context of the window's last row
                used = int(stop_row - (ends[last] - here[last]))
                starts.append(
                    TokenPosition(start + last + 1, 0) if used == here[last] else TokenPosition(start + last, used)
                )
            if here.any():
                end = TokenPosition(start + int(np.flatnonzero(here)[-1]) + 1, 0)
        if windows.start(len(starts) - 1) < rows:
            starts.append(end)
        return Counted(rows, within, starts)


class Counted(NamedTuple):
    """The rows there are to harvest in a token store. Window i reaches from `starts[i]` to `starts[i + 1]`."""

    rows: int
    within: int  # rows in the first contexts that were asked about
    starts: list[TokenPosition]
