"""What a training step does after the gradients: projection, clipping, Adam, and parameters kept where they belong.

On a CUDA device kernels do it in one pass where an architecture's groups say all there is to it
(`Trainable.kept_by_groups`), on numbers that lie in memory as they are read. The optimiser's state is the same either
way, so that a run may go on elsewhere than it began.
"""

from typing import Any

import torch
from torch import nn

from sae.pipeline.runtime.optimisers import Adam
from sae.pipeline.saes import Trainable, kernels


def adam(sae: Trainable, rate: float, steps: int, betas: tuple[float, float], eps: float) -> Adam:
    """The optimiser of something before the first of so many steps."""
    groups = [
        {"params": one.parameters, "side": one.side, "times": one.multiple(rate, steps), "kept": one.kept}
        for one in sae.parameter_groups()
    ]
    return Adam(groups, lr=rate, betas=betas, eps=eps, fused=True)


def set_rates(optimiser: torch.optim.Optimizer, encoder: float, decoder: float) -> None:
    """Set the learning rates of the next step."""
    for group in optimiser.param_groups:
        group["lr"] = (decoder if group["side"] == "decoder" else encoder) * group["times"]


@torch.no_grad()
def take_step(sae: Trainable, optimiser: torch.optim.Optimizer, clip: float | None) -> None:
    """Take the step that follows the gradients, whose norm is at most `clip`; afterwards those of before are no use."""
    if _kernels_can(sae):
        _by_kernels(optimiser, clip)
    else:
        sae.before_step()
        if clip is not None:
            nn.utils.clip_grad_norm_(sae.parameters(), clip)
        optimiser.step()
        sae.after_step()


def _kernels_can(sae: Trainable) -> bool:
    learning = [(one, one.grad) for one in sae.parameters() if one.grad is not None]
    there = all(kernels.usable(one) and kernels.usable(grad) for one, grad in learning)
    return sae.kept_by_groups and bool(learning) and there


def _by_kernels(optimiser: torch.optim.Optimizer, clip: float | None) -> None:
    update = kernels.family("update")
    tables = []
    for group in optimiser.param_groups:
        for one in group["params"]:
            if one.grad is not None:
                state = _state(optimiser, one)
                moments = (state[name] for name in ("exp_avg", "exp_avg_sq", "step"))
                tables.append(update.Table(one, one.grad, *moments, group["lr"], group["kept"]))
    update.adam(tables, clip, optimiser.defaults["betas"], optimiser.defaults["eps"])


def _state(optimiser: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """What Adam remembers of a parameter; of a new one what it begins with."""
    state: dict[str, Any] = optimiser.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return state
