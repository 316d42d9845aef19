"""Documents of a few token ids, rows that say which token they came from, and a dictionary that reads it off."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.store.codecs import codec, codec_recipe
from sae.cache.tokens import TokenStore, TokenWriter, contexts_per_chunk
from sae.pipeline.saes import Latents

T, D, BEGIN = 32, 12, 0  # context length, width (one dimension a token id), begin token
Stores = tuple[TokenStore, ActivationStore]


class Readout:
    """Latent j is dimension j where it is positive: what a latent does on a token can be read off the row."""

    def __init__(self, d_sae: int = D, *, sparse: bool = False) -> None:
        self.d_sae, self.sparse = d_sae, sparse

    def encode(self, x: Tensor) -> Latents:
        dense = torch.nn.functional.pad(x, (0, self.d_sae - x.shape[1])).relu()
        if not self.sparse:
            return Latents.of_dense(dense)
        values, indices = dense.topk(4, dim=1)
        return Latents.of_rows(values, indices, self.d_sae)


def build(folder: Path, contexts: int, *, codec_text: str = "float32", lengths: bool = False, seed: int = 0) -> Stores:
    """Random documents; the row of a token is about 1 to 5 in the token's own dimension, elsewhere at most 0."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, D, contexts * T)
    starts = np.sort(random.choice(np.arange(1, contexts * T), contexts, replace=False))
    tokens[0] = tokens[starts] = BEGIN
    documents = np.zeros(contexts * T, np.uint32)
    documents[starts] = 1
    documents = documents.cumsum().astype(np.uint32)
    real = random.integers(T // 2, T + 1, contexts) if lengths else np.full(contexts, T)
    recipe: dict[str, Any] = {
        "source": {"seed": seed}, "tokenizer": {"name": "letters", "n_vocab": D, "begin": BEGIN}, "context_length": T,
        "split": "train",
    }  # fmt: skip
    shape = (contexts, T)
    arrays = {
        "tokens": tokens.reshape(shape), "document": documents.reshape(shape), "length": real.astype(np.uint32)
    }  # fmt: skip
    assert contexts <= contexts_per_chunk(T)
    with TokenWriter(folder, "text", recipe) as writer:
        writer.write_vocabulary([f"<{i}>".encode() for i in range(D)])
        writer.append(arrays, {})
        writer.close()
        store = writer.store
    place = np.tile(np.arange(T), contexts)
    keep = np.flatnonzero((place >= 1) & (place < np.repeat(real, T)) & (tokens != BEGIN))
    rows = -random.random((len(keep), D)).astype(np.float32)
    rows[np.arange(len(keep)), tokens[keep]] = random.integers(8, 41, len(keep)) / 8  # many equal values: ties count
    made: dict[str, Any] = {
        "tokens": recipe, "model": {"model": "made up"}, "layer": 0, "site": "mlp_out", "hook": "blocks.0.hook_mlp_out",
        "d": D, "rows": {}, "codec": codec_recipe(codec(codec_text)),
    }  # fmt: skip
    with ActivationWriter(folder, "rows", made) as rows_writer:
        start = 0
        while start < len(keep):
            window = rows_writer.store.windows.count(start + 1) - 1
            stop = min(rows_writer.store.windows.bounds(window)[1], len(keep))
            buffer = rows_writer.window(stop - start)
            buffer.add(torch.from_numpy(rows[start:stop]), keep[start:stop])
            rows_writer.append(buffer.arrays(), {})
            start = stop
        rows_writer.close()
        return store, rows_writer.store
