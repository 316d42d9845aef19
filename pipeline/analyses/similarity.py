"""How alike a dictionary's directions are to each other, to its encoder's, and to true ones."""

from typing import ClassVar

import torch

from sae.pipeline.analyses.analysis import Analysed, Analysis, Finding, distribution, numbers, quantiles, register
from sae.pipeline.metrics.geometry import encoder_decoder_cosine, pairs, random_cosine, welch_bound
from sae.pipeline.metrics.recovery import Recovery


@register
class DictionarySimilarity(Analysis):
    """How alike directions are: to each other, to their latent's encoder, and to true ones where those are known."""

    name = "similarity"
    meanings: ClassVar[dict[str, str]] = {
        "mean_abs_cosine": "mean |cosine| of two decoder rows",
        "random_abs_cosine": "the same of random directions, sqrt(2 / (pi d))",
    }

    def find(self, subject: Analysed) -> Finding:
        sae = subject.sae
        table = sae.W_dec.detach().float().cpu()
        found_pairs = pairs(table)
        cosines, partners = found_pairs.largest, found_pairs.nearest
        alike = encoder_decoder_cosine(sae.W_enc.T, sae.W_dec).cpu() if sae.d_in == sae.d_out else torch.empty(0)
        first = cosines.argsort(descending=True, stable=True).tolist()
        alike_first = {tuple(sorted((i, int(partners[i])))): cosines[i].item() for i in first}
        named = [
            {"latents": [*pair], "cosine": cosine} for pair, cosine in [*alike_first.items()][: subject.config.top]
        ]
        truth = subject.truth
        found = None if truth is None else Recovery(table, truth.float().cpu()).result()
        panels = [distribution("largest cosine with another", cosines)] if len(table) > 1 else []
        return Finding(
            {
                "mean_abs_cosine": found_pairs.mean_abs, "random_abs_cosine": random_cosine(sae.d_out),
                "largest_cosine": cosines.max().item() if len(table) > 1 else None,
                "mean_largest_cosine": cosines.mean().item() if len(table) > 1 else None,
                "welch_bound": welch_bound(len(table), sae.d_out),
                "encoder_decoder_cosine": alike.mean().item() if len(alike) else None,
                **({} if found is None else found),
            },
            {
                "largest_cosine_quantiles": quantiles(cosines), "nearest": partners.tolist(),
                "largest_cosines": numbers(cosines), "most_alike": named,
                "encoder_decoder_cosine_quantiles": quantiles(alike),
            },
            [*panels, distribution("cosine of encoder and decoder", alike)],
        )  # fmt: skip
