"""Removing what is ours, whole, whenever it is cut short; and nothing that is not ours, by any command."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command_line import done, sae
from support.killing import killed_at
from support.linking import tree
from support.small_stores import CHUNK, N, heavy_rows, shrunk, write_activations, write_tokens

from sae.cache import catalogue
from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.disk import locks, processes
from sae.cache.disk.locks import LOCK, reading
from sae.cache.errors import Busy, SaeError
from sae.cache.runs import CONFIG, Run
from sae.cache.store.contents import ARRAYS
from sae.cache.store.manifest import MANIFEST
from sae.cache.store.store import RECIPE
from sae.cache.upkeep import removing

ROWS = heavy_rows(N, 6)
PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache that commands use, an empty folder of runs beside it."""
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAE_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return tmp_path / "cache"


def test_all_arrays_are_known() -> None:
    store = {spec.name for kind in catalogue.kinds().values() for spec in kind.specs(RECIPES[kind.kind])}
    assert store == set(ARRAYS)


RECIPES: dict[str, dict[str, Any]] = {
    "tokens": {"context_length": 8, "tokenizer": {"n_vocab": 9}},
    "activations": {"codec": {"name": "int8", "step": 0.1, "zstd": 1}, "d": 4, "truth": 3, "toy": {}},
}


# --- cut short --------------------------------------------------------------------------------------------------------


def expect_all_right(root: Path) -> None:
    """Whatever was cut short: the store is there whole, or not at all, and can be removed and made again."""
    found, damage = catalogue.readable(root)
    assert damage == []
    for one in found:
        assert not any(map(one.damage, [*one.committed_files(), *one.metadata()]))
        assert removing.remove(root, one.path) > 0
    assert os.listdir(root / "activations") == []
    assert write_activations(root, ROWS[:CHUNK]).n_rows == CHUNK


@pytest.mark.parametrize(
    "command", ["cache rm --yes synthetic", pytest.param("cache gc --yes --older-than 0d", marks=pytest.mark.slow)]
)
def test_a_removal_killed_at_any_step_is_completed(root: Path, command: str) -> None:
    """By the next command, whichever it is; readers see the store whole or not at all."""
    again: list[Callable[[ActivationStore], object]] = [
        lambda _: done("cache ls"),
        lambda _: done("cache gc --yes --older-than 0d"),
        lambda store: done("cache rm --yes", store.key),
        lambda store: write_activations(root, ROWS[:CHUNK]),
    ]
    steps = 0
    while True:
        store = write_activations(root, ROWS[:CHUNK])
        with killed_at(steps, "unlink", "rmdir", "rename", "replace") as came:
            done(command)
        if not came:
            break
        if not store.path.exists():
            assert all(one.key != store.key for one in catalogue.stores(root))
        again[steps % len(again)](store)
        assert not [path for path in (root / "activations").iterdir() if path.name.startswith(".")]
        expect_all_right(root)
        steps += 1
    assert steps > 15
    assert os.listdir(root / "activations") == []


def test_a_removal_that_was_killed_is_completed_by_the_same_command(root: Path) -> None:
    store = write_activations(root, ROWS)
    with killed_at(3, "unlink"):
        done("cache rm --yes", store.key)
    assert done("cache rm --yes", store.key).out == f"removed {store.key}, which had been cut short\n"
    assert os.listdir(root / "activations") == []
    assert "no such store" in sae("cache rm --yes", store.key).complaint


def test_only_folders_of_removals_are_cleared_away(root: Path, tmp_path: Path) -> None:
    """A name alone is not enough, and links are not followed."""
    write_activations(root, ROWS[:CHUNK])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / RECIPE).write_text("mine")
    kind = root / "activations"
    (kind / ".removed-x-deadbeef").symlink_to(tmp_path / "photos")
    for name in (".removed-y-deadbeef", ".removed-mine", "removed"):
        (kind / name).mkdir()
        (kind / name / "thesis.tex").write_text("years")
    before = tree(tmp_path)
    done("cache ls")
    done("cache gc --yes")
    assert tree(tmp_path) == before


# --- what is not a store of the cache ---------------------------------------------------------------------------------


def test_a_folder_with_a_recipe_is_no_store(root: Path, tmp_path: Path) -> None:
    write_activations(root, ROWS[:CHUNK])
    names = ("kitchen", "kitchen-deadbeef", "cache/kitchen", "cache/activations/a-deadbeef")
    places = [tmp_path / name for name in names]
    for place in places:
        (place / "photos").mkdir(parents=True)
        (place / RECIPE).write_text('{"dish": "soup"}')
        (place / "photos" / "1.jpg").write_text("x")
    before = tree(tmp_path)
    for place in places:
        answer = sae("cache rm --yes", place)
        assert answer.code == 2 and "left alone" in answer.complaint
        assert tree(tmp_path) == before
    assert sae("cache rm --yes a-deadbeef").code == 2
    sae("cache gc --yes --older-than 0d")
    assert tree(root / "activations" / "a-deadbeef") == tree(places[0])


def test_a_store_of_another_cache_is_left_alone(root: Path, tmp_path: Path) -> None:
    other = write_activations(tmp_path / "other", ROWS[:CHUNK])
    before = tree(other.path)
    assert "is not a store of the cache" in sae("cache rm --yes", other.path).complaint
    assert tree(other.path) == before
    assert done(f"cache rm --yes --cache {tmp_path / 'other'}", other.path).out.startswith("removed")


def test_damaged_stores_can_be_removed(root: Path) -> None:
    """As long as one thing tells that they are stores."""
    for damage in ((RECIPE,), (RECIPE, "zarr.json"), (RECIPE, MANIFEST), (MANIFEST, "zarr.json")):
        store = write_activations(root, ROWS[:CHUNK])
        for name in damage:
            (store.path / name).write_bytes(b"{}")
        assert done("cache rm --yes", store.key).out.startswith("removed")
    store = write_activations(root, ROWS[:CHUNK])
    (store.path / RECIPE).unlink()
    assert done("cache rm --yes", store.key).out.startswith("removed")
    store = write_activations(root, ROWS[:CHUNK])
    for name in (RECIPE, MANIFEST, "zarr.json"):
        (store.path / name).write_bytes(b"{}")
    assert "too damaged to tell" in sae("cache rm --yes", store.key).complaint


@pytest.mark.parametrize("name", ["thesis.tex", "rows/notes", "rows/c/0/mine", "photos/c/0", "my.partial", "x/lock"])
def test_a_store_with_a_file_of_somebody_is_not_removed(root: Path, name: str) -> None:
    store = write_activations(root, ROWS[:CHUNK])
    (store.path / name).parent.mkdir(exist_ok=True, parents=True)
    (store.path / name).write_text("years")
    before = tree(store.path)
    assert f"holds {name}, of which this program knows nothing" in sae("cache rm --yes", store.key).complaint
    answer = done("cache gc --yes --older-than 0d --json")
    assert any(name in line for line in answer.json["busy"])
    assert tree(store.path) == before
    write_activations(root, ROWS)
    assert (store.path / name).read_text() == "years"


def test_a_file_that_comes_at_the_last_moment_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_activations(root, ROWS[:CHUNK])
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        rename(source, target)
        if source == store.path:
            (target / "thesis.tex").write_text("years")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", late)
        assert "holds thesis.tex" in sae("cache rm --yes", store.key).complaint
    assert (store.path / "thesis.tex").read_text() == "years"
    (store.path / "thesis.tex").unlink()
    assert ActivationStore(store.path).n_rows == CHUNK


# --- who is at it -----------------------------------------------------------------------------------------------------


def test_what_is_being_read_is_not_removed(root: Path) -> None:
    tokens, rows = write_tokens(root, N), write_activations(root, ROWS[:CHUNK])
    kept = write_tokens(root, N, split="validation")
    with ActivationWriter(root, rows.slug, rows.recipe):
        for one in (tokens, kept):
            answer = sae("cache rm --yes", one.key)
            assert answer.code == 2 and f"is writing {rows.key} from it" in answer.complaint
    with reading(rows.path), reading(tokens.path):
        assert "is reading it; wait for it" in sae("cache rm --yes", rows.key).complaint
        assert len(done("cache gc --yes --older-than 0d --json").json["busy"]) == 2
    assert {store.key for store in catalogue.stores(root)} == {tokens.key, rows.key}


def test_a_store_put_in_the_place_of_a_begun_one_is_kept(tmp_path: Path) -> None:
    """A harvest is at its first window; a backup is put into its place; the harvest fails."""
    backup = write_activations(tmp_path / "backup", ROWS)
    before = tree(backup.path)

    def fail() -> None:
        with ActivationWriter(tmp_path / "cache", backup.slug, backup.recipe) as writer:
            buffer = writer.window(CHUNK)
            buffer.add(ROWS[:CHUNK], backup.positions(0, CHUNK))
            os.rename(tmp_path / "cache", tmp_path / "away")
            os.rename(tmp_path / "backup", tmp_path / "cache")
            writer.append(buffer.arrays(), {})

    with pytest.raises(Busy, match="its lock was taken away"):
        fail()
    assert tree(tmp_path / "cache" / "activations" / backup.key) == before


def test_a_store_is_not_begun_where_something_lies(tmp_path: Path) -> None:
    store = write_activations(tmp_path, ROWS[:CHUNK])
    key, slug, recipe = store.path, store.slug, store.recipe
    shutil.rmtree(key)
    (key / "data" / "c").mkdir(parents=True)
    (key / "data" / "c" / "0").write_text("years")
    before = tree(tmp_path)
    with pytest.raises(SaeError, match=r"data/c/0: is in the place of a store"):
        ActivationWriter(tmp_path, slug, recipe).__enter__()
    assert tree(tmp_path) == before
    shutil.rmtree(key)
    key.write_text("years")
    with pytest.raises(SaeError, match="is in the place of a store"):
        ActivationWriter(tmp_path, slug, recipe).__enter__()
    assert key.read_text() == "years"


def test_a_writer_that_fails_leaves_what_came_into_its_folder(tmp_path: Path) -> None:
    store = write_activations(tmp_path / "else", ROWS[:CHUNK])

    def fail() -> None:
        with ActivationWriter(tmp_path, store.slug, store.recipe) as writer:
            (writer.path / "thesis.tex").write_text("years")
            raise SaeError("refused")

    with pytest.raises(SaeError, match="refused"):
        fail()
    assert (tmp_path / "activations" / store.key / "thesis.tex").read_text() == "years"
    (tmp_path / "activations" / store.key / "thesis.tex").unlink()
    with pytest.raises(SaeError, match="refused"), ActivationWriter(tmp_path, store.slug, store.recipe):
        raise SaeError("refused")
    assert os.listdir(tmp_path / "activations") == []


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_name_that_is_somebody_s_folder_is_refused(tmp_path: Path) -> None:
    for name, file in (("thesis", "data/raw.csv"), ("locked", LOCK + "/x"), ("near", "config.json.bak")):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).write_text("years")
    (tmp_path / "file").write_text("years")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = tree(tmp_path)
    for name in ("thesis", "locked", "near", "file", "link"):
        with pytest.raises(SaeError, match=rf"name = {name}: .* is there, and is not a run \(it has no config.json\)"):
            Run.create(tmp_path / name, {})
        assert tree(tmp_path) == before


def test_only_what_was_made_here_is_discarded(tmp_path: Path) -> None:
    made = Run.create(tmp_path / "made", {"a": 1})
    Run(tmp_path / "made").discard()  # opened, not made
    assert made.path.exists()
    with made.lock():
        made.discard()  # another process trains in it
        assert (made.path / CONFIG).exists()
    for file in ("metrics.jsonl", "thesis.tex", "checkpoint.safetensors"):
        (made.path / file).write_text("1")
        made.discard()
        assert (made.path / CONFIG).exists()
        (made.path / file).unlink()
    written = (made.path / CONFIG).read_bytes()
    (made.path / CONFIG).write_text('{"a": 2}')
    made.discard()  # changed since
    assert made.path.exists()
    (made.path / CONFIG).write_bytes(written)
    made.discard()
    assert os.listdir(tmp_path) == []
    made.discard()
    assert os.listdir(tmp_path) == []


def test_a_run_killed_while_it_was_begun_or_discarded_is_not_in_the_way(tmp_path: Path) -> None:
    for stop in range(20):
        with killed_at(stop, "unlink", "rmdir", "rename", "replace") as came:
            Run.create(tmp_path / "x", {}).discard()
        if not came:
            break
        if not (tmp_path / "x" / CONFIG).exists():
            Run.create(tmp_path / "x", {})
        assert os.listdir(tmp_path) == ["x"]
        shutil.rmtree(tmp_path / "x")
    assert stop > 3
    assert os.listdir(tmp_path) == []


# --- what is left outside of stores -----------------------------------------------------------------------------------


def of_a_dead_process(name: str) -> str:
    """A temporary file's name as a process that is gone would have chosen it."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    whole, machine, rest = re.fullmatch(r"(.*)\.([0-9a-f]{8})-\d+-(.*)", processes.temporary(name)).groups()  # type: ignore[union-attr]
    return f"{whole}.{machine}-{process.pid}-{rest}"


def test_temporary_files_tell_whose_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    name = processes.temporary("a.b.json")
    assert processes.final_name(name) == "a.b.json" and processes.left_behind(name) is False
    assert processes.left_behind(of_a_dead_process("x")) is True
    number = name.split("-")
    assert processes.left_behind("-".join([number[0], number[1], "1", number[3]])) is True  # its number was used again
    assert processes.left_behind(name.replace(number[0][-8:], "0" * 8)) is None  # another machine's
    for other in ("thesis.partial", "a.b.partial", "x.1-2-3-4.partial", "lease-1.partial"):
        assert processes.final_name(other) is None and processes.left_behind(other) is None
    assert processes.final_name("config.json.77.partial") == "config.json"  # of version 0.1.0
    assert len({processes.temporary("x") for _ in range(99)}) == 99


@pytest.mark.parametrize("same", ["name", "machine"])
def test_processes_of_other_hosts_are_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: str
) -> None:
    """Of another host of the same name, or another name on the same machine: a container beside ours."""
    name = of_a_dead_process("cfg.json")
    lock = json.dumps(json.loads(locks._me()) | {"pid": 1 << 70}).encode()  # no process has this number
    assert processes.left_behind(name) is True and locks._is_dead(lock)
    with monkeypatch.context() as patch:
        if same == "name":
            other = tmp_path / "machine-id"
            other.write_text("0" * 32)
            patch.setattr(processes, "MACHINE_ID", other)
        else:
            patch.setattr(socket, "gethostname", lambda: "elsewhere")
        processes._machine.cache_clear()
        assert processes.left_behind(name) is None
        assert not locks._is_dead(lock)
    processes._machine.cache_clear()


def test_what_killed_processes_left_beside_stores_is_found(root: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (runs / "x").mkdir(parents=True, exist_ok=True)
    (runs / "x" / CONFIG).write_text("{}")
    run = Run(runs / "x")
    (run.path / "eval").mkdir()
    (runs / "begun").mkdir()
    (runs / "begun" / LOCK).write_bytes(b"")
    (runs / "begun" / of_a_dead_process(CONFIG)).write_bytes(b"half")
    left = [root / "latest.json", runs / "compare.png", run.path / "metrics.jsonl", run.path / "eval" / "eval.json"]
    left = [path.with_name(of_a_dead_process(path.name)) for path in left] + [run.path / "config.json.9.partial"]
    kept = [runs / "thesis.partial", run.path / "notes.9.partial", run.path / processes.temporary("cfg.json")]
    root.mkdir()
    for path in [*left, *kept]:
        path.write_bytes(bytes(10))
    os.utime(left[-1], (0, 0))
    os.utime(kept[1], (0, 0))
    before = tree(tmp_path)
    answer = done("cache gc --json").json
    assert tree(tmp_path) == before
    assert answer["bytes"] == 10 * len(left) + 4
    assert done("cache gc --yes --json").json["freed"] == answer["bytes"]
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)
    assert not (runs / "begun").exists() and (run.path / CONFIG).exists()
    assert done("cache gc").out == "nothing to remove\n"


EXPORTING = """
import os, signal, sys
sys.path[:0] = ["tests"]
from support.small_stores import shrunk
small = shrunk()
small.__enter__()
sys.argv = ["sae", "cache", "export", *sys.argv[1:]]
rename = os.replace
def killed(source, target, *more, **options):
    if str(target).endswith(os.environ["KILL"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target, *more, **options)
os.replace = killed
import pathlib
pathlib.Path.replace = lambda self, target: killed(self, target)
from sae.cli import main
main()
"""


@pytest.mark.parametrize("at", ["rows/zarr.json", pytest.param("c/0/0", marks=pytest.mark.slow)])
def test_half_of_an_export_that_was_killed_is_found(root: Path, tmp_path: Path, at: str) -> None:
    store = write_activations(root, ROWS)
    command = [sys.executable, "-c", EXPORTING, store.key, str(tmp_path / "out" / "z")]
    killed = subprocess.run(command, env={**os.environ, "KILL": at}, cwd=PROJECT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (half,) = (tmp_path / "out").iterdir()
    (half / "thesis.tex").write_text("years")
    assert done("cache gc --yes").out == "nothing to remove\n"
    assert half.exists()
    (half / "thesis.tex").unlink()
    assert half.name in done("cache gc").out and half.exists()
    done("cache gc --yes")
    assert os.listdir(tmp_path / "out") == []
    assert sorted(os.listdir(root)) == ["activations"]
    done(f"cache export {store.key} {tmp_path}/out/z")
    assert os.listdir(tmp_path / "out") == ["z"]


def test_a_forged_note_of_an_export_removes_nothing(root: Path, tmp_path: Path) -> None:
    """A cache may come from anyone."""
    root.mkdir()
    precious = tmp_path / of_a_dead_process("z")
    (precious / "rows").mkdir(parents=True)
    (precious / "zarr.json").write_text("years")
    (precious / "rows" / "thesis").write_text("years")
    (tmp_path / "plain").mkdir()
    (tmp_path / of_a_dead_process("link")).symlink_to(tmp_path / "plain")
    for where in (precious, tmp_path / "plain", "..", "", f"{tmp_path}/{of_a_dead_process('link')}", "\0"):
        (root / of_a_dead_process("export")).write_text(str(where))
    before = {name: what for name, what in tree(tmp_path).items() if not name.startswith("cache")}
    done("cache gc --yes")
    assert {name: what for name, what in tree(tmp_path).items() if not name.startswith("cache")} == before
