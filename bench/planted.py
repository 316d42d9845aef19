"""Rows with planted features, for every bench that trains. It needs torch alone, as other tools' interpreters have."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize


def planted_rows(count: int, width: int, seed: int) -> Tensor:
    """Sparse sums of 4 * width unit features plus a little noise: what a dictionary meets. [count, width]

    The features are the same whatever the seed.
    """
    features = normalize(torch.randn(4 * width, width, generator=torch.Generator().manual_seed(2**31)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(0, 4 * width, (count, 24), generator=generator)
    sizes = 2 * torch.rand(count, 24, generator=generator)
    noise = 0.05 * torch.randn(count, width, generator=generator)
    return embedding_bag(which, features, per_sample_weights=sizes, mode="sum") + noise
