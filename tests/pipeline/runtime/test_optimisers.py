"""Our Adam is torch's, step for step, and brings no compiler with it."""

import subprocess
import sys

import torch
from torch import nn

from sae.pipeline.runtime.optimisers import Adam

ALONE = """
import sys
import torch
from sae.pipeline.runtime.optimisers import Adam
one = torch.nn.Parameter(torch.ones(2, 3))
adam = Adam([{"params": [one], "side": "encoder"}], lr=0.1, fused=True)
for _ in range(2):
    one.sum().backward()
    torch.nn.utils.clip_grad_norm_([one], 1.0)
    adam.step()
    adam.zero_grad(set_to_none=True)
    adam.load_state_dict(adam.state_dict())
assert "torch._dynamo" not in sys.modules
"""


def test_it_is_torchs_to_the_bit() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3), torch.randn(4, 5, 3)
    states = []
    for kind in (Adam, torch.optim.Adam):
        one = nn.Parameter(start.clone())
        adam = kind([{"params": [one], "side": "decoder"}], lr=0.1, betas=(0.8, 0.99), eps=1e-6, fused=True)
        for gradient in gradients:
            one.grad = gradient.clone()
            adam.step()
            again = kind([{"params": [one], "side": "decoder"}], fused=True)
            again.load_state_dict(adam.state_dict())
            adam = again
        adam.zero_grad(set_to_none=True)
        assert one.grad is None and one.requires_grad
        states.append((one.detach(), adam.state_dict()))
    (mine, state), (its, expected) = states
    assert torch.equal(mine, its) and not torch.equal(mine, start)
    assert state["param_groups"] == expected["param_groups"] and state["state"].keys() == expected["state"].keys()
    for name, value in expected["state"][0].items():
        assert torch.equal(state["state"][0][name], value), name


def test_it_loads_no_compiler() -> None:
    """Which would take as long as torch itself."""
    ran = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
