"""Tiny language models in folders, token stores of made-up documents, and the plain model's own values.

For the tests of the stages that run a language model.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_stores import shrunk
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

from sae.cache.disk.identity import Recipe
from sae.cache.tokens import TokenStore, TokenWriter
from sae.pipeline.language_model import LanguageModel

VOCAB, CONTEXT, LAYERS, WIDTH, HEADS, BEGIN = 61, 16, 2, 16, 2, 3
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=32),
    "llama": LlamaConfig(**LLAMA),
    "mistral": MistralConfig(**LLAMA, sliding_window=6),
}


@contextmanager
def small_stages() -> Iterator[pytest.MonkeyPatch]:
    """Stores with windows of 32 to 128 rows, no waiting for the disk, and each model booted once."""
    with shrunk() as patch:
        boot = functools.cache(LanguageModel.boot)
        patch.setattr(LanguageModel, "boot", lambda name, **options: boot(name, **{**options, "device": "cpu"}))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # models this small only lose by sharing their work out
        yield patch
        torch.set_num_threads(threads)


def save_model(kind: str, folder: Path, *, seed: int = 7) -> Path:
    """A random model with weights large enough for every part to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


def plain_model(folder: Path) -> Any:
    """The model as transformers alone runs it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def blocks(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@torch.no_grad()
def plain_values(folder: Path, tokens: np.ndarray) -> dict[tuple[int, str], Tensor]:
    """Every site's values [contexts * T, width] as the plain model computes them, from tokens [contexts, T]."""
    model = plain_model(folder)
    found: dict[tuple[int, str], Tensor] = {}

    def keep(layer: int, site: str, what: str) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any, out: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            found[layer, site] = given if what == "in" else out[0] if isinstance(out, tuple) else out

        return hook

    for layer, block in enumerate(blocks(model)):
        gpt2 = hasattr(block, "ln_1")
        attention = block.attn if gpt2 else block.self_attn
        hooks = [
            (attention, "attn_out", "out"),
            (attention.c_proj if gpt2 else attention.o_proj, "attn_z", "in"),
            (block.mlp, "mlp_in", "in"),
            (block.mlp.c_proj if gpt2 else block.mlp.down_proj, "mlp_post", "in"),
            (block.mlp, "mlp_out", "out"),
        ]
        for module, site, what in hooks:
            module.register_forward_hook(keep(layer, site, what), with_kwargs=True)
    states = model(torch.from_numpy(tokens), output_hidden_states=True).hidden_states
    for layer in range(LAYERS):
        found[layer, "resid_pre"] = states[layer]
        found[layer, "resid_mid"] = states[layer] + found[layer, "attn_out"]
        # the last of hidden_states has been through the final norm, so the sum is taken instead
        found[layer, "resid_post"] = found[layer, "resid_mid"] + found[layer, "mlp_out"]
        if layer + 1 < LAYERS:
            torch.testing.assert_close(found[layer, "resid_post"], states[layer + 1], rtol=1e-5, atol=1e-6)
    return {point: value.flatten(0, 1) for point, value in found.items()}


def token_recipe(*, split: str = "train", packing: str = "concat", seed: int = 0, **changes: Any) -> Recipe:
    return {
        "source": {"name": "made-up", "seed": seed},
        "tokenizer": {"name": "made-up", "n_vocab": VOCAB, "begin": BEGIN},
        "context_length": CONTEXT,
        "packing": packing,
        "split": split,
        **changes,
    }


def made_up(contexts: int, *, seed: int = 0, length: int = CONTEXT) -> np.ndarray:
    """Tokens [contexts, length], one in ten of them a begin token."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB, (contexts, length))
    tokens[random.random((contexts, length)) < 0.1] = BEGIN
    return tokens


def token_store(
    root: Path, tokens: np.ndarray, lengths: np.ndarray | None = None, *, ended: bool = True, **recipe: Any
) -> TokenStore:
    """A store of tokens [n, T] (or the continuation of one), of which `lengths` [n] in each context are real."""
    full = token_recipe(**{"context_length": tokens.shape[1], **recipe})
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else lengths
    with TokenWriter(root, "made-up" + ("" if full["split"] == "train" else "-validation"), full) as writer:
        writer.write_vocabulary([b"t%d" % i for i in range(VOCAB)])
        while writer.store.n_rows < len(tokens):
            start, stop = writer.store.windows.bounds(len(writer.store.manifest.windows))
            part = slice(start, min(stop, len(tokens)))
            document = (tokens[part] == BEGIN).cumsum().reshape(tokens[part].shape)
            arrays = {"tokens": tokens[part], "document": document, "length": lengths[part]}
            writer.append({name: values.astype(np.uint32) for name, values in arrays.items()}, {})
        if ended and not writer.store.closed:
            writer.close()
        return writer.store


def row_places(tokens: np.ndarray, lengths: np.ndarray | None = None) -> list[int]:
    """Which tokens become rows, by the rule said in words: not the first of a context, no begin token, no padding."""
    return [
        context * tokens.shape[1] + place
        for context in range(len(tokens))
        for place in range(tokens.shape[1])
        if place > 0 and tokens[context, place] != BEGIN and (lengths is None or place < lengths[context])
    ]
