"""Model folders that say something else than they hold, or come from someone who means ill: one line, exit code 2."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_families import save_family
from torch import Tensor

from sae.cache.errors import SaeError
from sae.pipeline.language_model import LanguageModel, Point, weights

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    return {name: save_family(name, root / name) for name in ("gpt2", "llama")}


@pytest.fixture
def llama(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["llama"], tmp_path / "llama"))


@pytest.fixture
def gpt2(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["gpt2"], tmp_path / "gpt2"))


def refused(folder: Path, says: str) -> None:
    with pytest.raises(SaeError, match=says) as refusal:
        LanguageModel.boot(str(folder), device="cpu")
    assert str(refusal.value).startswith("model = ") and str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 500


def values(folder: Path) -> Tensor:
    point = Point(1, "resid_post")
    return LanguageModel.boot(str(folder), device="cpu").activations(torch.arange(20).view(2, 10), [point])[point]


def configure(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | settings))


def change(folder: Path, by: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    by(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# What the model does not take, and what it lacks


def test_layers_beyond_those_of_the_configuration(llama: Path) -> None:
    configure(llama, num_hidden_layers=1)
    refused(
        llama, r"9 weights are in the files and not in the model .*\(model.layers.1.input_layernorm.weight, .*\.\.\."
    )


def test_biases_that_the_configuration_turns_off(llama: Path) -> None:
    change(llama, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}))
    refused(llama, r"1 weight is in the files and not in the model .* \(model.layers.0.self_attn.q_proj.bias\)")
    configure(llama, attention_bias=True)
    refused(llama, r"7 weights are missing from the files \(model.layers.0.self_attn.k_proj.bias, ")


def test_a_weight_no_model_of_the_kind_has(gpt2: Path) -> None:
    change(gpt2, lambda tensors: tensors.update({"transformer.h.0.attn.gate\n\x1b[31m": torch.ones(3)}))
    refused(gpt2, r"1 weight is in the files and not in the model .*gate\?\?\[31m")


def test_scales_of_a_quantization_that_the_configuration_lost(llama: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(llama, lambda tensors: tensors.update({name + "_scale_inv": torch.ones(1)}))
    refused(llama, "1 weight is in the files and not in the model .*_scale_inv")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool])
def test_weights_that_mean_nothing_without_scales(llama: Path, kind: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(llama, lambda tensors: tensors.update({name: tensors[name].to(kind)}))
    refused(llama, rf"{name} is stored as \w+: quantized weights are not supported")


def test_a_quantized_checkpoint_says_so(llama: Path) -> None:
    configure(llama, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    refused(llama, "its weights are quantized .*: fp8")


def test_buffers_of_older_versions_are_no_weights(saved: dict[str, Path], gpt2: Path, llama: Path) -> None:
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()
    expected = values(saved["gpt2"])
    for prefix in ("transformer.", ""):
        masks = {f"{prefix}h.0.attn.bias": mask, f"{prefix}h.0.attn.masked_bias": torch.tensor(-1e4)}
        change(gpt2, lambda tensors, masks=masks: tensors.update(masks))
        assert torch.equal(values(gpt2), expected)


def test_names_of_buffers_and_names_like_them() -> None:
    def is_buffer(name: str, *shape: int) -> bool:
        return weights.Tensor(None, shape, "F32").is_buffer(name)

    for name in (
        "h.0.attn.bias",
        "gpt_neox.layers.0.attention.bias",
        "h.0.attn.attention.bias",
        "h.0.attn.causal_mask",
    ):
        assert is_buffer(name, 1, 1, 32, 32) and not is_buffer(name, 16)
    for name in ("layers.0.attention.rotary_emb.inv_freq", "model.embed_positions.weights", "model.decoder.version"):
        assert is_buffer(name, 8)
    for name in ("h.0.attn.c_attn.bias", "h.0.mlp.bias", "layers.0.self_attn.q_proj.bias", "embed_positions.weight"):
        assert not is_buffer(name, 1, 1, 32, 32)


def test_rotary_tables_of_older_versions_are_no_weights(saved: dict[str, Path], llama: Path) -> None:
    change(llama, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert torch.equal(values(llama), values(saved["llama"]))
    change(llama, lambda tensors: tensors.update({"model.layers.0.self_attn.bias": torch.ones(16)}))  # not a mask
    refused(llama, r"\(model.layers.0.self_attn.bias\)")


def test_a_head_is_the_embedding_only_where_the_configuration_says_so(llama: Path, gpt2: Path) -> None:
    change(llama, lambda tensors: tensors.pop("lm_head.weight"))
    refused(llama, r"1 weight is missing from the files \(lm_head.weight\)")
    configure(llama, tie_word_embeddings=True)
    tied = values(llama)
    change(llama, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert torch.equal(values(llama), tied)


def test_one_weight_in_two_files(llama: Path) -> None:
    tensors = load_file(llama / WEIGHTS)
    (llama / WEIGHTS).unlink()
    names = sorted(tensors)
    for file, part in (("a.safetensors", names[:9]), ("b.safetensors", names[8:])):
        save_file({name: tensors[name] for name in part}, llama / file, metadata={"format": "pt"})
    index = dict.fromkeys(names[:9], "a.safetensors") | dict.fromkeys(names[9:], "b.safetensors")
    (llama / INDEX).write_text(json.dumps({"weight_map": index}))
    refused(llama, f"{names[8]} is in two weight files")


def test_a_whole_file_goes_before_an_index_and_the_recipe_names_what_was_read(llama: Path) -> None:
    before = LanguageModel.boot(str(llama), device="cpu").recipe()
    (llama / INDEX).write_text(json.dumps({"weight_map": {"x": "x.safetensors"}}))
    assert LanguageModel.boot(str(llama), device="cpu").recipe() == before


# Configurations


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers in config.json is 1000000000"),
        ({"num_hidden_layers": 9000}, "asks for 9000 layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in config.json is 0"),
        ({"num_hidden_layers": -3}, "num_hidden_layers in config.json is -3"),
        ({"hidden_size": 0}, "hidden_size in config.json is 0"),
        ({"hidden_size": 2**40}, "asks for .* parameters, the files hold|describes no model"),
        ({"hidden_size": "wide"}, "is not understood|describes no model"),
        ({"intermediate_size": 10**12}, "asks for .* parameters, the files hold"),
        ({"intermediate_size": -5}, "is not understood|describes no model"),
        ({"vocab_size": 10**15}, "asks for .* parameters, the files hold"),
        ({"num_attention_heads": 0}, "num_attention_heads in config.json is 0|is not understood"),
        ({"num_labels": 10**9}, "num_labels in config.json"),
        ({"max_position_embeddings": 10**18}, "max_position_embeddings in config.json"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps in config.json is NaN"),
        ({"hidden_act": "__import__('os')"}, "describes no model|is not understood"),
        ({"model_type": 3}, "is not understood"),
        ({"model_type": "../llama"}, "is not understood"),
        ({"model_type": "t5"}, "a t5 is not a causal language model|is not understood"),
        ({"transformers_weights": "evil.safetensors"}, "transformers_weights in config.json is not supported"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files in config.json is not supported"),
        ({"rope_parameters": {"rope_type": "nosuch", "rope_theta": 1.0}}, "is not understood|describes no model"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be(llama: Path, settings: dict[str, Any], says: str) -> None:
    configure(llama, **settings)
    refused(llama, says)
    configure(llama, auto_map={})
    if "num_hidden_layers" in settings and settings["num_hidden_layers"] != 9000:
        with pytest.raises(SaeError, match=says):  # the same without weights
            LanguageModel.boot(f"random:{llama}", device="cpu")


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "7", "{", '"llama"', '{"model_type": "llama", "model_type": "gpt2"}', "\x00",
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", '{"a": ' + "9" * 10_000 + "}", "{}",
    ],
)  # fmt: skip
def test_configurations_that_are_none(llama: Path, text: str) -> None:
    (llama / CONFIG).write_text(text)
    refused(llama, "config.json is not understood")


def test_no_code_that_a_configuration_names_is_run(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither classes of the folder, nor kernels of the hub; where transformers knows the kind, its own is taken."""
    expected = values(llama)
    (llama / "own.py").write_text("raise SystemExit('code of a model was run')")
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    kernels = {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"}
    configure(llama, auto_map=code, **kernels, experts_implementation="evil/experts")
    assert torch.equal(values(llama), expected)


def test_nothing_but_configuration_and_weights_is_opened(llama: Path) -> None:
    """Adapters, distributed checkpoints, settings of generation and pickles beside the weights stay shut."""
    expected = values(llama)

    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os._exit, (77,)  # type: ignore[return-value]

    for name in (".metadata", "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "__0_0.distcp"):
        (llama / name).write_bytes(pickle.dumps(Trap()))
    (llama / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model", "peft_type": "LORA"}')
    for name in ("generation_config.json", "tokenizer_config.json"):
        (llama / name).unlink(missing_ok=True)
        os.mkfifo(llama / name)  # opening it would wait for ever
    assert torch.equal(values(llama), expected)


# Files that lie


def header(text: str | bytes, length: int | None = None) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(kind: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> str:
    return json.dumps({"model.norm.weight": {"dtype": kind, "shape": shape, "data_offsets": offsets}})


LIES: dict[str, bytes] = {
    "nothing": b"",
    "a length alone": header("", 2**62),
    "a header beyond the file": header(entry(), 10_000) + bytes(8),
    "a header that is no JSON": header("{nothing") + bytes(8),
    "a deep header": header("[" * 50_000) + bytes(8),
    "offsets beyond the file": header(entry(offsets=(0, 2**40), shape=(2**38,))) + bytes(8),
    "offsets that go back": header(entry(offsets=(8, 0))) + bytes(8),
    "a shape of another size": header(entry(shape=(10**12,))) + bytes(8),
    "a shape that overflows": header(entry(shape=(2**62, 2**62))) + bytes(8),
    "a negative shape": header(entry(shape=(-2,))) + bytes(8),
    "an unknown kind": header(entry(kind="F77")) + bytes(8),
    "overlapping tensors": header(
        json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"})
    )
    + bytes(8),
    "bytes that belong to nothing": header(entry()) + bytes(64),
    "a pickle": pickle.dumps({"a": 1}) * 100,
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_weight_files_that_lie(llama: Path, content: bytes) -> None:
    (llama / WEIGHTS).write_bytes(content)
    refused(llama, r"model.safetensors: its weights are damaged")


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "names files outside its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names files outside its folder"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "or no safetensors"),
        ({"weight_map": {"a": "\x1b[31m.safetensors"}}, r"\?\[31m.safetensors is missing"),
        ({"weight_map": {"a": "a\x00.safetensors"}}, r"a\?.safetensors is missing"),
        ({"weight_map": {"a": 3}}, "is not a list of weight files"),
        ({"weight_map": ["a.safetensors"]}, "is not a list of weight files"),
        ({"weight_map": {}}, "is not a list of weight files"),
        ([], "is not understood"),
    ],
)
def test_an_index_that_leads_elsewhere(llama: Path, index: object, says: str) -> None:
    (llama / WEIGHTS).rename(llama.parent / WEIGHTS)
    (llama / INDEX).write_text(json.dumps(index))
    refused(llama, says)
    (llama / INDEX).write_text('{"weight_map": ' + "[" * 100_000)
    refused(llama, "index.json is not understood")


def test_what_is_no_file_is_not_waited_for(llama: Path) -> None:
    for name, says in ((WEIGHTS, "no model.safetensors in it"), (CONFIG, "has no config.json")):
        (llama / name).unlink()
        os.mkfifo(llama / name)
        refused(llama, says)
    (llama / WEIGHTS).unlink()
    (llama / WEIGHTS).mkdir()
    (llama / CONFIG).unlink()
    (llama / CONFIG).symlink_to(llama / CONFIG)
    refused(llama, "has no config.json")


def test_links_to_files_are_files_as_in_the_cache_of_the_hub(llama: Path) -> None:
    expected = values(llama)
    for name in (WEIGHTS, CONFIG):
        (llama / name).rename(llama.parent / f"blob-{name}")
        (llama / name).symlink_to(llama.parent / f"blob-{name}")
    assert torch.equal(values(llama), expected)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_are_not_opened(llama: Path, suffix: str) -> None:
    (llama / WEIGHTS).rename(llama / f"model{suffix}")
    refused(llama, "only pickled weights")


def test_a_model_larger_than_the_machine_is_refused_before_it_takes_memory(
    tmp_path: Path, saved: dict[str, Path]
) -> None:
    shutil.copy(saved["llama"] / CONFIG, tmp_path)
    configure(tmp_path, vocab_size=10**13)
    with pytest.raises(SaeError, match=r"takes [\d,]+ GB, this machine has [\d,]+ GB; `harvest.dtype = bfloat16`"):
        LanguageModel.boot(f"random:{tmp_path}", device="cpu")
