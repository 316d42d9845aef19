"""Qwen-Scope: files `layerN.sae.pt`, one a layer, in a folder (or a repository) whose name says the model and k.

p = x @ W_enc.T + b_enc without centring; the k largest are active. Its own lines keep them where they are negative,
too, which none of the k largest of so many is; a ReLU is taken here. Source: the cards of Qwen/SAE-Res-*.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae.cache.points import hook_name
from sae.pipeline.saes.inference import Formula, TopKRule

from . import files
from .archives import read_pt
from .base import Format, Metadata, register

FILE = re.compile(r"layer([0-9]{1,4})\.sae\.pt")
SUITE = re.compile(r"SAE-Res-(.+?)-W[0-9]+K-L0_([0-9]{1,6})")
SHOWN = 3


@register
class QwenScope(Format):
    """Files of Qwen-Scope: layerN.sae.pt, below a folder named as their repository. Read alone."""

    name = "qwen-scope"

    def detects(self, path: Path) -> bool:
        return bool(_files(path))

    def formula(self, path: Path) -> tuple[Formula, Metadata]:
        found = _files(path)
        if len(found) > 1:
            some = ", ".join(file.name for file in found[:SHOWN])
            raise ValueError(f"it holds {len(found)} of them; name one of the files ({some}, ...)")
        file = found[0]
        suites = [suite for part in file.absolute().parts for suite in SUITE.finditer(part)]
        if not suites:
            raise ValueError("k is said by the name of the folder alone (SAE-Res-...-L0_50); keep that name")
        left = read_pt(file)
        d_sae, d_in = files.sides(left, "W_enc")
        k = int(suites[-1][2])
        if not 1 <= k <= d_sae:
            raise ValueError(f"{suites[-1][0]} says k = {k}, and there are {d_sae} latents")
        formula = Formula(
            W_enc=files.take(left, "W_enc", d_sae, d_in).T.contiguous(),
            b_enc=files.take(left, "b_enc", d_sae),
            W_dec=files.take(left, "W_dec", d_in, d_sae).T.contiguous(),
            b_dec=files.take(left, "b_dec", d_in),
            rule=TopKRule(k),
            centred=False,
        )
        files.expect_taken(left)
        named = FILE.fullmatch(file.name)
        assert named is not None, "as `_files` says"
        return formula, Metadata(model=f"Qwen/{suites[-1][1]}", hook=hook_name(int(named[1]), "resid_post"))


def _files(path: Path) -> list[Path]:
    """The files of the layers that a path is or holds, by their number."""
    there = [path] if path.is_file() else [*path.iterdir()] if path.is_dir() else []
    found = {int(named[1]): file for file in there if (named := FILE.fullmatch(file.name)) and file.is_file()}
    return [found[number] for number in sorted(found)]
