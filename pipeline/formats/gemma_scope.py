"""Gemma Scope: `params.npz` in folders as `layer_20/width_16k/average_l0_71`; Gemma Scope 2: `params.safetensors`.

JumpReLU without centring: p = x @ W_enc + b_enc, active above a threshold of each latent. A transcoder may have a skip
connection, x @ affine_skip_connection. What a dictionary is of is said by the path alone: the repository's name
(gemma-scope-2b-pt-res) and the folder of the layer; where neither is there it is not known. Source: the cards of
google/gemma-scope-*, SAELens 6.54.12 and circuit-tracer (their loaders).
"""

from __future__ import annotations

import re
from pathlib import Path

from sae.cache.points import hook_name
from sae.pipeline.saes.inference import Formula, ThresholdRule

from . import files
from .archives import read_npz
from .base import Format, Metadata, register

FIRST, SECOND = "params.npz", "params.safetensors"
SUITE = re.compile(r"gemma-scope-(2-)?([0-9]+[bm])-(pt|it)-?(res|mlp|att|transcoders)?")
LAYER = re.compile(r"layer_([0-9]{1,4})(?:_|$)")
SITES = {"res": "resid_post", "resid_post": "resid_post", "mlp": "mlp_out", "att": "attn_z", "attn_out": "attn_out"}
NORMED = "ln2.hook_normalized"
"""What its transcoders read, which is no site of ours: the second norm before its gain."""


@register
class GemmaScope(Format):
    """Folders of Gemma Scope: params.npz, or params.safetensors of Gemma Scope 2. Read alone."""

    name = "gemma-scope"

    def detects(self, path: Path) -> bool:
        return (path / FIRST).is_file() or (path / SECOND).is_file()

    def formula(self, path: Path) -> tuple[Formula, Metadata]:
        if "embedding" in path.absolute().parts:
            raise ValueError("a dictionary of token embeddings is in units of its own, which is not read")
        first = (path / FIRST).is_file()
        left = read_npz(path / FIRST) if first else files.read_weights(path / SECOND)
        left = {re.sub(r"^w_(?=enc$|dec$)", "W_", name): tensor for name, tensor in left.items()}
        d_in, d_sae = files.sides(left, "W_enc")
        _, d_out = files.sides(left, "W_dec")
        metadata, transcoder = _metadata(path)
        skips = "affine_skip_connection" in left
        W_enc, b_enc, W_dec, b_dec = files.take_plain(left, d_in, d_sae, d_out)
        formula = Formula(
            W_enc,
            b_enc,
            W_dec,
            b_dec,
            rule=ThresholdRule(files.take(left, "threshold", d_sae)),
            centred=False,
            transcoder=transcoder or skips or d_in != d_out,
            W_skip=files.take(left, "affine_skip_connection", d_in, d_out) if skips else None,
        )
        files.expect_taken(left)
        return formula, metadata


def _metadata(path: Path) -> tuple[Metadata, bool]:
    """Where a dictionary belongs by the names of the folders it is in, and whether those say a transcoder."""
    parts = path.absolute().parts
    suite = next((found for part in reversed(parts) if (found := SUITE.search(part))), None)
    layer = next((int(found[1]) for part in reversed(parts) if (found := LAYER.search(part))), None)
    model = None
    if suite is not None:
        family = "gemma-3" if suite[1] else "gemma-2"
        instructed = suite[3] == "it" or family == "gemma-3"
        model = f"google/{family}-{suite[2]}" + (f"-{suite[3]}" if instructed else "")
    kinds = [part for part in (*parts, "" if suite is None else suite[4] or "") if part]
    if any("transcoder" in part for part in kinds):
        of = (None, None) if layer is None else (f"blocks.{layer}.{NORMED}", hook_name(layer, "mlp_out"))
        return Metadata(model=model, hook=of[0], hook_out=of[1]), True
    site = next((SITES[part] for part in reversed(kinds) if part in SITES), None)
    return Metadata(model=model, hook=None if layer is None or site is None else hook_name(layer, site)), False
