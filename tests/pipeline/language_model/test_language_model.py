"""The language model against an independent twin: the same Hugging Face model, plain, with hooks on its own modules."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2Model,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    T5Config,
)

from sae.cache.errors import NotFound, SaeError
from sae.pipeline.language_model import SITES, LanguageModel, Point
from sae.pipeline.language_model.interventions import Change, Intervention, predicting
from sae.pipeline.runtime import network

VOCAB, LAYERS, WIDTH, HEADS = 53, 3, 24, 4
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=32, bos_token_id=0, eos_token_id=0
    ),
    "llama": LlamaConfig(**LLAMA),
    "mistral": MistralConfig(**LLAMA, sliding_window=8),
}
ROUNDING = {"rtol": 1e-4, "atol": 2e-6}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by sharing their work out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Twins:
    ours: LanguageModel
    plain: Any  # the Hugging Face model

    def block(self, layer: int) -> Any:
        inner = self.plain.transformer.h if hasattr(self.plain, "transformer") else self.plain.model.layers
        return inner[layer]

    def module(self, layer: int, site: str) -> tuple[nn.Module, bool]:
        """The plain module of a site, and whether the site is its input."""
        block = self.block(layer)
        if hasattr(block, "ln_1"):
            attention, projection, norm, out = block.attn, block.attn.c_proj, block.ln_2, block.mlp.c_proj
        else:
            attention, projection = block.self_attn, block.self_attn.o_proj
            norm, out = block.post_attention_layernorm, block.mlp.down_proj
        return {
            "resid_pre": (block, True),
            "resid_mid": (norm, True),
            "resid_post": (block, False),
            "attn_out": (attention, False),
            "attn_z": (projection, True),
            "mlp_in": (block.mlp, True),
            "mlp_post": (out, True),
            "mlp_out": (block.mlp, False),
        }[site]


@contextmanager
def changing(module: nn.Module, is_input: bool, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Pass a plain module's input or output through `change`."""

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            new = change(args[0])
            return (args if new is None else (new, *args[1:])), kwargs
        new = change(kwargs["hidden_states"])
        return args, (kwargs if new is None else {**kwargs, "hidden_states": new})

    def after(_: nn.Module, __: tuple, out: Any) -> Any:
        new = change(out[0] if isinstance(out, tuple) else out)
        if new is None:
            return out
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True) if is_input else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


def at(point: Point, changes: dict[str, Change]) -> dict[str, Intervention]:
    """Each of the changes as an intervention at one point."""
    return {name: {point: change} for name, change in changes.items()}


def intervened(model: LanguageModel, tokens: Tensor, changes: Intervention) -> Tensor:
    with model.intervene(changes):
        return model.losses(tokens)


def save(config: Any, folder: Path) -> Path:
    """A small model with weights large enough for every part to matter."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save(config, root / name) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module", params=[*CONFIGS, "stories260K"])
def twins(request: pytest.FixtureRequest) -> Twins:
    if request.param in CONFIGS:
        folder = request.getfixturevalue("folders")[request.param]
    else:
        folder = request.getfixturevalue("shared_data") / "models" / "stories260K" / "hf"
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Twins(LanguageModel.boot(str(folder), device="cpu"), plain)


@pytest.fixture(scope="module")
def gpt2(folders: dict[str, Path]) -> LanguageModel:
    return LanguageModel.boot(str(folders["gpt2"]), device="cpu")


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of its own, to be damaged."""
    return Path(shutil.copytree(folders["gpt2"], tmp_path / "copy"))


def some_tokens(model: LanguageModel, contexts: int = 3, length: int = 20) -> Tensor:
    random = torch.Generator().manual_seed(5)
    return torch.randint(0, model.n_vocab, (contexts, length), generator=random)


@pytest.mark.parametrize("site", SITES)
def test_a_site_is_what_the_plain_model_computes_there(twins: Twins, site: str) -> None:
    tokens = some_tokens(twins.ours)
    for layer in (0, twins.ours.n_layers - 1):
        seen: list[Tensor] = []
        with changing(*twins.module(layer, site), seen.append), torch.no_grad():
            twins.plain(tokens)
        point = Point(layer, site)
        found = twins.ours.activations(tokens, [point])[point]
        torch.testing.assert_close(found, seen[0], **ROUNDING)
        assert found.shape == (*tokens.shape, twins.ours.width(point))
        assert not found.requires_grad


def test_residual_streams_are_the_plain_models_hidden_states(twins: Twins) -> None:
    """To the last bit: the bridge's own steps are not in the way. (GPT-2's GELU is another kernel: to rounding.)"""
    tokens, last = some_tokens(twins.ours), twins.ours.n_layers - 1
    with torch.no_grad():
        hidden = twins.plain(tokens, output_hidden_states=True).hidden_states
    close = ROUNDING if twins.plain.config.model_type == "gpt2" else {"rtol": 0, "atol": 0}
    points = [Point(layer, site) for layer in range(last) for site in ("resid_pre", "resid_post")]
    found = twins.ours.activations(tokens, points)
    for layer in range(last):
        torch.testing.assert_close(found[Point(layer, "resid_pre")], hidden[layer], **close)
        torch.testing.assert_close(found[Point(layer, "resid_post")], hidden[layer + 1], **close)


OTHERS = {
    "qwen3": Qwen3Config(**LLAMA, head_dim=6),  # its bridge turns sdpa off
    "gemma2": Gemma2Config(**LLAMA, head_dim=6, final_logit_softcapping=2.0),  # caps its logits
    "gpt_neox": GPTNeoXConfig(**{**LLAMA, "num_key_value_heads": HEADS}),  # attention and MLP side by side
    "gpt_neo": GPTNeoConfig(  # blocks return more than a tensor
        vocab_size=VOCAB, hidden_size=WIDTH, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=HEADS,
        max_position_embeddings=32, window_size=8, bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_other_architectures_are_themselves_too(config: Any, tmp_path: Path) -> None:
    folder = save(config, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = LanguageModel.boot(str(folder), device="cpu")
    tokens = some_tokens(model)
    with torch.no_grad():
        out = plain(tokens, output_hidden_states=True)
    last = Point(model.n_layers - 1, "resid_pre")
    torch.testing.assert_close(model.activations(tokens, [last])[last], out.hidden_states[-2], rtol=1e-5, atol=1e-6)
    found = model.compare(tokens, at(Point(1, "mlp_out"), {"same": lambda x: x, "zero": torch.zeros_like}))
    chances = out.logits[:, :-1].log_softmax(-1)
    torch.testing.assert_close(found.clean, -chances.gather(-1, tokens[:, 1:, None])[..., 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.spliced["same"].ce, found.clean)
    assert torch.equal(found.spliced["zero"].ce, intervened(model, tokens, {Point(1, "mlp_out"): torch.zeros_like}))
    assert plain.config._attn_implementation == model._loaded.model.config._attn_implementation


def test_all_sites_in_one_pass_are_the_same_as_one_by_one(twins: Twins) -> None:
    tokens = some_tokens(twins.ours)
    points = [Point(layer, site) for layer in (1, 0) for site in SITES]
    together = twins.ours.activations(tokens, points)
    assert list(together) == points
    for point in points:
        assert torch.equal(together[point], twins.ours.activations(tokens, [point])[point])


def test_a_pass_goes_no_further_than_needed(gpt2: LanguageModel) -> None:
    ran: list[str] = []
    hooks = []
    for layer in range(LAYERS):
        for site in SITES:
            module, name = gpt2._bridge.point(layer, site), f"{layer}.{site}"
            hooks.append(module.register_forward_hook(lambda *_, name=name: ran.append(name)))
    gpt2.check(Point(1, "mlp_out"))
    ran.clear()
    gpt2.activations(some_tokens(gpt2), [Point(0, "attn_z"), Point(1, "attn_out")])
    for hook in hooks:
        hook.remove()
    assert {"0.resid_post", "1.attn_out"} <= set(ran)
    assert not {"1.resid_mid", "1.mlp_in", "1.resid_post", "2.resid_pre"} & set(ran)


def test_losses_are_the_plain_models(twins: Twins) -> None:
    tokens = some_tokens(twins.ours)
    losses = twins.ours.losses(tokens)
    with torch.no_grad():
        plain = twins.plain(tokens, labels=tokens)
    assert losses.shape == (3, 19) and losses.dtype == torch.float32
    assert losses.mean().item() == pytest.approx(plain.loss.item(), rel=1e-5)
    chances = plain.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(losses, -chances, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("site", [site for site in SITES if site != "resid_mid"])  # which the next test is about
def test_a_replacement_does_what_it_does_to_the_plain_model(twins: Twins, site: str) -> None:
    """Half the activations and none at all, from position 3 on; and nothing, which must cost nothing."""
    tokens, point = some_tokens(twins.ours), Point(1, site)

    def scaled(by: float) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([x[:, :3], by * x[:, 3:]], dim=1)

    changes = {"half": scaled(0.5), "zero": scaled(0.0), "same": lambda x: x, "equal": torch.clone}
    found = twins.ours.compare(tokens, at(point, changes))
    with torch.no_grad():
        clean = twins.plain(tokens).logits[:, :-1].log_softmax(-1)
    targets = tokens[:, 1:, None]
    torch.testing.assert_close(found.clean, -clean.gather(-1, targets)[..., 0], rtol=1e-4, atol=1e-5)
    for name in ("half", "zero"):
        with changing(*twins.module(1, site), changes[name]), torch.no_grad():
            changed = twins.plain(tokens).logits[:, :-1].log_softmax(-1)
        ce, kl = found.spliced[name]
        torch.testing.assert_close(ce, -changed.gather(-1, targets)[..., 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kl, (clean.exp() * (clean - changed)).sum(-1), rtol=1e-3, atol=1e-5)
        assert kl.mean() > 1e-4, "the replacement should matter"
        assert torch.equal(ce, intervened(twins.ours, tokens, {point: changes[name]}))
    for name in ("same", "equal"):
        assert torch.equal(found.spliced[name].ce, found.clean)
        assert (found.spliced[name].kl == 0).all()


def test_replacing_resid_mid_reaches_the_residual_stream_too(twins: Twins) -> None:
    """Twin: the block's own parts put together by hand, block(x) = r + mlp(norm(r)) with r = f(x + attention)."""
    tokens, point = some_tokens(twins.ours), Point(1, "resid_mid")
    for change in (lambda x: 0.5 * x, torch.zeros_like, lambda x: x):
        norm, mlp = twins.module(1, "resid_mid")[0], twins.module(1, "mlp_in")[0]
        mids: list[Tensor] = []

        def rebuilt(_: Tensor, change=change, norm=norm, mlp=mlp, mids=mids) -> Tensor:
            mid = change(mids[0])
            return mid + mlp.forward(norm.forward(mid))

        with changing(norm, True, mids.append), changing(twins.block(1), False, rebuilt), torch.no_grad():
            logits = twins.plain(tokens).logits[:, :-1]
        expected = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        found = twins.ours.compare(tokens, at(point, {"it": change, "same": lambda x: x}))
        torch.testing.assert_close(found.spliced["it"].ce, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.spliced["same"].ce, found.clean)


def test_one_site_may_decide_what_replaces_another(gpt2: LanguageModel) -> None:
    """A transcoder that is the MLP itself changes nothing; what it reads and replaces are the two sites."""
    tokens = some_tokens(gpt2)
    read, write = Point(0, "mlp_in"), Point(1, "mlp_out")
    clean = gpt2.activations(tokens, [read, write])
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(value: Tensor, source: Tensor) -> Tensor:
        seen.append((value, source))
        return value

    double = predicting(lambda value, source: value + source, read, write)
    found = gpt2.compare(tokens, {"spy": predicting(spy, read, write), "double": double})
    assert torch.equal(seen[0][0], clean[write]) and torch.equal(seen[0][1], clean[read])
    assert torch.equal(found.spliced["spy"].ce, found.clean)
    added = intervened(gpt2, tokens, {write: lambda value: value + clean[read]})
    assert torch.equal(found.spliced["double"].ce, added)
    with pytest.raises(SaeError, match=r"1\.mlp_out is computed after 0\.mlp_in"):
        gpt2.compare(tokens, {"it": predicting(spy, write, read)})


def test_a_replacement_that_writes_into_its_argument_spoils_only_its_own_pass(gpt2: LanguageModel) -> None:
    tokens = some_tokens(gpt2)
    for site in ("resid_pre", "resid_mid", "mlp_out"):
        found = gpt2.compare(tokens, at(Point(1, site), {"zero": lambda x: x.zero_(), "same": lambda x: x}))
        assert torch.equal(found.spliced["same"].ce, found.clean)
        assert not torch.equal(found.spliced["zero"].ce, found.clean)
        assert torch.equal(found.clean, gpt2.losses(tokens))


def test_losses_do_not_depend_on_how_many_rows_of_logits_are_held(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, point = some_tokens(gpt2), Point(2, "resid_pre")
    whole = gpt2.compare(tokens, {"half": {point: lambda x: x / 2}})
    monkeypatch.setattr("sae.pipeline.language_model.model._LOGITS_AT_ONCE", {"cpu": VOCAB * 4})
    pieces = gpt2.compare(tokens, {"half": {point: lambda x: x / 2}})
    torch.testing.assert_close(pieces.clean, whole.clean)
    torch.testing.assert_close(pieces.spliced["half"].kl, whole.spliced["half"].kl)


def test_a_replacement_of_another_shape_is_refused_and_leaves_no_hooks(gpt2: LanguageModel) -> None:
    tokens = some_tokens(gpt2)
    before = gpt2.losses(tokens)
    with pytest.raises(ValueError, match="must have its shape"):
        gpt2.compare(tokens, {"short": {Point(2, "attn_z"): lambda x: x[:, 1:]}})
    assert torch.equal(gpt2.losses(tokens), before)


def test_points_that_are_not_there_are_named_with_what_is(gpt2: LanguageModel) -> None:
    with pytest.raises(SaeError, match=r"^layer = 14: gpt2 has layers 0 to 2$"):
        gpt2.check(Point(14, "mlp_out"))
    with pytest.raises(SaeError, match="layer = -1"):
        gpt2.check(Point(-1, "mlp_out"))
    with pytest.raises(SaeError, match="site = mlp: the sites are resid_pre, "):
        gpt2.width(Point(0, "mlp"))


def test_a_site_a_model_lacks_is_named_with_those_it_has(tmp_path: Path) -> None:
    """GPT-J computes attention and MLP side by side: there is nothing between them."""
    (tmp_path / "gptj").mkdir()
    config = {"model_type": "gptj", "vocab_size": 20, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    (tmp_path / "gptj" / "config.json").write_text(json.dumps({**config, "bos_token_id": 0, "eos_token_id": 0}))
    model = LanguageModel.boot(f"random:{tmp_path / 'gptj'}")
    model.check(Point(0, "mlp_out"))
    with pytest.raises(
        SaeError,
        match=r"^site = resid_mid: tried out, nothing in layer 0 of random:gptj is the residual stream between .*; "
        "it has resid_pre, resid_post, attn_out",
    ):
        model.check(Point(0, "resid_mid"))


def test_tokens_the_model_cannot_read_are_refused(gpt2: LanguageModel) -> None:
    with pytest.raises(SaeError, match=r"context = 33: gpt2 reads at most 32 tokens"):
        gpt2.losses(torch.zeros(1, 33, dtype=torch.long))
    for wrong in (VOCAB, -1):
        with pytest.raises(SaeError, match=f"token {wrong}: gpt2 knows tokens 0 to {VOCAB - 1}"):
            gpt2.activations(torch.tensor([[0, wrong]]), [Point(0, "resid_pre")])


def test_recipe_names_a_local_model_by_folder_and_digest(folders: dict[str, Path], copy: Path) -> None:
    recipe = LanguageModel.boot(str(folders["gpt2"])).recipe()
    assert recipe | {"weights": None} == {
        "model": "gpt2", "revision": None, "weights": None, "processing": "none", "dtype": "float32",
    }  # fmt: skip
    assert json.loads(json.dumps(recipe)) == recipe
    again = LanguageModel.boot(str(copy), dtype="bfloat16").recipe()
    assert again == recipe | {"model": "copy", "dtype": "bfloat16"}
    weights = load_file(copy / "model.safetensors")
    weights["transformer.ln_f.bias"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert LanguageModel.boot(str(copy)).recipe()["weights"] != recipe["weights"]


def test_bfloat16_is_float32_to_its_precision(folders: dict[str, Path], gpt2: LanguageModel) -> None:
    short = LanguageModel.boot(str(folders["gpt2"]), dtype="bfloat16")
    tokens, point = some_tokens(gpt2), Point(1, "mlp_out")
    found, exact = (model.activations(tokens, [point])[point] for model in (short, gpt2))
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.02 * exact.norm()
    compared = short.compare(tokens, {"same": {point: lambda x: x}})
    assert compared.clean.dtype == torch.float32 and torch.equal(compared.spliced["same"].ce, compared.clean)


def test_random_weights_come_only_on_request_and_are_always_the_same(folders: dict[str, Path]) -> None:
    spec = f"random:{folders['llama']}"
    torch.manual_seed(1)
    one, other = LanguageModel.boot(spec), LanguageModel.boot(spec)
    assert one.name == "random:llama" and one.slug == "random-llama"
    assert one.recipe() == other.recipe() and one.recipe()["weights"] is not None
    tokens = some_tokens(one)
    assert torch.equal(one.losses(tokens), other.losses(tokens))
    for spec in ("random:nosuch", "random:"):
        with pytest.raises(NotFound, match="give gpt2, gpt2-medium"):
            LanguageModel.boot(spec)
    with pytest.raises(SaeError, match="has no revisions"):
        LanguageModel.boot(spec, revision="main")


def test_a_model_saved_without_its_head_is_whole(copy: Path, gpt2: LanguageModel) -> None:
    """GPT-2 on the hub is such a file: names without `transformer.`, the head tied to the embedding."""
    GPT2Model.from_pretrained(copy).save_pretrained(copy)
    assert not any(name.startswith("transformer.") for name in load_file(copy / "model.safetensors"))
    tokens = some_tokens(gpt2)
    assert torch.equal(LanguageModel.boot(str(copy)).losses(tokens), gpt2.losses(tokens))


def test_a_model_in_shards_is_one_model(copy: Path, gpt2: LanguageModel) -> None:
    AutoModelForCausalLM.from_pretrained(copy).save_pretrained(copy / "shards", max_shard_size="20KB")
    assert (copy / "shards" / "model.safetensors.index.json").is_file()
    tokens = some_tokens(gpt2)
    assert torch.equal(LanguageModel.boot(str(copy / "shards")).losses(tokens), gpt2.losses(tokens))
    next((copy / "shards").glob("model-00002*")).unlink()
    with pytest.raises(SaeError, match=r"model-00002-of-\d+\.safetensors is missing"):
        LanguageModel.boot(str(copy / "shards"))


def damage_config(copy: Path) -> None:
    (copy / "config.json").write_text("{not json")


def damage_kind(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "nosuch"}')


def damage_with_code(copy: Path) -> None:
    kinds = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (copy / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": kinds}))
    (copy / "own.py").write_text("raise SystemExit('code of a model was run')")


def damage_purpose(copy: Path) -> None:
    T5Config().save_pretrained(copy)


def damage_weights(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def damage_missing(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})


def damage_shape(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"][1:].clone()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})


def only_pickle(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")


def no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()


def no_config(copy: Path) -> None:
    (copy / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_config, "config.json is not understood"),
        (damage_kind, "config.json is not understood"),
        (damage_with_code, "is Python code of its own, which is never run"),
        (damage_purpose, "a t5 is not a causal language model"),
        (damage_weights, "its weights are damaged"),
        (damage_missing, r"1 weight is missing from the files \(transformer.h.1.mlp.c_fc.weight"),
        (damage_shape, "1 weight is of another shape than config.json says"),
        (only_pickle, "only pickled weights"),
        (no_weights, "no model.safetensors in it"),
        (no_config, "has no config.json"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(
    copy: Path, damage: Callable[[Path], None], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    with pytest.raises(SaeError, match=says) as refusal:
        LanguageModel.boot(str(copy))
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")


def test_names_that_lead_nowhere_say_what_to_try(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(network, "reachable", lambda _: False)
    for name in ("/no/such/folder", "./nowhere", "~no-such-user/x", "a/b/c"):
        with pytest.raises(NotFound, match="no such folder"):
            LanguageModel.boot(name)
    with pytest.raises(NotFound, match="neither a folder nor a hub name"):
        LanguageModel.boot("two words")
    with pytest.raises(NotFound, match=r"gpt2: not, or not whole, in .* offline was asked for; give a local"):
        LanguageModel.boot("gpt2", offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(NotFound, match=r"gpt2 at revision v1: .* cannot be reached; give a local"):
        LanguageModel.boot("gpt2", revision="v1")


def test_a_hub_model_is_named_by_its_commit(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache as huggingface_hub keeps it, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--some-gpt"
    shutil.copytree(folders["gpt2"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = LanguageModel.boot("someone/some-gpt", offline=True)
    assert model.recipe() == {
        "model": "someone/some-gpt", "revision": commit, "weights": None, "processing": "none", "dtype": "float32",
    }  # fmt: skip
    assert model.slug == "some-gpt"
    with pytest.raises(NotFound, match="at revision other: not, or not whole"):
        LanguageModel.boot("someone/some-gpt", revision="other", offline=True)


def test_options_that_cannot_be_are_refused(folders: dict[str, Path]) -> None:
    folder = str(folders["gpt2"])
    with pytest.raises(SaeError, match="dtype = int8: the forward pass runs in float32 or bfloat16"):
        LanguageModel.boot(folder, dtype="int8")
    for device in ("nosuch", "cuda:99"):
        with pytest.raises(SaeError, match=f"device = {device}: "):
            LanguageModel.boot(folder, device=device)
    with pytest.raises(SaeError, match="revision = main: gpt2 is a local folder"):
        LanguageModel.boot(folder, revision="main")
