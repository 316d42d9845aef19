"""`config.json` of a folder that may come from anyone -> a Hugging Face configuration, or one line that says why not.

Some keys make transformers read, fetch or run other things than the folder's own weights; some numbers make it take all
memory before it looks at a weight. Both are looked for in the file itself, before transformers sees it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from sae.cache.errors import SaeError
from sae.pipeline.language_model.files import CONFIG, one_line, read_json

_QUANTIZED = ("quantization_config", "compression_config")
_ELSEWHERE = ("configuration_files", "transformers_weights", "fusion_config")  # name other files, or change the model
_IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_internal)?")  # may name code on the hub
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
_LIMITS = (  # of integers by their key; far above what any model has, far below what a loop over them would take
    (re.compile(r"layers?$|blocks?$"), 10_000),
    (re.compile(r"^(n|num)_"), 10**6),
    (re.compile(r"position|context|_ctx|seq_len|max_length"), 10**8),
)


def read_config(folder: Path, name: str) -> Any:
    """The configuration of a causal language model. Raises SaeError."""
    for key, value in _entries(read_json(folder / CONFIG, name)):
        if key in _QUANTIZED and value:
            how = value.get("quant_method", "") if isinstance(value, dict) else ""
            raise SaeError(
                f"model = {name}: its weights are quantized ({key} in {CONFIG}: {str(how)[:40]}), which is not "
                "supported; give the model in float32, float16 or bfloat16"
            )
        if key in _ELSEWHERE and value is not None:
            raise SaeError(f"model = {name}: {key} in {CONFIG} is not supported; remove it, or give another model")
        if isinstance(value, float) and math.isnan(value):
            raise SaeError(f"model = {name}: {key} in {CONFIG} is NaN; fetch or save the model again")
        if isinstance(value, int) and any(kind.search(key) and abs(value) > most for kind, most in _LIMITS):
            raise SaeError(f"model = {name}: {key} in {CONFIG} is {str(value)[:30]}; fetch or save the model again")
    try:
        # code in the folder is never run: left unsaid, transformers would stop and ask on the terminal
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each of hundreds of classes fails in its own way on values that are not its own
        if "trust_remote_code" in str(error):  # which transformers would have us set
            raise SaeError(
                f"model = {name}: is Python code of its own, which is never run; give a model that transformers knows"
            ) from error
        raise SaeError(f"model = {name}: {CONFIG} is not understood: {one_line(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SaeError(f"model = {name}: a {config.model_type} is not a causal language model; give one such as gpt2")
    for size in _SIZES:
        value = getattr(config, size, None)
        if isinstance(value, int) and value < 1:
            raise SaeError(f"model = {name}: {size} in {CONFIG} is {value}; fetch or save the model again")
    config._attn_implementation = None  # transformers' default for the model
    config._experts_implementation = None
    return config


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each key and value of a JSON document, nested ones included; entries of lists under the list's key."""
    if isinstance(value, dict):
        for inner, content in value.items():
            if not _IMPLEMENTATIONS.fullmatch(inner):
                yield inner, content
                yield from _entries(content, inner)
    elif isinstance(value, list):
        for content in value:
            yield key, content
            yield from _entries(content, key)
