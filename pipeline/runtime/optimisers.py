"""torch's Adam without the compiler, which torch loads at an optimiser's first call, in as long as itself."""

from inspect import unwrap

import torch


class Adam(torch.optim.Adam):
    """The same numbers and the same state; nothing of it is marked for `torch.compile`, which nothing here uses."""

    add_param_group = unwrap(torch.optim.Adam.add_param_group)
    state_dict = unwrap(torch.optim.Adam.state_dict)
    load_state_dict = unwrap(torch.optim.Adam.load_state_dict)
    zero_grad = unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.Adam.step))
