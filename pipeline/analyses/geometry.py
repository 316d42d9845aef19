"""How directions fill their space: angles of all pairs beside those of random ones, spectrum, lengths."""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae.pipeline.analyses.analysis import Analysed, Analysis, Finding, distribution, numbers, quantiles, register
from sae.pipeline.metrics.geometry import Geometry
from sae.pipeline.studies.plots import Panel

DEGREES = 2  # of a bin
BLOCK = 1 << 22  # cosines held at a time
ALIKE = (0.5, 0.7, 0.9)


@register
class DictionaryGeometry(Analysis):
    """How directions fill their space: the angles of all pairs, the dimensions they take, and how long rows are."""

    name = "geometry"
    meanings: ClassVar[dict[str, str]] = {
        **{f"share_above_{one:g}": f"share of latents with a cosine above {one:g} to another" for one in ALIKE},
        "participation_ratio": "dimensions that directions are spread over: 1 / sum of squared shares of variance",
        "components_of_half": "principal components of directions that have half of the variance",
        "mean_direction": "length of the mean of all directions: 0 where they cancel out",
    }

    def find(self, subject: Analysed) -> Finding:
        sae, metric = subject.sae, Geometry(subject.sae)
        table = sae.W_dec.detach().float()
        lengths, unit = table.norm(dim=1), normalize(table, dim=1)
        angles = angles_of_pairs(unit)
        largest = metric.latents().get("largest_cosine", torch.empty(0))
        shares = spectrum(unit)
        pairs = max(1, int(angles.sum()))
        middles = [(i + 0.5) * DEGREES for i in range(len(angles))]
        expected = [math.sin(math.radians(at)) ** max(0, sae.d_out - 2) for at in middles]
        scale = pairs / sum(expected)
        curves = {
            "its own": [*zip(middles, angles.tolist(), strict=True)],
            "random": [(at, scale * density) for at, density in zip(middles, expected, strict=True)],
        }
        cumulated = shares.cumsum(0)
        return Finding(
            {
                **metric.result(),
                **{f"share_above_{one:g}": (largest > one).double().mean().item() for one in ALIKE if len(largest)},
                "participation_ratio": (1 / shares.square().sum()).item() if len(shares) else None,
                "components_of_half": int((cumulated < 0.5).sum()) + 1 if len(shares) else None,
                "mean_direction": unit.mean(0).norm().item(),
            },
            {
                "angles": {"degrees": DEGREES, "pairs": angles.tolist()}, "spectrum": numbers(shares),
                "decoder_norm_quantiles": quantiles(lengths), "largest_cosine_quantiles": quantiles(largest),
                "encoder_norm_quantiles": quantiles(sae.W_enc.detach().norm(dim=0)),
            },
            [
                Panel("pairs of directions", "angle, degrees", curves, dashed=frozenset({"random"}), marks=False),
                distribution("largest cosine with another", largest),
                Panel("share of their energy", "dimensions", {"": [*enumerate(cumulated.tolist(), 1)]}, marks=False),
                distribution("length of a decoder row", lengths),
            ],
        )  # fmt: skip


def angles_of_pairs(unit: Tensor) -> Tensor:
    """int64 [180 / DEGREES]: how many pairs of rows of length 1 [m, d] have which angle; a block of them at a time."""
    counts, m = torch.zeros(180 // DEGREES, dtype=torch.float64), len(unit)
    for rows in torch.arange(m, device=unit.device).split(max(1, BLOCK // m)):
        cosines = (unit[rows] @ unit.T).clamp(-1, 1)
        later = torch.arange(m, device=unit.device) > rows[:, None]
        counts += torch.histc(torch.rad2deg(cosines[later].acos()).double(), len(counts), 0, 180).cpu()
    return counts.long()


def spectrum(unit: Tensor) -> Tensor:
    """float64 [d]: the shares of principal directions in the energy of rows of length 1, largest first; or none."""
    values = torch.linalg.eigvalsh((unit.T @ unit).double().cpu()).clamp_min(0).flip(0)
    return values / values.sum() if values.sum() > 0 else values[:0]
