"""Answers of language models: kept on disk by what was asked, counted, and paid for no further than a limit.

Every answer is a file of its own in the run folder, `explain/<digest>.json`, named by all that decides it: who was
asked, with which settings and which words. A request that was answered is never sent again, whether or not the answer
is of use; one that was under way when a process was killed is.
"""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.cache.disk.durable import make_folder, read, write_in
from sae.cache.disk.identity import canonical
from sae.cache.disk.parsing import MOST_BYTES, whole
from sae.cache.disk.parsing import field as value_of
from sae.cache.disk.sealed import sealed, unsealed
from sae.cache.errors import SaeError
from sae.pipeline.explain.config import ExplainConfig

Key = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A language model's words, and the tokens that they and what was asked came to. ended: whether they are whole."""

    text: str
    asked_tokens: int
    answered_tokens: int
    ended: bool = True


@dataclass
class Estimate:
    """About how much is still to be asked. known: requests whose answers are there."""

    requests: int = 0
    asked_tokens: int = 0
    answered_tokens: int = 0
    known: int = 0

    @property
    def tokens(self) -> int:
        return self.asked_tokens + self.answered_tokens

    def says(self, config: ExplainConfig) -> str:
        """The estimate in a line."""
        cost = config.cost(self.asked_tokens, self.answered_tokens)
        price = "no price given" if cost is None else f"about {cost:.4g} by the prices given"
        return (
            f"{self.requests:,} requests to send, {self.known:,} answered before; about {self.asked_tokens:,} tokens "
            f"asked and {self.answered_tokens:,} answered, {price}"
        )


@dataclass
class Answers:
    """The answers in a folder, and what was spent on new ones. Used by several threads at once."""

    folder: Path
    config: ExplainConfig
    note: Callable[[str], None]
    spent: Estimate = field(default_factory=Estimate)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _under_way: dict[str, threading.Lock] = field(default_factory=dict)

    def known(self, key: Key) -> Answer | None:
        """The answer to a request, where it was answered; a file that is damaged is said, and counts as none."""
        data = read(path := self.folder / _name(key), MOST_BYTES)
        if data is None:
            return None
        try:
            found, checked = unsealed(data)
            text = value_of(found, "text")
            if not checked or found.get("asked") != key or not isinstance(text, str):
                raise ValueError("it is of another request")
            tokens = whole(found, "asked_tokens"), whole(found, "answered_tokens")
            return Answer(text, *tokens, ended=value_of(found, "ended") is True)
        except ValueError as error:
            self.note(f"{path}: is not what was written ({error}); it is asked again")
            return None

    def get(self, key: Key, ask: Callable[[], Answer]) -> Answer:
        """The answer that is kept, or that of `ask`, which is kept from then on.

        Raises SaeError where the limit is reached.
        """
        with self._lock:
            mine = self._under_way.setdefault(_name(key), threading.Lock())
        with mine:  # of two that ask the same at once, the second waits for the first one's answer
            return self._get(key, ask)

    def _get(self, key: Key, ask: Callable[[], Answer]) -> Answer:
        if (found := self.known(key)) is not None:
            with self._lock:
                self.spent.known += 1
            return found
        with self._lock:
            expect_within(self.config, self.spent, "were spent")
        found = ask()
        with self._lock:
            self.spent.requests += 1
            self.spent.asked_tokens += found.asked_tokens
            self.spent.answered_tokens += found.answered_tokens
        make_folder(self.folder)
        told = {"text": found.text, "ended": found.ended}
        counted = {"asked_tokens": found.asked_tokens, "answered_tokens": found.answered_tokens}
        write_in(self.folder, _name(key), sealed({"asked": key, **told, **counted}))
        return found


def expect_within(config: ExplainConfig, amount: Estimate, what: str) -> None:
    """Raise SaeError where an amount is beyond the limits that settings set."""
    cost = config.cost(amount.asked_tokens, amount.answered_tokens)
    if config.most_tokens is not None and amount.tokens > config.most_tokens:
        over = f"most_tokens = {config.most_tokens:,}: {amount.tokens:,} {what}"
    elif config.most_cost is not None and cost is not None and cost > config.most_cost:
        over = f"most_cost = {config.most_cost:g}: {cost:.4g} {what}"
    else:
        return
    raise SaeError(f"{over}; allow more, or explain fewer latents (answers so far are kept)")


def _name(key: Key) -> str:
    return f"{hashlib.sha256(canonical(key).encode()).hexdigest()[:32]}.json"
