"""What a training step asks of its device: every operation, and those that a GPU would be waited for."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "unique_consecutive", "unique_dim",
    "_unique", "_unique2", "lift_fresh",
}  # fmt: skip
"""Operations whose result, or its shape, the host has to have; the last is what `torch.tensor` of numbers copies."""

VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach",
    "alias", "split", "split_with_sizes", "unbind", "as_strided", "empty", "empty_like", "empty_strided", "new_empty",
    "is_same_size", "diagonal", "unfold", "device", "chunk", "set_",
}  # fmt: skip
"""Operations that give a device nothing to do."""


class Watch(TorchDispatchMode):
    """Counts the operations within, and names those that wait. Work on tensors of other kinds of devices is the host's.

    launched: operations that a device does, by name. waited: those that wait for it. asked: the same, as
    "file.py name", by the file that called torch.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.launched: Counter[str] = Counter()
        self.waited: list[str] = []
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if self._waits(name, args, kwargs):
            self.waited.append(str(func))
            self.asked[f"{_caller()} {name}"] += 1
        found = func(*args, **kwargs)
        if name not in VIEWS and self._here((args, found)):
            self.launched[name] += 1
        return found

    def _waits(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name in ("_to_copy", "copy_"):  # from the host
            to = kwargs.get("device")
            target = args[0].device.type if name == "copy_" else torch.device(to).type if to is not None else ""
            source = args[1] if name == "copy_" else args[0]
            return target == self.device and isinstance(source, Tensor) and source.device.type != self.device
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            return any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
        return name in WAITING and (self.device == "cpu" or self._here(args))

    def _here(self, values: Any) -> bool:
        if isinstance(values, Tensor):
            return values.device.type == self.device
        return isinstance(values, (list, tuple)) and any(self._here(one) for one in values)


def _caller() -> str:
    """The name of the file that called torch."""
    frame = sys._getframe(2)
    while f"{os.sep}torch{os.sep}" in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    return os.path.basename(frame.f_code.co_filename)


def watched(step: Callable[[], object], device: str = "cpu") -> Watch:
    """What one call asks of a kind of device."""
    with Watch(device) as found:
        step()
    return found
