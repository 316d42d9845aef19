"""Weights in safetensors files -> a Hugging Face model that takes all of them, or one line that says which it does not.

transformers fills what is missing with random numbers and leaves out what it has no place for, both with a report that
nobody reads. Headers are read first, so that a file or a configuration that lies is refused before memory is taken.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from sae.cache.errors import SaeError
from sae.pipeline.language_model.files import CONFIG, one_line, shown

_FLOATS = {"F64", "F32", "F16", "BF16"}
# What older versions saved beside the weights, and models make for themselves: causal masks, positions, rotary tables.
_BUFFERS = re.compile(
    r"(^|\.)(attn|attention|self_attn|self_attention|crossattention)(\.attention)?\.(bias|masked_bias|causal_mask)$"
    r"|(^|\.)position_ids$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)embed_positions\.weights$"
    r"|(^|\.)(en|de)coder\.version$"
)
_MODULES = 300_000  # parts of a model; a stack of experts in single matrices has some 60,000


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not read yet."""

    slice: Any  # of safetensors
    shape: tuple[int, ...]
    kind: str  # as safetensors names it: F32, BF16, I64, F8_E4M3, ...

    def is_buffer(self, name: str) -> bool:
        """Return True if it is something a model makes for itself (a mask is [1, 1, T, T], its bias one number)."""
        is_mask = self.shape[:-2] == (1, 1) or self.shape in ((), (1,))
        return _BUFFERS.search(name) is not None and (is_mask or not name.endswith(("bias", "mask")))


@contextmanager
def stored(files: Iterable[Path], name: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of some files, by name, from their headers alone. Raises SaeError for files that are not whole."""
    with ExitStack() as stack:
        found: dict[str, Tensor] = {}
        for path in files:
            try:
                opened = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                for key in opened.keys():  # noqa: SIM118  # it is no mapping
                    if key in found:
                        raise SaeError(f"model = {name}: {shown(key)} is in two weight files; save the model again")
                    part = opened.get_slice(key)
                    found[key] = Tensor(part, tuple(part.get_shape()), part.get_dtype())
            except (SafetensorError, OSError, ValueError) as error:
                raise SaeError(
                    f"model = {name}: {shown(path.name)}: its weights are damaged ({one_line(error)}); "
                    "fetch or save them again"
                ) from error
        for key, tensor in found.items():
            if tensor.kind not in _FLOATS and not tensor.is_buffer(key):
                raise SaeError(
                    f"model = {name}: {shown(key)} is stored as {tensor.kind}: quantized weights are not supported; "
                    "give the model in float32, float16 or bfloat16"
                )
        yield found


def outline(config: Any, name: str, dtype: torch.dtype, tensors: dict[str, Tensor] | None = None) -> Any:
    """The model of a configuration, of tensors without data.

    Raises SaeError where it asks for more than the weights hold, or than fits into memory.
    """
    layers = getattr(config, "num_hidden_layers", 0)
    if tensors is not None and isinstance(layers, int) and layers > len(tensors):
        raise SaeError(f"model = {name}: {CONFIG} asks for {layers} layers, the files hold {len(tensors)} weights")
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        if made > _MODULES:
            raise _TooMany(f"more than {_MODULES} modules")

    handle = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"), quiet():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # each of hundreds of classes fails in its own way on values that are not its own
        raise SaeError(f"model = {name}: {CONFIG} describes no model: {one_line(error)}") from error
    finally:
        handle.remove()
    asked, held = sum(p.numel() for p in model.parameters()), sum(_numel(t.shape) for t in (tensors or {}).values())
    if tensors is not None and asked > 2 * held + 10**6:  # a little less is told weight by weight
        raise SaeError(f"model = {name}: {CONFIG} asks for {asked:,} parameters, the files hold {held:,}")
    needed = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        half = "; `harvest.dtype = bfloat16` halves it" if dtype == torch.float32 else ""
        raise SaeError(f"model = {name}: takes {needed / 1e9:,.0f} GB, this machine has {there / 1e9:,.0f} GB{half}")
    return model


def fill(outlined: Any, tensors: dict[str, Tensor], name: str, dtype: torch.dtype) -> Any:
    """The model of an outline with all of the tensors in it. Raises SaeError where they do not fit each other."""
    try:
        with quiet():
            # given the tensors, transformers looks into no folder: other files there (adapters, pickles) stay shut
            model, found = type(outlined).from_pretrained(
                None, config=outlined.config, state_dict={key: tensor.slice for key, tensor in tensors.items()},
                dtype=dtype, local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise SaeError(f"model = {name}: cannot be loaded: {one_line(error)}") from error
    unknown = [key for key in found["unexpected_keys"] if not (key in tensors and tensors[key].is_buffer(key))]
    for keys, what in (
        (found["missing_keys"], "missing from the files"),
        ([key for key, *_ in found["mismatched_keys"]], f"of another shape than {CONFIG} says"),
        (unknown, f"in the files and not in the model that {CONFIG} describes"),
    ):
        if wrong := sorted(map(str, keys)):
            names = ", ".join(map(shown, wrong[:3])) + (", ..." if len(wrong) > 3 else "")
            count = "1 weight is" if len(wrong) == 1 else f"{len(wrong)} weights are"
            raise SaeError(f"model = {name}: {count} {what} ({names}); save the whole model again")
    return model


class _TooMany(Exception):
    """A configuration describes more parts than any model has."""


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting and drawing on the terminal: what it finds wrong is raised instead."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
