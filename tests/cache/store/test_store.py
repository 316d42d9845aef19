"""Stores: the format, read by docs/cache-format.md alone; and which names and folders are refused."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zstandard
from support.small_stores import (
    CHUNK,
    CONTEXT,
    N,
    activation_recipe,
    closed_store,
    heavy_rows,
    shrunk,
    token_recipe,
    window_arrays,
    write_activations,
    write_tokens,
)

from sae.cache import activations, tokens
from sae.cache.activations import CHUNK_BYTES, ActivationStore
from sae.cache.disk.locks import Lock
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.store import head as head_module
from sae.cache.store.arrays import NAMES, ArraySpec
from sae.cache.store.head import RECIPE
from sae.cache.store.store import Store
from sae.cache.tokens import TokenStore, TokenWriter

REAL_WINDOWS, REAL_CHUNK_ROWS = activations.WINDOWS, activations.CHUNK_ROWS
REAL_WINDOW_CHUNKS, REAL_CHUNK_TOKENS = tokens.WINDOW_CHUNKS, tokens.CHUNK_TOKENS
PAGE = Path(__file__).resolve().parents[3] / "docs" / "cache-format.md"


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


@pytest.fixture(params=["tokens", "activations"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return closed_store(request.param, tmp_path)


# --- the format, read by the page alone ----------------------------------------------------------------------------


def crc(data: bytes) -> str:
    return f"{google_crc32c.value(data):08x}"


def compact(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def read_by_the_page(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The recipe and every array of a store, with nothing of ours: json, NumPy, zstd, crc32c."""
    head = json.loads((folder / "recipe.json").read_text())
    assert head["format"] == 2
    assert folder.name == f"{head['slug']}-{hashlib.sha256(compact(head['recipe']).encode()).hexdigest()[:8]}"
    assert head.pop("crc") == crc(compact(head).encode())
    rows, listed = 0, {}
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        sealed = json.loads(line)
        assert line == compact(sealed)
        assert sealed["crc"] == crc(compact(sealed["line"]).encode())
        if "rows" in sealed["line"]:
            rows = sealed["line"]["rows"][1]
            listed |= sealed["line"]["files"]
    arrays = {}
    for path in folder.glob("*/zarr.json"):
        metadata, name = json.loads(path.read_text()), path.parent.name
        chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
        parts = []
        for index in range(-(-metadata["shape"][0] // chunk[0])):
            file = f"{name}/c/{index}" + "/0" * (len(chunk) - 1)
            stored = (folder / file).read_bytes()
            assert listed.pop(file) == [len(stored), crc(stored)]
            if any(codec["name"] == "zstd" for codec in metadata["codecs"]):
                stored = zstandard.decompress(stored)
            parts.append(np.frombuffer(stored, dtype).reshape(chunk))
        arrays[name] = np.concatenate(parts)[: metadata["shape"][0]]
        padding = np.concatenate(parts)[metadata["shape"][0] :].astype(np.float64)
        np.testing.assert_array_equal(padding, np.full_like(padding, float(metadata["fill_value"])))
    if head["kind"] == "tokens":
        stored = (folder / "vocabulary.json").read_bytes()
        assert listed.pop("vocabulary.json") == [len(stored), crc(stored)]
    assert not listed
    assert {len(array) for name, array in arrays.items() if not name.startswith("col_")} == {rows}
    return head["recipe"], arrays


def test_tokens_are_read_by_the_page(tmp_path: Path) -> None:
    recipe, arrays = read_by_the_page(write_tokens(tmp_path, N, ended=True).path)
    assert recipe == token_recipe()
    expected = window_arrays(recipe, 0, N)
    assert sorted(arrays) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize("codec", ["int8", "int8:step=0,zstd=none", "bfloat16", "float16", "float32:zstd=1"])
def test_activations_are_read_by_the_page(tmp_path: Path, codec: str) -> None:
    store = write_activations(tmp_path, heavy_rows(N, 7), codec, ended=True)
    recipe, arrays = read_by_the_page(store.path)
    rows = arrays["rows"]
    if recipe["codec"]["name"] == "int8":
        rows = rows * arrays["row_scale"].astype(np.float32)[:, None] * arrays["col_scale"] + arrays["col_mean"]
    elif recipe["codec"]["name"] == "bfloat16":
        rows = (rows.astype(np.uint32) << 16).view(np.float32) + arrays["col_mean"]
    np.testing.assert_allclose(rows.astype(np.float32), store.rows(0, N).numpy(), rtol=1e-6, atol=1e-5)
    for window, (start, stop) in enumerate([(0, 32), (32, 64), (64, 128), (128, N)]):
        text = f"{compact(recipe['tokens'])}#{window}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
        order = np.argsort(np.random.PCG64(seed).random_raw(stop - start), kind="stable")
        np.testing.assert_array_equal(arrays["position"][start:stop], start + order)


def table(marker: str) -> list[list[str]]:
    """The rows of the page's table under a marker."""
    lines = PAGE.read_text().split(f"<!-- {marker} -->\n")[1].splitlines()[2:]
    rows = lines[: lines.index("")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def as_line(kind: str, spec: ArraySpec, width: str) -> list[str]:
    """A specification as the page's table has it."""
    fill = "NaN" if spec.fill != spec.fill else str(spec.fill)
    chunk = "C" if spec.grows else f"{'G' if spec.dimension_names[0] == 'feature' else 'd'}, all in one"
    row = f"[{'G' if spec.dimension_names[-1] == 'feature' else width}]" if spec.row_shape else "[]"
    compressor = "none" if spec.zstd is None else f"zstd {spec.zstd}"
    return [kind, spec.name, NAMES[spec.dtype], row, chunk, ", ".join(spec.dimension_names), fill, compressor]


def test_the_pages_table_is_the_codes() -> None:
    found = set()
    for n_vocab, words in ((65_536, "up to 65536 in the vocabulary"), (65_537, "larger vocabulary")):
        for spec in TokenStore.specs(token_recipe(n_vocab=n_vocab)):
            kind = f"tokens, {words}" if spec.name == "tokens" else "tokens"
            found.add(tuple(as_line(kind, spec, "T")))
    for codec in ("int8", "bfloat16", "float16", "float32"):
        for spec in ActivationStore.specs({**activation_recipe(7, codec), "truth": 5, "toy": True}):
            own = f", codec {codec}" if spec.name in ("rows", "row_scale") else ""
            own = ", synthetic" if spec.name == "truth" else own
            own = ", toy" if spec.name in ("coefficient", "weight", "bias") else own
            found.add(tuple(as_line(f"activations{own}", spec, "d")))
    assert sorted(found) == sorted(map(tuple, table("arrays")))


def test_the_pages_numbers_are_the_codes() -> None:
    text = PAGE.read_text()
    assert f"| activations | an activation | {REAL_WINDOWS.first} | {REAL_WINDOWS.largest} |" in text
    assert f"| tokens | a context | the chunk's contexts | {REAL_WINDOW_CHUNKS} chunks |" in text
    assert f"up to {REAL_CHUNK_ROWS} whose decoded chunk is at most {CHUNK_BYTES >> 20} MiB" in text
    assert f"holding at most {REAL_CHUNK_TOKENS} tokens" in text


def test_what_is_no_store(tmp_path: Path, store: Store) -> None:
    with pytest.raises(NotFound, match=r"is not a store \(no recipe.json\); `stores\(\)`"):
        TokenStore(tmp_path / "nowhere")
    other = ActivationStore if isinstance(store, TokenStore) else TokenStore
    with pytest.raises(SaeError, match=f"holds {store.kind}, not {other.kind}"):
        other(store.path)
    with pytest.raises(SaeError, match="cannot be read"):
        type(store)(store.path / "manifest.jsonl")
    renamed = store.path.rename(store.path.with_name("renamed"))
    with pytest.raises(DamagedStore, match="not to the folder's name"):
        type(store)(renamed)


def test_a_future_format_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "FORMAT", 3)
    (store.path / RECIPE).write_bytes(head_module.head_bytes(store.kind, store.slug, store.recipe))
    monkeypatch.undo()
    with pytest.raises(SaeError, match="format 3, this version reads 2; use the version that wrote it"):
        type(store)(store.path)


def test_the_format_before_is_named(store: Store) -> None:
    head = json.loads((store.path / RECIPE).read_bytes())
    del head["crc"]  # it had none
    (store.path / RECIPE).write_text(json.dumps({**head, "format": 1}, indent=2))
    with pytest.raises(SaeError, match="format 1, this version reads 2; use the version that wrote it"):
        type(store)(store.path)


def test_any_way_to_a_store_will_do(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(store.path)
    for path in (
        tmp_path / "link",
        store.path / "tokens" / ".." / "." if isinstance(store, TokenStore) else store.path,
    ):
        assert type(store)(path).key == store.key
    monkeypatch.chdir(store.path)
    assert type(store)(Path()).key == type(store)(Path(".")).key == store.key
    moved = shutil.copytree(store.path, tmp_path / "elsewhere" / store.key)
    assert type(store)(moved).n_rows == N


def test_what_was_asked_for(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, "a", token_recipe()) as writer:
        assert (writer.store.requested, writer.store.complete) == (0, False)
        writer.request(2 * CHUNK)
        for window in range(2):
            assert not writer.store.complete
            bounds = writer.store.windows.bounds(window)
            writer.append(window_arrays(token_recipe(), *bounds), {})
        assert writer.store.complete
        writer.request(1 << 62)
        assert not writer.store.complete
        writer.close()
        assert writer.store.complete
        (writer.path / "request.json").write_text("{")
        with pytest.raises(
            DamagedStore, match=r"request\.json: is not what was written \(not JSON\); remove it and ask"
        ):
            _ = writer.store.requested


def test_a_closed_store_does_not_grow(tmp_path: Path) -> None:
    store = write_tokens(tmp_path, CHUNK - 3, ended=True)
    arrays = window_arrays(store.recipe, CHUNK - 3, CHUNK)
    with TokenWriter(tmp_path, "synthetic", store.recipe) as writer, pytest.raises(AssertionError):
        writer.append(arrays, {})
    assert store.refreshed().n_rows == CHUNK - 3


def test_a_window_is_all_its_arrays(tmp_path: Path) -> None:
    arrays = window_arrays(token_recipe(), 0, CHUNK)
    with TokenWriter(tmp_path, "a", token_recipe()) as writer:
        for wrong in (
            {"tokens": arrays["tokens"]},
            {**arrays, "length": arrays["length"][1:]},
            {name: array[:0] for name, array in arrays.items()},
            window_arrays(token_recipe(), 0, CHUNK + 1),
        ):
            with pytest.raises(AssertionError):
                writer.append(wrong, {})
        assert writer.store.n_rows == 0
        writer.append(arrays, {})


def test_a_store_that_never_had_a_row_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(SaeError), TokenWriter(tmp_path, "a", token_recipe()):
        raise SaeError("no text")
    assert list((tmp_path / "tokens").iterdir()) == []
    with pytest.raises(KeyboardInterrupt), TokenWriter(tmp_path, "a", token_recipe()) as writer:
        raise KeyboardInterrupt
    assert TokenStore(writer.path).n_rows == 0
    store = write_tokens(tmp_path, CHUNK)
    with pytest.raises(SaeError), TokenWriter(tmp_path, store.slug, store.recipe):
        raise SaeError("the disk is full")
    assert store.refreshed().n_rows == CHUNK


def test_hints_are_no_part_of_the_data(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, "a", token_recipe()) as writer:
        assert writer.store.hints == {}
        writer.hint(model="/models/mine")
        assert writer.store.hints == {"model": "/models/mine"}
        (writer.path / "hints.json").write_text("[")
        with pytest.raises(DamagedStore, match=r"hints\.json: is not what was written \(not JSON\); remove it"):
            _ = writer.store.hints


def test_the_writers_errors_free_the_lock(store: Store) -> None:
    (store.path / "manifest.jsonl").write_bytes(b"nonsense\n")
    writer = TokenWriter(store.path.parents[1], "synthetic", token_recipe())
    if isinstance(store, TokenStore):
        with pytest.raises(DamagedStore):
            writer.__enter__()
        with Lock(store.path) as lock:
            assert lock.stale is None


@pytest.fixture
def powerless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder, and for the length of the test no more rights than any user has (root may write anywhere)."""
    folder = tmp_path_factory.mktemp("powerless")
    root = os.geteuid() == 0
    if root:
        for parent in folder.parents[:3]:
            parent.chmod(0o755)
        os.chown(folder, 65_534, -1)
        os.seteuid(65_534)
    yield folder
    if root:
        os.seteuid(0)


def test_a_folder_without_write_permission(powerless: Path) -> None:
    store = write_tokens(powerless, CHUNK)
    for folder in [powerless, *(path for path in powerless.rglob("*") if path.is_dir())]:
        folder.chmod(0o555)
    try:
        assert TokenStore(store.path).contexts(0, CHUNK).shape == (CHUNK, CONTEXT)
        with pytest.raises(SaeError, match=r"cannot write here \(Permission denied\); choose another folder"):
            write_tokens(powerless, CHUNK, seed=1)
        with pytest.raises(SaeError, match=r"cannot write here \(Permission denied\); choose another folder"):
            write_tokens(powerless, 2 * CHUNK)
        assert store.refreshed().n_rows == CHUNK
    finally:
        for folder in [powerless, *(path for path in powerless.rglob("*") if path.is_dir())]:
            folder.chmod(0o755)


def test_a_file_without_read_permission(powerless: Path) -> None:
    store = write_tokens(powerless, CHUNK)
    for name in ("tokens/c/0/0", "manifest.jsonl", "recipe.json"):
        (store.path / name).chmod(0)
        with pytest.raises(SaeError, match=rf"{name}: cannot be read \(Permission denied\)"):
            TokenStore(store.path).contexts(0, 1)
