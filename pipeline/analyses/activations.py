"""How strong latents are where they fire, and which of them carry the most."""

from typing import ClassVar

import torch

from sae.pipeline.analyses.analysis import Analysed, Analysis, Finding, distribution, numbers, quantiles, register
from sae.pipeline.studies.plots import Panel

KEPT = 1 << 20  # values whose distribution is looked at
DRAWN = 2000  # latents that are drawn one by one


@register
class NeuronActivations(Analysis):
    """How strong latents are where they fire, and which of them carry the most."""

    name = "activations"
    meanings: ClassVar[dict[str, str]] = {
        "mean_when_active": "mean activation where a latent fires",
        "median_when_active": "half of these activations are below it",
        "negative_share": "share of these activations that are below 0",
        "largest": "the activation furthest from 0",
        "latents_of_half_the_energy": "fewest latents with half of the energy: squared activation times squared "
        "length of the decoder row",
    }

    def find(self, subject: Analysed) -> Finding:
        m = subject.sae.d_sae
        fired, total, squares = (torch.zeros(m, dtype=torch.float64) for _ in range(3))
        most, rows = torch.zeros(m), 0
        kept: list[torch.Tensor] = []
        room = KEPT
        for batch in subject.batches():
            dense = batch.latents.dense().cpu()
            rows += len(dense)
            fired += (dense != 0).sum(0)
            total += dense.double().sum(0)
            squares += dense.double().square().sum(0)
            most = torch.where(dense.abs().amax(0) > most.abs(), dense.gather(0, dense.abs().argmax(0)[None])[0], most)
            active = dense[dense != 0][:room]
            room -= len(active)
            kept.append(active)
        active = torch.cat(kept)
        norms = subject.sae.W_dec.detach().norm(dim=1).double().cpu().square()
        energy = squares * norms
        share = energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
        when = total / fired.clamp_min(1)
        by_latent = {"rate": fired / rows, "mean_when_active": when, "most": most, "energy": share}
        first = energy.argsort(descending=True, stable=True)
        named = [
            {"feature": i, **{name: values[i].item() for name, values in by_latent.items()}}
            for i in first[: subject.config.top].tolist()
            if fired[i] > 0
        ]
        drawn = [i for i in torch.linspace(0, m - 1, min(m, DRAWN)).long().tolist() if fired[i] > 0 and when[i] > 0]
        cloud = [(fired[i].log10().item() - torch.tensor(rows).log10().item(), when[i].log10().item()) for i in drawn]
        half = int((share[first].cumsum(0) < 0.5).sum()) + 1 if energy.sum() > 0 else None
        return Finding(
            {
                "mean_when_active": active.double().mean().item() if len(active) else None,
                "median_when_active": active.median().item() if len(active) else None,
                "negative_share": (active < 0).double().mean().item() if len(active) else None,
                "largest": most[most.abs().argmax()].item(),
                "latents_of_half_the_energy": half, "rows": rows,
            },
            {
                "active_quantiles": quantiles(active), "strongest": named,
                **{name: numbers(values) for name, values in by_latent.items()},
            },
            [
                distribution("log10 of the size of an active latent", active[active != 0].abs().log10(), "activations"),
                Panel("log10 of its mean when active", "log10 of the share of rows", {"": cloud}, joined=False),
                distribution("log10 of its largest size", most[most != 0].abs().log10()),
            ],
        )  # fmt: skip
