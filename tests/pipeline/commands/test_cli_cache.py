"""`sae cache`: what people see and programs read of stores, and what is removed and what never is."""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import zarr
from support.command_line import done, sae
from support.small_stores import CHUNK, files, heavy_rows, shrunk, write_activations, write_tokens
from support.small_tokens import CONTEXT

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.locks import Lock
from sae.cache.disk.paths import listing
from sae.cache.runs import Run
from sae.cache.store.head import RECIPE
from sae.cache.store.manifest import MANIFEST
from sae.cache.store.store import Store
from sae.cache.upkeep import garbage, removing
from sae.pipeline.commands import bars, console
from sae.pipeline.commands.cache_gc import span

N = 5 * CHUNK + 3
DAY = 86_400.0


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[pytest.MonkeyPatch]:
    with shrunk() as patch:
        patch.setattr(bars, "QUIET_SECONDS", float("inf"))
        yield patch


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and an empty folder of runs, where commands look for them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAE_RUNS", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    return tmp_path / "cache"


def test_rows_that_lie_far_out_are_told_of(root: Path) -> None:
    """In a line for people, whole for programs; null where there are none. What cannot be read is said last."""
    rows = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
    plain = write_activations(root, rows, "float32", ended=True)
    rows[[3, 77, 100]] += 500
    store = write_activations(root, rows, "bfloat16", ended=True)
    assert done(f"cache inspect {plain.key} --json").json["far_rows"] is None
    assert "\nfar_rows: null\n" in done(f"cache inspect {plain.key}").out + "\n"
    told = done(f"cache inspect {store.key} --json").json["far_rows"]
    places = Counter(str(row % CONTEXT) for row in (3, 77, 100))
    assert (told["rows"], told["of"], told["positions"], told["massive"]) == (3, N, places, True)
    assert told["share"] > 0.98 and told["norm"] == pytest.approx(500 * 6**0.5, rel=0.01)
    shown = done(f"cache inspect {store.key}").out
    assert re.search(r"^far_rows: 3 of \d+ rows have a norm above .* % of the variance$", shown, re.MULTILINE)
    (store.path / "row_norm" / "c" / "1").write_bytes(b"nothing")
    answer = sae(f"cache inspect {store.key} --json")
    assert answer.code == 3 and "row_norm/c/1: damaged" in answer.complaint and answer.json["rows"] == N


def aged(store: Store, days: float) -> Path:
    """The folder of a store that was last written so long ago."""
    for name in (MANIFEST, RECIPE):
        if (store.path / name).exists():
            os.utime(store.path / name, (time.time() - days * DAY,) * 2)
    return store.path


def run_on(root: Path, store: Store, name: str = "one") -> None:
    content = {"train": {}, "activations": {"key": store.key, "rows": store.n_rows, "recipe": store.recipe}}
    Run.create(root.parent / "runs" / name, content)


def collected(*options: str) -> dict[str, str]:
    """What `gc` lists: folder -> why."""
    return {Path(entry["path"]).name: entry["why"] for entry in done("cache gc --json", *options).json["garbage"]}


# --- ls, du, verify ---------------------------------------------------------------------------------------------------


def test_ls_says_when_a_store_was_written(root: Path) -> None:
    store = write_tokens(root, N)
    aged(store, 3.2)
    assert re.search(rf"{store.key} .* 3 d ago$", done("cache ls").out, re.MULTILINE)
    (entry,) = done("cache ls --json").json
    assert entry["written"] == (store.path / MANIFEST).stat().st_mtime


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (40 * DAY, "40 d"), (-5, "0 s")]
)
def test_ages(seconds: float, said: str) -> None:
    assert console.ago(seconds) == said


def test_where_the_bytes_are(root: Path) -> None:
    rows, tokens = write_activations(root, heavy_rows(N, 7)), write_tokens(root, N)
    (rows.path / "rows/c/99").mkdir()
    (rows.path / "rows/c/99/0").write_bytes(bytes(1000))
    (rows.path / "rows/zarr.json.77.partial").write_bytes(bytes(24))
    (root / "tokens" / "broken-12345678").mkdir()
    (root / "tokens" / "broken-12345678" / "zarr.json").write_bytes(bytes(11))
    found = done("cache du --json").json
    by_kind = {entry["kind"]: entry for entry in found["stores"]}
    entry = by_kind["activations"]
    for name, part in entry["arrays"].items():
        size = sum(path.stat().st_size for path in (rows.path / name / "c").rglob("*") if path.is_file())
        assert part["bytes"] == size - (1000 if name == "rows" else 0)
        assert part["bytes_per_row"] == round(part["bytes"] / N, 2)
        assert part["share_of_float32"] == round(part["bytes"] / (N * 7 * 4), 4)
    assert entry["bytes"] == catalogue.bytes_in(rows.path)
    assert entry["unaccounted"] == 1024
    assert entry["unaccounted_files"] == ["rows/c/99/0", "rows/zarr.json.77.partial"]
    assert entry["bytes"] == sum(part["bytes"] for part in entry["arrays"].values()) + entry["other"] + 1024
    assert by_kind["tokens"]["share_of_float32"] is None and by_kind["tokens"]["unaccounted"] == 0
    assert found["not_readable"] == 11
    assert found["bytes"] == catalogue.bytes_in(root)
    out = done("cache du").out
    for line in (
        rf"{rows.key} +{N} .* %$",
        r"  rows .* %$",
        r"  left by a crash +1.0 kB$",
        "not a readable store +11 B$",
    ):
        assert re.search(f"^{line}", out, re.MULTILINE), line
    assert done("cache du --json", tokens.key).json["stores"] == [by_kind["tokens"]]


def test_du_of_nothing(root: Path) -> None:
    assert done("cache du --json").json == {"stores": [], "not_readable": 0, "bytes": 0}
    assert "total" in done("cache du").out


def test_du_goes_on_where_a_store_cannot_be_read(root: Path) -> None:
    good, bad = write_tokens(root, N), write_tokens(root, N, seed=1)
    (bad.path / MANIFEST).write_text("{\n")
    answer = sae("cache du --json")
    assert answer.code == 3 and [entry["key"] for entry in answer.json["stores"]] == [good.key]
    assert answer.json["not_readable"] == catalogue.bytes_in(bad.path)
    assert "`sae cache verify --repair` makes it again, `sae cache rm` removes the store" in answer.complaint


def test_verify_counts_bytes(root: Path) -> None:
    store = write_activations(root, heavy_rows(N, 7))
    answer = done("cache verify")
    assert answer.out == "1 store, every byte as committed\n"
    size = store.manifest.stored_bytes + sum(map(len, store.metadata().values()))
    assert re.search(rf"^verify: {re.escape(console.size(size))} in .* s \(.*B/s\)$", answer.err, re.MULTILINE)


def test_verify_looks_at_what_can_be_read_beside_a_damaged_manifest(root: Path) -> None:
    store = write_activations(root, heavy_rows(N, 7))
    lines = (store.path / MANIFEST).read_bytes().splitlines(keepends=True)
    (store.path / MANIFEST).write_bytes(lines[0] + b"{\n" + b"".join(lines[2:]))
    (store.path / "rows/c/0/0").unlink()
    (store.path / "position/c/4").write_bytes(b"")
    answer = sae("cache verify --json")
    assert answer.code == 3
    assert [line.partition(":")[0].removeprefix(f"{store.path}/") for line in answer.json["damage"]] == [
        MANIFEST, "rows/c/0/0", "position/c/4",
    ]  # fmt: skip


# --- gc ---------------------------------------------------------------------------------------------------------------


def test_nothing_to_collect(root: Path) -> None:
    write_tokens(root, N, ended=True)
    assert done("cache gc").out == "nothing to remove\n"
    assert done("cache gc --json").json == {"garbage": [], "bytes": 0, "freed": 0, "busy": []}


def test_remains_of_crashes(root: Path) -> None:
    """Temporary files, chunks no line lists, folders without a recipe; nothing is removed without a yes."""
    store = write_activations(root, heavy_rows(N, 7), ended=True)
    whole = files(store.path)
    (store.path / "rows/c/77").mkdir()
    for name in ("rows/c/77/0", "position/c/77", "col_mean/c/0.123.partial"):
        (store.path / name).write_bytes(bytes(100))
    (store.path / "notes.txt").write_text("mine")
    gone = write_tokens(root, N)
    (gone.path / RECIPE).unlink()
    assert gone.key not in collected(), "it lacks its recipe alone, and can be repaired"
    for path in gone.path.glob("*/zarr.json"):
        path.unlink()
    size = catalogue.bytes_in(gone.path)
    answer = done("cache gc --json")
    assert answer.json["bytes"] == 300 + size and answer.json["freed"] == 0
    assert [(Path(e["path"]).name, e["why"], e["bytes"], e["files"]) for e in answer.json["garbage"]] == [
        (store.key, "left by a crash", 300, ["col_mean/c/0.123.partial", "position/c/77", "rows/c/77/0"]),
        (gone.key, "remains of a store", size, [*listing(gone.path)]),
    ]
    out = done("cache gc").out
    assert out.endswith(f"{console.size(300 + size)} nobody needs; --yes removes them\n") and gone.key in out
    assert gone.path.exists() and (store.path / "rows/c/77/0").exists()
    assert done("cache gc --yes").out.endswith(f"freed {console.size(300 + size)}\n")
    assert not gone.path.exists()
    assert files(store.path) == whole | {"notes.txt": b"mine"}
    done("cache verify")


def test_what_is_not_ours_is_left_alone(root: Path) -> None:
    for name, content in (("notes", "a.txt"), ("backup-12345678", "a.txt"), ("photos", "zarr.json")):
        (root / "tokens" / name).mkdir(parents=True)
        (root / "tokens" / name / content).write_text("mine")
    (root / "other").mkdir()
    (root / "other" / "a.partial").write_text("mine")
    (root / "tokens" / "file").write_text("mine")
    assert collected("--older-than", "0d") == {}


def test_a_damaged_store_is_left_to_verify(root: Path) -> None:
    store = write_tokens(root, N)
    (store.path / MANIFEST).write_text("{\n")
    (store.path / "tokens/c/77").mkdir()
    (store.path / "tokens/c/77/0").write_bytes(b"1")
    os.utime(store.path / MANIFEST, (0, 0))
    assert collected("--older-than", "0d") == {}


def test_stores_nobody_uses(root: Path) -> None:
    """Old, and no run, no last command, no needed store stands on them."""
    tokens, held_out = write_tokens(root, N, ended=True), write_tokens(root, N, split="validation", ended=True)
    used = write_activations(root, heavy_rows(N, 7), ended=True)
    beside = write_activations(root, heavy_rows(N, 7), ended=True, split="validation")
    unused = write_activations(root, heavy_rows(N, 7), "float16", ended=True)
    alone = write_tokens(root, N, seed=5, ended=True)
    for store in (tokens, held_out, used, beside, unused, alone):
        aged(store, 40)
    run_on(root, used)
    assert collected() == {
        unused.key: "used by no run, last written 40 days ago",
        alone.key: "used by no run, last written 40 days ago",
    }
    assert collected("--older-than", "6w") == {}
    catalogue.remember(root, "activations", [unused.key])
    assert list(collected()) == [alone.key]
    catalogue.remember(root, "tokens", [alone.key])
    assert collected() == {}
    (root / "latest.json").unlink()
    done("cache gc --yes")
    assert {store.key for store in catalogue.stores(root)} == {tokens.key, held_out.key, used.key, beside.key}


def test_tokens_of_young_activations_are_needed(root: Path) -> None:
    tokens = aged(write_tokens(root, N, ended=True), 40)
    rows = write_activations(root, heavy_rows(N, 7), ended=True)
    assert collected() == {}
    aged(rows, 40)
    assert set(collected()) == {tokens.name, rows.key}


def test_a_store_that_was_never_completed(root: Path) -> None:
    """An interrupted command has a day to be repeated."""
    store = write_tokens(root, N)
    (store.path / "request.json").write_text(json.dumps({"rows": 10 * N}))
    aged(store, 0.5)
    assert collected() == {} and set(collected("--older-than", "6h")) == {store.key}
    aged(store, 2)
    assert collected() == {store.key: "never completed, used by no run, last written 2 days ago"}
    empty = write_tokens(root, 0, seed=3)
    assert collected() == collected("--older-than", "30d") and empty.key not in collected()
    aged(empty, 2)
    assert set(collected()) == {store.key, empty.key}


def test_without_runs_no_store_is_unused(root: Path) -> None:
    aged(write_tokens(root, N, ended=True), 400)
    (root.parent / "runs").rmdir()
    answer = done("cache gc --yes")
    assert answer.out == "nothing to remove\n"
    assert "is not there, so which stores are needed is not known" in answer.err


def test_runs_on_several_stores_need_them_all(root: Path) -> None:
    one, two = write_activations(root, heavy_rows(N, 7)), write_activations(root, heavy_rows(N, 7), "float16")
    for store in (one, two):
        aged(store, 40)
    said = [{"key": store.key, "recipe": store.recipe} for store in (one, two)]
    Run.create(root.parent / "runs" / "both", {"train": {}, "activations": {"rows": N} | said[0], "targets": said[1:]})
    assert collected() == {}


def test_what_is_being_written_is_never_touched(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, growing = write_tokens(root, N), write_tokens(root, N, seed=1)
    for one in (store, growing):
        aged(one, 40)
        (one.path / "request.json.9.partial").write_bytes(b"1")
    with Lock(store.path):
        assert set(collected()) == {growing.key}
        (store.path / RECIPE).rename(store.path / "recipe")  # as between the lock and the first file
        (store.path / "recipe").rename(root / "recipe")
        assert set(collected()) == {growing.key}
        (root / "recipe").rename(store.path / RECIPE)
        monkeypatch.setattr(garbage, "held", lambda folder: False)  # the writer came after the list was made
        answer = done("cache gc --yes --json")
        assert [line.split(":")[0] for line in answer.json["busy"]] == [str(store.path)]
    assert [one.key for one in catalogue.stores(root)] == [store.key]
    assert "is writing here" in done("cache ls").err + answer.json["busy"][0]


def test_a_folder_that_became_a_store_is_kept(root: Path) -> None:
    store = write_tokens(root, N)
    (store.path / RECIPE).rename(root / RECIPE)
    (store.path / MANIFEST).rename(root / MANIFEST)
    (found,) = garbage.survey(root, [], DAY)
    (root / RECIPE).rename(store.path / RECIPE)
    (root / MANIFEST).rename(store.path / MANIFEST)
    before = files(store.path)
    assert found.remove() == 0 and files(store.path) == before


@pytest.mark.parametrize(("text", "days"), [("12h", 0.5), ("30d", 30), ("2w", 14), ("1.5d", 1.5), ("0d", 0)])
def test_lengths_of_time(text: str, days: float) -> None:
    assert span(text) == days * DAY


@pytest.mark.parametrize("text", ["", "30", "d", "-3d", "30 d", "3m", "1e3d"])
def test_no_lengths_of_time(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a length of time; write 12h, 30d or 2w"):
        span(text)


def test_gc_of_a_wrong_time(root: Path) -> None:
    answer = sae("cache gc --older-than soon")
    assert (answer.code, answer.complaint) == (2, "--older-than soon: is not a length of time; write 12h, 30d or 2w")


# --- export -----------------------------------------------------------------------------------------------------------


def test_export(root: Path) -> None:
    store, tokens = write_activations(root, heavy_rows(N, 7)), write_tokens(root, N)
    answer = done(f"cache export {store.key} out.zarr --rows 100 --order token --with-tokens --json")
    assert answer.json == {
        "path": "out.zarr", "store": store.key, "rows": 100, "format": "zarr", "dtype": "float32",
        "order": "token", "bytes": catalogue.bytes_in(Path("out.zarr")),
    }  # fmt: skip
    assert re.search(r"^export: 100 rows in ", answer.err, re.MULTILINE)
    group: Any = zarr.open_group("out.zarr", mode="r")
    assert list(group["position"][:]) == list(range(100))
    np.testing.assert_array_equal(group["tokens"][:], tokens.contexts(0, 13))
    answer = done(f"cache export {store.key} half.zarr --dtype float16")
    assert (
        answer.out
        == f"half.zarr: {N} rows of {store.key} as float16, {console.size(catalogue.bytes_in(Path('half.zarr')))}\n"
    )
    assert zarr.open_array("half.zarr/rows", mode="r").dtype == np.float16


def test_export_of_what_cannot_be(root: Path) -> None:
    tokens, store = write_tokens(root, N), write_activations(root, heavy_rows(N, 7))
    assert "holds tokens, not activations" in sae(f"cache export {tokens.key} out").complaint
    assert sae(f"cache export {store.key} cache").complaint == "cache: exists; remove it or name another"
    assert sae(f"cache export {store.key} out --dtype int8").complaint.startswith("--dtype int8: rows are exported as")
    assert sae(f"cache export {store.key} out --order any").complaint.startswith("--order any: rows come in")
    assert "cannot write here" in sae(f"cache export {store.key} {tokens.path / RECIPE}/out").complaint
    removing.remove(root, tokens.path)
    answer = sae(f"cache export {store.key} out --with-tokens")
    assert answer.code == 2 and answer.complaint.startswith(f"--with-tokens: the tokens of {store.key} are not in")
    assert not Path("out").exists()
    assert isinstance(catalogue.any_store(root, store.key), ActivationStore)
