"""Symbolic links in the place of files and folders of ours: no command writes, cuts off or deletes through them."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from support.command_line import done, sae
from support.small_stores import shrunk
from test_removal import tree

from sae.cache.disk.locks import LOCK

How = Callable[[Path, Path], None]
ROWS = "--rows 64 --d 6 --features 12 --active 2 --groups 3 --set synthesize.validation_rows=64"
TRAIN = "--k 2 --d-sae 12 --batch 16 --steps 6 --device cpu --set train.checkpoint_every=3"
COMMANDS = (
    "cache ls", "cache verify --repair", "cache gc --yes --older-than 0d", "cache rm {key} --yes",
    "cache rm {store} --yes", "cache export {key} {home}/out", f"synthesize {ROWS} --rows 256",
    "train --resume --name r", f"train {TRAIN} --name r", f"train {TRAIN} --name new",
    f"train {TRAIN} --name r --seed 3", "eval r", "compare --csv {home}/runs/table.csv",
    "study coefficients --no-ce --l1 0.1 --jl 0.1 --hybrid-jl 0.1 --steps 2 --d-sae 8 --out {home}/runs/r",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of synthetic rows and one run, judged."""
    home = tmp_path_factory.mktemp("made")
    with shrunk() as patch:
        patch.setenv("SAE_CACHE", str(home / "cache"))
        patch.setenv("SAE_RUNS", str(home / "runs"))
        done(f"synthesize {ROWS}")
        done(f"train {TRAIN} --name r")
        done("eval r")
        yield home


def in_files(folder: Path, outside: Path) -> None:
    """Every file is a link to one outside that holds other bytes."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        to = outside / path.relative_to(folder)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(b"precious\n")
        path.unlink()
        path.symlink_to(to)


def in_some_files(folder: Path, outside: Path) -> None:
    """What is written in place or first is a link; what tells that the folder is ours is not."""
    for name in (LOCK, "manifest.jsonl", "metrics.jsonl", "request.json", "eval/eval.json", "cfg.json"):
        if (folder / name).exists():
            to = outside / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, to)
            to.write_bytes(to.read_bytes() + b"half a line")
            (folder / name).unlink()
            (folder / name).symlink_to(to)


def in_folders(folder: Path, outside: Path) -> None:
    """The folders in it are links to ones of the same contents, where something is missing and something more."""
    for path in [path for path in folder.iterdir() if path.is_dir()]:
        shutil.copytree(path, outside / path.name)
        for inner in [*(outside / path.name).rglob("*")][-1:]:
            (inner.parent / "thesis.9.partial").write_text("precious")
            (inner.parent / "zarr.json.9.partial").write_text("precious")
        for inner in (outside / path.name).rglob("0"):
            if inner.is_file():
                inner.write_text("precious")
        shutil.rmtree(path)
        path.symlink_to(outside / path.name)


def itself(folder: Path, outside: Path) -> None:
    """The folder is a link to the whole of it, where chunks and weights are damaged."""
    shutil.copytree(folder, outside / folder.name)
    for path in [*(outside / folder.name).rglob("0"), outside / folder.name / "sae_weights.safetensors"]:
        if path.is_file():
            path.write_bytes(b"precious")
    (outside / folder.name / "zarr.json.9.partial").write_text("precious")
    shutil.rmtree(folder)
    folder.symlink_to(outside / folder.name)


def its_parent(folder: Path, outside: Path) -> None:
    """The folder of all of its kind is a link."""
    itself(folder.parent, outside)


OTHERS: tuple[How, ...] = (in_files, in_folders, its_parent)


def expect_untouched(how: How, commands: Sequence[str], made: Path, run: str, tmp_path: Path) -> None:
    """Each command, with a store of every kind and a run behind links, leaves all that they lead to as it was."""
    for number, command in enumerate(commands):
        home, outside = tmp_path / str(number), tmp_path / "outside"
        shutil.copytree(made, home)
        stores = [path for path in sorted((home / "cache").glob("*/*")) if "validation" not in path.name]
        for folder in (*stores, home / "runs" / run):
            if how is its_parent and folder.parent.name == "runs":
                continue  # the root of runs may be a link: that is its owner's wish
            (outside / folder.name).mkdir(parents=True)
            how(folder, outside / folder.name)
        before = tree(outside)
        assert before
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SAE_CACHE", str(home / "cache"))
            patch.setenv("SAE_RUNS", str(home / "runs"))
            patch.chdir(home)
            answer = sae(command.format(key=stores[0].name, store=stores[0], home=home))
        assert answer.code in (0, 2, 3), (command, answer.err)
        assert tree(outside) == before, command
        shutil.rmtree(outside)
        shutil.rmtree(home)


@pytest.mark.parametrize("how", [in_some_files, itself, *(pytest.param(how, marks=pytest.mark.slow) for how in OTHERS)])
def test_nothing_outside_is_touched(how: How, made: Path, tmp_path: Path) -> None:
    expect_untouched(how, COMMANDS, made, "r", tmp_path)


def test_a_root_that_is_a_link_is_its_owner_s_wish(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made, tmp_path / "disk")
    for name in ("cache", "runs"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        monkeypatch.setenv(f"SAE_{name.upper()}", str(tmp_path / name))
    done(f"synthesize {ROWS} --rows 256")
    done(f"train {TRAIN} --name other")
    key = done("cache ls --json").json[0]["key"]
    assert done("cache rm --yes", tmp_path / "cache" / "activations" / key).out.startswith("removed")
    assert key not in os.listdir(tmp_path / "disk" / "cache" / "activations")


def test_a_store_that_is_a_link_is_read_and_unlinked(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made / "cache", tmp_path / "cache")
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    for store in list((tmp_path / "cache" / "activations").iterdir()):
        store.rename(tmp_path / store.name)
        store.symlink_to(tmp_path / store.name)
        assert done("cache inspect --json", store.name).json["key"] == store.name
        before = tree(tmp_path / store.name)
        assert done("cache rm --yes", store.name).out == (
            f"removed {store.name}, a link; {tmp_path / store.name} is as it was\n"
        )
        assert tree(tmp_path / store.name) == before and not store.is_symlink()


@pytest.mark.parametrize("name", ["recipe.json", "manifest.jsonl", "zarr.json", "rows/c/0/0", "request.json"])
def test_pipes_are_refused_and_not_waited_for(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "home/cache"))
    monkeypatch.setenv("SAE_RUNS", str(tmp_path / "home/runs"))
    monkeypatch.chdir(tmp_path)
    store = next(path for path in (tmp_path / "home/cache/activations").iterdir() if "validation" not in path.name)
    (store / name).unlink()
    os.mkfifo(store / name)
    for command in ("cache ls", "cache verify", "cache gc", f"synthesize {ROWS} --rows 256", f"train {TRAIN} --name z"):
        assert sae(command).code in (0, 2, 3)
    assert sae("cache verify --repair").code in (0, 2, 3)
    assert done("cache rm --yes", store.name).out.startswith("removed")


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "cfg.json", "sae_weights.safetensors", "lock"])
def test_pipes_in_runs_are_refused_and_not_waited_for(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "home/cache"))
    monkeypatch.setenv("SAE_RUNS", str(tmp_path / "home/runs"))
    (tmp_path / "home/runs/r" / name).unlink()
    os.mkfifo(tmp_path / "home/runs/r" / name)
    for command in ("list", "compare r", "eval r", "train --resume --name r"):
        assert sae(command).code in (0, 2, 3), command
