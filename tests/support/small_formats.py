"""Other tools' folders, small and written by hand, beside what the tool computes from them, a latent at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.saes_kit import D, M
from torch import Tensor

from sae.cache.errors import SaeError
from sae.pipeline.saes.dictionary import Dictionary

Said = dict[str, Any]
Tensors = dict[str, Tensor]
K, D_OUT = 3, 7


def rows(count: int = 20) -> Tensor:
    return 3 * torch.randn(count, D, generator=torch.Generator().manual_seed(9)) + 1


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def one_line(read: Callable[[], object]) -> str:
    with pytest.raises(SaeError) as caught:
        read()
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


@dataclass
class Folder:
    """What is in a folder: settings (None: no file of them), tensors, and what the tool computes of a row.

    computes: row [d_in] -> (latents [m], reconstruction [d_out]).
    """

    said: Said | None
    tensors: Tensors
    computes: Callable[[Tensor], tuple[Tensor, Tensor]]
    settings_file: str
    tensors_file: str
    inside: str = "it"
    odd: tuple[tuple[str, ...], ...] = field(default=())  # settings that a reader looks at, to be made odd

    def put(self, where: Path) -> Path:
        """Write it below a folder; where."""
        folder = where / self.inside
        folder.mkdir(parents=True, exist_ok=True)
        if self.said is not None:
            (folder / self.settings_file).write_text(json.dumps(self.said))
        put_tensors(folder / self.tensors_file, self.tensors)
        return folder

    def expect(self, dictionary: Dictionary, atol: float = 1e-4) -> None:
        """That a dictionary computes what the tool does, and that latents are on here and off there."""
        x = rows()
        pairs = [self.computes(row) for row in x]
        latents, y = (torch.stack(part) for part in zip(*pairs, strict=True))
        torch.testing.assert_close(dictionary.encode(x).dense(), latents, rtol=1e-4, atol=atol)
        torch.testing.assert_close(dictionary.decode(dictionary.encode(x)), y, rtol=1e-4, atol=atol)
        assert (latents > 0).any() and (latents == 0).any()
        assert not dictionary.training and not any(one.requires_grad for one in dictionary.parameters())


def put_tensors(path: Path, tensors: Tensors) -> None:
    """Write tensors as the ending of a name says."""
    if path.suffix == ".pt":
        torch.save(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def top(p: Tensor, k: int) -> Tensor:
    """The k largest of p [m] as they are, 0 elsewhere."""
    best = p.sort(descending=True).indices[:k]
    return torch.zeros_like(p).index_copy(0, best, p[best])


def biased(m: int = M) -> Tensor:
    return 0.3 * numbers(m, seed=3)


def thresholds(m: int = M) -> Tensor:
    return numbers(m, seed=6).abs() / 2


# dictionary_learning


def _learned(
    kind: str, tensors: Tensors, computes: Callable[[Tensor], tuple[Tensor, Tensor]], **trainer: Any
) -> Folder:
    said = {
        "trainer": {
            "dict_class": kind, "trainer_class": "T", "activation_dim": D, "dict_size": M, "layer": 4,
            "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_4", **trainer,
        },
        "buffer": {"ctx_len": 128},
    }  # fmt: skip
    odd = tuple(("trainer", key) for key in ("dict_class", "k", "layer", "lm_name", "submodule_name"))
    return Folder(said, tensors, computes, "config.json", "ae.pt", odd=(*odd, ("buffer", "ctx_len"), ("trainer",)))


def dictionary_learning() -> dict[str, Folder]:
    """A folder of every class of it that is read."""
    E, b, C = numbers(M, D), biased(), numbers(D, M, seed=1)
    c = numbers(D, seed=2)
    linear = {"encoder.weight": E, "encoder.bias": b, "decoder.weight": C}
    k, theta = {"k": torch.tensor(K, dtype=torch.int32)}, torch.tensor(0.8)
    norms, t = C.norm(dim=0), thresholds()
    r, mag, gate = 0.2 * numbers(M, seed=7), 0.3 * numbers(M, seed=8), 0.3 * numbers(M, seed=9)

    def relu(x: Tensor) -> tuple[Tensor, Tensor]:
        f = (E @ (x - c) + b).relu()
        return f * norms, C @ f + c

    def new(x: Tensor) -> tuple[Tensor, Tensor]:
        f = (E @ x + b).relu()
        return f, C @ f + c

    def topk(x: Tensor) -> tuple[Tensor, Tensor]:
        f = top((E @ (x - c) + b).relu(), K)
        return f, C @ f + c

    def above(x: Tensor) -> tuple[Tensor, Tensor]:
        f = (E @ (x - c) + b).relu()
        f = f * (f > theta)
        return f, C @ f + c

    def jump(x: Tensor) -> tuple[Tensor, Tensor]:
        p = E @ x + b
        f = (p * (p > t)).relu()
        return f, C @ f + c

    def gated(x: Tensor) -> tuple[Tensor, Tensor]:
        e = E @ (x - c)
        f = (e + gate > 0) * (r.exp() * e + mag).relu()
        return f, C @ f + c

    plain = {"W_enc": E.T, "b_enc": b, "W_dec": C.T, "b_dec": c}
    return {
        "AutoEncoder": _learned("AutoEncoder", linear | {"bias": c}, relu),
        "AutoEncoderNew": _learned("AutoEncoderNew", linear | {"decoder.bias": c}, new),
        "AutoEncoderTopK": _learned(
            "AutoEncoderTopK", linear | {"b_dec": c, "threshold": torch.tensor(-1.0)} | k, topk, k=K
        ),
        "BatchTopKSAE": _learned("BatchTopKSAE", linear | {"b_dec": c, "threshold": theta} | k, above, k=K),
        "MatryoshkaBatchTopKSAE": _learned(
            "MatryoshkaBatchTopKSAE", plain | {"threshold": theta, "group_sizes": torch.tensor([8, M - 8])} | k, above,
            k=K,
        ),
        "JumpReluAutoEncoder": _learned("JumpReluAutoEncoder", plain | {"threshold": t}, jump),
        "GatedAutoEncoder": _learned(
            "GatedAutoEncoder",
            {"encoder.weight": E, "decoder.weight": C, "decoder_bias": c, "r_mag": r, "mag_bias": mag,
             "gate_bias": gate}, gated,
        ),
    }  # fmt: skip


# OpenMOSS


def _opened(
    tensors: Tensors, computes: Callable[[Tensor], tuple[Tensor, Tensor]], act_fn: str, norm: str, **more: Any
) -> Folder:
    said = {
        "sae_type": "sae", "d_model": D, "expansion_factor": M / D, "use_decoder_bias": True, "act_fn": act_fn,
        "norm_activation": norm, "sparsity_include_decoder_norm": False, "top_k": K, "use_glu_encoder": False,
        "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post", **more,
    }  # fmt: skip
    odd = tuple((key,) for key in said)
    return Folder(said, tensors, computes, "config.json", "sae_weights.safetensors", odd=odd)


def openmoss() -> dict[str, Folder]:
    """Folders of it with each activation function and each scaling of rows that is read."""
    W, b, V, c = numbers(D, M), biased(), numbers(M, D, seed=1), numbers(D, seed=2)
    tensors, norms, theta = {"W_E": W, "b_E": b, "W_D": V, "b_D": c}, V.norm(dim=1), thresholds() + 0.1
    jumping = tensors | {"activation_function.log_jumprelu_threshold": theta.log()}
    hook_in, hook_out = "blocks.3.hook_mlp_in", "blocks.3.hook_mlp_out"
    average = "dataset_average_activation_norm."
    a_in, a_out = torch.tensor(11.0), torch.tensor(5.0)

    def by(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def computes(x: Tensor) -> tuple[Tensor, Tensor]:
            f = activation(x @ W + b)
            return f, f @ V + c

        return computes

    def jump(p: Tensor) -> Tensor:
        return p * (p > theta)

    def whole_set(x: Tensor) -> tuple[Tensor, Tensor]:  # latents in the data's units: those of the tool over its scale
        s_in, s_out = D**0.5 / a_in, D**0.5 / a_out
        f = jump(x * s_in @ W + b)
        return f / s_in, (f @ V + c) / s_out

    def each_row(x: Tensor) -> tuple[Tensor, Tensor]:
        s = D**0.5 / x.norm()
        f = (x * s @ W + b).relu()
        return f, (f @ V + c) / s

    return {
        "relu": _opened(tensors, by(torch.relu), "relu", "inference"),
        "topk": _opened(tensors, by(lambda p: top(p.relu(), K)), "topk", "inference"),
        "jumprelu": _opened(jumping, by(jump), "jumprelu", "inference"),
        "jumprelu by norm": _opened(
            jumping, by(lambda p: jump(p * norms) / norms), "jumprelu", "inference", sparsity_include_decoder_norm=True
        ),
        "no decoder bias": _opened(
            {name: value for name, value in tensors.items() if name != "b_D"},
            lambda x: ((f := (x @ W + b).relu()), f @ V), "relu", "inference", use_decoder_bias=False,
        ),
        "transcoder of a data set": _opened(
            jumping | {average + hook_in: a_in, average + hook_out: a_out}, whole_set, "jumprelu", "dataset-wise",
            hook_point_in=hook_in, hook_point_out=hook_out,
        ),
        "each row": _opened(tensors, each_row, "relu", "token-wise"),
    }  # fmt: skip


# Gemma Scope and Qwen-Scope


def gemma_scope() -> dict[str, Folder]:
    """Folders of both generations."""
    W, b, V, c = numbers(D, M), biased(), numbers(M, D, seed=1), numbers(D, seed=2)
    theta, skip = thresholds(), 0.1 * numbers(D, D, seed=4)

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        p = x @ W + b
        f = (p > theta) * p.relu()
        return f, f @ V + c

    def skipping(x: Tensor) -> tuple[Tensor, Tensor]:
        f, y = plain(x)
        return f, y + x @ skip

    biases = {"b_enc": b, "b_dec": c, "threshold": theta}
    first = Folder(
        None, biases | {"W_enc": W, "W_dec": V}, plain, "", "params.npz",
        "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
    )  # fmt: skip
    second = {"w_enc": W, "w_dec": V, "affine_skip_connection": skip} | biases
    return {
        "npz": first,
        "second": Folder(
            None, second, skipping, "", "params.safetensors",
            "gemma-scope-2-270m-it/transcoder/layer_12_width_16k_l0_small_affine",
        ),
    }  # fmt: skip


def qwen_scope() -> Folder:
    E, b, C, c = numbers(M, D), biased(), numbers(D, M, seed=1), numbers(D, seed=2)

    def computes(x: Tensor) -> tuple[Tensor, Tensor]:
        f = top(E @ x + b, K)
        return f, C @ f + c

    tensors = {"W_enc": E, "b_enc": b, "W_dec": C, "b_dec": c}
    return Folder(None, tensors, computes, "", "layer5.sae.pt", f"SAE-Res-Qwen3-8B-Base-W64K-L0_{K}")


def every() -> dict[str, Folder]:
    """One of each way to read."""
    found = {f"dictionary_learning {name}": folder for name, folder in dictionary_learning().items()}
    found |= {f"openmoss {name}": folder for name, folder in openmoss().items()}
    found |= {f"gemma-scope {name}": folder for name, folder in gemma_scope().items()}
    return found | {"qwen-scope": qwen_scope()}
