"""A dictionary at its place in somebody's language model: the latents of a text, splicing, ablation, steering.

The model may be any that `places.intervene` takes, and stays as it is: everything is done by hooks, within a context,
also while the model generates. Between the latents and what the dictionary makes of them lies its error; an edit of
latents keeps it, so that an edit which changes nothing changes nothing, and splicing leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae.cache.arguments import checked
from sae.cache.errors import SaeError
from sae.pipeline.language_model.interventions import predicting
from sae.pipeline.language_model.places import Said, intervene
from sae.pipeline.saes.dictionary import Dictionary
from sae.pipeline.saes.latents import Latents

Edit = Callable[[Tensor], Tensor]
"""Given the values of latents [B, T, d_sae], returns others."""


@checked
def attach(model: Any, dictionary: Dictionary, at: Said | None = None, *, writes: Said | None = None) -> Attached:
    """Say where in a model a dictionary reads, and where it writes; nothing is done to the model yet.

    `model`: a Hugging Face model, a transformer_lens bridge, or a `LanguageModel`. `at`: a place as `6.mlp_out`, as
    `blocks.6.hook_mlp_out`, or the name of a module; default: where the dictionary says that it belongs. `writes`: of a
    transcoder, likewise. Raises SaeError where neither says it.
    """
    if len(dictionary.widths_in) > 1 or len(dictionary.widths_out) > 1:
        raise SaeError("the dictionary is of several places at once, and is attached at none; `evaluate()` splices it")
    reads = at or dictionary.metadata.hook
    to = writes or (dictionary.metadata.hook_out if dictionary.is_transcoder else reads)
    for name, place in (("at", reads), ("writes", to)):
        if place is None:
            raise SaeError(
                f"{name}: nothing says where the dictionary belongs; give it, as attach(..., {name}='6.mlp_in')"
            )
    assert reads is not None and to is not None
    return Attached(model, dictionary, reads, to)


@dataclass(frozen=True)
class Attached:
    """A dictionary at a place; made by `attach`. Each method but `latents` gives a context to run the model in."""

    model: Any
    dictionary: Dictionary
    reads: Said
    writes: Said

    def latents(self, *inputs: Any, **named: Any) -> Latents:
        """The latents [B, T] of what the model is given, as in `latents(**tokenizer(text, return_tensors="pt"))`."""
        seen: list[Latents] = []

        def look(value: Tensor) -> None:
            seen[:] = [self._encoded(value)]

        with torch.no_grad(), intervene(self.model, {self.reads: look}):
            (self.model if callable(self.model) else self.model.losses)(*inputs, **named)
        if not seen:
            raise SaeError(f"{self.reads}: the model ran, and nothing passed there; give another place")
        return seen[0]

    def splice(self) -> AbstractContextManager[None]:
        """Put the dictionary's reconstruction in the place of the model's own activations."""
        return self._writing(lambda _, latents: self.dictionary.decode(latents))

    def edit(self, change: Edit) -> AbstractContextManager[None]:
        """The model's own activations, plus the difference that other values of the latents make."""

        def write(value: Tensor, latents: Latents) -> Tensor:
            values = latents.dense()
            new = change(values)
            if new.shape != values.shape:
                raise ValueError(f"an edit must return {list(values.shape)}, not {list(new.shape)}")
            old = self.dictionary.decode(latents.edited(values))
            return value + (self.dictionary.decode(latents.edited(new)) - old).to(value)

        return self._writing(write)

    def steer(self, by: Mapping[int, float]) -> AbstractContextManager[None]:
        """Each of some latents is raised by a number at every position: its direction is added so many times."""
        raised = torch.zeros(self.dictionary.d_sae)
        raised[self._known(by)] = torch.tensor([float(number) for number in by.values()])
        return self.edit(lambda values: values + raised.to(values))

    def ablate(self, latents: Iterable[int]) -> AbstractContextManager[None]:
        """Some latents are taken to be 0: what they write is taken away."""
        kept = torch.ones(self.dictionary.d_sae)
        kept[self._known(latents)] = 0
        return self.edit(lambda values: values * kept.to(values))

    def _writing(self, write: Callable[[Tensor, Latents], Tensor]) -> AbstractContextManager[None]:
        return intervene(
            self.model,
            predicting(lambda value, read: write(value, self._encoded(read)).to(value), self.reads, self.writes),
        )

    def _encoded(self, value: Tensor) -> Latents:
        return self.dictionary.encode(value.to(self.dictionary.W_dec.device))

    def _known(self, latents: Iterable[int]) -> list[int]:
        """Numbers of latents. Raises SaeError for one that the dictionary has not."""
        numbers = [*latents]
        for latent in numbers:
            if not 0 <= latent < self.dictionary.d_sae:
                raise SaeError(f"latent {latent}: the dictionary has latents 0 to {self.dictionary.d_sae - 1}")
        return numbers
