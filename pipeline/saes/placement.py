"""Devices that are given work ahead of time, as a GPU is.

There the host may not ask for a number, nor make a shape that follows from one: it would wait until all the work before
is done, and the device would then wait for the host. So what is chosen is chosen in shapes that are known beforehand.
On the host itself nothing waits, and shapes follow the data, so that what is not active costs nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

HOSTS = {"cpu"}
"""Kinds of devices whose numbers are at hand."""


def runs_ahead(x: Tensor) -> bool:
    """Return True if asking for a number of the tensor would wait for a device."""
    return x.device.type not in HOSTS


def numbers(values: Sequence[float], like: Tensor) -> Tensor:
    """[n]: numbers in the type of a tensor and where it is, without a copy from the host."""
    return torch.stack([like.new_full((), value) for value in values])


def reduced(x: Tensor) -> torch.dtype | None:
    """The precision in which autocast has a device that runs ahead take products of it; None where it is the full."""
    kind = x.device.type
    if not (runs_ahead(x) and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind)


def rounds(x: Tensor) -> bool:
    """Return True if float32 products of a tensor take its factors in TF32."""
    return x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
