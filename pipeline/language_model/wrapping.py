"""transformer_lens' bridge around a Hugging Face model.

The bridge recomputes attention and norms step by step so that every score can be hooked. None of our sites needs that,
so those two are handed back to the model's own modules (`_hand_back`): the numbers are then Hugging Face's, with its
default attention, and so is the speed.
"""

from __future__ import annotations

import copy
import types
import warnings
from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge import AttentionBridge, NormalizationBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers.activations import NewGELUActivation

from sae.cache.errors import SaeError
from sae.pipeline.language_model.files import one_line


def wrap(model: Any, name: str) -> Any:
    """The bridge around a model, with what it took over handed back. Raises SaeError where there is none."""
    attention, kind = model.config._attn_implementation, type(model).__name__
    config = model.config
    if getattr(config, "new_decoder_architecture", False) and getattr(config, "multi_query", False):
        config = copy.deepcopy(config)  # Falcon reads either of the two, transformer_lens both
        config.multi_query = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about hook points it lacks: what is there is tried out
            # no tokenizer: the stages speak token ids, and a folder without one would boot with an empty one
            bridge: Any = build_bridge_from_module(model, kind, hf_config=config, tokenizer=None, model_name=name)
        causal = bool(getattr(bridge, "blocks", None)) and bridge.adapter.supports_causal_loss
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # its adapters fail in as many ways as there are architectures
        raise SaeError(
            f"model = {name}: transformer_lens has no bridge that fits this {kind} ({one_line(error)}); "
            "give one such as gpt2"
        ) from error
    if not causal:
        raise SaeError(f"model = {name}: {kind} is not a causal transformer; give one such as gpt2")
    model.set_attn_implementation(attention)  # wrapping may have switched it to eager
    _hand_back(model)
    return bridge


def _hand_back(model: nn.Module) -> None:
    """Let attention, norms and the tanh GELU run as single kernels of the model's own again.

    The wrapped attention still calls the bridge's projections, so the hook points of all our sites fire as before.
    `gelu_new` in transformers is nine element-wise steps; torch does the same in one, equal but for rounding.
    """
    for module in list(model.modules()):
        # a component without a name wraps its parent, which must not run in its place
        if isinstance(module, (AttentionBridge, NormalizationBridge)) and module.name is not None:
            object.__setattr__(module, "forward", types.MethodType(GeneralizedComponent.forward, module))
        if isinstance(module, AttentionBridge) and module.name is not None:
            _hook_output_projection(module)
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _hook_output_projection(attention: Any) -> None:
    """See that the wrapped attention calls the bridge's output projection, whose input is attn_z.

    (A bridge that splits a joint query-key-value projection leaves the wrapped module's own in place.)
    """
    projection = attention.submodules.get("o")
    name = getattr(projection, "name", None) or ""
    if projection is not None and getattr(attention.original_component, name, None) is projection.original_component:
        setattr(attention.original_component, name, projection)
