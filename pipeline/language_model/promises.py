"""Tests of whether a site holds what its name says: values are written into one layer, and others read.

Architectures differ in what they add to what: norms after the sum, attention and MLP side by side, scaled branches,
experts, mixers without attention. A list of names would always lag behind, so each site of a layer is put to the test
of what it promises (`SITES`), on a few random rows:

    resid_pre, resid_post   the stream arrives where it should, and nothing else reaches what follows the layer
    attn_out, mlp_out       resid_mid = resid_pre + attn_out and resid_post = resid_mid + mlp_out, or where the two
                            are side by side resid_post = resid_pre + attn_out + mlp_out, as read and as written
    resid_mid               the stream between the two, and the rest of the layer depends on nothing else
    attn_z, mlp_post        the module's output is a projection (with a bias) of it, and not it itself
    mlp_in                  the MLP's output depends on nothing else
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ATTENTION, MLP, NEXT = "attention", "mlp", "next"  # read beside the sites: the modules' own outputs, what follows

# Values to write, by site -> what is then at each site, at ATTENTION, MLP and NEXT; [1, T, width], absent where nothing
# passes. Written values are what is read at their own site.
Trial = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

_SUM, _PRODUCT = 8, 64  # how many roundings of the largest term a sum, or a matrix product, may be off


class NotFinite(Exception):
    """The layer gives infinities or NaN for small inputs."""


def kept(trial: Trial, *, last: bool) -> list[str]:
    """The sites whose promise holds. `last`: NEXT is not the next layer's input, but follows a norm or the like.

    Raises NotFinite.
    """
    there = trial({})
    if not {"resid_pre", "resid_post", NEXT} <= there.keys():
        return []
    draw = _Draw(there["resid_pre"])
    tried = _Layer(trial, there, draw)
    found = ["resid_pre", "resid_post"] if tried.stream_arrives(last) else []
    found += tried.branches() if found else []
    for site, *modules in (("attn_z", ATTENTION, "attn_out"), ("mlp_post", MLP, "mlp_out"), ("mlp_in", MLP, "mlp_out")):
        modules = [module for module in modules if module in there]  # two: some add the stream to their own output
        if site not in there or any(tried.is_at(site, module) for module in modules):
            continue
        holds = tried.decides if site == "mlp_in" else tried.is_projected
        if any(holds(site, module) for module in modules):
            found.append(site)
    return found


class _Draw:
    """Random values, the same every time, whatever the device."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._random = torch.Generator().manual_seed(0)

    def __call__(self, like: Tensor | None = None, size: float = 1.0) -> Tensor:
        like = self._like if like is None else like
        return (size * torch.randn(like.shape, generator=self._random)).to(like.device, like.dtype)


class _Layer:
    """One layer under trial: `x` and `y` are two streams that enter it."""

    def __init__(self, trial: Trial, there: Mapping[str, Tensor], draw: _Draw) -> None:
        self._trial, self._there, self._draw = trial, there, draw
        self._x, self._y = draw(), draw()
        self._seen = trial({"resid_pre": self._x})
        if not all(value.isfinite().all() for value in self._seen.values()):
            raise NotFinite
        # written values are as large as those of the layer, so that neither drowns in the other's rounding
        self._size = max(float(value.abs().max()) for value in self._seen.values())

    def stream_arrives(self, last: bool) -> bool:
        """Check that resid_post alone decides what follows the layer, and resid_pre alone resid_post."""
        r = self._draw(size=self._size)
        one, other = (self._trial({"resid_pre": stream, "resid_post": r}) for stream in (self._x, self._y))
        arrives = equal(one[NEXT], [other[NEXT]]) if last else equal(one[NEXT], [r]) and equal(other[NEXT], [r])
        moved = not equal(self._trial({"resid_pre": self._y})["resid_post"], [self._seen["resid_post"]])
        return arrives and moved and not equal(one[NEXT], [self._seen[NEXT]])

    def branches(self) -> list[str]:
        """Those of resid_mid, attn_out and mlp_out that satisfy the residual identities."""
        there = self._there.keys()
        runs = [self._seen]  # as it is, then with either branch replaced
        for site in ("attn_out", "mlp_out"):
            if site in there:
                runs.append(self._trial({"resid_pre": self._x, site: self._draw(self._there[site], self._size)}))
        side_by_side = {"attn_out", "mlp_out"} <= there and all(
            equal(run["resid_post"], [self._x, run["attn_out"], run["mlp_out"]]) for run in runs
        )
        found = {"attn_out", "mlp_out"} if side_by_side else set()
        if "resid_mid" in there and self.decides("resid_mid", "resid_post"):
            middle = self._draw(self._there["resid_mid"], self._size)
            rewritten = self._trial({"resid_pre": self._x, "resid_mid": middle})
            if "attn_out" in there and all(equal(run["resid_mid"], [self._x, run["attn_out"]]) for run in runs):
                found |= {"resid_mid", "attn_out"}
            if "mlp_out" in there and all(
                equal(run["resid_post"], [run["resid_mid"], run["mlp_out"]]) for run in [*runs, rewritten]
            ):
                found |= {"resid_mid", "mlp_out"}
        return [site for site in ("resid_mid", "attn_out", "mlp_out") if site in found]

    def decides(self, site: str, what: str) -> bool:
        """`what` follows from the value at `site`: the same for two streams, and in all positions if given all alike.

        (The second for modules alone: a layer's own attention lies before the sites this is asked for.)
        """
        value = self._draw(self._there[site], self._size)[:, :1].expand_as(self._there[site]).clone()
        one, other = (self._trial({"resid_pre": stream, site: value})[what] for stream in (self._x, self._y))
        varied = self._trial({"resid_pre": self._x, site: self._draw(value, self._size)})[what]
        return (
            equal(one, [other], _PRODUCT)
            and equal(one, [one[:, :1].expand_as(one)], _PRODUCT)
            and not equal(varied, [one], _PRODUCT)
        )

    def is_at(self, site: str, module: str) -> bool:
        """Return True if a site is nothing but the module's output, as where a bridge knows no place before it
        (experts)."""
        return equal(self._seen[site], [self._seen[module]])

    def is_projected(self, site: str, module: str) -> bool:
        """`module`'s output is a matrix times the value at `site`, plus a bias."""
        value = self._draw(self._there[site], self._size)
        none, once, turned = (
            self._trial({"resid_pre": self._x, site: by * value})[module].float() for by in (0.0, 1.0, -2.0)
        )
        return (
            not equal(once, [none])
            and equal(none, [none[:, :1].expand_as(none)], _PRODUCT, value.dtype)
            and equal(turned, [none, -2 * (once - none)], _PRODUCT, value.dtype)
        )


def equal(value: Tensor, terms: list[Tensor], roundings: int = _SUM, dtype: torch.dtype | None = None) -> bool:
    """Return True if a value is the sum of the terms, but for rounding in `dtype` (default: the value's own)."""
    if any(term.shape != value.shape for term in terms):
        return False
    largest = max(float(part.abs().max()) for part in [value, *terms])
    error = (value.float() - torch.stack([term.float() for term in terms]).sum(0)).abs().max()
    return bool(error <= roundings * torch.finfo(dtype or value.dtype).eps * largest)
