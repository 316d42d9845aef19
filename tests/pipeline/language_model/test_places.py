"""Places in models of others: where a site is found, what hooks see and change there, and that nothing is left."""

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.model_families import FAMILIES, LAYERS, save_family, some_tokens, watching
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoModelForCausalLM

from sae.cache.errors import SaeError
from sae.pipeline.language_model import SITES, LanguageModel, Point
from sae.pipeline.language_model.places import intervene

EVERY = {site for site in SITES if site != "resid_mid"}  # which is no module's own
FEWER: dict[str, set[str]] = {  # sites that are no module's own, beside resid_mid
    "mixtral": {"mlp_post"}, "granite": {"attn_out", "mlp_out"},
    "opt, norms after": {"attn_out", "mlp_out", "mlp_post"}, "bloom": {"attn_out", "attn_z", "mlp_out", "mlp_post"},
}  # fmt: skip
DAILY = [pytest.param(name, marks=[] if FAMILIES[name].daily else [pytest.mark.slow]) for name in FAMILIES]


def plain(name: str, folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(save_family(name, folder), dtype=torch.float32).eval()


def keep(seen: dict[str, Tensor], name: str, value: Tensor) -> None:
    seen[name] = value.clone()  # some models add to it in place


def found(model: Any, layer: int) -> dict[str, Tensor]:
    """What passes at every site of a layer that is found."""
    seen: dict[str, Tensor] = {}
    for site in SITES:
        look = partial(keep, seen, site)
        with suppress(SaeError), intervene(model, {Point(layer, site): look}):
            model(some_tokens(), use_cache=False)
    return seen


@pytest.mark.parametrize("name", DAILY)
@torch.no_grad()
def test_sites_that_are_found_in_a_plain_model_are_where_the_family_has_them(name: str, tmp_path: Path) -> None:
    model = plain(name, tmp_path / "model")
    keys = [*model.state_dict()]
    for layer in range(LAYERS):
        expected: dict[str, Tensor] = {}
        with watching(model, name, layer, partial(keep, expected)):
            clean = model(some_tokens(), use_cache=False).logits
        seen = found(model, layer)
        assert {"resid_pre", "resid_post"} <= set(seen) <= EVERY
        if FAMILIES[name].daily:
            assert set(seen) == EVERY - FEWER.get(name, set())
        for site in seen:
            if site in expected:
                torch.testing.assert_close(seen[site].view(expected[site].shape), expected[site], rtol=1e-5, atol=1e-6)
    assert [*model.state_dict()] == keys
    assert torch.equal(model(some_tokens(), use_cache=False).logits, clean)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt"])
@torch.no_grad()
def test_a_change_does_what_it_does_in_our_own_model(name: str, tmp_path: Path) -> None:
    model = plain(name, tmp_path / "model")
    ours = LanguageModel.boot(str(tmp_path / "model"), device="cpu")
    tokens = some_tokens()
    clean = model(tokens, use_cache=False).logits
    for site in EVERY:
        with intervene(model, {f"1.{site}": torch.clone}):
            assert torch.equal(model(tokens, use_cache=False).logits, clean)
        with intervene(model, {f"1.{site}": lambda x: 0.5 * x}):
            logits = model(tokens, use_cache=False).logits[:, :-1]
        with intervene(ours, {f"1.{site}": lambda x: 0.5 * x}):
            losses = ours.losses(tokens)
        mine = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        torch.testing.assert_close(mine, losses, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(tokens, use_cache=False).logits, clean)


@torch.no_grad()
def test_a_bridge_of_transformer_lens_is_hooked_at_its_own_points(tmp_path: Path) -> None:
    model = plain("llama", tmp_path / "model")
    ours = LanguageModel.boot(str(tmp_path / "model"), device="cpu")
    bridge: Any = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config, tokenizer=None)
    tokens = some_tokens()
    clean = bridge(tokens)
    for site in SITES:
        seen: list[Tensor] = []
        with intervene(bridge, {f"1.{site}": seen.append}):
            assert torch.equal(bridge(tokens), clean)
        expected = ours.activations(tokens, [Point(1, site)])[Point(1, site)]
        torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
        with intervene(bridge, {ours.hook(Point(1, site)): lambda x: 0.5 * x}):
            logits = bridge(tokens)[:, :-1]
        with ours.intervene({Point(1, site): lambda x: 0.5 * x}):
            losses = ours.losses(tokens)
        mine = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        torch.testing.assert_close(mine, losses, rtol=1e-4, atol=1e-5)
    with (
        pytest.raises(SaeError, match=r"no hook point blocks\.9\.hook_mlp_out"),
        intervene(bridge, {"9.mlp_out": seen.append}),
    ):
        pass


@torch.no_grad()
def test_a_module_is_a_place_by_its_name(tmp_path: Path) -> None:
    model = plain("gpt2", tmp_path / "model")
    tokens, places = some_tokens(), {"1.mlp_out": "transformer.h.1.mlp", "1.mlp_in": "h.1.mlp.input"}
    for site, module in places.items():
        seen: dict[str, Tensor] = {}
        with intervene(model, {name: partial(keep, seen, name) for name in (site, module)}):
            model(tokens)
        assert torch.equal(seen[site], seen[module])


@torch.no_grad()
def test_a_model_in_training_is_left_in_training_and_its_modes_too(tmp_path: Path) -> None:
    """Where sites are is tried without dropout, whatever the model is doing."""
    model = plain("gpt2", tmp_path / "model").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    seen: list[Tensor] = []
    with intervene(model, {"0.mlp_out": seen.append}):
        model(some_tokens())
    assert [module.training for module in model.modules()] == modes and len(seen) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_places_that_are_not_there_are_said_with_those_that_are(tmp_path: Path) -> None:
    model = plain("granite", tmp_path / "model")
    for said, message in {
        "9.mlp_out": "^9.mlp_out: the model has layers 0 to 1",
        "1.mlp_out": "^1.mlp_out: not found in this GraniteForCausalLM, of whose sites there are resid_pre, .*module",
        "1.nonesuch": "of whose sites there are",
        "nonesuch": "is not a module of the model; give a site as 6.mlp_out",
        "mlp": "is ambiguous; it may be model.layers.0.mlp, model.layers.1.mlp",
    }.items():
        with pytest.raises(SaeError, match=message), intervene(model, {said: torch.clone}):
            pass
    with (
        pytest.raises(SaeError, match="its layers are not found"),
        intervene(torch.nn.Linear(2, 2), {"0.mlp_out": torch.clone}),
    ):
        pass


@torch.no_grad()
def test_sites_are_found_whatever_is_done_to_the_model_meanwhile(tmp_path: Path) -> None:
    """Interventions nest, the inner one given what the outer left; those that are open do not disturb the trial."""
    model, tokens = plain("llama", tmp_path / "model"), some_tokens()
    nothing = {"0.mlp_out": torch.zeros_like, "1.mlp_out": torch.zeros_like}
    long = {"layers.0": lambda x: x * torch.ones(2, 12, 1)}  # for this length alone
    with intervene(model, long), intervene(model, nothing):
        both = model(tokens).logits
    with intervene(model, {"0.mlp_out": lambda x: 0 * x, "1.mlp_out": torch.zeros_like}):
        assert torch.equal(model(tokens).logits, both)
    with intervene(model, {"1.mlp_out": lambda x: x + 1}), intervene(model, {"1.mlp_out": lambda x: 2 * x}):
        nested = model(tokens).logits
    with intervene(model, {"1.mlp_out": lambda x: 2 * (x + 1)}):
        assert torch.equal(model(tokens).logits, nested)
