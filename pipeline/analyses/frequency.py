"""How often latents fire, and whether that stays so from one window of rows to the next.

Held-out rows are gone through once, in windows of equal length; what is kept are the counts of each window.
"""

import math
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from sae.pipeline.analyses.analysis import (
    Analysed,
    Analysis,
    Finding,
    distribution,
    numbers,
    quantiles,
    register,
)  # fmt: skip
from sae.pipeline.metrics.similarity import correlation
from sae.pipeline.metrics.sparsity import DENSE, RARE
from sae.pipeline.studies.plots import Panel

SURPRISING = 5.0  # standard errors between the rates of two halves, from which on a latent drifts
DRAWN = 2000  # latents that are drawn one by one


@register
class Frequency(Analysis):
    """How often latents fire, and how stable that is from window to window of rows."""

    name = "frequency"
    meanings: ClassVar[dict[str, str]] = {
        "mean_rate": "mean over latents of the share of rows they fire in",
        "median_rate": "median of it over latents that fire",
        "never": "latents that fired in none of the rows",
        "rare": "latents that fired, but in fewer than a millionth of the rows",
        "dense": "latents that fired in more than a tenth of the rows",
        "windows": "windows of rows",
        "pearson": "mean correlation of rates in a window and the next",
        "spearman": "mean rank correlation of rates in a window and the next",
        "trend": "slope of the mean rate over windows, as a share of it, a window",
        "drifting": f"latents whose rates in the two halves are {SURPRISING:g} standard errors apart",
    }

    def find(self, subject: Analysed) -> Finding:
        counts, rows = counted(subject)
        rates, whole = counts / rows[:, None], counts.sum(0) / rows.sum()
        pearson = [correlation(a, b) for a, b in pairwise(rates)]
        spearman = [correlation(ranks(a), ranks(b)) for a, b in pairwise(rates)]
        half = len(rows) // 2
        drift = apart(counts[:half].sum(0), rows[:half].sum(), counts[half:].sum(0), rows[half:].sum())
        most = drift.abs().argsort(descending=True, stable=True)[: subject.config.top].tolist()
        halves = [(counts[part].sum(0) / rows[part].sum()) for part in (slice(half), slice(half, None))] if half else []
        means, living = rates.mean(1), whole[whole > 0]
        every = torch.linspace(0, len(whole) - 1, min(len(whole), DRAWN)).long().tolist()
        cloud = [(halves[0][i].log10().item(), halves[1][i].log10().item()) for i in every if halves
                 and halves[0][i] > 0 and halves[1][i] > 0]  # fmt: skip
        return Finding(
            {
                "mean_rate": whole.mean().item(), "median_rate": living.median().item() if len(living) else None,
                "never": int((whole == 0).sum()), "rare": int(((whole < RARE) & (whole > 0)).sum()),
                "dense": int((whole > DENSE).sum()), "windows": len(rows), "rows": int(rows.sum()),
                "pearson": _mean(pearson), "spearman": _mean(spearman), "trend": trend(means),
                "drifting": int((drift.abs() > SURPRISING).sum()) if half else None,
            },
            {
                "rates": numbers(whole), "rate_quantiles": quantiles(living), "mean_rate_by_window": numbers(means),
                "pearson_by_window": pearson, "spearman_by_window": spearman, "rows_by_window": rows.long().tolist(),
                "drift": [
                    {"feature": i, "first": halves[0][i].item(), "second": halves[1][i].item(), "z": drift[i].item()}
                    for i in most if halves and math.isfinite(drift[i].item())
                ],
            },
            [
                distribution("log10 of the share of rows", living.log10()),
                Panel("log10 rate, second half", "log10 rate, first half", {"": cloud}, joined=False),
                Panel("correlation with the next window", "window", {
                    name: [*enumerate(each, 1)] for name, each in (("Pearson", pearson), ("Spearman", spearman))
                }),
                Panel("mean rate", "window", {"": [*enumerate(means.tolist(), 1)]}),
            ],
        )  # fmt: skip


def counted(subject: Analysed) -> tuple[Tensor, Tensor]:
    """In how many rows of each window each latent fired, float64 [W, m], and the rows of each, float64 [W].

    Fewer windows than are asked for where there are fewer rows.
    """
    windows = min(subject.config.windows, subject.rows)
    counts = torch.zeros(windows, subject.sae.d_sae, dtype=torch.float64)
    rows = torch.zeros(windows, dtype=torch.float64)
    seen = 0
    for batch in subject.batches(-(-subject.rows // windows)):
        window = min(windows - 1, seen * windows // subject.rows)
        counts[window] += batch.latents.fired().cpu()
        rows[window] += len(batch.x)
        seen += len(batch.x)
    return counts[rows > 0], rows[rows > 0]


def ranks(values: Tensor) -> Tensor:
    """float64 [n]: the ranks of numbers, those that are equal sharing the mean of theirs."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]


def apart(first: Tensor, of_first: Tensor, second: Tensor, of_second: Tensor) -> Tensor:
    """float64 [m]: the difference of two rates, in standard errors of it where they are one; 0 where nothing fires."""
    pooled = (first + second) / (of_first + of_second)
    error = (pooled * (1 - pooled) * (1 / of_first + 1 / of_second)).sqrt()
    return torch.where(error > 0, (second / of_second - first / of_first) / error, 0.0)


def trend(means: Tensor) -> float | None:
    """The slope of the line through mean rates, a window, as a share of their mean; None of one window or no rate."""
    if len(means) < 2 or means.mean() <= 0:
        return None
    place = torch.arange(len(means), dtype=torch.float64)
    place -= place.mean()
    return (place @ means / place.square().sum() / means.mean()).item()


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
