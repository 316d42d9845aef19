"""Weight matrices of a language model: what each multiplies, and passes in which other products stand in their place.

A matrix has the name of its module in the bridged model (`transformer.h.6.mlp.c_fc`). It is found by trying: a module
with a weight of two axes that, for some tokens, gives the product of its input and that weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae.cache.errors import SaeError

Product = Callable[[Tensor], Tensor | None]
"""Given what a matrix reads [..., d_in], returns what stands in the place of its product with it [..., d_out], without
the bias; None where it has only looked."""

SHOWN = 12  # names in a message
_WRAPPED = "._original_component"


class Matrix(NamedTuple):
    """A weight matrix, [d_out, d_in] whatever way round its module keeps it, and the module that multiplies by it."""

    module: nn.Module
    weight: Tensor
    bias: Tensor | None


@torch.no_grad()
def matrices_of(model: nn.Module, run: Callable[[], Any]) -> dict[str, Matrix]:
    """The matrices below a model that a pass of it multiplies by, by name, in the order of the modules."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            seen[module] = args[0], out

    plain = {name: one for name, one in model.named_modules() if _is_plain(one)}
    with ExitStack() as stack:
        for one in plain.values():
            stack.callback(one.register_forward_hook(keep).remove)
        run()
    found = {}
    for name, one in plain.items():
        if one in seen and (matrix := _tried(one, *seen[one])) is not None:
            found[name.replace(_WRAPPED, "")] = matrix
    return found


def chosen(there: Mapping[str, Matrix], patterns: Sequence[str], what: str) -> dict[str, Matrix]:
    """Those of some matrices that patterns name: names or ends of names, with * and ? for anything; none: all of them.

    Raises SaeError, with those there are, for a pattern that names none.
    """
    found: dict[str, Matrix] = {}
    for pattern in patterns:
        fits = {
            name: one for name, one in there.items() if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
        }
        if not fits:
            names = ", ".join([*there][:SHOWN]) + (f" and {len(there) - SHOWN} more" if len(there) > SHOWN else "")
            raise SaeError(f"matrices = {pattern}: {what} has no such matrix; there is {names or 'none'}")
        found |= fits
    return {name: one for name, one in there.items() if name in found} if patterns else dict(there)


@contextmanager
def multiplying(products: Mapping[str, Product], there: Mapping[str, Matrix]) -> Iterator[None]:
    """Within this context each named matrix's product is what the function given for it returns, if anything."""
    with ExitStack() as stack:
        for name, product in products.items():
            matrix = there[name]
            stack.callback(matrix.module.register_forward_hook(partial(_instead, product, matrix.bias)).remove)
        yield


def _instead(product: Product, bias: Tensor | None, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
    new = product(args[0])
    if new is None:
        return None
    return (new if bias is None else new + bias).to(out.dtype)


def _is_plain(module: nn.Module) -> bool:
    """Return True if a module has a matrix itself, and none of its parts does."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not [*module.children()]


def _tried(module: nn.Module, x: Tensor, out: Tensor) -> Matrix | None:
    """The matrix of a module that gave `out` for x; None where that is not a product, plus a bias."""
    kept, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(kept, Tensor) and (bias is None or isinstance(bias, Tensor))
    product = (out if bias is None else out - bias).float()
    for weight in (kept, kept.T):
        if x.is_floating_point() and x.shape[-1:] + product.shape[-1:] == weight.T.shape:
            off = (x.float() @ weight.float().T - product).abs().max()
            if off <= torch.finfo(kept.dtype).eps ** 0.5 * product.abs().max():
                return Matrix(module, weight, bias)
    return None
