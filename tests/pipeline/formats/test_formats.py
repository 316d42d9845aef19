"""Other tools' folders, written by hand, read as the function their tool computes; and what is no dictionary."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.hostile import RAW, VALUES
from support.saes_kit import CASES, D, M, batches, made, one_thread, settings, train
from support.small_formats import D_OUT, K, Said, Tensors, numbers, one_line, rows
from torch import Tensor

from sae.cache.errors import NotFound, SaeError
from sae.cache.runs import Run
from sae.pipeline import formats
from sae.pipeline.commands.registry_listing import choices
from sae.pipeline.formats import FORMATS, Format, Metadata, saelens
from sae.pipeline.saes import create
from sae.pipeline.saes.encoder import Preactivations
from sae.pipeline.saes.inference import RULES, Formula, ReLURule, Rule
from sae.pipeline.saes.latents import Latents

single = pytest.fixture(autouse=True, scope="module")(one_thread)


def weights(*more: str, d_out: int = D) -> Tensors:
    """The tensors of SAELens' classes; `more` are of one number a latent."""
    shared = {"W_enc": numbers(D, M), "W_dec": numbers(M, d_out, seed=1), "b_dec": numbers(d_out, seed=2)}
    return shared | {name: 0.3 * numbers(M, seed=3 + i) for i, name in enumerate(more)}


def put(folder: Path, said: Any, tensors: Tensors, weights_name: str = "sae_weights.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(said))
    safetensors.torch.save_file(tensors, folder / weights_name)
    return folder


def described(architecture: str, **more: Any) -> Said:
    said = {
        "architecture": architecture, "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre",
                     "context_size": 128, "prepend_bos": True, "dataset_path": "a/b"},
    }  # fmt: skip
    return said | more


def by_saelens(said: Said, t: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    """(latents [B, m], reconstruction) as SAELens 6.54 computes them, a row at a time."""
    found = []
    for row in x:
        match said["normalize_activations"]:
            case "layer_norm":
                shift, scale = row.mean(), row.std() + 1e-5
            case "constant_norm_rescale":
                shift, scale = torch.zeros(()), row.norm() / D**0.5
            case _:
                shift, scale = torch.zeros(()), torch.ones(())
        centred = (row - shift) / scale - (t["b_dec"] if said["apply_b_dec_to_input"] else 0)
        p = torch.stack([centred @ column for column in t["W_enc"].T]) + t.get("b_enc", 0)
        f = torch.zeros(M)
        kind = said["architecture"].replace("skip_", "").removesuffix("_transcoder").replace("transcoder", "standard")
        weigh = t["W_dec"].norm(dim=1) if said.get("rescale_acts_by_decoder_norm") else torch.ones(M)
        best = (p * weigh).sort(descending=True).indices[: said.get("k", 0)].tolist()
        for i in range(M):
            if kind == "gated":
                gate, magnitude = p[i] + t["b_gate"][i], p[i] * t["r_mag"][i].exp() + t["b_mag"][i]
                f[i] = magnitude.clamp(min=0) if gate > 0 else 0
            elif kind == "topk":
                f[i] = (p * weigh)[i].clamp(min=0) if i in best else 0
            elif kind == "jumprelu":
                f[i] = p[i].clamp(min=0) if p[i] > t["threshold"][i] else 0
            else:
                f[i] = p[i].clamp(min=0)
        y = (f / weigh) @ t["W_dec"] + t["b_dec"]
        y = y + row @ t["W_skip"].T if "W_skip" in t else y
        found.append((f, y if "transcoder" in said["architecture"] else y * scale + shift))
    return torch.stack([f for f, _ in found]), torch.stack([y for _, y in found])


OUT: Said = {"d_out": D_OUT, "apply_b_dec_to_input": False}
FOLDERS: dict[str, tuple[Said, Tensors]] = {
    "standard": (described("standard"), weights("b_enc")),
    "not centred": (described("standard", apply_b_dec_to_input=False), weights("b_enc")),
    "layer norm": (described("standard", normalize_activations="layer_norm"), weights("b_enc")),
    "norm": (described("standard", normalize_activations="constant_norm_rescale"), weights("b_enc")),
    "folded": (described("standard", normalize_activations="expected_average_only_in"), weights("b_enc")),
    "heads": (described("standard", reshape_activations="hook_z"), weights("b_enc")),
    "topk": (described("topk", k=K), weights("b_enc")),
    "topk rescaled": (described("topk", k=K, rescale_acts_by_decoder_norm=True), weights("b_enc")),
    "jumprelu": (described("jumprelu"), weights("b_enc", "threshold")),
    "gated": (described("gated"), weights("b_gate", "b_mag", "r_mag")),
    "transcoder": (described("transcoder", **OUT), weights("b_enc", d_out=D_OUT)),
    "jumprelu transcoder": (described("jumprelu_transcoder", **OUT), weights("b_enc", "threshold", d_out=D_OUT)),
    "skip transcoder": (
        described("skip_transcoder", **OUT), weights("b_enc", d_out=D_OUT) | {"W_skip": 0.1 * numbers(D_OUT, D)},
    ),
    "jumprelu skip transcoder": (
        described("jumprelu_skip_transcoder", **OUT),
        weights("b_enc", "threshold", d_out=D_OUT) | {"W_skip": 0.1 * numbers(D_OUT, D)},
    ),
    "normed transcoder": (
        described("transcoder", normalize_activations="layer_norm", **OUT), weights("b_enc", d_out=D_OUT),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_of_saelens_is_the_function_saelens_computes(case: str, tmp_path: Path) -> None:
    said, tensors = FOLDERS[case]
    sae, metadata = formats.read(str(put(tmp_path / "it", said, tensors)))
    x = rows()
    latents, y = by_saelens(said, tensors, x)
    torch.testing.assert_close(sae.encode(x).dense(), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(sae.encode(x)), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), y, rtol=1e-4, atol=1e-4)
    assert (latents > 0).any() and (latents == 0).any()
    if case != "topk rescaled":
        torch.testing.assert_close(sae.W_dec, tensors["W_dec"])
    assert not sae.training and not any(parameter.requires_grad for parameter in sae.parameters())
    assert (sae.d_in, sae.d_sae, sae.d_out) == (D, M, y.shape[1])
    assert metadata == Metadata("gpt2-small", "blocks.8.hook_resid_pre", None, 128, True, "a/b")
    moved = sae.double()
    assert moved(x.double()).dtype == torch.float64


BEFORE: Said = {
    "d_in": D, "d_sae": M, "dtype": "float32", "model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8, "hook_point_head_index": None, "context_size": 128, "dataset_path": "a/b",
    "prepend_bos": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "now"),
    [
        ({}, described("standard")),
        ({"apply_b_dec_to_input": False, "normalize_activations": True}, FOLDERS["not centred"][0]),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, FOLDERS["topk"][0]),
        ({"architecture": "jumprelu", "activation_fn_str": "relu"}, FOLDERS["jumprelu"][0]),
    ],
)
def test_folders_of_saelens_before_version_6(more: Said, now: Said, tmp_path: Path) -> None:
    tensors = weights("b_enc", *(["threshold"] if now["architecture"] == "jumprelu" else []))
    sae, metadata = formats.read(put(tmp_path, BEFORE | more, tensors))
    torch.testing.assert_close(sae(rows()), by_saelens(now, tensors, rows())[1], rtol=1e-4, atol=1e-4)
    assert metadata == Metadata("gpt2-small", "blocks.8.hook_resid_pre", None, 128, True, "a/b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in weights("b_enc").items()}
    sae, _ = formats.read(put(tmp_path, described("standard", dtype=str(dtype)[6:]), tensors))
    expected = by_saelens(described("standard"), {name: t.float() for name, t in tensors.items()}, rows())[1]
    torch.testing.assert_close(sae(rows()), expected, rtol=1e-4, atol=1e-4)


def sparsify_folder() -> tuple[Said, Tensors]:
    said = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": M, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D,
    }  # fmt: skip
    tensors = {
        "encoder.weight": numbers(M, D), "encoder.bias": 0.3 * numbers(M), "W_dec": numbers(M, D, seed=1),
        "b_dec": numbers(D, seed=2),
    }  # fmt: skip
    return said, tensors


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("transcode", [False, True])
def test_a_folder_of_sparsify_is_the_function_sparsify_computes(transcode: bool, skips: bool, tmp_path: Path) -> None:
    said, t = sparsify_folder()
    said |= {"transcode": transcode, "skip_connection": skips}
    t |= {"W_skip": 0.1 * numbers(D, D, seed=4)} if skips else {}
    folder = put(tmp_path / "layers.5", said, t, "sae.safetensors")
    sae, metadata = formats.read(folder)
    assert metadata.hook == "layers.5" and sae.is_transcoder == transcode
    for row in rows():
        p = (t["encoder.weight"] @ (row if transcode else row - t["b_dec"]) + t["encoder.bias"]).clamp(min=0)
        top = p.topk(K)
        y = sum((v * t["W_dec"][i] for v, i in zip(top.values, top.indices, strict=True)), t["b_dec"])
        y = y + t["W_skip"] @ row if skips else y
        torch.testing.assert_close(sae(row[None])[0], y, rtol=1e-4, atol=1e-4)
    formats.write(sae, metadata, tmp_path / "again", "sparsify")
    again, _ = formats.read(tmp_path / "again")
    assert torch.equal(again(rows()), sae(rows()))


# What is written


@pytest.mark.parametrize("d_out", [None, D_OUT])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_architecture_is_written_and_read(case: Said, d_out: int | None, tmp_path: Path) -> None:
    sae = made(settings(case), d_out)
    train(sae, batches(d_out, 3), lr=1e-2)
    sae.eval()
    metadata = Metadata("m", "blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out" if d_out else None, 8, False, None)
    if d_out is not None and sae.rule.name in ("topk", "gated"):
        with pytest.raises(SaeError, match=f"saelens cannot say this dictionary: it has no {sae.rule.name} transcoder"):
            formats.write(sae, metadata, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    elif sae.rule.name in ("linear", "signed_topk"):
        for name in FORMATS:
            with pytest.raises(SaeError, match=f"{name} cannot say this dictionary"):
                formats.write(sae, metadata, tmp_path / "out", name)
            assert not (tmp_path / "out").exists()
    else:
        formats.write(sae, metadata, tmp_path / "out")
        again, said = formats.read(tmp_path / "out")
        torch.testing.assert_close(again(rows()), sae(rows()), rtol=1e-4, atol=1e-4)
        assert said == metadata
        with pytest.raises(SaeError, match="is there already"):
            formats.write(sae, metadata, tmp_path / "out")
    run = Run.create(tmp_path / "run", {"train": {}, "activations": {}})
    run.save_weights(*saelens.written(sae.formula(), metadata))  # where gated transcoders are kept, too
    torch.testing.assert_close(formats.read(run.path).dictionary(rows()), sae(rows()), rtol=1e-4, atol=1e-4)


def test_a_topk_of_unit_rows_says_so(tmp_path: Path) -> None:
    """Numbers stay, and tools that scale rows by their norms take it."""
    cases = (("unit", True), ("free", True), ("none", False))  # free rows are written as unit ones
    for name, unit in cases:
        sae = made(settings({"arch": "topk", "decoder_norm": name}))
        train(sae, batches(None, 3), lr=1e-2)
        formats.write(sae, Metadata(), tmp_path / name)
        said = json.loads((tmp_path / name / "cfg.json").read_text())
        assert said["rescale_acts_by_decoder_norm"] is unit
        assert torch.equal(formats.read(tmp_path / name).dictionary.W_dec, sae.formula().W_dec)


def test_a_jumprelu_subtracts_nothing_where_it_is_exported(tmp_path: Path) -> None:
    """The same five tensors are right for tools that subtract b_dec and for those that never do."""
    sae = made(settings({"arch": "jumprelu"})).eval()
    with torch.no_grad():
        sae.b_dec.copy_(numbers(D))
    assert sae.b_dec_applied_to_input
    formats.write(sae, Metadata(), tmp_path / "x")
    t, said = safetensors.torch.load_file(tmp_path / "x" / "sae_weights.safetensors"), tmp_path / "x" / "cfg.json"
    assert json.loads(said.read_text())["apply_b_dec_to_input"] is False
    p = rows() @ t["W_enc"] + t["b_enc"]
    torch.testing.assert_close((p * (p > t["threshold"])).relu() @ t["W_dec"] + t["b_dec"], sae(rows()).detach())


def test_which_tokens_became_rows_and_how_heads_stand_is_said(tmp_path: Path) -> None:
    sae = made(settings({"arch": "l1"}))
    metadata = Metadata("gpt2", "blocks.1.attn.hook_z", None, 128, True, "a/b", (1, None), (198, 50256))
    formats.write(sae, metadata, tmp_path / "x")
    said = json.loads((tmp_path / "x" / "cfg.json").read_text())
    assert said["reshape_activations"] == "hook_z"
    assert said["metadata"]["seqpos_slice"] == [1, None]
    assert said["metadata"]["exclude_special_tokens"] == [198, 50256]
    assert formats.read(tmp_path / "x").metadata == metadata
    for slice_, expected in (([None], None), ([5], (0, 5)), ([2, 9], (2, 9)), ([None, None], None)):
        said["metadata"]["seqpos_slice"] = slice_
        (tmp_path / "x" / "cfg.json").write_text(json.dumps(said))
        assert saelens.metadata_of(said["metadata"]).positions == expected


def test_what_sparsify_has_no_words_for(tmp_path: Path) -> None:
    for case, said in (
        ({"arch": "l1"}, "these by relu"),
        ({"arch": "topk", "input_scale": "per_token"}, "scaling of each row"),
    ):
        with pytest.raises(SaeError, match=said):
            formats.write(create(settings(case), D), Metadata(), tmp_path / "x", "sparsify")
    with pytest.raises(SaeError, match="it gives as many values as it takes, and these are 7 and 12"):
        formats.write(create(settings({"arch": "topk"}), D, D_OUT), Metadata(), tmp_path / "x", "sparsify")
    with pytest.raises(SaeError, match=r"nonesuch: unknown format; those are .*, saelens, sparsify"):
        formats.write(create(settings({"arch": "l1"}), D), Metadata(), tmp_path / "x", "nonesuch")


# Adding one


@pytest.fixture
def forgotten() -> Iterator[None]:
    formats_before, rules_before = dict(FORMATS), dict(RULES)
    yield
    for registry, before in ((FORMATS, formats_before), (RULES, rules_before)):
        registry.clear()
        registry.update(before)  # type: ignore[arg-type]


@pytest.mark.usefixtures("forgotten")
def test_a_format_of_a_test_file_is_seen_everywhere(tmp_path: Path) -> None:
    @formats.register
    class Plain(Format):
        """Numbers in a text file. Made for this test."""

        name = "plain"

        def detects(self, folder: Path) -> bool:
            return (folder / "numbers.txt").is_file()

        def formula(self, folder: Path) -> tuple[Formula, Metadata]:
            scale = float((folder / "numbers.txt").read_text())
            return Formula(scale * torch.eye(D), torch.zeros(D), torch.eye(D), torch.zeros(D), ReLURule()), Metadata()

        def write(self, formula: Formula, metadata: Metadata, folder: Path) -> None:
            folder.mkdir()
            (folder / "numbers.txt").write_text(str(formula.W_enc[0, 0].item()))

    assert {"name": "plain", "help": "Numbers in a text file"} in choices([])["formats"]
    (tmp_path / "numbers.txt").write_text("2.5")
    sae, _ = formats.read(tmp_path)
    torch.testing.assert_close(sae(rows()), 2.5 * rows().relu())
    formats.write(sae, Metadata(), tmp_path / "again", "plain")
    assert formats.read(tmp_path / "again").dictionary(rows()).equal(sae(rows()))
    (tmp_path / "numbers.txt").write_text("many")
    with pytest.raises(SaeError, match="is not a plain dictionary that can be read: could not convert"):
        formats.read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SaeError, match=r"those are .*, plain, .*saelens, sparsify"):
        formats.read(tmp_path / "empty")


@pytest.mark.usefixtures("forgotten")
def test_a_rule_of_an_architectures_own_is_kept_in_a_run_folder(tmp_path: Path) -> None:
    @dataclass(frozen=True, eq=False)
    class Squared(Rule):
        """f = gain ReLU(p)^2."""

        name = "squared"
        gain: Tensor

        def __call__(self, pre: Preactivations) -> Latents:
            found = pre.above(0.0)
            gains = found.per_entry(self.gain)
            return found.map(lambda p: gains * p.relu().square())

    globals()["Squared"] = Squared
    formula = Formula(*(weights("b_enc")[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")), Squared(numbers(M)))
    tensors, said = saelens.written(formula, Metadata())
    assert said["architecture"] == "squared" and set(tensors) == {"W_enc", "b_enc", "W_dec", "b_dec", "gain"}
    again = saelens.formula_of(tensors, said)
    assert isinstance(again.rule, Squared) and torch.equal(again.rule.gain, numbers(M))


# What is none


REFUSED: list[tuple[str, Said, str]] = [
    ("standard", {"architecture": "matching_pursuit"}, 'architecture is "matching_pursuit"; read are'),
    ("standard", {"architecture": ["standard"]}, "architecture is"),
    ("standard", {"d_in": D + 1}, rf"W_enc has shape \[{D}, {M}\] where \[{D + 1}, {M}\] is wanted"),
    ("standard", {"d_in": 10**15}, "d_in is 1000000000000000, not a whole number from 1"),
    ("standard", {"d_sae": 0}, "d_sae is 0"),
    ("standard", {"d_sae": float(M)}, "d_sae is 32.0"),
    ("standard", {"apply_b_dec_to_input": "yes"}, 'apply_b_dec_to_input is "yes", not true or false'),
    ("standard", {"normalize_activations": "covariance_whitening"}, 'normalize_activations is "covariance_whitening"'),
    ("standard", {"metadata": []}, r"metadata is \[\], not an object"),
    ("standard", {"metadata": {"context_size": "x"}}, "context_size is"),
    ("topk", {"k": None}, "k is null, not a whole number from 1 to 32"),
    ("topk", {"k": M + 1}, "k is 33, not a whole number from 1 to 32"),
    ("transcoder", {"apply_b_dec_to_input": True}, "a transcoder's b_dec is of its outputs"),
    ("transcoder", {"d_out": D}, "W_dec has shape"),
    ("transcoder", {"architecture": "skip_transcoder"}, "tensors lack W_skip"),
    ("skip transcoder", {"normalize_activations": "layer_norm"}, "which is not read together"),
    ("standard", {"metadata": {"seqpos_slice": [1, 2, 3]}}, "seqpos_slice is"),
    ("standard", {"metadata": {"seqpos_slice": [-1]}}, "seqpos_slice is"),
    ("standard", {"metadata": {"exclude_special_tokens": ["a"]}}, "exclude_special_tokens is"),
]


@pytest.mark.parametrize(("case", "change", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_settings_that_are_none(case: str, change: Said, said: str, tmp_path: Path) -> None:
    settings, tensors = FOLDERS[case]
    put(tmp_path, settings | change, tensors)
    with pytest.raises(SaeError, match=f"is not a saelens dictionary that can be read: .*{said}"):
        formats.read(tmp_path)


def spoilt() -> dict[str, Callable[[Tensors], Tensors]]:
    inf, nan = float("inf"), float("nan")
    return {
        "lack b_enc": lambda t: {name: tensor for name, tensor in t.items() if name != "b_enc"},
        "unknown tensors W_skip": lambda t: t | {"W_skip": numbers(D, D)},
        "W_dec has shape": lambda t: t | {"W_dec": t["W_dec"].T.contiguous()},
        "b_enc has shape []": lambda t: t | {"b_enc": torch.zeros(())},
        "b_dec has shape [0]": lambda t: t | {"b_dec": torch.zeros(0)},
        "W_enc is of type int64": lambda t: t | {"W_enc": torch.ones(D, M, dtype=torch.int64)},
        "b_enc is of type bool": lambda t: t | {"b_enc": torch.ones(M, dtype=torch.bool)},
        "W_enc holds numbers": lambda t: t | {"W_enc": t["W_enc"].index_fill(0, torch.tensor([1]), nan)},
        "b_dec holds numbers": lambda t: t | {"b_dec": torch.full((D,), inf)},
        "b_enc holds numbers that are not finite, or too large": lambda t: (
            t | {"b_enc": torch.full((M,), 1e300, dtype=torch.float64)}
        ),
    }  # fmt: skip


@pytest.mark.parametrize("said", spoilt())
def test_tensors_that_are_none(said: str, tmp_path: Path) -> None:
    settings, tensors = FOLDERS["standard"]
    put(tmp_path, settings, spoilt()[said]({name: tensor.clone() for name, tensor in tensors.items()}))
    assert said in one_line(lambda: formats.read(tmp_path))


@pytest.mark.parametrize("tool", ["standard", "gated", "topk", "transcoder", "before", "sparsify"])
def test_whatever_a_setting_says_is_read_or_refused(tool: str, tmp_path: Path) -> None:
    """Every key, with every odd value and without one; a reading that succeeds gives finite numbers."""
    name = "sae.safetensors" if tool == "sparsify" else "sae_weights.safetensors"
    settings, tensors = (
        sparsify_folder() if tool == "sparsify" else (BEFORE, weights("b_enc")) if tool == "before" else FOLDERS[tool]
    )
    put(tmp_path, settings, tensors, name)
    keys = [(key,) for key in settings] + [("metadata", key) for key in settings.get("metadata", {})]
    tried, lines = 0, []
    for key in keys:
        for value in [*VALUES, ...]:
            said = json.loads(json.dumps(settings))
            inside = said if len(key) == 1 else said[key[0]]
            inside.pop(key[-1]) if value is ... else inside.__setitem__(key[-1], value)
            (tmp_path / "cfg.json").write_text(json.dumps(said))
            tried += 1
            try:
                found = formats.read(tmp_path).dictionary
            except SaeError as error:
                lines.append(str(error))
            else:
                assert found(rows(2)).isfinite().all()
    assert [line for line in lines if "\n" in line or len(line) >= 600] == []
    assert 0 < len(lines) < tried


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("how", RAW)
def test_files_that_are_something_else(name: str, how: str, tmp_path: Path) -> None:
    put(tmp_path, *FOLDERS["standard"])
    (tmp_path / name).write_bytes(RAW[how])
    assert str(tmp_path) in one_line(lambda: formats.read(tmp_path))


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    put(tmp_path, *FOLDERS["standard"])
    torch.save(FOLDERS["standard"][1], tmp_path / "sae_weights.safetensors")
    assert "is it whole" in one_line(lambda: formats.read(tmp_path))
    (tmp_path / "other").mkdir()
    torch.save(FOLDERS["standard"][1], tmp_path / "other" / "ae.pt")  # without its config.json
    assert "holds no dictionary in a format that is known" in one_line(lambda: formats.read(tmp_path / "other"))


def test_weights_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *FOLDERS["standard"])
    monkeypatch.setattr("sae.pipeline.formats.files.memory", lambda: 1000)
    assert "more than the memory" in one_line(lambda: formats.read(tmp_path))


def test_places_without_a_dictionary(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", "", "a" * 5000, "a\0b", "s3://bucket/x", tmp_path / "cfg.json"):
        (tmp_path / "cfg.json").write_text("{}")
        one_line(lambda path=path: formats.read(path))  # type: ignore[misc]
    with pytest.raises(NotFound, match="is not a folder on this machine"):
        formats.read(tmp_path / "nothing")
    for name in ("cfg.json", "sae_weights.safetensors"):
        folder = put(tmp_path / name.replace(".", "-"), *FOLDERS["standard"])
        (folder / name).unlink()
        (folder / name).mkdir()
        one_line(lambda folder=folder: formats.read(folder))  # type: ignore[misc]
        (folder / name).rmdir()
        os.mkfifo(folder / name)
        one_line(lambda folder=folder: formats.read(folder))  # type: ignore[misc]


def test_cut_and_changed_weights_of_ours(tmp_path: Path) -> None:
    formats.write(made(settings({"arch": "topk"})), Metadata(), tmp_path / "x")
    path = tmp_path / "x" / "sae_weights.safetensors"
    data = path.read_bytes()
    for changed in (data[:-4], data + b"\0", data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(changed)
        assert "is it whole" in one_line(lambda: formats.read(tmp_path / "x"))
