"""Sparse dictionaries of language models: cached activations, training, evaluation.

    import sae
    coder = sae.load("topk-8192-k32-...")        # a run, or sae.read(folder) for another tool's dictionary
    latents = coder.encode(x)                    # x [..., d]; latents.dense() is [..., d_sae]

`docs/python.md` teaches the rest. Every name below is imported when it is first used, so that this takes no seconds;
an architecture's settings go by the name of its class (`sae.TopK(k=32, d_sae=8192)`), and each is found by being there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.cache.errors import Busy, DamagedStore, NotFound, SaeError
    from sae.cache.loader.dataset import Dataset
    from sae.dictionaries import load, read
    from sae.pipeline.interpret.attached import attach
    from sae.pipeline.language_model.model import LanguageModel
    from sae.pipeline.language_model.places import intervene
    from sae.pipeline.saes.batchtopk import BatchTopKConfig as BatchTopK
    from sae.pipeline.saes.clt import CLTConfig as CLT
    from sae.pipeline.saes.crosscoder import CrosscoderConfig as Crosscoder
    from sae.pipeline.saes.dictionary import Dictionary
    from sae.pipeline.saes.fsq import FSQConfig as FSQ
    from sae.pipeline.saes.gated import GatedConfig as Gated
    from sae.pipeline.saes.hybrid import HybridConfig as Hybrid
    from sae.pipeline.saes.jl import JLConfig as JL
    from sae.pipeline.saes.jumprelu import JumpReLUConfig as JumpReLU
    from sae.pipeline.saes.l1 import L1Config as L1
    from sae.pipeline.saes.latents import Latents
    from sae.pipeline.saes.matryoshka import MatryoshkaConfig as Matryoshka
    from sae.pipeline.saes.molt import MOLTConfig as MOLT
    from sae.pipeline.saes.nvae import NVAEConfig as NVAE
    from sae.pipeline.saes.p_anneal import PAnnealConfig as PAnneal
    from sae.pipeline.saes.shifted_relu import ShiftedReLUConfig as ShiftedReLU
    from sae.pipeline.saes.topk import TopKConfig as TopK
    from sae.pipeline.saes.vae import VAEConfig as VAE
    from sae.pipeline.saes.vsae_iso import VSAEIsoConfig as VSAEIso
    from sae.pipeline.saes.vsae_mix import VSAEMixConfig as VSAEMix
    from sae.pipeline.saes.vsae_multi import VSAEMultiConfig as VSAEMulti
    from sae.session import Session
    from sae.stages import evaluate, harvest, tokenize, train

    __version__: str

_HOMES = {
    "sae.cache.errors": ("Busy", "DamagedStore", "NotFound", "SaeError"),
    "sae.cache.loader.dataset": ("Dataset",),
    "sae.dictionaries": ("load", "read"),
    "sae.pipeline.interpret.attached": ("attach",),
    "sae.pipeline.language_model.model": ("LanguageModel",),
    "sae.pipeline.language_model.places": ("intervene",),
    "sae.pipeline.saes.dictionary": ("Dictionary",),
    "sae.pipeline.saes.latents": ("Latents",),
    "sae.session": ("Session",),
    "sae.stages": ("evaluate", "harvest", "tokenize", "train"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_ARCHITECTURES = "sae.pipeline.saes"


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    if name == "__version__":
        from importlib.metadata import version

        return version("sae-cache")
    if name in _HOME_OF:
        globals()[name] = value = getattr(import_module(_HOME_OF[name]), name)
        return value
    if name in _architectures():
        classes = import_module(_ARCHITECTURES).ARCHITECTURES.values()
        return next(one.config_type for one in classes if one.__name__ == name)
    raise AttributeError(f"module 'sae' has no attribute {name!r}; it has {', '.join(__dir__())}")


def __dir__() -> list[str]:
    return sorted({"__version__", *_HOME_OF, *_architectures()})


def _architectures() -> set[str]:
    """Names of the classes of all architectures, which are not imported for it."""
    from sae.pipeline.declared import registered

    return {one.name for one in registered(f"{_ARCHITECTURES}.base.ARCHITECTURES", "arch").values()}
