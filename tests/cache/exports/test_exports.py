"""Every format of exported rows, read back by what its users read it with: the store's rows, positions and tokens."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from safetensors.torch import load_file
from support.small_stores import CHUNK, CONTEXT, heavy_rows, shrunk, write_activations, write_tokens

from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.exports import arrow, base
from sae.cache.tokens import TokenStore
from sae.cache.upkeep.export import export

N, D = 40 * CHUNK + 3, 7


class Found(NamedTuple):
    rows: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray | None
    about: dict[str, Any]


def shards(path: Path, name: str, ending: str) -> list[Path]:
    return sorted(path.glob(f"{name}-*.{ending}"))


def about(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / base.ABOUT).read_text())
    return found


def from_zarr(path: Path) -> Found:
    group: Any = zarr.open_group(str(path), mode="r")
    tokens = group["tokens"][:].reshape(-1)[group["position"][:]] if "tokens" in group else None
    return Found(group["rows"][:], group["position"][:], tokens, dict(group.attrs))


def from_npy(path: Path) -> Found:
    each = [
        [np.load(one, mmap_mode="r") for one in shards(path, name, "npy")] for name in ("rows", "position", "token")
    ]
    rows, positions, tokens = (np.concatenate(one) if one else None for one in each)
    assert rows is not None and positions is not None
    return Found(rows, positions, tokens, about(path))


def from_safetensors(path: Path) -> Found:
    every = [load_file(one) for one in shards(path, "rows", "safetensors")]
    rows, positions = (torch.cat([one[name] for one in every]).numpy() for name in ("rows", "position"))
    tokens = torch.cat([one["token"] for one in every]).numpy() if "token" in every[0] else None
    return Found(rows, positions, tokens, about(path))


def from_parquet(path: Path) -> Found:
    table = pq.read_table(path)
    tokens = table["token"].to_numpy() if "token" in table.column_names else None
    return Found(np.stack(table["row"].to_numpy()), table["position"].to_numpy(), tokens, about(path))


def from_arrow(path: Path) -> Found:
    """As SAELens reads it: a column named as the hook point, of a shape that its features tell."""
    found = datasets.load_from_disk(str(path))
    assert isinstance(found, datasets.Dataset)
    hook = next(name for name in found.column_names if name not in ("position", "token_ids"))
    assert found.features[hook].shape == (arrow.RECORD, D)
    found.set_format(type="torch", dtype=getattr(torch, found.features[hook].dtype))
    rows = torch.cat(list(found[hook][:])).numpy()
    found.set_format(type="numpy")
    tokens = np.concatenate(found["token_ids"][:]) if "token_ids" in found.column_names else None
    return Found(rows, np.concatenate(found["position"][:]), tokens, about(path))


READERS: dict[str, Callable[[Path], Found]] = {
    "zarr": from_zarr, "npy": from_npy, "safetensors": from_safetensors, "parquet": from_parquet, "arrow": from_arrow,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "SHARD_BYTES", 150 * D * 4)  # several files
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, small: None) -> ActivationStore:
    return write_activations(tmp_path_factory.mktemp("store"), heavy_rows(N, D, massive=0), ended=True)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, small: None) -> TokenStore:
    return write_tokens(tmp_path_factory.mktemp("tokens"), -(-N // CONTEXT) + 4)


def test_every_format_is_tried() -> None:
    assert sorted(READERS) == base.names()


@pytest.mark.parametrize("order", ["stored", "token"])
@pytest.mark.parametrize("name", READERS)
def test_rows_come_back(name: str, order: str, store: ActivationStore, tokens: TokenStore, tmp_path: Path) -> None:
    told: list[int] = []
    made = export(store, tmp_path / "out", told.append, order=order, tokens=tokens, format=name)
    found = READERS[name](made.path)
    every, positions = store.rows(0, N).numpy(), store.positions(0, N)
    place = np.argsort(positions) if order == "token" else np.arange(N)
    n = N // arrow.RECORD * arrow.RECORD if name == "arrow" else N
    np.testing.assert_array_equal(found.rows, every[place][:n])
    np.testing.assert_array_equal(found.positions, positions[place][:n])
    assert found.tokens is not None
    contexts = tokens.contexts(0, tokens.n_contexts).reshape(-1)
    np.testing.assert_array_equal(found.tokens, contexts[positions[place][:n]])
    assert made.rows == sum(told) == n == found.about["rows"]
    assert found.about["recipe"] == store.recipe and found.about["store"] == store.key
    files = [str(path.relative_to(made.path)) for path in made.path.rglob("*") if path.is_file()]
    assert all(map(base.is_made, files)), "and what a killed one leaves can be cleared up"
    assert name == "zarr" or len(files) > 5


@pytest.mark.parametrize("name", READERS)
def test_halves_and_no_tokens(name: str, store: ActivationStore, tmp_path: Path) -> None:
    found = READERS[name](export(store, tmp_path / "out", lambda _: None, rows=300, dtype="float16", format=name).path)
    assert found.tokens is None and found.rows.dtype == np.float16
    np.testing.assert_array_equal(found.rows, store.rows(0, len(found.rows)).numpy().astype(np.float16))


def test_bfloat16_where_there_is_one(store: ActivationStore, tmp_path: Path) -> None:
    made = export(store, tmp_path / "out", lambda _: None, dtype="bfloat16", format="safetensors", rows=60)
    (shard,) = made.path.glob("*.safetensors")
    assert torch.equal(load_file(shard)["rows"], store.rows(0, 60).bfloat16())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"format": "hdf5"}, "format = hdf5: rows are exported as arrow, npy, parquet, safetensors, zarr"),
        ({"format": "npy", "dtype": "bfloat16"}, "dtype = bfloat16: npy has no such numbers; take float32 or float16"),
        (
            {"format": "arrow", "rows": 100},
            "format = arrow: a record is 128 rows, and there are 100; take another format",
        ),
    ],
)
def test_what_is_refused(store: ActivationStore, tmp_path: Path, given: dict[str, Any], says: str) -> None:
    with pytest.raises(SaeError, match=re.escape(says)):
        export(store, tmp_path / "z", lambda _: None, **given)
    assert list(tmp_path.iterdir()) == []


def test_the_column_is_called_as_the_hook_point(store: ActivationStore, tmp_path: Path) -> None:
    made = export(store, tmp_path / "z", lambda _: None, format="arrow")
    assert store.recipe["hook"] in datasets.load_from_disk(str(made.path)).column_names
