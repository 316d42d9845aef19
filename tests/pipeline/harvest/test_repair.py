"""Damage of every kind to every kind of file: verify names it, repair mends it, and every byte is what it was."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command_line import Answer, done, sae
from support.small_models import small_stages
from support.small_stores import files
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from sae.cache import catalogue, tokens
from sae.cache.activations import ActivationStore
from sae.cache.disk.durable import write_atomic, write_in
from sae.cache.disk.locks import Lock
from sae.cache.errors import SaeError
from sae.cache.store.head import RECIPE
from sae.cache.store.manifest import MANIFEST, Manifest, Window, read_line
from sae.cache.store.notes import write_note
from sae.cache.tokens import VOCABULARY
from sae.cache.upkeep import repair
from sae.cache.upkeep.damage import inspect_damage, verify
from sae.pipeline.commands import bars
from sae.pipeline.commands.cache_verify import inspect_stores, mend
from sae.pipeline.harvest import repair as harvest_repair
from sae.pipeline.language_model import LanguageModel, loading
from sae.pipeline.runtime import network
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Silent

Change = Callable[[bytes], bytes | None]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


CHANGES: dict[str, Change] = {
    "flipped": flipped,
    "truncated": lambda data: data[:-1],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "deleted": lambda data: None,
}


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[pytest.MonkeyPatch]:
    with small_stages() as patch:
        patch.setattr(tokens, "CHUNK_TOKENS", 64)
        patch.setattr(bars, "QUIET_SECONDS", float("inf"))
        yield patch


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a model and a cache of both: tokens of two splits, rows in two codecs."""
    home = tmp_path_factory.mktemp("made")
    words = (Path(__file__).parents[3] / "LICENSE").read_text(encoding="utf-8").split()
    documents = [" ".join(words[i : i + 15]) for i in range(0, 165, 15)]
    (home / "text.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    torch.manual_seed(1)
    shape = GPT2Config(vocab_size=4096, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(shape).save_pretrained(home / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("SAE_CACHE", str(home / "cache"))
        done("tokenize --source text.txt --tokenizer tiny --context 16 --tokens all --validation 0.2 --workers 1")
        for codec in ("int8", "bfloat16"):
            done(f"harvest --model model --layer 1 --site mlp_out --codec {codec} --set harvest.batch_tokens=80")
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "copy" / "cache"))
    for store in (tmp_path / "copy" / "cache").glob("*/*"):  # the hints still lead to where all of it was made
        assert str(made) in (store / "hints.json").read_text()
    return tmp_path / "copy"


def store_of(home: Path, kind: str, end: str = "") -> Path:
    """The training store of a kind."""
    found = [path for path in (home / "cache" / kind).iterdir() if "valid" not in path.name and end in path.name]
    assert len(found) == 1, found
    return found[0]


def everything(home: Path) -> dict[str, dict[str, bytes]]:
    return {path.name: files(path) for path in sorted((home / "cache").glob("*/*"))}


def change(path: Path, how: Change) -> None:
    data = how(path.read_bytes())
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)


def expect_mended(home: Path, made: Path, *named: Path) -> Answer:
    """Verify says what is wrong with exit code 3; repaired, every file of every store is what it was."""
    before = everything(home)
    answer = sae("cache verify --json")
    assert answer.code == 3
    assert [line.split(":")[0] for line in answer.json["damage"]] == [str(path) for path in named]
    assert everything(home) == before, "looking changes nothing"
    answer = done("cache verify --repair --json")
    assert [line.split(":")[0] for line in answer.json["damage"]] == [str(path) for path in named]
    assert everything(home) == everything(made)
    return answer


ARRAYS = [
    ("activations", "int8", "rows/c/0/0"),
    ("activations", "int8", "rows/c/7/0"),
    ("activations", "int8", "row_scale/c/2"),
    ("activations", "int8", "row_norm/c/1"),
    ("activations", "int8", "position/c/5"),
    ("activations", "int8", "col_mean/c/0"),
    ("activations", "int8", "col_scale/c/0"),
    ("activations", "bfloat16", "rows/c/4/0"),
    ("activations", "bfloat16", "col_mean/c/0"),
    ("tokens", "", "tokens/c/0/0"),
    ("tokens", "", "tokens/c/3/0"),
    ("tokens", "", "document/c/1/0"),
    ("tokens", "", "length/c/2"),
    ("tokens", "", VOCABULARY),
]


@pytest.mark.parametrize(("kind", "codec", "name"), ARRAYS, ids=[f"{c or k}-{n}" for k, c, n in ARRAYS])
def test_a_damaged_file(home: Path, made: Path, kind: str, codec: str, name: str) -> None:
    path = store_of(home, kind, codec) / name
    change(path, CHANGES["deleted" if ARRAYS.index((kind, codec, name)) % 2 else "flipped"])
    answer = expect_mended(home, made, path)
    assert answer.json["repaired"] == [
        {"key": path.relative_to(home).parts[2], "files": [name], "replaced_windows": []}
    ]


@pytest.mark.parametrize("how", ["truncated", "empty", "longer"])
def test_other_damage(home: Path, made: Path, how: str) -> None:
    path = store_of(home, "activations", "int8") / "rows/c/3/0"
    change(path, CHANGES[how])
    expect_mended(home, made, path)


@pytest.mark.parametrize(
    ("name", "how"), [("zarr.json", "deleted"), ("rows/zarr.json", "flipped"), ("col_mean/zarr.json", "truncated")]
)
def test_metadata_needs_no_model(home: Path, made: Path, name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModel, "boot", None)
    shutil.rmtree(home / "cache" / "tokens")
    path = store_of(home, "activations", "int8") / name
    change(path, CHANGES[how])
    answer = sae("cache verify --json")
    assert answer.code == 3 and [line.split(":")[0] for line in answer.json["damage"]] == [str(path)]
    assert done("cache verify --repair --json").json["repaired"][0]["files"] == [name]
    assert files(path.parents[name.count("/")]) == everything(made)[path.relative_to(home).parts[2]]


# --- the manifest and the recipe --------------------------------------------------------------------------------------


def without_batches(manifest: bytes) -> list[Window]:
    """Windows of a manifest, but for the size of the batches they were computed in."""
    lines = [read_line(line) for line in manifest.splitlines()]
    windows = [line for line in lines if isinstance(line, Window)]
    for window in windows:
        window.notes.get("made", {}).pop("contexts", None)
    return windows


def with_lines(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))


LINES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "first": lambda lines: [flipped(lines[0]), *lines[1:]],
    "middle": lambda lines: [*lines[:2], flipped(lines[2]), *lines[3:]],
    "two": lambda lines: [*lines[:1], flipped(lines[1]), flipped(lines[2]), *lines[3:]],
    "last": lambda lines: [*lines[:-2], flipped(lines[-2]), lines[-1]],
    "end": lambda lines: [*lines[:-1], flipped(lines[-1])],
    "last and end": lambda lines: [*lines[:-2], flipped(lines[-2]), flipped(lines[-1])],
    "all": lambda lines: [flipped(line) for line in lines],
    "joined": lambda lines: [lines[0], lines[1].replace(b"\n", b" "), *lines[2:]],
    "cut in two": lambda lines: [lines[0], lines[1][:50] + b"\n" + lines[1][51:], *lines[2:]],
    "repeated": lambda lines: [*lines[:2], lines[1], *lines[2:]],
    "left out": lambda lines: [*lines[:2], *lines[3:]],
    "out of order": lambda lines: [lines[1], lines[0], *lines[2:]],
    "gone": lambda lines: lines[:-3],
    "all gone": lambda lines: [],
}


# what becomes of the lines is the same for both kinds; what has to be made again is not
BOTH = [("tokens", how) for how in LINES] + [
    ("activations", how) for how in ("first", "two", "end", "last and end", "all", "gone")
]


@pytest.mark.parametrize(("kind", "how"), BOTH)
def test_damaged_lines(home: Path, made: Path, kind: str, how: str) -> None:
    path = store_of(home, kind, "int8" if kind == "activations" else "") / MANIFEST
    with_lines(path, LINES[how])
    answer = sae("cache verify --json")
    assert answer.code == 3 and {line.split(":")[0] for line in answer.json["damage"]} == {str(path)}
    answer = done("cache verify --repair --json")
    assert answer.json["repaired"][0]["files"] == [MANIFEST]
    assert answer.json["repaired"][0]["replaced_windows"] == []
    if kind == "activations" and how.startswith("all"):  # then nothing says how large the batches were
        original = everything(made)[path.parent.name][MANIFEST]
        assert without_batches(path.read_bytes()) == without_batches(original)
        path.write_bytes(original)
    assert everything(home) == everything(made)


def test_damaged_lines_and_files_at_once(home: Path, made: Path) -> None:
    """Tokens are mended before the activations that are made of them."""
    rows, tokens = store_of(home, "activations", "int8"), store_of(home, "tokens")
    with_lines(rows / MANIFEST, LINES["middle"])
    with_lines(tokens / MANIFEST, LINES["first"])
    for path in (rows / "rows/c/0/0", rows / "rows/c/3/0", rows / "rows/zarr.json", tokens / "tokens/c/2/0"):
        path.unlink()
    (rows / "row_scale/c/5").write_bytes(b"")
    answer = sae("cache verify --json")
    # what has no line cannot be checked, and zarr.json only against a whole manifest
    assert answer.code == 3
    assert [line.split(":")[0].removeprefix(str(home / "cache")) for line in answer.json["damage"]] == [
        f"/tokens/{tokens.name}/{MANIFEST}",
        f"/activations/{rows.name}/{MANIFEST}",
        f"/tokens/{tokens.name}/tokens/c/2/0",
        f"/activations/{rows.name}/rows/c/0/0",
        f"/activations/{rows.name}/row_scale/c/5",
    ]
    done("cache verify --repair")
    assert everything(home) == everything(made)


def test_an_open_store_stays_open(home: Path) -> None:
    """A lost last line of a store that was to grow: nothing says that its source had ended."""
    path = store_of(home, "activations", "int8") / MANIFEST
    with_lines(path, lambda lines: [*lines[:3]])
    for name in ("rows/c/7/0", "row_scale/c/7", "row_norm/c/7", "position/c/7"):
        (path.parent / name).unlink()
    windows = [read_line(line) for line in path.read_bytes().splitlines()]
    store = ActivationStore(path.parent, Manifest(tuple(w for w in windows if isinstance(w, Window))))
    for name, data in store.metadata().items():
        write_atomic(path.parent / name, data)
    whole = path.read_bytes()
    with_lines(path, LINES["end"])
    done("cache verify --repair")
    assert path.read_bytes() == whole
    assert ActivationStore(path.parent).n_rows == 128


@pytest.mark.parametrize("how", ["flipped", "empty", "longer", "deleted"])
def test_a_damaged_recipe(home: Path, made: Path, how: str) -> None:
    """The Zarr group says it, too."""
    path = store_of(home, "activations", "int8") / RECIPE
    change(path, CHANGES[how])
    assert str(path) in sae("cache verify").complaint
    assert done("cache verify --repair --json").json["repaired"] == [
        {"key": path.parent.name, "files": [RECIPE], "replaced_windows": []}
    ]
    assert everything(home) == everything(made)


def test_what_a_store_is_is_gone(home: Path) -> None:
    folder = store_of(home, "activations", "int8")
    (folder / RECIPE).write_text("{")
    for content in ("{", '{"attributes": {"kind": "activations", "recipe": {"a": 1}}}'):
        (folder / "zarr.json").write_text(content)
        answer = sae("cache verify --repair")
        assert answer.code == 3
        assert (
            answer.complaint
            == f"{folder / RECIPE}: is not readable as a recipe (not JSON); remove the store and make it again"
        )


# --- what it costs, and what cannot be --------------------------------------------------------------------------------


def test_only_damaged_windows_are_made_again(home: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    compute = harvest_repair.compute

    def counted(source: Any, task: Any, *args: Any) -> Any:
        computed.append(task.window)
        return compute(source, task, *args)

    monkeypatch.setattr(harvest_repair, "compute", counted)
    store = store_of(home, "activations", "int8")
    (store / "rows/c/1/0").unlink()
    (store / "row_scale/c/1").unlink()
    (store / "position/c/4").unlink()
    done("cache verify --repair", store.name)
    assert computed == [1, 3]
    assert everything(home) == everything(made)


def test_one_store_at_a_time(home: Path, made: Path) -> None:
    one, other = store_of(home, "activations", "int8"), store_of(home, "activations", "bfloat16")
    (one / "rows/c/1/0").unlink()
    (other / "rows/c/1/0").unlink()
    done("cache verify --repair", one.name)
    assert files(one) == everything(made)[one.name] and not (other / "rows/c/1/0").exists()
    assert sae("cache verify").complaint.startswith(f"{other / 'rows/c/1/0'}: missing")


@pytest.mark.parametrize("codec", ["int8", "bfloat16"])
@pytest.mark.parametrize("window", [0, 2])
def test_another_machine(home: Path, made: Path, monkeypatch: pytest.MonkeyPatch, window: int, codec: str) -> None:
    """Rounding differs: the whole window is replaced, with its line; the others and the columns are as they were."""
    activations = LanguageModel.activations

    def rounded(self: LanguageModel, *args: object) -> dict[object, Tensor]:
        found = activations(self, *args)  # type: ignore[arg-type]
        return {point: value * (1 + 1e-3) for point, value in found.items()}

    monkeypatch.setattr(LanguageModel, "activations", rounded)
    store = store_of(home, "activations", codec)
    before = ActivationStore(store)
    name = before.arrays["rows"].chunk_file({0: 0, 2: 2}[window])
    (store / name).unlink()
    answer = done("cache verify --repair --json")
    assert answer.json["repaired"][0]["replaced_windows"] == [window]
    assert f"window {window} has other bytes than before, equal up to rounding" in answer.err
    after = ActivationStore(store)
    assert done("cache verify").out.endswith("every byte as committed\n")
    changed = [a.index for a, b in zip(after.manifest.windows, before.manifest.windows, strict=True) if a != b]
    assert changed == [window] and after.manifest.closed
    original = ActivationStore(store_of(made, "activations", codec))
    assert torch.equal(after.columns.mean, original.columns.mean)
    start, stop = after.manifest.windows[window].start, after.manifest.windows[window].stop
    rows, same = after.rows(0, after.n_rows), original.rows(0, original.n_rows)
    outside = torch.ones(len(rows), dtype=torch.bool)
    outside[start:stop] = False
    assert torch.equal(rows[outside], same[outside]) and not torch.equal(rows[start:stop], same[start:stop])
    np.testing.assert_array_equal(after.positions(0, len(rows)), original.positions(0, len(rows)))


def test_other_positions_are_another_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(home, "activations", "int8")
    (store / "rows/c/1/0").unlink()
    before = everything(home)
    arrays_of = harvest_repair.arrays_of

    def moved(*args: Any) -> Any:
        found = arrays_of(*args)
        for arrays in found.values():
            arrays["position"] = arrays["position"][:] + 1
            arrays["rows"] = -arrays["rows"][:]
        return found

    monkeypatch.setattr(harvest_repair, "arrays_of", moved)
    answer = sae("cache verify --repair")
    assert answer.code == 2
    assert answer.complaint.startswith(f"{store}: window 1 made again is another one than was committed")
    assert everything(home) == before


def test_the_tokens_are_gone(home: Path) -> None:
    store = store_of(home, "activations", "int8")
    (store / "rows/c/1/0").unlink()
    shutil.rmtree(home / "cache" / "tokens")
    before = everything(home)
    answer = sae("cache verify --repair")
    assert answer.code == 2
    assert answer.complaint == (
        f"{store}: cannot be repaired, since the tokens it was made from are not in {home / 'cache'}; tokenize the "
        "same text again (`sae tokenize`), or remove the store (`sae cache rm`)"
    )
    assert everything(home) == before


def test_the_model_has_moved(home: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(home, "activations", "int8")
    (store / "rows/c/1/0").unlink()
    hints = store / "hints.json"
    for where, says in (
        ("nowhere/model", f"{hints}: names the model nowhere/model; where that is right, repeat with --model and that"),
        ("https://nowhere/model", f"{hints}: names the model https://nowhere/model; where that is right, repeat with"),
        ("/nowhere", f"{hints}: the model is said to be at /nowhere, which is not a folder; say --model"),
    ):
        write_note(hints, {"model": where})  # as a stranger would
        assert sae("cache verify --repair").complaint.startswith(says)
    torch.manual_seed(2)
    shape = GPT2Config(vocab_size=4096, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(shape).save_pretrained(home / "other" / "model")
    answer = sae("cache verify --repair --model other/model")
    assert answer.code == 2
    assert answer.complaint.startswith("--model other/model: its weights differ from those")
    done("cache verify --repair --model model")
    assert everything(home) == everything(made)


@pytest.mark.parametrize(
    "model", ["other", "s3://bucket/model", "memory://model", "file:///model", "http://host/model", "org/model", "gpt2",
              "random:other", "/nowhere", "~root", "tiny"],
)  # fmt: skip
def test_a_model_that_hints_name_is_only_taken_for_what_the_recipe_pins(
    home: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Nothing is loaded and no host is asked."""
    store = store_of(home, "activations", "int8")
    (store / "rows/c/1/0").unlink()
    shutil.copytree(home / "model", home / "other")
    config = json.loads((home / "other" / "config.json").read_text())
    (home / "other" / "config.json").write_text(json.dumps(config | {"model_name": "another"}))
    write_note(store / "hints.json", {"model": str(home / "other") if model == "other" else model})
    before = everything(home)
    with monkeypatch.context() as patch:
        patch.setattr(network, "reachable", lambda *_: pytest.fail("the network was asked"))
        patch.setattr(loading, "_from_files", lambda *_: pytest.fail("a model was loaded"))
        answer = sae("cache verify --repair")
    assert answer.code == 2 and "--model" in answer.complaint, answer.err
    assert everything(home) == before


def test_a_model_of_the_right_digest_is_taken_wherever_it_is(home: Path, made: Path) -> None:
    store = store_of(home, "activations", "int8")
    (store / "rows/c/1/0").unlink()
    shutil.copytree(home / "model", home / "moved")
    write_note(store / "hints.json", {"model": str(home / "moved")})
    done("cache verify --repair")
    assert (store / "rows/c/1/0").read_bytes() == (store_of(made, "activations", "int8") / "rows/c/1/0").read_bytes()


@pytest.mark.parametrize(
    "hints",
    [{"tokenizer": name} for name in ("hf:org/model", "/dev", "s3://bucket", "gpt2", "tiny\\..", "folder")]
    + [{"source": name} for name in ("s3://bucket/a.txt", "memory://a.txt", "http://h/a.txt", "org/texts", "fineweb",
                                     "text.txt", "hub:org/texts", "/dev/zero", "pipe.txt")],
    ids=str,
)  # fmt: skip
def test_texts_and_tokenizers_that_hints_name_are_no_urls_and_no_pipes(
    home: Path, monkeypatch: pytest.MonkeyPatch, hints: dict[str, str]
) -> None:
    store = store_of(home, "tokens")
    (store / "tokens/c/1/0").unlink()
    os.mkfifo(home / "pipe.txt")
    (home / "folder").mkdir()
    (home / "folder" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    hints = {name: str(home / said) if said in ("pipe.txt", "folder") else said for name, said in hints.items()}
    write_note(store / "hints.json", {"tokenizer": "tiny", **hints})
    before = everything(home)
    monkeypatch.setattr(network, "reachable", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setattr(network, "snapshot", lambda *_, **__: pytest.fail("the hub was asked"))
    answer = sae("cache verify --repair")
    assert answer.code == 2 and everything(home) == before, answer.err
    assert all(f"--{option}" in answer.complaint for option in hints), answer.complaint


def test_the_text_has_changed(home: Path, made: Path) -> None:
    """Nothing is written, and the text is asked for."""
    store = store_of(home, "tokens")
    (store / "tokens/c/1/0").unlink()
    (store / "length/c/0").write_bytes(b"")
    (home / "other.txt").write_text((home / "text.txt").read_text() + " more")
    before = everything(home)
    answer = sae("cache verify --repair --source other.txt")
    assert answer.code == 2
    assert answer.complaint.startswith(f"--source other.txt: is not what {store.name} was made from (files differ)")
    assert everything(home) == before
    assert "no such file" in sae("cache verify --repair --source nothing.txt").complaint
    answer = sae("cache verify --repair --tokenizer gpt2 --offline")
    assert answer.code == 2 and "--tokenizer gpt2: " in answer.complaint
    (store / "hints.json").unlink()
    answer = sae("cache verify --repair")
    assert answer.complaint == f"{store}: where its text is now is not known; say it with --source"
    assert everything(home) == before
    done("cache verify --repair --source text.txt")
    assert everything(home) == everything(made)


def test_a_store_that_is_being_written(home: Path) -> None:
    store = store_of(home, "activations", "int8")
    (store / "rows/c/1/0").unlink()
    with Lock(store):
        answer = sae("cache verify --repair")
    assert answer.code == 2
    assert re.fullmatch(rf"{re.escape(str(store))}: process \d+ on .* is writing here; .*", answer.complaint)


def test_what_can_be_mended_is(home: Path, made: Path) -> None:
    """One store that cannot be mended does not keep the others from it."""
    one, other = store_of(home, "activations", "bfloat16"), store_of(home, "activations", "int8")
    (one / "rows/c/1/0").unlink()
    (other / "rows/c/1/0").unlink()
    with Lock(one):
        answer = sae("cache verify --repair --json")
    assert answer.code == 2 and [entry["key"] for entry in answer.json["repaired"]] == [other.name]
    assert files(other) == everything(made)[other.name]


def test_stopped_at_every_write_and_repeated(home: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair that ends anywhere is no harm, and the next one finishes it."""
    store = store_of(home, "activations", "int8")
    for stop_at in range(6):
        with_lines(store / MANIFEST, LINES["middle"])
        for name in ("rows/c/1/0", "row_scale/c/1", "rows/c/2/0", "rows/zarr.json"):
            (store / name).unlink(missing_ok=True)
        left = [stop_at]

        def stopping(folder: Path, name: str, data: bytes, left: list[int] = left) -> None:
            if not left[0]:
                raise SaeError("stopped")
            left[0] -= 1
            write_in(folder, name, data)

        with monkeypatch.context() as patch:
            patch.setattr(repair, "write_in", stopping)
            assert sae("cache verify --repair", store.name).code == (2 if stop_at < 5 else 0)
        done("cache verify --repair", store.name)
        assert everything(home) == everything(made)


def test_salvaging_a_whole_store_is_opening_it(home: Path) -> None:
    for store in catalogue.stores(home / "cache"):
        found = inspect_damage(store.path)
        assert found.store.manifest == store.manifest and not found.lost and not found.lines
        assert sum(found.files.values()) == store.manifest.stored_bytes + sum(map(len, store.metadata().values()))


# --- any damage at all ------------------------------------------------------------------------------------------------


@st.composite
def damage(draw: st.DrawFn, whole: dict[str, bytes]) -> dict[str, bytes | None]:
    """Some files of a store, changed or gone; recipe.json or zarr.json is spared."""
    spared = draw(st.sampled_from([RECIPE, "zarr.json"]))
    names = draw(st.sets(st.sampled_from(sorted(whole.keys() - {spared})), min_size=1, max_size=6))
    changed: dict[str, bytes | None] = {}
    for name in sorted(names):
        data, how = whole[name], draw(st.sampled_from(["flip", "cut", "line", "gone"]))
        place = draw(st.integers(0, max(0, len(data) - 1)))
        lines = data.splitlines(keepends=True)
        changed[name] = {
            "flip": data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :],
            "cut": data[:place],
            "line": b"".join(line for line in lines if line != draw(st.sampled_from(lines))),
            "gone": None,
        }[how]
    return changed


@pytest.fixture(scope="module")
def workbench(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that is mended again and again."""
    home = tmp_path_factory.mktemp("workbench") / "copy"
    shutil.copytree(made, home)
    return home


@pytest.mark.parametrize("kind", ["tokens", "activations"])
def test_any_damage_is_mended(workbench: Path, kind: str) -> None:
    """Several files at once, in any way: found and made whole by one repair, or nothing says how it was made."""
    root = workbench / "cache"
    store = store_of(workbench, kind, "bfloat16" if kind == "activations" else "")
    whole = files(store)

    @settings(deadline=None, max_examples=12)
    @given(damage(whole))
    def check(changed: dict[str, bytes | None]) -> None:
        try:
            for name, data in changed.items():
                (store / name).unlink() if data is None else (store / name).write_bytes(data)
            found, hopeless, restored = inspect_stores(root, None, repair=True)
            assert not hopeless
            findings = verify(found, lambda size: None)
            mended, problems = mend(found, findings, Origins(root, device="cpu"), Silent())
            assert not problems and bool(mended or restored) == any(whole[name] != changed[name] for name in changed)
            (one,) = [one for one in found if one.store.path == store]
            if kind == "activations" and len(one.lost) == len(one.store.manifest.windows):
                return  # then nothing says how large the batches were
            assert files(store) == whole
        finally:
            for name, data in whole.items():
                (store / name).parent.mkdir(parents=True, exist_ok=True)
                (store / name).write_bytes(data)

    check()


@pytest.mark.parametrize("kind", ["tokens", "activations"])
def test_a_manifest_and_every_witness_of_it_lost(workbench: Path, kind: str) -> None:
    """Nothing says any more how many rows there were but the chunks on the disk."""
    store = store_of(workbench, kind, "bfloat16" if kind == "activations" else "")
    whole = files(store)
    try:
        for name in whole:
            if name == MANIFEST or name.endswith("/zarr.json"):
                (store / name).write_bytes(b"")
        found, hopeless, _ = inspect_stores(workbench / "cache", None, repair=True)
        (one,) = [one for one in found if one.store.path == store]
        assert not hopeless and one.lines and len(one.lost) == len(one.store.manifest.windows) > 1
        mended, problems = mend(
            found, verify(found, lambda size: None), Origins(workbench / "cache", device="cpu"), Silent()
        )
        assert mended and not problems
        again = {name: data for name, data in files(store).items() if name != MANIFEST or kind == "tokens"}
        assert again == {name: whole[name] for name in again} and (store / MANIFEST).stat().st_size
    finally:
        for name, data in whole.items():
            (store / name).write_bytes(data)
