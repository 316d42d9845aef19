"""Links in the place of what is ours, of five shapes, and what tells that nothing was written through them."""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.command_line import sae

from sae.cache.disk.locks import LOCK

How = Callable[[Path, Path], None]


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


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: what links say, and a hash of what files hold."""
    found = {}
    for base, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(base, name)
            if path.is_symlink():
                what = os.readlink(path)
            else:
                what = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[path.relative_to(folder).as_posix()] = what
    return found
