"""Several dictionaries of one shape as one, on a device that is given work ahead of time.

There a step of a narrow dictionary takes as long as the host needs to ask for its operations. A stack of N asks for
them once: its tensors are theirs one after another, W_dec [N, m, d_out], b_dec [N, 1, d_out] (and `scale`, so that both
meet rows [N, B, d]), and each of the N goes on as if it were alone, its own tensors being views of the stack's. What is
sparse needs nothing for it: the entries of N B rows, whose latents are counted on from one dictionary to the next. A
loss has a dimension before, terms [N]; gradients of their sum are each dictionary's own.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from .base import SAE
from .latents import Latents
from .losses import SparseLosses
from .sparse import SparsePattern

OWN = {"k", "k_start", "k_anneal"}
"""Settings that dictionaries of one stack may each have another of."""

BESIDE_ROWS = ("b_dec", "scale", "target_scale")
"""Tensors that meet rows [B, d], and in a stack [N, B, d]."""


def shape(sae: SAE) -> Hashable | None:
    """What dictionaries have in common that can be stacked; None for one that cannot be."""
    config = sae.config
    by_row = config.input_scale == "per_token" or config.skip
    if not sae.stacks or by_row or config.ghost_grads or config.decoder_norm == "free":
        return None
    return type(sae), sae.widths_in, sae.widths_out, sae.is_transcoder, config.model_dump_json(exclude=OWN)


@torch.no_grad()
def stacked(saes: Sequence[SAE]) -> SAE:
    """Dictionaries of one `shape` as one, whose tensors theirs become views of."""
    it = copy.deepcopy(saes[0])
    it.configs = tuple(sae.config for sae in saes)
    it.none_dead_before = min(sae.none_dead_before for sae in saes)
    for name, tensor in [*it.named_parameters(), *it.named_buffers()]:
        whole = torch.stack([getattr(sae, name).detach() for sae in saes])
        if name in BESIDE_ROWS:
            whole = whole.view(len(saes), 1, -1)
        setattr(it, name, nn.Parameter(whole) if isinstance(tensor, nn.Parameter) else whole)
        for sae, own in zip(saes, whole, strict=True):
            if isinstance(tensor, nn.Parameter):
                getattr(sae, name).data = own.view_as(tensor)
            else:
                setattr(sae, name, own.view_as(tensor))
    return it


def give_gradients(stack: SAE, saes: Sequence[SAE]) -> None:
    """Let each dictionary's parameters have their part of the gradients of its stack."""
    for name, parameter in stack.named_parameters():
        if parameter.grad is not None:
            for sae, grad in zip(saes, parameter.grad, strict=True):
                own = sae.get_parameter(name)
                own.grad = grad.view_as(own)


def split(losses: SparseLosses, ks: Sequence[int]) -> list[SparseLosses]:
    """The losses of each dictionary of a stack, whose rows have so many entries on average."""
    active, rows, count = losses.latents, losses.rows, len(ks)
    assert active.entries is not None, "what k fixes is sparse"
    values, m = active.values.reshape(-1), active.d_sae // count
    found = []
    for i, (begin, end) in enumerate(pairwise([0, *accumulate(k * rows for k in ks)])):
        offsets = active.entries.offsets[i * rows : (i + 1) * rows] - begin
        entries = SparsePattern(active.entries.indices[begin:end] - i * m, offsets, m)
        terms: dict[str, Tensor] = {name: term[i] for name, term in losses.terms.items()}
        scale = losses.target_scale[i]
        latents = Latents(values[begin:end], entries, m)
        found.append(SparseLosses(terms, losses.clock, latents, losses.reconstruction[i], scale, losses.y[i]))
    return found
