"""Dictionaries that come from other tools and go to them, as one types it: `sae import` and `sae export`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.command_line import done, sae
from support.small_formats import dictionary_learning
from support.small_models import small_stages
from transformers import GPT2Config, GPT2LMHeadModel

from sae.cache import activations, tokens
from sae.cache.store.manifest import Windows
from sae.pipeline import formats
from sae.pipeline.commands import bars

SMALL = "--set train.log_every=2 --set train.checkpoint_every=3 --batch 64 --steps 6 --d-sae 24"
TOPK = f"{SMALL} --k 4 --activations model-1.mlp_out"
FIGURES = ("rows", "fvu", "l0", "ce_spliced", "dead_fraction", "mse")


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[pytest.MonkeyPatch]:
    with small_stages() as patch:
        patch.setattr(tokens, "CHUNK_TOKENS", 1024)
        patch.setattr(activations, "CHUNK_ROWS", 512)
        patch.setattr(activations, "WINDOWS", Windows(512, 2048))
        patch.setattr(bars, "QUIET_SECONDS", float("inf"))
        yield patch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, small: pytest.MonkeyPatch) -> Path:
    """Rows of two sites of a small model, a judged dictionary of one of them, a transcoder of both."""
    home = tmp_path_factory.mktemp("world")
    small.chdir(home)
    small.setenv("SAE_CACHE", str(home / "cache"))
    small.setenv("SAE_RUNS", str(home / "runs"))
    words = Path(__file__).read_text(encoding="utf-8").split()
    documents = [" ".join(words[i : i + 60]) for i in range(0, 900, 60)] * 2
    (home / "text.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=16, n_layer=2, n_head=2, n_positions=32)).save_pretrained(
        "model"
    )
    done("tokenize --source text.txt --tokenizer tiny --context 16 --tokens all --validation 0.3 --workers 1")
    done("harvest --model model --layer 1 --site mlp_in,mlp_out")
    done(f"train {SMALL} --activations model-1.mlp_out --arch batchtopk --k 4 --name one")
    done(f"train {SMALL} --input 1.mlp_in --target 1.mlp_out --arch l1 --name across")
    done("eval one --tokens 64")
    return home


@pytest.fixture
def copy(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The world, to change as one likes."""
    shutil.copytree(world, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "copy" / "cache"))
    monkeypatch.setenv("SAE_RUNS", str(tmp_path / "copy" / "runs"))
    return tmp_path / "copy"


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "openmoss"])
def test_what_is_exported_and_imported_is_judged_alike(copy: Path, format: str) -> None:
    """Out of a run, into the tool's files, back into a run: the same figures, on the store of its hook point."""
    answer = done(f"export one --to {format} --out theirs --json")
    assert answer.json == {"path": str(copy / "theirs"), "format": format, "runs": ["one"]}
    assert "model is what a folder is called; --model-name says what others call it" in answer.err
    where = json.loads((copy / "runs/one/cfg.json").read_text())["metadata"]
    assert where["seqpos_slice"] == [1, None] and where["exclude_special_tokens"] == [4095]  # which became no row
    said = done("import theirs --name back --json").json
    assert said["format"] == format and said["arch"] == "threshold" and said["d_sae"] == 24
    assert said["activations"].startswith("model-1.mlp_out")
    before, after = (
        json.loads((copy / "runs/one/eval/eval.json").read_text()),
        done("eval back --tokens 64 --json").json,
    )
    for name in FIGURES:
        assert after[name] == pytest.approx(before[name], rel=1e-4), name
    (row, other) = done("compare one back --json").json["runs"]
    assert (row["format"], other["format"]) == (None, format) and other["sae.arch"] == "threshold"
    assert other["fvu"] == pytest.approx(row["fvu"], rel=1e-4) and other["train_fvu"] is None
    page = Path(done("report back --json").json["report"]).read_text()
    assert f"that <b>{format}</b> trained" in page and "It was trained by another tool." in page
    listed = {run["name"]: run["help"] for run in done("list --json").json["runs"]}
    assert listed["back"].startswith(f"imported from {format}, on model-1.mlp_out")


def test_a_transcoder_there_and_back(copy: Path) -> None:
    done("export across --to saelens --out theirs")
    said = done("import theirs --name back --json").json
    assert "model-1.mlp_in" in said["activations"] and "model-1.mlp_out" in said["activations"]
    before, after = (done(f"eval {name} --tokens 64 --json").json for name in ("across", "back"))
    for name in FIGURES:
        assert after[name] == pytest.approx(before[name], rel=1e-4), name


def test_an_import_is_no_training_to_go_on_with(copy: Path) -> None:
    done("export one --to saelens --out theirs")
    done("import theirs --name back")
    assert "back: was trained by another tool" in sae(f"train --resume --name back {TOPK}").complaint
    assert "back exists; choose another --name" in sae(f"train {TOPK} --name back").complaint
    assert "back exists; choose another --name" in sae("import theirs --name back").complaint
    assert "no unfinished run" in sae("train --resume").complaint
    done(f"train {SMALL} --activations model-1.mlp_out --sweep k=3,4")  # which looks through the runs there are
    done("compare")


def test_an_import_that_was_killed_is_taken_up(copy: Path) -> None:
    done("export one --to saelens --out theirs")
    done("import theirs --name back")
    os.remove("runs/back/sae_weights.safetensors")
    listed = {run["name"]: run["help"] for run in done("list --json").json["runs"]}
    assert listed["back"] == "not wholly imported; import it again"
    done("import theirs --name back")
    done("eval back --tokens 64")


def test_the_store_is_said_where_nothing_else_says_it(copy: Path) -> None:
    done("export one --to openmoss --out theirs")
    config = json.loads(Path("theirs/config.json").read_text())
    for hook, says in (
        ("blocks.0.hook_mlp_out", "no store of it in"),
        ("hook_embed", "is of hook_embed, no site of ours; name the store that it is judged on with --activations"),
        ("blocks.1.hook_mlp_in", "is of blocks.1.hook_mlp_in, no site of ours"),
    ):
        Path("theirs/config.json").write_text(json.dumps(config | {"hook_point_in": hook, "hook_point_out": hook}))
        shutil.copy("runs/one/config.json", "other.json")
        assert says in sae("import theirs --name back").complaint
        assert not Path("runs/back").exists()
    answer = done("import theirs --name back --activations model-1.mlp_out")
    assert "is of blocks.1.hook_mlp_out, and the dictionary of blocks.1.hook_mlp_in" in answer.err


def test_a_store_of_another_model_is_only_the_users_choice(copy: Path) -> None:
    done("export one --to dictionary_learning --out theirs --model-name EleutherAI/pythia-70m")
    config = json.loads(Path("theirs/config.json").read_text())
    assert config["trainer"]["lm_name"] == "EleutherAI/pythia-70m"
    complaint = sae("import theirs --name back").complaint
    assert "is of the model model, and the dictionary of EleutherAI/pythia-70m; if it is the one, say" in complaint
    assert "--activations model-1.mlp_out" in complaint
    done("import theirs --name back --activations model-1.mlp_out")


def test_rows_of_another_width(copy: Path) -> None:
    folder = dictionary_learning()["AutoEncoder"].put(copy)
    complaint = sae("import --name x --activations model-1.mlp_out", folder).complaint
    assert "its rows have 16 values, and" in complaint and not Path("runs/x").exists()
    assert "reconstructs what it reads; leave it out" in sae("import --name x --target y", folder).complaint


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("import nowhere --name x", "nowhere: is not a folder on this machine"),
        ("import text.txt --name x", "text.txt: holds no dictionary in a format that is known; those are"),
        ("import runs --name x", "runs: holds no dictionary in a format that is known"),
        (
            "import owner/name/folder --name x --offline",
            "owner/name/folder: is not a folder here, and on the hub: offline",
        ),
        ("import owner/name/../../x --name x --offline", "leads out of its repository"),
        ("import theirs --name ../x", "--name ../x: is not the name of a folder"),
        ("export nowhere --to saelens", "nowhere: no such run in"),
        ("export one --to nonesuch", "nonesuch: unknown format; those are circuit-tracer, dictionary_learning"),
        ("export one --to sparsify", "its latents are chosen by topk, these by threshold"),
        ("export one --to circuit-tracer", "it has transcoders alone, and one of these reconstructs what it reads"),
        ("export across --to dictionary_learning", "it has no transcoders"),
        ("export across --to circuit-tracer", "there is none of layer 0"),
        ("export one across --to saelens", "a folder of it holds one dictionary"),
        ("export one --to saelens --out cache", "cache: is there already"),
        ("export one --to saelens --out x.pt", "--out x.pt: would be a folder, and .pt is the name of a file"),
    ],
)
def test_bad_input(world: Path, command: str, says: str) -> None:
    answer = sae(command)
    assert answer.code == 2 and says in answer.complaint and answer.out == ""
    assert not list(world.glob("one-*")) and not (world / "runs" / "x").exists()


def test_pages_of_latents_for_neuronpedia(copy: Path) -> None:
    assert (
        "no latent has been looked up yet; run `sae report one` first" in sae("export one --to neuronpedia").complaint
    )
    done("report one")
    features = json.loads(Path("runs/one/eval/features.json").read_text())
    said = done("export one --to neuronpedia --out pages --model-name gpt2-small --json").json
    assert said["files"] == ["batch-0.json"] and said["format"] == "neuronpedia"
    batch = json.loads(Path("pages/batch-0.json").read_text())
    assert {key: batch[key] for key in ("model_id", "layer", "sae_set", "sae_id_suffix")} == {
        "model_id": "gpt2-small", "layer": 1, "sae_set": "mlp_out-one", "sae_id_suffix": None,
    }  # fmt: skip
    shown = {one["latent"]: one for one in features["features"]}
    assert [one["feature_index"] for one in batch["features"]] == sorted(shown)
    W_dec = formats.read("runs/one").dictionary.W_dec
    for page in batch["features"]:
        latent = page["feature_index"]
        assert page["frac_nonzero"] == shown[latent]["density"]
        torch.testing.assert_close(torch.tensor(page["vector"]), W_dec[latent], rtol=1e-4, atol=1e-5)
        first, best = page["activations"][0], shown[latent]["top"][0]
        assert first["values"][first["qualifying_token_index"]] == best["value"]
        assert len(first["tokens"]) == len(first["values"]) == len(best["tokens"])
        words = b"".join(features["vocabulary"][str(token)].encode("latin-1") for token in best["tokens"])
        assert "".join(first["tokens"]) == words.decode()
        assert sum(page["freq_hist_data_bar_heights"]) == shown[latent]["fired"]
    assert "pages: is there already" in sae("export one --to neuronpedia --out pages").complaint
    assert "takes the pages of one run" in sae("export one across --to neuronpedia").complaint


def test_another_tools_folder_is_converted_without_a_run(copy: Path) -> None:
    folder = dictionary_learning()["AutoEncoderTopK"].put(copy)
    done("export --to sparsify --out theirs", folder)
    x = torch.randn(5, 12)
    assert formats.read("theirs").dictionary(x).allclose(formats.read(folder).dictionary(x), atol=1e-5)


def test_a_folder_of_another_tool_among_the_runs_is_none(copy: Path) -> None:
    """It is listed by none, breaks none, and is said to be what it is where it is named."""
    shutil.copytree(dictionary_learning()["AutoEncoder"].put(copy), "runs/learned")
    done("export one --to saelens --out runs/lens")
    for name, text in (
        ("nan", '{"lr": NaN, "steps": Infinity}'),
        ("training", '{"train": {"lr": 3}, "model": "x"}'),
        ("relu", '{"activations": "relu"}'),
    ):
        Path(f"runs/{name}").mkdir()
        Path(f"runs/{name}/config.json").write_text(text)
    assert {run["name"] for run in done("list --json").json["runs"]} == {"one", "across"}
    assert len(done("compare --json").json["runs"]) == 2
    done("report")
    for name in ("learned", "nan", "training", "relu"):
        for command in ("eval", "report"):
            answer = sae(f"{command} runs/{name}")
            assert answer.code == 2 and answer.err.count("\n") == 1
            assert f"runs/{name}: is another tool's folder, no run; `sae import runs/{name}`" in answer.complaint
        assert f"runs/{name} is another tool's folder; choose another" in sae(f"train {TOPK} --name {name}").complaint
        assert "is another tool's folder" in sae(f"train {TOPK} --resume --name {name}").complaint
    assert "no such run in" in sae("eval lens").complaint
