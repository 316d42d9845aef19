"""Anyone's rows in files of every kind: one store whatever the format, and one line for what is not a table."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from pyarrow import feather
from safetensors.torch import save_file
from support.command_line import done, sae
from support.small_stores import files, shrunk

from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.pipeline.harvest.sources.table import TableConfig, TableSource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.harvest.tables import base, columns
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Silent

N, D = 500, 6


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Small windows, and blocks of a few rows, so that all edges are met."""
    monkeypatch.setattr(base, "BYTES", 7 * 4 * D)
    monkeypatch.setattr(columns, "LINES", 7)
    with shrunk():
        yield


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


def lines(rows: np.ndarray, separator: str, head: str = "") -> str:
    return head + "".join(separator.join(map(repr, row)) + "\n" for row in rows.astype(float).tolist())


def frame(rows: np.ndarray) -> pa.Table:
    return pa.table({f"c{i}": rows[:, i] for i in range(D)})


def nested(rows: np.ndarray) -> pa.Table:
    return pa.table({"e": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), D)})


def to_zarr(path: Path, rows: np.ndarray) -> None:
    zarr.create_array(str(path), shape=rows.shape, chunks=(13, 4), dtype="f4")[:] = rows


def to_arrow(path: Path, table: pa.Table, new: Callable[..., Any]) -> None:
    """In batches of several sizes, an empty one among them."""
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        for low, high in ((0, 1), (1, 1), (1, 200), (200, table.num_rows)):
            part = table.slice(low, high - low).combine_chunks().to_batches()
            writer.write_batch(part[0] if part else pa.RecordBatch.from_pylist([], schema=table.schema))


WRITERS: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "x.npy": np.save,
    "fortran.npy": lambda path, rows: np.save(path, np.asfortranarray(rows)),
    "big.npy": lambda path, rows: np.save(path, rows.astype(">f8")),
    "x.npz": lambda path, rows: np.savez(path, rows=rows, labels=np.arange(3)),
    "packed.npz": lambda path, rows: np.savez_compressed(path, rows=rows),
    "x.safetensors": lambda path, rows: save_file({"a": torch.from_numpy(rows), "b": torch.ones(2)}, path),
    "x.parquet": lambda path, rows: pq.write_table(frame(rows), path, row_group_size=31),
    "list.parquet": lambda path, rows: pq.write_table(nested(rows), path, row_group_size=31),
    "x.arrow": lambda path, rows: to_arrow(path, frame(rows), pa.ipc.new_file),
    "stream.arrow": lambda path, rows: to_arrow(path, nested(rows), pa.ipc.new_stream),
    "x.feather": lambda path, rows: feather.write_feather(frame(rows), path, compression="zstd", chunksize=17),
    "x.csv": lambda path, rows: path.write_text(lines(rows, ",")),
    "named.tsv": lambda path, rows: path.write_text(lines(rows, "\t", "\t".join("abcdef") + "\n") + "\n\n"),
    "crlf.csv": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + lines(rows, ",").replace("\n", "\r\n").encode()),
    "x.zarr": to_zarr,
}


def opened(path: Path, **settings: Any) -> TableSource:
    return TableSource.of_settings(TableConfig(table=str(path), **settings), Origins(path.parent), Silent())


@pytest.fixture(scope="module")
def digest(rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("one") / "x.npy"
    np.save(path, rows)
    return str(opened(path).identity()["rows"])


@pytest.mark.parametrize("name", WRITERS)
def test_a_store_is_what_the_rows_are(tmp_path: Path, rows: np.ndarray, name: str, digest: str) -> None:
    """Every row once, in one split; the digest does not depend on the format."""
    WRITERS[name](tmp_path / name, rows)
    source = opened(tmp_path / name, codec="float32", validation=0.2)
    assert source.identity()["rows"] == digest
    stores = harvest(source, tmp_path / "cache", Silent()).stores
    found = {}
    for split, (store,) in stores.items():
        at = store.positions(0, store.n_rows)
        assert torch.equal(store.rows(0, store.n_rows), torch.from_numpy(rows[at]))
        assert store.closed and store.split == split and store.d == D
        found[split] = set(at.tolist())
    assert found["train"] | found["validation"] == set(range(N)) and not found["train"] & found["validation"]
    assert 60 < len(found["validation"]) < 140
    assert not harvest(source, tmp_path / "cache", Silent()).plans[0].rows_to_do


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint16", "int64"])
def test_numbers_of_every_kind(tmp_path: Path, dtype: str) -> None:
    values = np.arange(60).reshape(20, 3).astype(dtype)
    np.save(tmp_path / "x.npy", values)
    source = opened(tmp_path / "x.npy", codec="float32", validation=0.0)
    (store,) = harvest(source, tmp_path / "cache", Silent()).stores["train"]
    assert source.splits == ("train",)
    assert torch.equal(store.rows(0, 20), torch.from_numpy(values[store.positions(0, 20)].astype(np.float32)))


def test_bfloat16_of_safetensors(tmp_path: Path) -> None:
    values = torch.randn(20, 3).bfloat16()
    save_file({"only": values}, tmp_path / "x.safetensors")
    (store,) = harvest(opened(tmp_path / "x.safetensors", codec="float32", validation=0.0), tmp_path, Silent()).stores[
        "train"
    ]
    assert torch.equal(store.rows(0, 20), values.float()[store.positions(0, 20)])


def test_columns_are_chosen_in_their_order(tmp_path: Path, rows: np.ndarray) -> None:
    table = frame(rows).append_column("name", pa.array(["x"] * N))
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(SaeError, match=r"x.parquet: column 'name' holds string; name the columns"):
        opened(tmp_path / "x.parquet")
    source = opened(tmp_path / "x.parquet", columns=["c4", "c0"], codec="float32")
    (store,) = harvest(source, tmp_path / "cache", Silent()).stores["train"]
    at = store.positions(0, store.n_rows)
    assert torch.equal(store.rows(0, store.n_rows), torch.from_numpy(rows[at][:, [4, 0]]))
    assert store.recipe["source"]["columns"] == ["c4", "c0"]


@pytest.mark.parametrize("name", ["x.npy", "big.npy", "x.npz", "x.safetensors", "x.zarr", "x.csv"])
def test_columns_without_names_are_chosen_by_number(tmp_path: Path, rows: np.ndarray, name: str) -> None:
    """What is in the others does not matter."""
    holed = np.where(np.arange(D) == 1, np.nan, rows).astype(np.float32)
    WRITERS[name](tmp_path / name, holed)
    source = opened(tmp_path / name, columns=[4, "0"], codec="float32", validation=0.0)
    (store,) = harvest(source, tmp_path / "cache", Silent()).stores["train"]
    at = store.positions(0, store.n_rows)
    assert torch.equal(store.rows(0, store.n_rows), torch.from_numpy(rows[at][:, [4, 0]]))


def test_fewer_rows_are_the_beginning_of_all(tmp_path: Path, rows: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", rows)
    for cache, wanted in (("grown", 1), ("grown", 70), ("grown", "all"), ("whole", "all")):
        source = opened(tmp_path / "x.npy", train_rows=wanted)
        (store,) = harvest(source, tmp_path / cache, Silent()).stores["train"]
        assert store.complete and (store.closed == (wanted == "all"))
        assert store.n_rows >= (1 if wanted == "all" else wanted)
    assert files(store.path) == files(tmp_path / "grown" / "activations" / store.key)


def cut(path: Path) -> None:
    to_arrow(path, frame(np.ones((N, D), np.float32)), pa.ipc.new_stream)
    path.write_bytes(path.read_bytes()[:-3000])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no.arrow": (lambda p: p.write_bytes(b"nothing of Arrow's"), "cannot be read ("),
    "none.feather": (lambda p: p.write_bytes(b""), "cannot be read ("),
    "cut.arrow": (cut, "cannot be read ("),
    "names.arrow": (lambda p: to_arrow(p, pa.table({"c": ["x"] * N}), pa.ipc.new_file), "column 'c' holds string"),
    "holes.arrow": (
        lambda p: to_arrow(p, pa.table({"c": [1.0] * 3 + [None] * N}), pa.ipc.new_file),
        "row 3 has nan in column c",
    ),
    "uneven.arrow": (
        lambda p: to_arrow(p, pa.table({"e": [[1.0, 2.0]] * 4 + [[1.0]] * N}), pa.ipc.new_file),
        "row 4 has 1 values where the first has 2",
    ),
    "nan.npy": (lambda p: np.save(p, np.array([[1.0, 2.0], [3.0, np.nan]])), "row 1 has nan in column 1; rows are"),
    "large.npy": (lambda p: np.save(p, np.array([[1.0], [1e300]])), "row 1 has 1e+300 in column 0; rows are"),
    "flat.npy": (lambda p: np.save(p, np.ones(5)), "has shape [5]; rows are [n, d], so reshape it"),
    "deep.npy": (lambda p: np.save(p, np.ones((2, 2, 2))), "has shape [2, 2, 2]; rows are [n, d]"),
    "none.npy": (lambda p: np.save(p, np.ones((0, 4))), "has shape [0, 4], so no rows"),
    "narrow.npy": (lambda p: np.save(p, np.ones((4, 0))), "has shape [4, 0], so no rows"),
    "complex.npy": (lambda p: np.save(p, np.ones((2, 2), complex)), "holds complex128; rows are of real numbers"),
    "bool.npy": (lambda p: np.save(p, np.ones((2, 2), bool)), "holds bool; rows are of real numbers"),
    "text.npy": (lambda p: np.save(p, np.array([["a"]])), "holds <U1; rows are of real numbers"),
    "pickle.npy": (lambda p: np.save(p, np.array([[{}]]), allow_pickle=True), "cannot be read ("),
    "cut.npy": (lambda p: (np.save(p, np.ones((50, 4))), os.truncate(p, 300)), "cannot be read ("),
    "empty.npy": (lambda p: p.write_bytes(b""), "cannot be read ("),
    "junk.npz": (lambda p: p.write_bytes(b"PK nothing"), "cannot be read ("),
    "two.npz": (lambda p: np.savez(p, a=np.ones((2, 2)), b=np.ones((2, 2))), "has several arrays of shape [n, d] (a"),
    "flat.npz": (lambda p: np.savez(p, a=np.ones(2)), "has no array of shape [n, d] (a [2]); name one"),
    "junk.safetensors": (lambda p: p.write_bytes(b"junk"), "cannot be read ("),
    "junk.parquet": (lambda p: p.write_bytes(b"junk"), "cannot be read ("),
    "none.parquet": (lambda p: pq.write_table(pa.table({"a": pa.array([], pa.float32())}), p), "so no rows"),
    "null.parquet": (lambda p: pq.write_table(pa.table({"a": [1.0, None, 2.0]}), p), "row 1 has nan in column a"),
    "ragged.parquet": (
        lambda p: pq.write_table(pa.table({"a": [[1.0, 2.0], [1.0]]}), p),
        "row 1 has 1 values where the first has 2; rows are",
    ),
    "words.parquet": (lambda p: pq.write_table(pa.table({"a": [["x"], ["y"]]}), p), "rows are of real numbers"),
    "ragged.csv": (
        lambda p: p.write_text("1,2\n3\n"),
        "rows 0 to 2: CSV parse error: Row #2: Expected 2 columns",
    ),
    "word.csv": (lambda p: p.write_text("a,b\n1,2\n3,x\n"), "rows 0 to 2: "),
    "hole.csv": (lambda p: p.write_text("1,2\n3,\n"), "row 1 has nan in column 1"),
    "empty.csv": (lambda p: p.write_text(""), "so no rows"),
    "head.csv": (lambda p: p.write_text("a,b\n"), "has shape [0, 2], so no rows"),
    "twice.csv": (lambda p: p.write_text("a,a\n1,2\n"), "names a column twice"),
    "binary.csv": (lambda p: p.write_bytes(bytes(range(256)) * 9), ""),
    "group.zarr": (lambda p: zarr.create_group(str(p)), "has no array of shape [n, d] (nothing)"),
    "flat.zarr": (lambda p: zarr.create_array(str(p), shape=(4,), dtype="f4"), "has shape [4]; rows are [n, d]"),
    "x.pt": (lambda p: p.write_bytes(b"junk"), "is not a table; give one of .npy, .npz, "),
    "folder.npy": (lambda p: p.mkdir(), "is not a table"),
    "missing.npy": (lambda p: None, "no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_table_is_one_line(tmp_path: Path, name: str) -> None:
    write, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises(SaeError, match=re.escape(f"table = {tmp_path / name}: ")) as caught:
        opened(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_choices_that_are_not_there(tmp_path: Path, rows: np.ndarray) -> None:
    for name in ("x.npy", "x.npz", "x.csv", "named.tsv", "x.parquet"):
        WRITERS[name](tmp_path / name, rows)
    for name, settings, message in (
        ("x.npy", {"array": "a"}, "harvest.array = a: a .npy file has one table; leave it out"),
        ("x.npy", {"columns": ["a"]}, "x.npy: has no column 'a'; there is 0, 1, 2, 3, 4, 5"),
        ("x.npz", {"array": "z"}, "has no array 'z'; there is rows [500, 6], labels [3]"),
        ("x.npz", {"array": "labels"}, "labels has shape [3]; rows are [n, d]"),
        ("x.csv", {"columns": ["a"]}, "has no column 'a'; there is 0, 1, 2"),
        ("named.tsv", {"columns": ["z"]}, "has no column 'z'; there is a, b, c, d, e, f"),
        ("x.parquet", {"columns": ["z"]}, "has no column 'z'; there is c0, "),
    ):
        with pytest.raises(SaeError, match=re.escape(message)):
            opened(tmp_path / name, **settings)


def test_a_file_that_changes_under_way_is_noticed(tmp_path: Path, rows: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", rows)
    source = opened(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", rows[:-1])
    with pytest.raises(SaeError, match=r"x.npy: was changed while it was read; repeat with it as it is now"):
        harvest(source, tmp_path / "cache", Silent())


def test_the_whole_way(tmp_path: Path, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line: harvested, trained on, judged, compared, damaged, moved, mended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    np.save("x.npy", rows)
    made = done("harvest --table x.npy --codec float32 --set harvest.validation=0.2 --json --threads 1").json["stores"]
    assert [one["slug"] for one in made] == ["table-x-float32", "table-x-validation-float32"]
    assert sum(one["rows"] for one in made) == N
    done("train --d-sae 8 --k 2 --steps 5 --batch 64 --device cpu --threads 1 --name one")
    judged = done("eval one --json --device cpu --set eval.dead_rows=0").json
    assert judged["rows"] == made[1]["rows"] and judged["fvu"] > 0 and "ce_clean" not in judged
    assert [row["run"] for row in done("compare --json").json["runs"]] == ["one"]
    store = ActivationStore(Path(made[0]["path"]))
    assert store.hints == {"source": str(tmp_path / "x.npy")} and str(tmp_path) not in str(store.recipe)
    whole = files(store.path)
    for name in ("rows/c/0/0", "position/c/2"):
        (store.path / name).unlink()
    Path("x.npy").rename("y.npy")
    assert "no such file" in sae("cache verify --repair").complaint
    np.save("z.npy", rows + 1)
    assert "has other rows than those table-x-float32" in sae("cache verify --repair --source z.npy").complaint
    done("cache verify --repair --source y.npy")
    assert files(store.path) == whole
    assert "--model gpt2: the rows of" in sae("eval one --model gpt2").complaint
    assert "give one of the two" in sae("harvest --table y.npy --source synthetic").complaint
    assert "--layer 1: these settings have no layer" in sae("harvest --table y.npy --layer 1").complaint
