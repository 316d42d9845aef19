"""What is said of the disk before anything is written is what `du` shows afterwards; a lack of it is said in time."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from support.harvesting import harvest
from support.small_models import made_up, save_model, small_stages, token_store
from support.small_stores import write_activations

from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.store.space import expect_room, folder_size, on_disk
from sae.cache.upkeep.export import export
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.runtime.progress import Silent

CODECS = (
    "int8",
    "int8:step=0.16",
    "int8:zstd=none",
    "bfloat16",
    "float16",
    "float32",
    "bfloat16:zstd=1",
    "float32:zstd=1",
)
Disk = namedtuple("Disk", "total used free")


def du(folder: Path) -> int:
    """Allocated bytes of a folder, as `du -s` counts them; the lock is there with or without a store."""
    return sum(os.lstat(path).st_blocks * 512 for path in [folder, *folder.rglob("*")] if path.name != "lock")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("rows", "d"), [(50, 64), (17_000, 32)])
def test_an_estimate_is_what_du_shows(tmp_path: Path, codec: str, rows: int, d: int) -> None:
    """Of a store of one padded chunk, and of one of two."""
    random = torch.Generator().manual_seed(3)
    values = torch.randn(rows, d, generator=random) * torch.rand(d, generator=random)
    store = write_activations(tmp_path, values, codec, ended=True)
    for name in ("request.json", "hints.json"):  # as a harvest writes them
        (store.path / name).write_text("{}")
    estimate = on_disk(ActivationStore.specs(store.recipe), store.recipe, rows, folder_size(tmp_path))
    assert estimate == pytest.approx(du(store.path), rel=0.06)


def test_a_dry_run_says_what_is_on_the_disk_then(tmp_path: Path) -> None:
    """Of four stores of few rows; raw ones are padding for the most part, which is said with what to do about it."""
    model = save_model("gpt2", tmp_path / "model")
    for codec, padded in (("float32", True), ("float32:zstd=1", False)):
        root = tmp_path / codec
        with small_stages():
            tokens = token_store(root, made_up(20))
        lines: list[str] = []
        progress = Silent()
        progress.note = lines.append  # type: ignore[method-assign]
        given = {"layer": (0, 1), "site": ("mlp_out", "resid_post"), "codec": codec}
        config = HarvestConfig(model=str(model), **given)
        (plan,) = harvest(config, [tokens], root, progress, device="cpu", dry_run=True).plans
        harvest(config, [tokens], root, Silent(), device="cpu")
        assert plan.stored_bytes == pytest.approx(du(root / "activations"), rel=0.1)
        assert any("`codec = float32:zstd=1`" in line for line in lines) == padded


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**12, 10**12 - 1000, 1000))
    with pytest.raises(SaeError, match=r"new/cache: this takes about 2.0 GB, and 0.0 MB are free there; free some"):
        expect_room(tmp_path / "new" / "cache", 2e9, "this")
    expect_room(tmp_path, 1000, "this")
    assert not list(tmp_path.iterdir())
    store = write_activations(tmp_path, torch.randn(50, 8))
    with pytest.raises(SaeError, match=r"the export takes about"):
        export(store, tmp_path / "there" / "x.zarr", lambda _: None)
    assert not (tmp_path / "there").exists()
