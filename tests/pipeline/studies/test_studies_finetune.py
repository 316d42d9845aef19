"""A dictionary's latents on a model that an adapter changed, or left as it was."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.harvesting import harvest
from support.small_models import made_up, save_model, small_stages, token_store
from support.small_studies import BASE, lab_in
from transformers import AutoModelForCausalLM

from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.language_model import adapters
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.studies.finetune import Finetune
from sae.pipeline.studies.lab import Lab
from sae.pipeline.studies.study import Setup


def saved_adapter(model: Path, folder: Path, scale: float) -> Path:
    """An adapter of peft on the model in a folder; `scale` 0 changes nothing."""
    import peft

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(model)
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(scale * torch.randn_like(weight))
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of saving an adapter by peft
def test_no_change_leaves_every_latent_and_a_change_does_not(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    with small_stages():
        model = save_model("llama", tmp_path / "model")
        tokens = [token_store(root, made_up(n, seed=n), split=s) for n, s in ((60, "train"), (20, "validation"))]
        config = HarvestConfig(model=str(model), layer=(1,), site=("resid_post",), codec="float32")
        (store,) = harvest(config, tokens, root, Silent()).stores["train"]
        lab = lab_in(root, tmp_path / "runs")
        lab = Lab(lab.place, lab.eval_config, cross_entropy=True)

        def run(**settings: Any) -> dict[tuple[str, str, int], dict[str, Any]]:
            result = Finetune(**settings).run(Setup(BASE, Dataset.of(store), lab))
            result.write(tmp_path / "out")
            return {(row["dictionary"], row["model"], row["seed"]): row for row in result.runs}

        same = run(adapter=str(saved_adapter(model, tmp_path / "none", 0.0)))
        assert [*same] == [
            (d, m, s) for d, m in (("base", "base"), ("base", "adapted"), ("adapted", "adapted")) for s in (0, 1)
        ]
        for seed in (0, 1):
            base, on = same["base", "base", seed], same["base", "adapted", seed]
            assert on["persistence_50"] == on["persistence_90"] == on["mean_correlation"] == 1.0
            assert on["log_rate_ratio"] == 0.0
            for name in ("fvu", "l0", "ce_degradation"):
                assert on[name] == pytest.approx(base[name], rel=1e-5)
            again = same["adapted", "adapted", seed]
            assert again["mmcs"] == pytest.approx(again["mmcs_control"], abs=1e-4)
        folder = saved_adapter(model, tmp_path / "some", 2.0)
        changed = run(adapter=str(folder))
        assert changed["base", "adapted", 0]["mean_correlation"] < 0.99
        assert changed["base", "adapted", 0]["fvu"] > changed["base", "base", 0]["fvu"]
        assert run(adapter=str(folder)) == changed  # of what was kept
        assert len([*(tmp_path / "runs" / "adapted").iterdir()]) == 2
        with pytest.raises(SaeError, match="seeds = 1: the control takes two"):
            Finetune().run(Setup(BASE, Dataset.of(store), lab, seeds=1))
        plain, before = (AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
        batches = itertools.repeat(torch.from_numpy(made_up(4)))
        options: dict[str, Any] = {"lr": 1e-2, "rank": 2, "alpha": 4, "seed": 0}
        plain, losses = adapters.trained_on(plain, batches, steps=0, **options)
        weights = before.state_dict()
        assert losses == [] and all(torch.equal(weights[name], one) for name, one in plain.state_dict().items())
        plain, losses = adapters.trained_on(plain, batches, steps=8, **options)
        assert losses[-1] < losses[0]
        changed_ones = {name for name, one in plain.state_dict().items() if not torch.equal(weights[name], one)}
        assert changed_ones and all("q_proj" in name or "v_proj" in name for name in changed_ones)
        (folder / adapters.WEIGHTS).write_bytes(b"x" * 99)
        with pytest.raises(SaeError, match="does not fit the model"):
            adapters.merged_with(plain, folder)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (None, "has no adapter_config.json"), ({}, "is a None, not a LORA"), ({"peft_type": "IA3"}, "is a IA3, not"),
        ({"peft_type": "LORA", "modules_to_save": ["lm_head"]}, "modules_to_save in adapter_config.json"),
        ({"peft_type": "LORA", "megatron_config": {"x": 1}}, "megatron_config"),
        ({"peft_type": "LORA", "bias": "all"}, "changes biases"), ([], "is not understood"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_adapter_is_said(tmp_path: Path, said: Any, why: str) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(SaeError, match="no such folder"):
        adapters.expect_adapter(folder)
    folder.mkdir()
    if said is not None:
        (folder / adapters.CONFIG).write_text(json.dumps(said))
        (folder / "adapter_model.bin").write_bytes(b"pickled")
        with pytest.raises(SaeError, match=r"has no adapter_model\.safetensors; pickled weights are never opened"):
            adapters.expect_adapter(folder)
        (folder / adapters.WEIGHTS).write_bytes(b"")
    with pytest.raises(SaeError, match=why):
        adapters.expect_adapter(folder)
