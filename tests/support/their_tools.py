"""Run by another tool's Python, in whose environment nothing of ours is: opens and makes folders with its own code.

    python their_tools.py TOOL JOBS.json

A job is {"do": "open", "folder": ..., "rows": x.npy, "out": y.npz}: load a dictionary, write `latents` and `output` of
the rows; or {"do": "make", "kind": ..., "folder": ..., ...}: make one with random weights first, and save it as the
tool does. A job that fails has its error in `out` + ".error".
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

Result = tuple[torch.Tensor, torch.Tensor]


def randomise(module: Any) -> None:
    """Numbers of a useful size in every parameter, thresholds above 0."""
    random = torch.Generator().manual_seed(3)
    for name, value in module.named_parameters():
        drawn = torch.randn(value.shape, generator=random) * (1.0 if value.dim() == 2 else 0.3)
        value.data.copy_(drawn.abs() if "threshold" in name else drawn * (0.1 if "skip" in name else 1.0))


# SAELens


def saelens_open(folder: str, x: torch.Tensor) -> Result:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder, device="cpu")
    if sae.cfg.reshape_activations == "hook_z":
        heads = x.view(len(x), 2, -1)
        return sae.encode(heads), sae(heads).flatten(1)
    return sae.encode(x), sae(x)


def saelens_make(kind: str, folder: str, d_in: int, d_sae: int, d_out: int, k: int) -> None:
    from sae_lens.registry import get_sae_class, get_sae_training_class

    training = "batchtopk" in kind
    made, config = (get_sae_training_class if training else get_sae_class)(kind)
    said: dict[str, Any] = {"architecture": kind, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}
    said |= {"k": k} if "topk" in kind else {}
    said |= {"matryoshka_widths": [d_sae // 2, d_sae]} if "matryoshka" in kind else {}
    said |= {"d_out": d_out, "apply_b_dec_to_input": False} if "transcoder" in kind else {}
    sae = made(config.from_dict(said))
    randomise(sae)
    if training:
        sae.topk_threshold.fill_(0.7)
        sae.save_inference_model(folder)
    else:
        sae.save_model(folder)


# dictionary_learning


def dictionary_learning_open(folder: str, x: torch.Tensor) -> Result:
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(folder, "cpu")
    return dictionary.encode(x), dictionary(x)


def dictionary_learning_make(kind: str, folder: str, d_in: int, d_sae: int, d_out: int, k: int) -> None:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    every = {**vars(dictionary), **vars(top_k), **vars(batch_top_k), **vars(matryoshka_batch_top_k)}
    more: dict[str, Any] = {"k": k} if "TopK" in kind else {}
    made = every[kind](d_in, d_sae, **more, **({"group_sizes": [8, d_sae - 8]} if "Matryoshka" in kind else {}))
    randomise(made)
    if hasattr(made, "threshold") and made.threshold.dim() == 0:
        made.threshold.fill_(0.7)
    Path(folder).mkdir()
    torch.save(made.state_dict(), f"{folder}/ae.pt")
    trainer = {"dict_class": kind, "layer": 3, "lm_name": "m", "activation_dim": d_in, "dict_size": d_sae, **more}
    Path(folder, "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))


# sparsify


def sparsify_open(folder: str, x: torch.Tensor) -> Result:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder, device="cpu")
    found = coder(x)
    latents = torch.zeros(len(x), coder.num_latents)
    return latents.scatter(1, found.latent_indices, found.latent_acts), found.sae_out


def sparsify_make(kind: str, folder: str, d_in: int, d_sae: int, d_out: int, k: int) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    transcode, skips = "transcoder" in kind, "skip" in kind
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k, transcode=transcode, skip_connection=skips))
    randomise(coder)
    coder.save_to_disk(folder)


# circuit-tracer, which makes none itself


def circuit_tracer_open(folder: str, x: torch.Tensor) -> Result:
    import yaml
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    said = yaml.safe_load(Path(folder, "config.yaml").read_text())
    layers = len(list(Path(folder).glob("layer_*.safetensors")))
    (transcoder,) = load_transcoder_set(
        {layer: f"{folder}/layer_{layer}.safetensors" for layer in range(layers)}, said["scan"],
        said["feature_input_hook"], said["feature_output_hook"], device=torch.device("cpu"), dtype=torch.float32,
        lazy_encoder=False, lazy_decoder=False,
    )  # fmt: skip
    return transcoder.encode(x), transcoder(x)


# OpenMOSS


def openmoss_open(folder: str, x: torch.Tensor) -> Result:
    import llamascopium.models  # noqa: F401 - which makes its kinds known
    from llamascopium.models.sparse_dictionary import SparseDictionary

    sae = SparseDictionary.from_pretrained(folder)
    latents = sae.encode(x)
    return latents, sae.decode(latents)


def openmoss_make(kind: str, folder: str, d_in: int, d_sae: int, d_out: int, k: int) -> None:
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    act_fn, _, by_norm = kind.partition(" ")
    config = SAEConfig(
        d_model=d_in, expansion_factor=d_sae / d_in, act_fn=act_fn, top_k=k, norm_activation="inference",
        sparsity_include_decoder_norm=bool(by_norm), hook_point_in="blocks.0.hook_mlp_in",
        hook_point_out="blocks.0.hook_mlp_out",
    )  # fmt: skip
    sae = SparseAutoEncoder(config)
    randomise(sae)
    sae.save_pretrained(folder)
    config.save_hyperparameters(folder)


TOOLS: dict[str, tuple[Any, Any]] = {
    "saelens": (saelens_open, saelens_make),
    "dictionary_learning": (dictionary_learning_open, dictionary_learning_make),
    "sparsify": (sparsify_open, sparsify_make),
    "circuit-tracer": (circuit_tracer_open, None),
    "openmoss": (openmoss_open, openmoss_make),
}


def main(tool: str, jobs: str) -> None:
    opens, makes = TOOLS[tool]
    for job in json.loads(Path(jobs).read_text()):
        try:
            if job["do"] == "make":
                makes(job["kind"], job["folder"], job["d_in"], job["d_sae"], job["d_out"], job["k"])
            with torch.no_grad():
                latents, output = opens(job["folder"], torch.from_numpy(np.load(job["rows"])))
            np.savez(job["out"], latents=latents.numpy(), output=output.numpy())
        except Exception:  # noqa: BLE001 - it is told to the test
            Path(job["out"] + ".error").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(*sys.argv[1:])
