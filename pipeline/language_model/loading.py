"""A folder -> a Hugging Face causal model in memory, whole or an error; or one with random weights, on request."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, GPT2Config
from transformers.utils import logging

from cache.errors import NotFound, SaeError
from pipeline.language_model.files import CONFIG, RANDOM, ModelFiles, one_line, slug

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
    """The model in a folder. transformers fills what is missing with random numbers and a report: here an error."""
    files.weights()
    config = _config(files.folder, files.name)
    try:
        with _quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                files.folder, config=config, dtype=dtype, use_safetensors=True, local_files_only=True,
                ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False,
            )  # fmt: skip
    except SafetensorError as error:
        raise SaeError(f"--model {files.name}: its weights are damaged ({error}); fetch or save them again") from None
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise SaeError(f"--model {files.name}: cannot be loaded: {one_line(error)}") from error
    for key, what in (("missing_keys", "missing"), ("mismatched_keys", f"of another shape than {CONFIG} says")):
        if wrong := sorted(str(weight[0] if isinstance(weight, tuple) else weight) for weight in found[key]):
            raise SaeError(
                f"--model {files.name}: {len(wrong)} weights are {what} ({wrong[0]} and on); save the whole model again"
            )
    return model


def _config(folder: Path, name: str) -> Any:
    try:
        # code in the folder is never run: left unsaid, transformers would stop and ask on the terminal
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SaeError(f"--model {name}: {CONFIG} is not understood: {one_line(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SaeError(f"--model {name}: a {config.model_type} is not a causal language model; give one such as gpt2")
    return config


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
            raise NotFound(f"--model {RANDOM}{shape}: give {', '.join(GPT2_SHAPES)}, or a folder with a {CONFIG}")
        name = slug(folder.resolve().name)
        config = _config(folder, name)
    with _quiet(), torch.random.fork_rng(devices=[]):
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


@contextmanager
def _quiet() -> Iterator[None]:
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
