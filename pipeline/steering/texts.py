"""The latents that fire on a text, token by token."""

from __future__ import annotations

from typing import Any

import torch

from sae.cache.errors import SaeError
from sae.pipeline.steering.opened import Opened


@torch.no_grad()
def fired_on(opened: Opened, text: str, top: int) -> list[dict[str, Any]]:
    """A row a token: its `position`, `id` and `token`, whether it is such as the dictionary has `learned` of, how many
    latents `fired`, and the `top` strongest of them, as `feature` and `value`.

    Raises SaeError for a text without tokens, and for one that is longer than the model reads.
    """
    if top < 1:
        raise SaeError(f"top = {top}: is no number of latents; give 1 or more")
    ids = opened.encoded(text, "text = ...")
    rows = opened.model.activations(ids[None], [opened.reads])[opened.reads][0]
    values = opened.dictionary.encode(rows).dense().cpu()
    learned = opened.learned(ids).tolist()
    strongest = values.abs().topk(min(top, values.shape[1]), dim=1).indices
    return [
        {
            "position": place, "id": token, "token": opened.text([token]), "learned": learned[place],
            "fired": int((values[place] != 0).sum()),
            "latents": [
                {"feature": feature, "value": value}
                for feature in strongest[place].tolist() if (value := values[place, feature].item())
            ],
        }
        for place, token in enumerate(ids.tolist())
    ]  # fmt: skip
