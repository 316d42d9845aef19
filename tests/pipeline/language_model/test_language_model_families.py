"""Every family of models at every site against the plain Hugging Face model; and shapes that are refused in a line."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.model_families import FALCON, FAMILIES, GPT2, MANY, OPT, VOCAB, WIDTH, compared, save_family
from transformers import AutoModelForCausalLM

from sae.cache.errors import SaeError
from sae.pipeline.language_model import LanguageModel, Point

RARE = [pytest.param(name, marks=[] if family.daily else [pytest.mark.slow]) for name, family in FAMILIES.items()]


@pytest.mark.parametrize("name", RARE)
def test_every_site_of_a_family_is_the_plain_models(name: str, tmp_path: Path) -> None:
    off = compared(name, save_family(name, tmp_path / "model"))
    assert max(off.values()) < 5e-5, off


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "encoder": ("Bert", MANY, "a BertLMHeadModel sees tokens before it predicts them"),
    "a decoder of an encoder": ("Bart", {"vocab_size": VOCAB, "d_model": WIDTH}, "no bridge that fits this Bart"),
    "no bridge": ("BioGpt", MANY, "no bridge that fits this BioGptForCausalLM"),
    "a bridge for one norm more": (
        "Falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        "no bridge that fits this FalconForCausalLM",
    ),
    "a bridge for a last norm": (
        "OPT",
        {**OPT, "word_embed_proj_dim": WIDTH, "do_layer_norm_before": False},
        "bridge for OPTForCausalLM does not fit it",
    ),
    "a bridge for one key": ("GPTBigCode", {**GPT2, "multi_query": False}, "no bridge that fits this GPTBigCode"),
}


@pytest.mark.parametrize(("kind", "settings", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_in_a_line(
    kind: str, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    small = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8} if kind == "Bart" else {}
    getattr(transformers, kind + "Config")(**settings, **small).save_pretrained(tmp_path)
    with pytest.raises(SaeError, match=says) as refusal:
        LanguageModel.boot(f"random:{tmp_path}", device="cpu")
    assert "\n" not in str(refusal.value)


def test_a_site_that_is_not_what_its_name_says_is_refused_with_those_that_are(tmp_path: Path) -> None:
    """OPT with its norms after the sums: what attention gives is not what the stream gains."""
    model = LanguageModel.boot(str(save_family("opt, norms after", tmp_path / "opt")), device="cpu")
    for site in ("resid_mid", "attn_out", "mlp_out"):
        with pytest.raises(
            SaeError, match=rf"^site = {site}: tried out, nothing in layer 1 of opt is .*; it has "
        ) as no:
            model.check(Point(1, site))
        assert str(no.value).endswith("it has resid_pre, resid_post, attn_z, mlp_in, mlp_post")


def test_sites_are_the_same_in_half_precision(tmp_path: Path) -> None:
    """Promises are tried out in the model's own precision, where small terms drown in rounding."""
    for name in ("gpt2", "gpt_neox", "opt, norms after", "gemma2", "granite", "mixtral"):
        save_family(name, tmp_path / name)
        model = LanguageModel.boot(str(tmp_path / name), device="cpu", dtype="bfloat16")
        assert set(model._bridge.sites(1)) == set(FAMILIES[name].sites), name


def test_a_bridge_that_computes_something_else_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae.pipeline.language_model import bridge

    folder, wrap = save_family("llama", tmp_path / "llama"), bridge.wrap

    def wrong(model: Any, name: str) -> Any:
        wrapped = wrap(model, name)
        model.model.layers[1].mlp.register_forward_hook(lambda _module, _args, out: 1.1 * out)
        return wrapped

    monkeypatch.setattr(bridge, "wrap", wrong)
    with pytest.raises(SaeError, match="bridge for LlamaForCausalLM gives other logits than the model itself"):
        LanguageModel.boot(str(folder), device="cpu")


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 3] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(SaeError, match="its logits are infinite or NaN"):
        LanguageModel.boot(str(folder), device="cpu")
