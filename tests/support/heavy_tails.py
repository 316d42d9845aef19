"""Rows like a trained language model's residual stream, from a seed: what codecs are judged on.

Thousands of sparse features with Zipf frequencies and heavy-tailed values, some dense directions of falling power,
noise, column means, three outlier dimensions (means of 100, -60 and 50 usual standard deviations, spreads of 8, 3, 2)
and, where asked for, rows of massive activations: one coordinate of 3000 times the usual spread. Kurtosis of a usual
column: about 6.
"""

import torch
from torch import Tensor

OUTLIERS = ((3, 100.0, 8.0), (1, -60.0, 3.0), (2, 50.0, 2.0))  # dimension, mean and spread in usual spreads


class HeavyTails:
    """One distribution of rows of width d: `rows` draws from it."""

    def __init__(self, d: int, *, seed: int = 0, features: int = 4096, active: int = 24) -> None:
        random = torch.Generator().manual_seed(seed)
        self.d, self.active = d, active
        self._directions = torch.nn.functional.normalize(torch.randn(features, d, generator=random), dim=1)
        self._often = 1.0 / torch.arange(2, features + 2) ** 0.9
        dense = min(64, d)
        self._dense = torch.randn(dense, d, generator=random) / d**0.5 * (torch.arange(1, dense + 1) ** -0.7)[:, None]
        self._mean = 0.5 * torch.randn(d, generator=random)

    def rows(self, n: int, *, seed: int, massive: int = 0) -> Tensor:
        """float32 [n, d]. The first `massive` rows are massive activations."""
        random = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self._often, n * self.active, replacement=True, generator=random)
        size = torch.empty(n, self.active).exponential_(generator=random).pow_(1.7)
        rows = torch.nn.functional.embedding_bag(
            which.reshape(n, self.active), self._directions, per_sample_weights=size, mode="sum"
        )
        rows += 4 * torch.randn(n, len(self._dense), generator=random) @ self._dense
        rows += 0.1 * torch.randn(n, self.d, generator=random)
        rows /= rows.std(dim=0).median()
        rows += self._mean
        for dimension, mean, spread in OUTLIERS:
            at = dimension * self.d // 5
            rows[:, at] = mean + spread * (rows[:, at] - self._mean[at])
        rows[:massive] *= 0.1
        rows[:massive, self.d // 7] = 3000.0
        return rows
