"""Models in transformer_lens' own format, such as gelu-1l: its numbers, and never made-up ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import done, sae
from support.lens_models import GELU_1L, SMALL, saved, weights
from support.small_hub import hub
from support.small_tokenizers import CORPUS, write_tokenizer
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native.model import NativeModel
from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

from sae.cache.activations import ActivationStore
from sae.cache.errors import NotFound, SaeError
from sae.pipeline.language_model import LanguageModel, Point
from sae.pipeline.tokenizers.matching import model_tokenizer
from sae.pipeline.tokenizers.tokenizer import tokenizer


def native(config: dict[str, Any], named: dict[str, Tensor]) -> NativeModel:
    """transformer_lens' own model of the weights."""
    known = {key: value for key, value in config.items() if key not in ("normalization", "tokenizer_name")}
    cfg = TransformerBridgeConfig(**known, normalization_type="LN", architecture="TransformerLensNative")
    model = NativeModel(cfg).eval()
    theirs = convert_tl_checkpoint(named, cfg)
    names = {"embed": "tok_embed", "pos_embed": "pos", "ln_final": "ln_out", "unembed": "head"}
    renamed = {}
    for key, value in theirs.items():
        first, dot, rest = key.partition(".")
        key = f"{names.get(first, first)}{dot}{rest}".replace("blocks.", "layers.")
        key = key.replace(".mlp.in.", ".mlp.fc_in.").replace(".mlp.out.", ".mlp.fc_out.")
        if key != "head.bias":
            renamed[key] = value
    model.load_state_dict(renamed, strict=True)
    return model


@pytest.mark.parametrize("layers", [1, 2])
def test_the_numbers_are_transformer_lens(tmp_path: Path, layers: int) -> None:
    config = {**SMALL, "n_layers": layers}
    named = weights(config)
    model = LanguageModel.boot(str(saved(tmp_path / "m", config, named)), device="cpu")
    assert (model.n_layers, model.n_vocab, model.context_length) == (layers, 61, 48)
    theirs = native(config, named)
    kept: dict[str, Tensor] = {}
    theirs.layers[-1].mlp.fc_out.register_forward_hook(lambda _m, args, out: kept.update(post=args[0], out=out))
    ids = torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(ids)
    points = [Point(layers - 1, "mlp_post"), Point(layers - 1, "mlp_out")]
    found = model.activations(ids, points)
    assert model.hook(points[0]) == f"blocks.{layers - 1}.mlp.hook_post" and model.width(points[0]) == 96
    torch.testing.assert_close(found[points[0]], kept["post"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[points[1]], kept["out"], rtol=1e-4, atol=1e-5)
    ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(model.losses(ids).flatten(), ce, rtol=1e-4, atol=1e-4)


def test_a_bias_of_the_unembedding_and_folded_norms(tmp_path: Path) -> None:
    named = weights(SMALL)
    plain = LanguageModel.boot(str(saved(tmp_path / "a", SMALL, named)), device="cpu")
    bias = 3 * torch.randn(61)
    biased = LanguageModel.boot(str(saved(tmp_path / "b", SMALL, {**named, "unembed.b_U": bias})), device="cpu")
    ids = torch.arange(40)[None] % 61
    final = plain._bridge.final(ids).flatten(0, 1)
    torch.testing.assert_close(biased._bridge.logits(final), plain._bridge.logits(final) + bias, rtol=1e-4, atol=1e-4)
    folded = {key: value for key, value in named.items() if "ln" not in key}
    config = {**SMALL, "normalization": "LNPre"}
    ones = {key: torch.ones(32) if key.endswith(".w") else torch.zeros(32) for key in named if "ln" in key}
    one = LanguageModel.boot(str(saved(tmp_path / "c", config, folded)), device="cpu")
    other = LanguageModel.boot(str(saved(tmp_path / "d", SMALL, folded | ones)), device="cpu")
    torch.testing.assert_close(one.losses(ids), other.losses(ids))


class Malice:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_what_is_not_whole_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = weights(SMALL)
    lacking = {key: value for key, value in named.items() if key != "blocks.0.mlp.W_in"}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (SMALL, lacking, "blocks.0.mlp.W_in is missing from model_final.pth"),
        (SMALL, {**named, "blocks.1.ln1.w": torch.ones(32)}, "blocks.1.ln1.w is in model_final.pth, and config.json"),
        (SMALL, {**named, "blocks.0.mlp.W_in": torch.ones(32, 95)}, "its weights are not those that config.json says"),
        (SMALL, {**named, "embed.W_E": torch.full((61, 32), torch.nan)}, "embed.W_E holds infinities or NaN"),
        (SMALL, {**named, "blocks.0.attn.W_Q": torch.ones(32, 32)}, "blocks.0.attn has weights of"),
        (SMALL, {"x": Malice()}, "holds more than weights, or is damaged"),
        ({**SMALL, "act_fn": "solu_ln"}, named, "act_fn in config.json is solu_ln: of transformer_lens' own models"),
        ({**SMALL, "attn_only": True}, named, "attn_only in config.json is True"),
        ({**SMALL, "d_head": 7}, named, "d_head in config.json is 7"),
        ({**SMALL, "n_ctx": "many"}, named, "n_ctx in config.json is many, not a whole number"),
        ({**SMALL, "n_heads": 1 << 40}, named, "n_heads in config.json is 1099511627776, not a whole number"),
    ]
    for number, (config, given, message) in enumerate(cases):
        folder = saved(tmp_path / str(number), config, given)
        with pytest.raises(SaeError) as caught:
            LanguageModel.boot(str(folder), device="cpu")
        assert message in str(caught.value) and "\n" not in str(caught.value), (message, caught.value)
    (tmp_path / "0" / "model_final.pth").unlink()
    with pytest.raises(SaeError, match=r"no model_final\.pth in it; save the model again"):
        LanguageModel.boot(str(tmp_path / "0"), device="cpu")
    assert "this ran" not in capsys.readouterr().out


def test_by_its_name_with_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gelu-1l is a repository without a tokenizer, which names another: both are had from the hub."""
    text = write_tokenizer(tmp_path / "words", "SmolLM")
    config = {**SMALL, "d_vocab": tokenizer(str(text)).n_vocab}
    folder = saved(tmp_path / "model", config, weights(config))
    models = {"NeelNanda/GELU_1L512W_C4_Code": folder, "NeelNanda/gpt-neox-tokenizer-digits": text}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{i} {one}"}) for i in range(40) for one in CORPUS)
    )
    with hub(models, tmp_path / "hub"):
        own, named = model_tokenizer("gelu-1l"), tokenizer("gelu-1l")
        assert (
            own is not None
            and own.recipe()["digest"] == named.recipe()["digest"] == tokenizer(str(text)).recipe()["digest"]
        )
        small = "--set tokenize.context=32 --set tokenize.validation=0.2 --tokens 4000 --workers 1"
        done(f"tokenize --source text.jsonl --tokenizer gelu-1l {small}")
        made = done(
            "harvest --model gelu-1l --layer 0 --site mlp_post --codec float32 --tokens 500 --device cpu --json"
        )
    store = ActivationStore(Path(made.json["stores"][0]["path"]))
    assert (store.d, store.recipe["hook"], store.recipe["model"]["model"]) == (
        96, "blocks.0.mlp.hook_post", "NeelNanda/GELU_1L512W_C4_Code",
    )  # fmt: skip
    assert "unchecked" not in made.err and store.recipe["model"]["revision"]
    done("tokenize --preset tiny --source text.jsonl --tokens 2000 --workers 1 --set tokenize.context=32")
    with hub(models, tmp_path / "hub"):
        refused = sae("harvest --model gelu-1l --layer 0 --site mlp_post --device cpu")
    assert refused.code == 2 and "was made with another tokenizer" in refused.complaint
    assert "--tokenizer gelu-1l" in refused.complaint


def test_without_the_hub_there_is_no_such_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotFound, match=r"model = NeelNanda/GELU_1L512W_C4_Code: not, or not whole, in the local"):
        LanguageModel.boot("gelu-1l", offline=True)
    with pytest.raises(SaeError, match="tokenizer = gelu-1l: "):
        tokenizer("gelu-1l", offline=True)


@pytest.mark.slow
def test_at_the_size_of_gelu_1l(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", GELU_1L, weights(GELU_1L))
    model = LanguageModel.boot(str(folder), device="cpu")
    assert (model.n_layers, model.n_vocab, model.context_length) == (1, 48_262, 1024)
    assert model.width(Point(0, "mlp_post")) == 2048
    ids = torch.arange(128)[None] * 300
    assert model.activations(ids, [Point(0, "mlp_post")])[Point(0, "mlp_post")].shape == (1, 128, 2048)
