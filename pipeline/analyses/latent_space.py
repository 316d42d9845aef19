"""The space that latents lie in: how much each says, what of the prior is seen in it, and its shape.

For a variational dictionary latents are means mu in the units of training, where its prior is; of any other, what it
encodes in the data's units.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae.cache.errors import SaeError
from sae.cache.runs import CHECKPOINT
from sae.pipeline.analyses.analysis import (
    Analysed,
    Analysis,
    Finding,
    Value,
    distribution,
    numbers,
    register,
)
from sae.pipeline.metrics.similarity import correlation
from sae.pipeline.saes.variational import Posterior, Variational
from sae.pipeline.saes.vsae_mix import VSAEMix
from sae.pipeline.studies.plots import Heat, Panel

ACTIVE = 0.01  # a latent is an active unit from this variance of its means on (Burda et al. 2016)
COLLAPSED = 0.01  # nats a row below which a latent's posterior is its prior
SAMPLE, DRAWN = 2048, 500  # rows whose shape is looked at, and drawn
PATHS, PLACES = 64, 9  # pairs of rows that are joined, and places between them
SAMPLED = 256  # rows whose KL is told, and draws for each of them
MATRIX = 512  # latents whose correlations are set against the prior's
COMPONENTS = 10


@register
class LatentSpace(Analysis):
    """How much each latent says, what of the prior is seen in them, principal components, and the way between rows.

    Of a variational dictionary it needs the checkpoint, where variances are.
    """

    name = "latent_space"
    meanings: ClassVar[dict[str, str]] = {
        "active_units": f"latents whose variance over rows, of means where it is variational, is above {ACTIVE}",
        "active_share": "share of latents that are active units",
        "kl": "KL of the posterior and the prior as training has it, nats a row",
        "kl_sampled": "the same by sampling from the posterior",
        "collapsed_share": f"share of latents whose posterior is their prior: a KL below {COLLAPSED} nats a row",
        "mean_sigma": "mean standard deviation of a posterior",
        "prior_frobenius": "distance of the means' correlations from the prior's, over the norm of the prior's",
        "prior_correlation": "mean correlation of two latents in the prior",
        "mean_correlation": "mean correlation of two latents' means",
        "prior_r": "Pearson's r of the means' correlations and the prior's",
        "components_of_half": "principal components of latents that have half of the variance",
        "participation_ratio": "components that the variance is spread over: 1 / sum of their squared shares",
        "bend": "halfway between two rows: distance of its latents from halfway between theirs, over their length",
    }

    def find(self, subject: Analysed) -> Finding:
        variational = self._variational(subject)
        moments, rows = torch.zeros(2, subject.sae.d_sae, dtype=torch.float64), 0
        sums: dict[str, Tensor] = {}
        for batch in subject.batches():
            means = batch.latents.dense()
            if variational is not None:
                posterior = variational.posterior_of(batch.x)
                means = posterior.mean
                for name, values in by_latent(variational, posterior).items():
                    sums[name] = sums.get(name, 0) + values.double().sum(0).cpu()
            means = means.double().cpu()
            moments += torch.stack([means.sum(0), means.square().sum(0)])
            rows += len(means)
        mean, square = moments / rows
        variance = (square - mean.square()).clamp_min(0)
        figures: dict[str, Value] = {
            "active_units": int((variance > ACTIVE).sum()), "active_share": (variance > ACTIVE).double().mean().item(),
            "rows": rows,
        }  # fmt: skip
        details: dict[str, Any] = {"variance": numbers(variance)}
        panels: list[Panel | Heat] = [distribution("log10 of the variance of means", variance[variance > 0].log10())]
        x = subject.sample(SAMPLE)
        means = encoded(subject, variational, x)
        for more in (
            _of_posteriors(variational, sums, rows, x), _of_the_prior(variational, means, variance),
            _components(means), _between(subject, variational, x),
        ):  # fmt: skip
            figures |= more.figures
            details |= more.details
            panels += more.panels
        return Finding(figures, details, panels)

    def _variational(self, subject: Analysed) -> Variational | None:
        if isinstance(subject.training, Variational):
            return subject.training
        if isinstance(subject.sae, Variational):
            raise SaeError(
                f"{subject.run.path}: the variances of its latents are in {CHECKPOINT}, which is not there; put it "
                "back, or name the other analyses"
            )
        return None


def by_latent(sae: Variational, posterior: Posterior) -> dict[str, Tensor]:
    """What is averaged over rows, [B, m] each; KLs [B, m] are from the prior's marginals."""
    if posterior.logvar is None:
        return {}
    kl = sae.marginals(posterior.mean, posterior.variance) - 0.5 * (1 + posterior.logvar)
    return {"kl": kl, "sigma": (0.5 * posterior.logvar).exp()}


@torch.no_grad()
def encoded(subject: Analysed, variational: Variational | None, x: Tensor) -> Tensor:
    """[n, m]: means of rows in the units of training, or latents."""
    return subject.sae.encode(x).dense() if variational is None else variational.posterior_of(x).mean


def _of_posteriors(sae: Variational | None, sums: dict[str, Tensor], rows: int, x: Tensor) -> Finding:
    """KLs and standard deviations, where there are any: `kl` as it is minimised, and beside it by sampling."""
    if sae is None or not sums:
        return Finding(dict.fromkeys(("kl", "kl_sampled", "collapsed_share", "mean_sigma")))
    kl, sigma = sums["kl"] / rows, sums["sigma"] / rows
    posterior = sae.posterior_of(x[:SAMPLED])
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(posterior.mean.shape, generator=generator).to(x.device) for _ in range(SAMPLED)]
    sampled = torch.stack([sae.sampled_kl(posterior, noise[None]) for noise in draws]).mean()
    return Finding(
        {
            "kl": sae.kl(posterior).mean().item(), "kl_sampled": sampled.item(),
            "collapsed_share": (kl < COLLAPSED).double().mean().item(), "mean_sigma": sigma.mean().item(),
        },
        {"kl_by_latent": numbers(kl), "sigma_by_latent": numbers(sigma), "collapsed_below": COLLAPSED},
        [distribution("KL of a latent, nats a row", kl), distribution("mean sigma", sigma)],
    )  # fmt: skip


def _of_the_prior(sae: Variational | None, means: Tensor, variance: Tensor) -> Finding:
    """Correlations of means against the prior's, of the first latents that vary; how pairs behave."""
    names = ("prior_frobenius", "prior_correlation", "mean_correlation", "prior_r")
    if sae is None:
        return Finding(dict.fromkeys(names))
    which = (variance[:MATRIX] > ACTIVE).nonzero().view(-1)
    if len(which) < 2:
        return Finding(dict.fromkeys(names))
    seen = torch.corrcoef(means[:, which].double().cpu().T).nan_to_num(0)
    prior = sae.prior_covariance(int(which.max()) + 1)[which][:, which]
    scale = prior.diagonal().rsqrt()
    prior = scale[:, None] * prior * scale
    aside = ~torch.eye(len(which), dtype=torch.bool)
    figures: dict[str, Value] = {
        "prior_frobenius": ((seen - prior).norm() / prior.norm()).item(),
        "prior_correlation": prior[aside].mean().item(), "mean_correlation": seen[aside].mean().item(),
        "prior_r": correlation(seen[aside], prior[aside]),
    }  # fmt: skip
    return Finding(figures, {"pairs": pairs_of(sae, means)} if isinstance(sae, VSAEMix) else {})


def pairs_of(sae: VSAEMix, means: Tensor) -> list[dict[str, Any]]:
    """How often both, one and none of a pair's latents are there, and how their means correlate."""
    found = []
    for pair in range(sae.config.pairs):
        two = means[:, 2 * pair : 2 * pair + 2]
        there = (two > 0).sum(1)
        shares = {name: (there == n).double().mean().item() for n, name in enumerate(("none", "one", "both"))}
        kind = "correlated" if pair < sae.config.correlated_pairs else "anticorrelated"
        found.append(
            {"latents": [2 * pair, 2 * pair + 1], "kind": kind, **shares, "r": correlation(two[:, 0], two[:, 1])}
        )
    return found


def _components(means: Tensor) -> Finding:
    """Principal components, by the products of rows: latents are more than the rows that are looked at."""
    centred = (means - means.mean(0)).double().cpu()
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values.clamp_min(0).flip(0), vectors.flip(1)
    total = values.sum()
    if len(values) < 2 or total <= 0:
        return Finding({"components_of_half": None, "participation_ratio": None})
    shares = values / total
    at = (vectors[:, :2] * values[:2].sqrt())[:DRAWN]
    curve = [(i + 1, share) for i, share in enumerate(shares[:COMPONENTS].cumsum(0).tolist())]
    return Finding(
        {
            "components_of_half": int((shares.cumsum(0) < 0.5).sum()) + 1,
            "participation_ratio": (1 / shares.square().sum()).item(),
        },
        {"variance_of_components": numbers(shares[:COMPONENTS])},
        [
            Panel("share of variance", "principal components", {"": curve}),
            Panel("second component", "first component", {"": [(x, y) for x, y in at.tolist()]}, joined=False),
        ],
    )  # fmt: skip


def _between(subject: Analysed, variational: Variational | None, x: Tensor) -> Finding:
    """How far the latents of what lies between two rows are from what lies between their latents, and how many fire.

    Zero where the encoder is linear between them.
    """
    half = min(PATHS, len(x) // 2)
    if half < 1:
        return Finding({"bend": None})
    start, stop = x[:half], x[half : 2 * half]
    first, last = (encoded(subject, variational, ends) for ends in (start, stop))
    bends, l0s = [], []
    places = [i / (PLACES - 1) for i in range(PLACES)]
    for share in places:
        found = encoded(subject, variational, start.lerp(stop, share))
        straight = first.lerp(last, share)
        norms = straight.norm(dim=1)
        bends.append((found - straight).norm(dim=1)[norms > 0] / norms[norms > 0])
        l0s.append((found != 0).sum(1).double().mean().item())
    bend = [one.mean().item() if len(one) else None for one in bends]
    curves: Sequence[tuple[float, float | None]] = [*zip(places, bend, strict=True)]
    return Finding(
        {"bend": bend[PLACES // 2]},
        {"between": {"places": places, "bend": bend, "l0": l0s}},
        [Panel("distance from the straight line", "place between two rows", {"": curves})],
    )
