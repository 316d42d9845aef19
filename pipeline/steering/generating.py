"""Continuations of a prompt, greedy or drawn, by the model as it is or under a dose; and how likely they are to it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from sae.cache.errors import SaeError
from sae.pipeline.language_model import LanguageModel


class Treatment(Protocol):
    """What is done to a model while it reads tokens."""

    def at(self, tokens: Tensor, first: int = 0) -> AbstractContextManager[None]:
        """The context to give it tokens [T] in, the first of which is at position `first` of the text."""


def log_chances(model: LanguageModel, treatment: Treatment, ids: Tensor, first: int) -> Tensor:
    """Log-probabilities float64 [T - first, n_vocab] of what follows each of the tokens [T] from `first` on.

    Raises SaeError where the numbers are none any more.
    """
    with treatment.at(ids):
        return _finite(model.predictions(ids, first)).double().log_softmax(-1)


def continuation(
    model: LanguageModel, treatment: Treatment, prompt: Tensor, tokens: int, *, temperature: float = 0.0, seed: int = 0,
    ends: frozenset[int] = frozenset(), keeping: bool = True,
) -> Tensor:  # fmt: skip
    """Token ids int64 [n] that follow a prompt [T], at most `tokens`; fewer where one of `ends` would follow.

    temperature: 0 takes the likeliest token each time; else tokens are drawn, equal seeds giving equal ones. keeping:
    whether the model's keys and values of earlier tokens are kept, or computed anew for every token.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, kept = prompt, None
    while len(ids) < len(prompt) + tokens:
        fresh = ids if kept is None else ids[-1:]
        with treatment.at(fresh, len(ids) - len(fresh)):
            logits, seen = model.continued(fresh, kept)
        kept = seen if keeping else None
        following = _chosen(_finite(logits).cpu(), temperature, generator)
        if following in ends:
            break
        ids = torch.cat([ids, torch.tensor([following])])
    return ids[len(prompt) :]


def _chosen(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits.double() - logits.max()) / temperature  # the largest is 0, so that no number is too large
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))


def _finite(logits: Tensor) -> Tensor:
    if logits.isnan().any() or not logits.amax(-1).isfinite().all():
        raise SaeError("strength = ...: under it the model's logits are no numbers any more; give one nearer to 0")
    return logits
