"""Variational SAEs on a language model's MLP activations, through the ordinary harvest."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lens_models import GELU_1L, saved, weights
from support.small_models import VOCAB, made_up, small_stages, token_store
from transformers import AutoModelForCausalLM, GPT2Config

import sae


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[pytest.MonkeyPatch]:
    with small_stages() as patch:
        yield patch


def gelu_1l(folder: Path) -> Path:
    config = {**GELU_1L, "d_vocab": VOCAB, "n_ctx": 32}
    return saved(folder, config, weights(config))


def gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=768, n_layer=1, n_head=12, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("model", "width"), [(gelu_1l, 2048), (gpt2, 3072)], ids=["gelu-1l", "gpt2"])
def test_on_mlp_activations(model: Any, width: int, tmp_path: Path) -> None:
    """At the widths of GELU-1L's and GPT-2's: harvested, trained side by side, judged, spliced in, analysed."""
    lab = sae.Session(tmp_path / "cache", tmp_path / "runs", device="cpu", offline=True, progress=False)
    tokens = token_store(tmp_path / "cache", made_up(60))
    token_store(tmp_path / "cache", made_up(12, seed=1), split="validation")
    rows = lab.harvest(tokens, model=str(model(tmp_path / "model")), layer=0, site="mlp_post", tokens="all")
    (dataset,) = rows.values()
    assert dataset.d_in == width
    kinds = [
        sae.VSAEIso(d_sae=64), sae.VSAEMix(d_sae=64, k=8), sae.VSAEMulti(d_sae=64, target_l0=8, mean="relu"),
    ]  # fmt: skip
    runs = lab.train(kinds, dataset, steps=40, batch=128, lr=3e-3, log_every=10)
    for run in runs:
        losses = [entry["loss_reconstruction"] for entry in run.history()]
        assert losses[-1] < losses[0] and all("loss_kl" in entry for entry in run.history())
        figures = lab.evaluate(run, tokens=100)
        assert 0 < figures["fvu"] < 1.1 and figures["ce_degradation"] is not None
    assert lab.analyze(runs[0], "latent_space", rows=100)["latent_space"]["kl"] > 0
