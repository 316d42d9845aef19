"""A dictionary at its place in somebody's model: what splicing, editing, steering and ablating do there."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_models import VOCAB, WIDTH, plain_model, save_model
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module

from sae.cache.errors import SaeError
from sae.pipeline.interpret.attached import Attached, attach
from sae.pipeline.language_model import LanguageModel, Point
from sae.pipeline.language_model.places import intervene
from sae.pipeline.saes import create, parse
from sae.pipeline.saes.dictionary import Dictionary, Metadata

TOKENS = torch.arange(24).view(2, 12) * 7 % VOCAB
M = 24


TOPK = {"arch": "topk", "k": 4, "decoder_norm": "free"}


def dictionary(transcoder: bool = False, **settings: Any) -> Dictionary:
    config = parse({"d_sae": M, "b_dec_init": "mean"} | (settings if "arch" in settings else TOPK | settings))
    made = create(config, WIDTH, WIDTH if transcoder else None, seed=3)
    sample = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)) + 1
    made.initialise(sample, sample if transcoder else None)
    return made.fold().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def model(folder: Path) -> Any:
    return plain_model(folder)


@torch.no_grad()
def logits(model: Any, context: AbstractContextManager[None]) -> Tensor:
    with context:
        return model(input_ids=TOKENS, use_cache=False).logits


def at(model: Any, place: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """What a model gives where a place is changed by hand."""
    return logits(model, intervene(model, {place: change}))


def test_latents_of_what_a_model_reads_are_those_of_its_activations(model: Any, folder: Path) -> None:
    coder = dictionary()
    ours = LanguageModel.boot(str(folder), device="cpu")
    rows = ours.activations(TOKENS, [Point(1, "mlp_out")])[Point(1, "mlp_out")]
    expected = coder.encode(rows).dense()
    bridge = build_bridge_from_module(plain_model(folder), "LlamaForCausalLM", hf_config=model.config, tokenizer=None)
    found = [
        attach(model, coder, "1.mlp_out").latents(input_ids=TOKENS),
        attach(model, coder, "layers.1.mlp").latents(TOKENS),
        attach(ours, coder, "1.mlp_out").latents(TOKENS),
        attach(bridge, coder, "blocks.1.hook_mlp_out").latents(TOKENS),
    ]
    for latents in found:
        assert latents.dense().shape == (2, 12, M) and not latents.dense().requires_grad
        torch.testing.assert_close(latents.dense(), expected, rtol=1e-4, atol=1e-5)


def test_splicing_puts_the_reconstruction_in_place(model: Any, folder: Path) -> None:
    coder = dictionary()
    clean = logits(model, attach(model, coder, "0.mlp_out").edit(lambda values: values))
    assert torch.equal(clean, model(TOKENS, use_cache=False).logits), "an edit that changes nothing"
    spliced = logits(model, attach(model, coder, "0.mlp_out").splice())
    assert torch.equal(spliced, at(model, "0.mlp_out", coder)) and not torch.equal(spliced, clean)
    ours = LanguageModel.boot(str(folder), device="cpu")
    with attach(ours, coder, "0.mlp_out").splice():
        losses = ours.losses(TOKENS)
    mine = -spliced[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]
    torch.testing.assert_close(mine, losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"input_scale": "per_token"}, {"arch": "l1", "coefficient": 0.1}])
def test_steering_adds_a_direction_and_ablating_takes_what_a_latent_wrote(model: Any, settings: dict[str, Any]) -> None:
    coder = dictionary(**settings)
    there = attach(model, coder, "0.resid_post")
    busiest = int(there.latents(TOKENS).dense().flatten(0, 1).sum(0).argmax())

    def ablated(value: Tensor) -> Tensor:
        latents = coder.encode(value)
        written = torch.zeros_like(latents.dense())
        written[..., busiest] = latents.dense()[..., busiest]
        frame = 1.0 if latents.row_stats is None else latents.row_stats.std.view(*value.shape[:-1], 1)
        return value - frame * (written @ coder.W_dec)

    def steered(value: Tensor) -> Tensor:
        latents = coder.encode(value)
        frame = 1.0 if latents.row_stats is None else latents.row_stats.std.view(*value.shape[:-1], 1)
        return value + frame * 2.5 * coder.W_dec[3] - frame * 0.5 * coder.W_dec[busiest]

    clean = model(TOKENS, use_cache=False).logits
    for context, by_hand in ((there.ablate([busiest]), ablated), (there.steer({3: 2.5, busiest: -0.5}), steered)):
        found = logits(model, context)
        torch.testing.assert_close(found, at(model, "0.resid_post", by_hand), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(found, clean, atol=1e-2)
    assert torch.equal(logits(model, there.steer({})), clean)
    assert torch.equal(logits(model, there.ablate([])), clean)
    assert torch.equal(model(TOKENS, use_cache=False).logits, clean), "nothing stays"


def test_a_transcoder_reads_one_place_and_writes_another(model: Any) -> None:
    coder = dictionary(transcoder=True)
    there = attach(model, coder, "1.mlp_in", writes="1.mlp_out")
    read: list[Tensor] = []
    with intervene(model, {"1.mlp_in": read.append}):
        model(TOKENS)
    spliced = logits(model, there.splice())
    assert torch.equal(spliced, at(model, "1.mlp_out", lambda _: coder(read[0])))
    assert torch.equal(there.latents(TOKENS).dense(), coder.encode(read[0]).dense())
    added = at(model, "1.mlp_out", lambda value: value + 2.0 * coder.W_dec[5])
    torch.testing.assert_close(logits(model, there.steer({5: 2.0})), added, rtol=1e-4, atol=1e-4)
    with pytest.raises(SaeError, match=r"1\.mlp_out is computed after 1\.mlp_in"):
        logits(model, attach(model, coder, "1.mlp_out", writes="1.mlp_in").splice())


def test_a_model_generates_steered_with_its_cache_of_keys(model: Any) -> None:
    there = attach(model, dictionary(), "1.resid_post")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(TOKENS, **options)
    with there.steer({2: 40.0}):
        steered, whole = model.generate(TOKENS, **options), model.generate(TOKENS, use_cache=False, **options)
    assert torch.equal(steered, whole) and not torch.equal(steered, plain)
    assert torch.equal(model.generate(TOKENS, **options), plain)


def test_a_dictionary_says_itself_where_it_belongs(model: Any) -> None:
    coder = dictionary()
    with pytest.raises(SaeError, match=r"^at: nothing says where the dictionary belongs; .*at='6\.mlp_in'"):
        attach(model, coder)
    coder.metadata = Metadata("some", "blocks.1.hook_mlp_out")
    assert attach(model, coder) == Attached(model, coder, "blocks.1.hook_mlp_out", "blocks.1.hook_mlp_out")
    whole = attach(model, coder, "1.mlp_out").latents(TOKENS).dense()
    assert torch.equal(attach(model, coder).latents(TOKENS).dense(), whole)
    coder = dictionary(transcoder=True)
    coder.metadata = Metadata("some", "blocks.1.hook_mlp_in")
    with pytest.raises(SaeError, match=r"^writes: nothing says"):
        attach(model, coder)


def test_what_does_not_fit_is_said(model: Any) -> None:
    there = attach(model, dictionary(), "1.mlp_out")
    for latent in (M, -1):
        with pytest.raises(SaeError, match=f"latent {latent}: the dictionary has latents 0 to {M - 1}"):
            there.ablate([latent])
        with pytest.raises(SaeError, match=f"latent {latent}"):
            there.steer({latent: 1.0})
    with pytest.raises(ValueError, match="an edit must return"):
        logits(model, there.edit(lambda values: values[..., 1:]))
    with pytest.raises(ValueError, match=rf"this dictionary reads \[\.\.\., {WIDTH}\]"):
        attach(model, dictionary(), "1.mlp_post").latents(TOKENS)
