"""Ranks over torch.distributed: gloo between CPUs, NCCL between GPUs, one device a rank.

Gradients are averaged by all-reduces that begin during the backward pass, each with the gradient it is of, not by
DistributedDataParallel: what is trained is a loss and no `forward`, several dictionaries may share a backward pass, and
the counters have to be exchanged anyway. Flags, barriers and tensors of the CPU go over gloo in any case, so that
asking whether to stop waits for no GPU.

Who is which rank is said by torchrun's environment, on one machine or several, or by `pipeline.parallel.launcher`.
"""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sae.cache.errors import SaeError
from sae.pipeline.saes import Observed

PATIENCE = timedelta(minutes=30)  # for a rank that comes late, as while another writes a large checkpoint


class LostRank(SaeError):
    """Another process of the training is gone; what it said tells why."""


class ProcessInfo(NamedTuple):
    """The number of this process among all, and the device of its tensors.

    folder: where they meet; None: where torchrun's environment says.
    """

    rank: int
    world: int
    device: str
    folder: Path | None = None


def assign_devices(processes: int, device: str, asked: str = "devices =") -> list[str]:
    """The devices of so many processes on this machine. Raises SaeError where there are too few."""
    gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not gpus):
        return ["cpu"] * processes
    if device not in ("auto", "cuda"):
        raise SaeError(f"device = {device}: is one device for {processes} processes; give cuda, cpu or auto")
    if processes > gpus:
        there = {0: "no GPU", 1: "one GPU"}.get(gpus, f"{gpus} GPUs")
        raise SaeError(f"{asked} {processes}: this machine has {there}; ask for fewer, or give `device = cpu`")
    return [f"cuda:{i}" for i in range(processes)]


def torchrun_process(device: str) -> ProcessInfo | None:
    """The seat torchrun gave this process; None where it was not started by torchrun."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        return None
    rank, world, local, beside = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    return ProcessInfo(rank, world, assign_devices(beside, device, "torchrun --nproc-per-node")[local])


@contextmanager
def together(seat: ProcessInfo, stop: threading.Event | None = None) -> Iterator["DistributedRanks"]:
    """Take the seat, once all have come. `stop`: set when whoever started this process wants the training to end."""
    on_gpu = seat.device != "cpu"
    if on_gpu:
        torch.cuda.set_device(seat.device)
    meeting = "env://" if seat.folder is None else (seat.folder / "meeting").as_uri()
    with _explained():
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", meeting, rank=seat.rank, world_size=seat.world, timeout=PATIENCE,
            device_id=torch.device(seat.device) if on_gpu else None,
        )  # fmt: skip
        control = dist.new_group(backend="gloo", timeout=PATIENCE) if on_gpu else None
    try:
        yield DistributedRanks(seat.rank, seat.world, control, stop or threading.Event())
    except BaseException:
        if not on_gpu:  # NCCL may wait for ever for work that others have given up
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


class DistributedRanks:
    """`pipeline.parallel.ranks.Ranks` over the process group. Raises LostRank where a process of it is gone.

    control: a group over gloo, where the default group is none.
    """

    def __init__(self, rank: int, world: int, control: dist.ProcessGroup | None, stop: threading.Event) -> None:
        self.rank, self.world = rank, world
        self._control, self._stop = control, stop

    @property
    def stop_requested(self) -> bool:
        return self._stop.is_set()

    @contextmanager
    def averaging(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        ready: set[nn.Parameter] = set()
        waiting, sent = deque(parameters), list[Tensor]()
        works: list[dist.Work] = []

        def send(parameter: nn.Parameter) -> None:
            if (gradient := parameter.grad) is not None:
                works.append(dist.all_reduce(gradient, group=self._group(gradient), async_op=True))
                sent.append(gradient)

        def arrived(parameter: nn.Parameter) -> None:
            ready.add(parameter)
            while waiting and waiting[0] in ready:
                send(waiting.popleft())

        hooks = [one.register_post_accumulate_grad_hook(arrived) for one in parameters]
        try:
            with _explained():
                yield
                while waiting:  # what waited for a gradient that there was none of
                    send(waiting.popleft())
                for work in works:
                    work.wait()
        finally:
            for hook in hooks:
                hook.remove()
        torch._foreach_div_(sent, self.world)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        with _explained():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0, group=self._group(tensor))

    def all_gather(self, parts: Sequence[Observed]) -> list[Observed]:
        first = parts[0]  # of the same step and as many rows as each rank's first, and so on
        size = first.fired.numel()
        mine = torch.stack([torch.cat([part.fired.view(-1), _bits(part.numbers)]) for part in parts])
        everybody = [torch.empty_like(mine) for _ in range(self.world)]
        with _explained():
            dist.all_gather(everybody, mine, group=self._group(mine))
        return [
            Observed(part.clock, part.rows, row[:size].view_as(first.fired), _floats(row[size:], first.numbers))
            for rows in everybody
            for part, row in zip(parts, rows, strict=True)
        ]

    def sum(self, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        with _explained():
            dist.all_reduce(total, group=self._group(total))
        return total

    def any(self, flag: bool) -> bool:
        told = torch.tensor(int(flag))
        with _explained():
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._control)
        return bool(told)

    def barrier(self) -> None:
        self.any(False)

    def broadcast_text(self, text: str) -> str:
        """Return the text of rank 0, on every rank; the others' is not read."""
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = torch.tensor(len(data))
        with _explained():
            dist.broadcast(size, 0, group=self._control)
            data = data if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, 0, group=self._control)
        return bytes(data.tolist()).decode()

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._control if tensor.device.type == "cpu" else None


def _bits(numbers: Tensor) -> Tensor:
    """Numbers as what the bits of them as float64 are as integers."""
    return numbers.double().view(torch.int64)


def _floats(bits: Tensor, like: Tensor) -> Tensor:
    """The numbers whose float64 bits these are, in their own type again."""
    return bits.view(torch.float64).to(like.dtype)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what torch.distributed says of a lost process into LostRank."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise LostRank(
                "another process of the training was lost; see what it said, then continue with `resume`"
            ) from error
        raise
