"""Tiny random models of many families, and where each site is in the plain Hugging Face model of the family.

A site is written as the path of a module inside a block and what of it: `self_attn.o_proj<` is its input, `self_attn>`
its output; `*0.5` after it is what the block multiplies it by. `.` is the block itself. Sites that are not there are
those a family has none of: the numbers of `compared` say that the rest is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sae.pipeline.language_model import LanguageModel, Point

VOCAB, LAYERS, WIDTH, HEADS, LENGTH = 101, 2, 16, 4, 12
SCALE = 0.22  # Granite's residual_multiplier

MANY = {  # heads with keys and values of their own
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA = {**MANY, "num_key_value_heads": 2}
GPT2 = {
    "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "ffn_dim": 24, "num_hidden_layers": LAYERS, "pad_token_id": 0,
    "num_attention_heads": HEADS, "max_position_embeddings": 32,
}  # fmt: skip
FALCON = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "ffn_hidden_size": 24, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}

_ENDS = {"resid_pre": ".<", "resid_post": ".>"}
_OF_LLAMA = _ENDS | {
    "resid_mid": "post_attention_layernorm<", "attn_out": "self_attn>", "attn_z": "self_attn.o_proj<",
    "mlp_in": "mlp<", "mlp_post": "mlp.down_proj<", "mlp_out": "mlp>",
}  # fmt: skip
_OF_GPT2 = _ENDS | {
    "resid_mid": "ln_2<", "attn_out": "attn>", "attn_z": "attn.c_proj<", "mlp_in": "mlp<", "mlp_post": "mlp.c_proj<",
    "mlp_out": "mlp>",
}  # fmt: skip
_OF_NEOX = _ENDS | {
    "resid_mid": "post_attention_layernorm<", "attn_out": "attention>", "attn_z": "attention.dense<", "mlp_in": "mlp<",
    "mlp_post": "mlp.dense_4h_to_h<", "mlp_out": "mlp>",
}  # fmt: skip
_OF_FALCON = _OF_NEOX | {"attn_out": "self_attention>", "attn_z": "self_attention.dense<"}
_OF_OPT = _ENDS | {
    "resid_mid": "final_layer_norm<", "attn_out": "self_attn>", "attn_z": "self_attn.out_proj<", "mlp_in": "fc1<",
    "mlp_post": "fc2<", "mlp_out": "fc2>",
}  # fmt: skip
_SANDWICH = {"attn_out": "post_attention_layernorm>", "mlp_out": "post_feedforward_layernorm>"}


def _without(sites: dict[str, str], *names: str) -> dict[str, str]:
    return {site: place for site, place in sites.items() if site not in names}


_OF_GPTJ = _without(_OF_GPT2, "resid_mid") | {"attn_z": "attn.out_proj<", "mlp_post": "mlp.fc_out<"}
_OF_EXPERTS = _without(_OF_LLAMA, "mlp_post")


@dataclass(frozen=True)
class Family:
    config: Callable[[], Any]
    sites: dict[str, str]  # of every layer
    blocks: str = "model.layers"
    daily: bool = False  # part of every test run; the others are marked slow
    apart: tuple[str, ...] = field(default=())  # sites whose plain place cannot be written to the same effect


def _family(name: str, kind: str, settings: dict[str, Any], sites: dict[str, str], **more: Any) -> tuple[str, Family]:
    return name, Family(lambda: getattr(transformers, kind + "Config")(**settings), sites, **more)


_H = {"blocks": "transformer.h"}
FAMILIES: dict[str, Family] = dict(
    [
        _family("gpt2", "GPT2", GPT2, _OF_GPT2, **_H, daily=True),
        _family("gpt_neo", "GPTNeo", {
            "vocab_size": VOCAB, "hidden_size": WIDTH, "num_layers": 2, "num_heads": HEADS, "window_size": 8,
            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32, "bos_token_id": 1,
            "eos_token_id": 2,
        }, _OF_GPT2 | {"attn_z": "attn.attention.out_proj<"}, **_H),
        _family("gpt_bigcode", "GPTBigCode", GPT2, _OF_GPT2, **_H),
        _family("gptj", "GPTJ", {**GPT2, "rotary_dim": 4}, _OF_GPTJ, **_H, daily=True),
        _family("codegen", "CodeGen", {**GPT2, "rotary_dim": 4}, _OF_GPTJ, **_H),
        _family("gpt_neox", "GPTNeoX", MANY, _without(_OF_NEOX, "resid_mid"), blocks="gpt_neox.layers", daily=True),
        _family("gpt_neox, one after the other", "GPTNeoX", {**MANY, "use_parallel_residual": False}, _OF_NEOX,
            blocks="gpt_neox.layers"),
        _family("opt", "OPT", {**OPT, "word_embed_proj_dim": WIDTH}, _OF_OPT, blocks="model.decoder.layers",
            daily=True),
        _family("opt, norms after", "OPT", {**OPT, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
            _without(_OF_OPT, "resid_mid", "attn_out", "mlp_out"), blocks="model.decoder.layers", daily=True),
        _family("bloom", "Bloom", {
            "vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "bos_token_id": 1,
            "eos_token_id": 2,
        }, _OF_NEOX | {"attn_out": "self_attention.dense>", "attn_z": "self_attention.dense<",
            "mlp_out": "mlp.dense_4h_to_h>"}, **_H, daily=True),
        _family("bloom, norms in the stream", "Bloom", {
            "vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "bos_token_id": 1,
            "eos_token_id": 2, "apply_residual_connection_post_layernorm": True,
        }, _ENDS | {"attn_z": "self_attention.dense<", "mlp_post": "mlp.dense_4h_to_h<", "mlp_in": "mlp<"}, **_H,
            apart=("mlp_in",)),
        _family("falcon", "Falcon", {**FALCON, "multi_query": True}, _without(_OF_FALCON, "resid_mid"), **_H),
        _family("falcon, alibi", "Falcon", {
            **FALCON, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True,
        }, _OF_FALCON, **_H),
        _family("falcon, new", "Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
            _without(_OF_FALCON, "resid_mid"), **_H, daily=True),
        _family("mpt", "Mpt", {
            "vocab_size": VOCAB, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 32,
            "expansion_ratio": 2,
        }, _ENDS | {
            "resid_mid": "norm_2<", "attn_out": "attn.out_proj>", "attn_z": "attn.out_proj<", "mlp_in": "ffn<",
            "mlp_post": "ffn.down_proj<", "mlp_out": "ffn.down_proj>",
        }, blocks="transformer.blocks"),
        _family("llama", "Llama", LLAMA, _OF_LLAMA, daily=True),
        _family("mistral", "Mistral", {**LLAMA, "sliding_window": 8}, _OF_LLAMA),
        _family("mixtral", "Mixtral", {**LLAMA, "num_local_experts": 4}, _OF_EXPERTS, daily=True),
        _family("qwen2", "Qwen2", LLAMA, _OF_LLAMA),
        _family("qwen2_moe", "Qwen2Moe", {
            **LLAMA, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 12, "decoder_sparse_step": 1,
        }, _OF_EXPERTS),
        _family("qwen3", "Qwen3", {**LLAMA, "head_dim": 6}, _OF_LLAMA),
        _family("qwen3_moe", "Qwen3Moe", {**LLAMA, **_EXPERTS, "head_dim": 6, "num_experts": 4}, _OF_EXPERTS),
        _family("gemma", "Gemma", {**LLAMA, "head_dim": 6}, _OF_LLAMA),
        _family("gemma2", "Gemma2", {
            **LLAMA, "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 8, "final_logit_softcapping": 2.0,
        }, _OF_LLAMA | _SANDWICH | {"resid_mid": "pre_feedforward_layernorm<"}, daily=True),
        _family("gemma3_text", "Gemma3Text", {
            **LLAMA, "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 8,
        }, _OF_LLAMA | _SANDWICH | {"resid_mid": "pre_feedforward_layernorm<"}),
        _family("phi", "Phi", {**MANY, "num_key_value_heads": HEADS}, _without(_OF_LLAMA, "resid_mid") | {
            "attn_z": "self_attn.dense<", "mlp_post": "mlp.fc2<",
        }),
        _family("phi3", "Phi3", LLAMA, _OF_LLAMA),
        _family("stablelm", "StableLm", LLAMA, _OF_LLAMA),
        _family("stablelm, side by side", "StableLm", {**LLAMA, "use_parallel_residual": True},
            _without(_OF_LLAMA, "resid_mid")),
        _family("starcoder2", "Starcoder2", {**LLAMA, "sliding_window": 8}, _OF_LLAMA | {"mlp_post": "mlp.c_proj<"}),
        _family("olmo", "Olmo", LLAMA, _OF_LLAMA),
        _family("olmo2", "Olmo2", LLAMA, _OF_LLAMA | _SANDWICH | {"resid_mid": "mlp<"}, daily=True,
            apart=("mlp_in",)),
        _family("olmoe", "Olmoe", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}, _OF_EXPERTS),
        _family("granite", "Granite", {
            **LLAMA, "residual_multiplier": SCALE, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
        }, _OF_LLAMA | {"attn_out": f"self_attn>*{SCALE}", "mlp_out": f"mlp>*{SCALE}"}, daily=True),
        _family("granitemoe", "GraniteMoe", {
            **LLAMA, "residual_multiplier": SCALE, "num_local_experts": 4, "num_experts_per_tok": 2,
        }, _without(_OF_LLAMA, "mlp_post") | {
            "attn_out": f"self_attn>*{SCALE}", "mlp_in": "block_sparse_moe<", "mlp_out": f"block_sparse_moe>*{SCALE}",
        }),
        _family("cohere", "Cohere", LLAMA, _without(_OF_LLAMA, "resid_mid")),
        _family("nemotron", "Nemotron", LLAMA, _OF_LLAMA),
        _family("glm4", "Glm4", {**LLAMA, "head_dim": 4}, _OF_LLAMA | {
            "attn_out": "post_self_attn_layernorm>", "mlp_out": "post_mlp_layernorm>",
        }),
        _family("deepseek_v3", "DeepseekV3", {
            **MANY, **_EXPERTS, "num_key_value_heads": HEADS, "q_lora_rank": 8, "kv_lora_rank": 8,
            "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "n_group": 1,
            "topk_group": 1, "first_k_dense_replace": 0,
        }, _OF_EXPERTS),
        _family("gpt_oss", "GptOss", {**LLAMA, "head_dim": 8, "num_local_experts": 4, "sliding_window": 8},
            _OF_EXPERTS),
        _family("xglm", "XGLM", {
            "vocab_size": VOCAB, "d_model": WIDTH, "ffn_dim": 24, "num_layers": LAYERS, "attention_heads": HEADS,
            "max_position_embeddings": 32,
        }, _OF_OPT),
        _family("mamba", "Mamba", {
            "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4,
        }, _ENDS, blocks="backbone.layers"),
    ]
)  # fmt: skip


def save_family(name: str, folder: Path) -> Path:
    """A random model with weights large enough for every part to matter."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(FAMILIES[name].config())
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


def some_tokens() -> Tensor:
    return torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))


@contextmanager
def watching(
    model: Any, name: str, layer: int, change: Callable[[str, Tensor], Tensor | None], *sites: str
) -> Iterator[None]:
    """Pass the plain model's value at each site of a layer through `change`; what is returned, if anything, goes on."""
    family = FAMILIES[name]
    block = model.get_submodule(family.blocks)[layer]
    with ExitStack() as stack:
        for site in sites or family.sites:
            stack.callback(_watch(block, family.sites[site], lambda value, site=site: change(site, value)).remove)
        yield


def _watch(block: nn.Module, place: str, change: Callable[[Tensor], Tensor | None]) -> Any:
    path, is_input, scale = place.partition("*")[0][:-1], "<" in place, float(place.partition("*")[2] or 1)
    module = block if path == "." else block.get_submodule(path)

    def through(value: Tensor) -> Tensor:
        rows = value if value.ndim == 3 else value.view(-1, LENGTH, value.shape[-1])
        new = change(rows * scale)
        return value if new is None else (new / scale).reshape(value.shape)

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (through(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": through(kwargs["hidden_states"])}

    def after(_: nn.Module, __: tuple, out: Any) -> Any:
        return (through(out[0]), *out[1:]) if isinstance(out, tuple) else through(out)

    if is_input:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


@torch.no_grad()
def compared(name: str, folder: Path) -> dict[str, float]:
    """The largest deviation from the plain model, over its largest value: of each site, and of the logits.

    Asserted on the way: the sites are those of the table, the residual identities hold, replacing a site by itself
    changes nothing to the last bit, and replacing it by something else does what it does to the plain model.
    """
    model, tokens = LanguageModel.boot(str(folder), device="cpu"), some_tokens()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = plain(tokens, use_cache=False).logits
    targets = tokens[:, 1:, None]
    off: dict[str, float] = {"logits": _off(_losses(logits, targets), model.losses(tokens))}
    for layer in range(LAYERS):
        seen: dict[str, Tensor] = {}
        with watching(plain, name, layer, seen.__setitem__):
            plain(tokens, use_cache=False)
        points = [Point(layer, site) for site in FAMILIES[name].sites]
        assert set(model._bridge.sites(layer)) == set(FAMILIES[name].sites), (name, layer)
        found = {point.site: value for point, value in model.activations(tokens, points).items()}
        for site, value in found.items():
            assert value.shape == seen[site].shape == (*tokens.shape, model.width(Point(layer, site)))
            off[site] = max(off.get(site, 0.0), _off(seen[site], value))
        _check_identities(found)
        for site in found:
            changes = {"same": lambda x: x, "equal": torch.clone, "half": lambda x: 0.5 * x}
            losses = model.compare(tokens, {name: {Point(layer, site): change} for name, change in changes.items()})
            for same in ("same", "equal"):
                assert torch.equal(losses.spliced[same].ce, losses.clean), (name, layer, site)
                assert (losses.spliced[same].kl == 0).all(), (name, layer, site)
            if site == "resid_mid" or site in FAMILIES[name].apart:
                continue  # in the plain model the block keeps the tensor for its sum: what is put in is half replaced
            with watching(plain, name, layer, lambda _, x: 0.5 * x, site):
                halved = _losses(plain(tokens, use_cache=False).logits, targets)
            off["spliced"] = max(off.get("spliced", 0.0), _off(halved, losses.spliced["half"].ce))
    return off


def _check_identities(found: dict[str, Tensor]) -> None:
    def add_up(whole: str, *parts: str) -> None:
        if {whole, *parts} <= found.keys():
            torch.testing.assert_close(found[whole], sum(found[part] for part in parts), rtol=1e-5, atol=1e-5)

    add_up("resid_mid", "resid_pre", "attn_out")
    add_up("resid_post", "resid_mid", "mlp_out")
    add_up("resid_post", "resid_pre", "attn_out", "mlp_out")


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits[:, :-1].float().log_softmax(-1).gather(-1, targets)[..., 0]


def _off(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max())
