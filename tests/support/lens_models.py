"""Models in transformer_lens' own format, of random weights: the shape of gelu-1l, and a smaller one."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALL = {
    "d_model": 32, "n_layers": 1, "d_mlp": 96, "d_head": 8, "n_heads": 4, "n_ctx": 48, "d_vocab": 61, "act_fn": "gelu",
    "attn_only": False, "normalization": "LN", "tokenizer_name": "NeelNanda/gpt-neox-tokenizer-digits",
}  # fmt: skip
GELU_1L = {**SMALL, "d_model": 512, "d_mlp": 2048, "d_head": 64, "n_heads": 8, "n_ctx": 1024, "d_vocab": 48_262}


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights by transformer_lens' names, as it saves them, masks included."""
    random = torch.Generator().manual_seed(seed)
    d, heads, d_head, d_mlp = (config[key] for key in ("d_model", "n_heads", "d_head", "d_mlp"))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) / shape[0] ** 0.5

    found = {"embed.W_E": drawn(config["d_vocab"], d) * 8, "pos_embed.W_pos": drawn(config["n_ctx"], d),
             "unembed.W_U": drawn(d, config["d_vocab"])}  # fmt: skip
    for layer in range(config["n_layers"]):
        at = f"blocks.{layer}"
        found |= {f"{at}.attn.W_{which}": drawn(heads, d, d_head) / 2 for which in "QKV"}
        found |= {f"{at}.attn.b_{which}": drawn(heads, d_head) for which in "QKV"}
        found |= {
            f"{at}.attn.W_O": drawn(heads, d_head, d), f"{at}.attn.b_O": drawn(d), f"{at}.mlp.W_in": drawn(d, d_mlp),
            f"{at}.mlp.b_in": drawn(d_mlp), f"{at}.mlp.W_out": drawn(d_mlp, d), f"{at}.mlp.b_out": drawn(d),
            f"{at}.attn.mask": torch.ones(4, 4).tril().bool(), f"{at}.attn.IGNORE": torch.tensor(-1e5),
        }  # fmt: skip
    names = ["ln_final", *(f"blocks.{layer}.ln{i}" for layer in range(config["n_layers"]) for i in (1, 2))]
    return found | {f"{name}.w": 1 + drawn(d) for name in names} | {f"{name}.b": drawn(d) for name in names}


def saved(folder: Path, config: dict[str, Any], named: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(named, folder / "model_final.pth")
    return folder
