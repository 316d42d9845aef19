"""The unembedding of a language model, without the rest of it at work."""

import torch
from torch import Tensor

from sae.pipeline.language_model.files import RANDOM, find_model


def unembedding(name: str, revision: str | None = None) -> Tensor | None:
    """float32 [n_vocab, d_model]: what makes logits of the final hidden state; nothing is downloaded.

    None for a model that has none of its own or random weights. Raises SaeError where the model is not on this machine.
    """
    if name.startswith(RANDOM):
        return None
    files = find_model(name, revision=revision, offline=True)
    from sae.pipeline.language_model.loading import load

    made = load(files, torch.float32).model.get_output_embeddings()
    return None if made is None else made.weight.detach().float()
