"""Adapters (LoRA, by peft) on a Hugging Face model: read from a folder or trained on tokens, and merged into it.

A merged model is saved as any other and loaded as any other: what is harvested from it is named by the content of its
weights. Of an adapter's folder the configuration and the safetensors file are read, nothing is unpickled or run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae.cache.errors import NotFound, SaeError, needing
from sae.pipeline.language_model.files import one_line, read_json

if TYPE_CHECKING:
    import peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KNOWN = (  # of a configuration, what decides the merged weights; what else may be there must say nothing
    "r", "lora_alpha", "target_modules", "exclude_modules", "fan_in_fan_out", "use_rslora", "use_dora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern",
)  # fmt: skip
REFUSED = ("modules_to_save", "megatron_config", "layer_replication", "trainable_token_indices")


def expect_adapter(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter's folder. Raises SaeError, in one line, where it is none that can be merged."""
    if not folder.is_dir():
        raise NotFound(f"adapter = {folder}: no such folder; give one that peft saved")
    if not (folder / CONFIG).is_file():
        raise SaeError(f"adapter = {folder}: has no {CONFIG}; give a folder that peft saved")
    if not (folder / WEIGHTS).is_file():
        raise SaeError(
            f"adapter = {folder}: has no {WEIGHTS}; pickled weights are never opened, so save it again as safetensors"
        )
    said = read_json(folder / CONFIG, str(folder))
    if said.get("peft_type") != "LORA":
        raise SaeError(f"adapter = {folder}: is a {str(said.get('peft_type'))[:40]}, not a LORA; give one that is")
    if odd := [name for name in REFUSED if said.get(name)]:
        raise SaeError(f"adapter = {folder}: {odd[0]} in {CONFIG} is not supported; give a plain LoRA")
    if str(said.get("bias", "none")) != "none":
        raise SaeError(f"adapter = {folder}: changes biases as well, which is not supported; give a plain LoRA")
    return said


def merged_with(model: Any, folder: Path) -> Any:
    """The model with the adapter of a folder merged into its weights. Raises SaeError where they do not fit."""
    said = expect_adapter(folder)
    with needing(f"adapter = {folder}", extra="lora"):
        import peft
        from peft.utils import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = peft.LoraConfig(**{name: said[name] for name in KNOWN if said.get(name) is not None})
        adapted = _wrapped(model, config)
        found: Any = set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS))
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, OSError, SafetensorError) as error:
        raise SaeError(
            f"adapter = {folder}: does not fit the model ({one_line(error)}); give the model's own"
        ) from error
    absent = [name for name in found.missing_keys if "lora_" in name]
    if absent or found.unexpected_keys:
        odd = (absent or [*found.unexpected_keys])[0]
        what = "is missing from its weights" if absent else "is in its weights, and not in the model"
        raise SaeError(f"adapter = {folder}: {odd[:100]} {what}; give the model's own")
    return adapted.merge_and_unload()


def trained_on(
    model: Any, batches: Iterable[Tensor], *, steps: int, lr: float, rank: int, alpha: int, seed: int
) -> tuple[Any, list[float]]:
    """The model with an adapter that was trained on contexts [B, T], merged, and the loss at each step (nats a token).

    The adapter is on the matrices of attention that peft names for the kind of model. Its B is 0 at first, so that no
    steps leave the model as it is. Raises SaeError where peft names none.
    """
    with needing("study.finetune", extra="lora"):
        import peft
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, task_type="CAUSAL_LM")
    try:
        adapted = _wrapped(model, config)
    except ValueError as error:
        raise SaeError(f"the model's kind has no usual matrices for an adapter ({one_line(error)})") from error
    ours = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(ours, lr=lr, weight_decay=0.0)
    losses = []
    adapted.train()
    for _, ids in zip(range(steps), batches, strict=False):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not loss.isfinite():
            raise SaeError(
                f"study.finetune.lr = {lr:g}: the adapter's loss is no number after {len(losses)} steps; lower it"
            )
    return adapted.eval().merge_and_unload(), losses


def _wrapped(model: Any, config: peft.LoraConfig) -> peft.PeftModel:
    """The model with an adapter on it."""
    import peft

    with warnings.catch_warnings():  # of what peft asks transformers, which calls it by another name by now
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        found = peft.get_peft_model(model, config)
    assert isinstance(found, peft.PeftModel)
    return found


def save(model: Any, folder: Path, about: dict[str, Any]) -> None:
    """Save a merged model as a Hugging Face folder, with what it was made of beside it."""
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "adapted.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
