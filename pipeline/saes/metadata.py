"""Where what was trained belongs."""

from __future__ import annotations

from typing import NamedTuple


class Metadata(NamedTuple):
    """The place where a dictionary belongs: the model, the hook point of its inputs (and of its outputs, for a
    transcoder), the text it was trained on. None where that is not known or there is none, as for rows of no language
    model.

    positions: the first position of a context that became a row, and where they ended (None: with the context).
    left_out: tokens that became none, wherever they stood. beside: the hook points of further stores, whose inputs lie
    beside those of `hook`; beside_out: likewise, beside `hook_out` (of an autoencoder none: they are `beside`).
    """

    model: str | None = None
    hook: str | None = None
    hook_out: str | None = None
    context_length: int | None = None
    begin_token: bool | None = None
    dataset: str | None = None
    positions: tuple[int, int | None] | None = None
    left_out: tuple[int, ...] | None = None
    beside: tuple[str, ...] = ()
    beside_out: tuple[str, ...] = ()
