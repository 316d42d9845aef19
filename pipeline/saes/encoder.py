"""The encoder's product, and the ways an architecture picks active latents from it.

The pre-activations p = (x - centre) @ W_enc + b_enc of a batch are computed once, without a graph, into scratch memory
that is reused from step to step (fresh pages for 64 MiB cost a tenth of the product). An architecture scans them,
names the entries it keeps, and gets those back with their gradients attached. Scratch holds one block of rows at a time
and is dead when the scan ends, so nothing saved for backward refers to it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels, linears, placement, sparse
from .latents import Latents
from .sparse import SparsePattern

BLOCK_ELEMENTS = 2**24
"""Pre-activations held at a time (64 MiB in float32); smaller blocks were slower in every measurement."""

MIN_BLOCK_ROWS = 256
"""Below this many rows per product, packing the weights costs more than a smaller block saves."""

KERNEL_BLOCK_ELEMENTS = 2**28
"""The same where kernels choose among them: a GPU has the memory, and a choice more costs launches."""

PROBED_ROWS = 32
"""Rows `above_threshold` looks at before it decides: their product costs 2 % of a batch of 2048."""

SPARSE_BELOW = 0.15
"""Share of entries kept up to which `above_threshold` goes entry by entry. Beyond, dense products are cheaper: from
0.16 on for L1, 0.20 for gated, 0.25 and more for JumpReLU."""

GROUPS = 4
"""Groups a row is cut into when its k largest are searched by the groups' maxima, as a multiple of k."""

SAMPLE = 2**18
"""Pre-activations from which `batch_topk` guesses its bound."""

_scratch = threading.local()


def _scratch_rows(purpose: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised [rows, columns] tensor on the CPU, the calling thread's own, reused by the next call."""
    kept: dict[tuple[str, torch.dtype], Tensor] = _scratch.__dict__.setdefault("kept", {})
    key = purpose, dtype
    if key not in kept or kept[key].numel() < rows * columns:
        kept[key] = torch.empty(rows * columns, dtype=dtype)
    return kept[key][: rows * columns].view(rows, columns)


class Preactivations:
    """p = (x - centre) @ weight.T + bias, seen through what an architecture needs of it.

    x [B, d_in], centre [d_in], weight [m, d_in] (W_enc stored latent by latent), bias [m].
    Under autocast, and in TF32, the product runs in the reduced precision; the entries kept are then recomputed in
    full, so that only the choice of entries is approximate and never their values.

    Of a stack of N dictionaries (`stacks`) x is [N, B, d_in], centre [N, 1, d_in], weight [N, m, d_in], bias [N, m].
    """

    def __init__(self, x: Tensor, centre: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.x, self.centre, self.weight, self.bias = x, centre, weight, bias
        self.centred = x.detach() - centre.detach()

    @property
    def d_sae(self) -> int:
        return self.weight.shape[-2]

    def blocks(self, first: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(rows, p of those rows [b, m]) without a graph; p is overwritten when the next block is asked for.

        first: rows of the first block, for a scan that may stop there. Of no rows there is one block, without any.
        """
        block = KERNEL_BLOCK_ELEMENTS if kernels.usable(self.weight) else BLOCK_ELEMENTS
        size = max(MIN_BLOCK_ROWS, block // self.d_sae)
        product = self._product()
        stop = 0
        while True:
            start, stop = stop, min(stop + (first or size), self.x.shape[0])
            rows, first = slice(start, stop), None
            yield rows, product(rows)
            if stop == self.x.shape[0]:
                return

    def whole(self) -> Tensor:
        """All of p [B, m] without a graph, as the product gives it, on a device that runs ahead."""
        return self._product()(slice(None))

    def means(self) -> Tensor:
        """[m]: the means of p over the rows, differentiable, at the cost of one row; in full precision."""
        with torch.autocast(self.x.device.type, enabled=False):
            return self.weight @ (self.x - self.centre).mean(0) + self.bias

    def _product(self) -> Callable[[slice], Tensor]:
        """Some rows -> their p, in the precision autocast asks for."""
        x, weight, bias = self.centred, self.weight.detach(), self.bias.detach()
        if placement.runs_ahead(x):  # a GPU's allocator already reuses memory

            def elsewhere(rows: slice) -> Tensor:
                with torch.no_grad():
                    return F.linear(x[rows], weight, bias)

            return elsewhere
        if torch.is_autocast_enabled("cpu"):  # which an out= product ignores
            dtype = torch.get_autocast_dtype("cpu")
            weight = _scratch_rows("weight", self.d_sae, x.shape[1], dtype).copy_(weight)
            x, bias = x.to(dtype), bias.to(dtype)

        def here(rows: slice) -> Tensor:
            part = x[rows]
            return torch.addmm(bias, part, weight.T, out=_scratch_rows("p", len(part), len(weight), x.dtype))

        return here

    def gather(self, entries: SparsePattern, values: Tensor) -> Tensor:
        """The pre-activations at the entries, differentiable: `values` [n] are what the scan saw there."""
        if values.dtype != self.weight.dtype or placement.rounds(self.x):
            with torch.no_grad():
                centred, weight = self.centred.flatten(0, -2), self.weight.flatten(0, -2)
                values = sparse.sddmm(entries, centred, weight) + self.bias.flatten()[entries.indices]
        return linears.with_gradient(values, self.x, self.centre, self.weight, self.bias, self.centred, entries)

    def topk(self, *ks: int) -> Latents:
        """The k largest of every row: values [B, k] (of either sign), exactly k of them whatever the ties.

        Of a stack, as many as is said of each dictionary: values [N B, k], or [n] where that differs.
        """
        if self.x.dim() > 2:
            return self._topk_of_each(ks)
        (k,) = ks
        kept = [_row_topk(p, k) for _, p in self.blocks()]
        values, indices = kept[0] if len(kept) == 1 else (torch.cat(parts) for parts in zip(*kept, strict=True))
        entries = SparsePattern.per_row(indices, self.d_sae)
        values = self.gather(entries, values.reshape(-1))
        return Latents(values.view(-1, k), entries, self.d_sae)

    def _topk_of_each(self, ks: Sequence[int]) -> Latents:
        p, m, begin = self._of_each(), self.d_sae, 0
        kept, patterns = [], []
        for k, alike in groupby(ks):
            end = begin + len([*alike])
            values, indices = _row_topk(p[begin:end].flatten(0, 1), k)
            firsts = torch.arange(begin * m, end * m, m, device=p.device)
            kept.append(values)
            own = (indices.view(end - begin, -1) + firsts[:, None]).view(-1, k)
            patterns.append(SparsePattern.per_row(own, m * len(ks)))
            begin = end
        alone = len(kept) == 1
        entries = patterns[0] if alone else SparsePattern.following(patterns)
        values = self.gather(entries, torch.cat([values.reshape(-1) for values in kept]))
        return Latents(values.view_as(kept[0]) if alone else values, entries, m * len(ks))

    def _of_each(self) -> Tensor:
        """All of a stack's p [N, B, m], in the precision autocast asks for, without a graph.

        Each product is by itself: it is large enough for a device, and the same as that of its dictionary alone.
        """
        dtype = placement.reduced(self.x) or self.x.dtype
        x, weight, bias = (one.detach().to(dtype) for one in (self.centred, self.weight, self.bias))
        p = x.new_empty(*x.shape[:2], self.d_sae)
        for out, *factors in zip(p, bias, x, weight.mT, strict=True):
            torch.addmm(*factors, out=out)
        return p

    def batch_topk(self, count: int) -> Latents:
        """The `count` largest of the whole batch among the positive ones, exactly so many whatever the ties.

        A bound guessed from a sample, a little low, leaves few candidates to choose from. Where it was too high after
        all, the scan is repeated without one. On a device that runs ahead there are always so many: where fewer are
        positive, the largest of the others are among them.
        """
        if placement.runs_ahead(self.x):
            return self._ragged(*self._largest(count))
        bound: float | None = None
        while True:
            found = []
            for rows, p in self.blocks():
                bound = _bound(p, count / max(1, self.x.shape[0] * self.d_sae)) if bound is None else bound
                flat = _where(p, bound)
                found.append((flat + rows.start * self.d_sae, p.view(-1)[flat]))
            flat, values = (torch.cat(parts) for parts in zip(*found, strict=True))
            if len(flat) >= count or bound == 0:
                break
            bound = 0.0
        if len(flat) > count:
            keep = values.topk(count, sorted=False).indices.sort().values
            flat, values = flat[keep], values[keep]
        return self._ragged(flat, values)

    def _largest(self, count: int) -> tuple[Tensor, Tensor]:
        """Ascending places in the flattened p of its `count` largest, int64 [count], and their values."""
        found = []
        for rows, p in self.blocks():
            flat, values = _batch_topk(p, min(count, p.numel()))
            found.append((flat + rows.start * self.d_sae if rows.start else flat, values))
        if len(found) == 1:
            return found[0]
        flat, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        keep = values.topk(min(count, len(flat)), sorted=False).indices.sort().values
        return flat[keep], values[keep]

    def above_threshold(self, bound: Tensor | float) -> Latents:
        """p where it exceeds a bound (of each latent, [m], or of all): entry by entry where few do, else all of p.

        Dense or not, what is not above the bound is for the caller's function to zero. Decided on a few rows; on a
        device that runs ahead, where nobody can tell how many there will be, it is all of p (but see `uncounted`).
        """
        if placement.runs_ahead(self.x):
            return Latents.of_dense(self.dense())
        found = []
        for rows, p in self.blocks(first=PROBED_ROWS):
            flat = _where(p, bound)
            if len(flat) > SPARSE_BELOW * p.numel():
                return Latents.of_dense(self.dense())
            found.append((flat + rows.start * self.d_sae, p.view(-1)[flat]))
        flat, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        return self._ragged(flat, values)

    def _ragged(self, flat: Tensor, values: Tensor) -> Latents:
        """Latents at ascending places of the flattened [B, m], with the values a scan saw there."""
        firsts = torch.arange(self.x.shape[0], device=flat.device) * self.d_sae
        entries = SparsePattern(flat % self.d_sae, torch.searchsorted(flat, firsts), self.d_sae)
        if placement.runs_ahead(flat):
            entries.row_ids = flat // self.d_sae
        return Latents(self.gather(entries, values), entries, self.d_sae)

    def dense(self) -> Tensor:
        """All of p, [B, m], differentiable the ordinary way."""
        return linears.centred_linear(self.x, self.centre, self.weight, self.bias)

    def columns(self, latents: Tensor) -> Tensor:
        """p of some latents only (int64 [c]): [B, c], differentiable, at c / m of the cost of `dense`."""
        return linears.centred_linear(self.x, self.centre, self.weight[latents], self.bias[latents])


def _row_topk(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest of every row of p [b, m], in no order: torch's topk in 0.6 of its time.

    A row is cut into a few times k groups. At least k numbers reach the k-th largest of the groups' maxima, and little
    more than k do: only those are compared. (A group takes every so-many-th number, so that maxima are found by
    comparing whole stretches of memory.)
    """
    if kernels.usable(p, torch.bfloat16) and (select := kernels.family("select")).fits(k):
        indices = select.rows(p, k)
        return p.gather(1, indices), indices
    (b, m), groups = p.shape, GROUPS * 2 ** math.ceil(math.log2(k))
    if not b or placement.runs_ahead(p) or m % groups or m < 8 * groups:
        return _plain_topk(p, k)
    bound = p.view(b, -1, groups).amax(1).kthvalue(groups - k + 1, dim=1, keepdim=True).values
    flat = _where(p, bound, or_equal=True)
    starts = torch.searchsorted(flat, torch.arange(b) * m)
    if (torch.diff(starts, append=torch.tensor([len(flat)])) < k).any():  # there are NaN
        return _plain_topk(p, k)
    rows = flat // m
    places = torch.arange(len(flat)) - starts[rows]
    candidates = torch.full((b, int(places.max()) + 1), -torch.inf, dtype=p.dtype)
    candidates[rows, places] = p.view(-1)[flat]
    top = candidates.topk(k, dim=1, sorted=False)
    return top.values, flat[starts[:, None] + top.indices] % m


def _plain_topk(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top = p.topk(k, dim=1, sorted=False)
    return top.values, top.indices


def _batch_topk(p: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ascending places in the flattened p of its `count` largest, and their values."""
    usable = count > 0 and kernels.usable(p, torch.bfloat16)
    if usable and (select := kernels.family("select")).fits(-(-count // len(p))):
        flat = select.batch(p, count)
    else:
        flat = p.view(-1).topk(count, sorted=False).indices.sort().values
    return flat, p.view(-1)[flat]


def _where(p: Tensor, bound: Tensor | float, *, or_equal: bool = False) -> Tensor:
    """int64 [n]: where p [b, m] exceeds (or equals) a bound that broadcasts to it, on the CPU: places in the flat p.

    NumPy finds the few true ones among many 4 times as fast as torch. bfloat16 is compared as what its bits
    are as integers, in half the time: above a bound that is not negative the order is the same.
    """
    compare = torch.ge if or_equal else torch.gt
    limit = torch.as_tensor(bound, dtype=p.dtype)
    if p.dtype == torch.bfloat16 and bool((limit > 0 if or_equal else limit >= 0).all()):
        p, limit = p.view(torch.int16), limit.abs().view(torch.int16)
    mask = compare(p, limit, out=_scratch_rows("mask", p.shape[0], p.shape[1], torch.bool))
    return torch.from_numpy(mask.view(-1).numpy().nonzero()[0])


def _bound(p: Tensor, share: float) -> float:
    """A number at least 0 that somewhat more than a share of p [b, m] exceeds, guessed from an even sample of it."""
    stride = max(1, p.numel() // SAMPLE)
    while math.gcd(stride, p.shape[1]) > 1:  # which would leave out latents
        stride += 1
    sample = p.view(-1)[::stride]
    expected = share * len(sample)
    rank = math.ceil(1.25 * expected + 4 * math.sqrt(expected)) + 1
    return max(0.0, sample.topk(rank).values[-1].item()) if rank <= len(sample) else 0.0
