"""sparsify (EleutherAI): `cfg.json` beside `sae.safetensors`, in a folder named after the module it is for.

Read and written are TopK dictionaries and transcoders: p = (x - b_dec) @ encoder.weight.T + encoder.bias, where a
transcoder subtracts nothing; the k largest of ReLU(p) are active, and a skip connection adds x @ W_skip.T. Source:
sparsify 1.3.3 (`sparse_coder.py`, `config.py`).
"""

from __future__ import annotations

from pathlib import Path

from sae.cache.disk.parsing import whole
from sae.pipeline.saes.inference import Formula, TopKRule

from . import files
from .base import Format, Metadata, register

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


@register
class Sparsify(Format):
    """Folders of sparsify: cfg.json and sae.safetensors."""

    name = "sparsify"
    holds = (CONFIG, WEIGHTS)

    def formula(self, path: Path) -> tuple[Formula, Metadata]:
        config, left = files.read_pair(path, CONFIG, WEIGHTS)
        files.choice(config, "activation", "topk")
        transcoder, skips = files.flag(config, "transcode", False), files.flag(config, "skip_connection", False)
        d_in = files.width(config, "d_in")
        d_sae = whole(config, "num_latents", 0, files.MOST_WIDTH) or d_in * files.width(config, "expansion_factor")
        k = whole(config, "k", 1, d_sae)
        formula = Formula(
            W_enc=files.take(left, "encoder.weight", d_sae, d_in).T.contiguous(),
            b_enc=files.take(left, "encoder.bias", d_sae),
            W_dec=files.take(left, "W_dec", d_sae, d_in),
            b_dec=files.take(left, "b_dec", d_in),
            rule=TopKRule(k),
            centred=not transcoder,
            transcoder=transcoder,
            W_skip=files.take(left, "W_skip", d_in, d_in).T.contiguous() if skips else None,
        )
        files.expect_taken(left)
        return formula, Metadata(hook=path.name)

    def write(self, formula: Formula, metadata: Metadata, folder: Path) -> None:
        rule = formula.rule
        if not isinstance(rule, TopKRule):
            raise ValueError(f"its latents are chosen by topk, these by {rule.name}")
        files.expect_unscaled(formula)
        if formula.d_in != formula.d_out:
            raise ValueError(f"it gives as many values as it takes, and these are {formula.d_out} and {formula.d_in}")
        formula = formula.recentred(not formula.transcoder)
        config = {
            "activation": "topk", "expansion_factor": max(1, formula.d_sae // formula.d_in), "normalize_decoder": False,
            "num_latents": formula.d_sae, "k": rule.k, "multi_topk": False,
            "skip_connection": formula.W_skip is not None, "transcode": formula.transcoder, "d_in": formula.d_in,
        }  # fmt: skip
        tensors = {
            "encoder.weight": formula.W_enc.T, "encoder.bias": formula.b_enc, "W_dec": formula.W_dec,
            "b_dec": formula.b_dec, **({} if formula.W_skip is None else {"W_skip": formula.W_skip.T}),
        }  # fmt: skip
        files.write_pair(folder, CONFIG, config, WEIGHTS, tensors)
