"""A folder -> a Hugging Face causal model in memory, whole or an error; or one with random weights, on request."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from sae.cache.errors import NotFound
from sae.pipeline.language_model.config import read_config
from sae.pipeline.language_model.files import CONFIG, RANDOM, ModelFiles, slug
from sae.pipeline.language_model.weights import fill, outline, quiet, stored

RANDOM_SEED = 0
GPT2_SHAPES = {  # width, layers, heads
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}


@dataclass(frozen=True)
class Loaded:
    """A Hugging Face model and what identifies it."""

    model: Any
    name: str  # without any path
    revision: str | None  # the hub's commit
    weights: Callable[[], str] | None  # sha256 of weights no commit names; a function, because it reads them all


def load(files: ModelFiles, dtype: torch.dtype) -> Loaded:
    """Load the model of some files. Raises SaeError when it is not whole, or not a causal language model."""
    return Loaded(
        _from_files(files, dtype), files.name, files.revision, files.digest if files.revision is None else None
    )


def _from_files(files: ModelFiles, dtype: torch.dtype) -> Any:
    """The model in a folder, of which its configuration and its weight files alone are opened."""
    if files.of_lens:
        files.weights()  # are there
        from sae.pipeline.language_model.lens_format import load_lens

        return load_lens(files.folder, files.name, dtype)
    config = read_config(files.folder, files.name)
    with stored(files.weights(), files.name) as tensors:
        return fill(outline(config, files.name, dtype, tensors), tensors, files.name, dtype)


def load_random(shape: str, dtype: torch.dtype) -> Loaded:
    """An untrained model in the shape of a GPT-2, or of a folder with a configuration.

    The weights are the same every time, for one version of torch. Raises NotFound for any other shape.
    """
    if shape in GPT2_SHAPES:
        width, layers, heads = GPT2_SHAPES[shape]
        name, config = shape, GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
    else:
        folder = Path(os.path.expanduser(shape))
        if not (folder / CONFIG).is_file():
            raise NotFound(f"model = {RANDOM}{shape}: give {', '.join(GPT2_SHAPES)}, or a folder with a {CONFIG}")
        name = slug(folder.resolve().name)
        config = read_config(folder, name)
    outline(config, RANDOM + name, dtype)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    digest = _digest(model.state_dict())
    return Loaded(model, RANDOM + name, None, lambda: digest)


def _digest(weights: dict[str, torch.Tensor]) -> str:
    """sha256 over names and values."""
    whole = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        whole.update(name.encode())
        whole.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return whole.hexdigest()
