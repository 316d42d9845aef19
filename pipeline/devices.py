"""Where tensors live: `--device` by name."""

import torch

from cache.errors import SaeError


def device(name: str) -> torch.device:
    """The device a name stands for: auto (a GPU where there is one), cpu, cuda, cuda:1, ...

    Raises SaeError where it cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise SaeError(f"--device {name}: not usable here (no such device); try auto, cpu or cuda:1") from None
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise SaeError(f"--device {name}: not usable here ({first[:200]}); try auto or cpu") from None
    return found
