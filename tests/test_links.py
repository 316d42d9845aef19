"""Symbolic links in the place of files and folders of ours: no command writes, cuts off or deletes through them."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_line import done, sae
from support.linking import How, expect_untouched, in_files, in_folders, in_some_files, its_parent, itself, tree
from support.small_stores import shrunk

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


OTHERS: tuple[How, ...] = (in_files, in_folders, its_parent)


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
