"""Several processes and one store: one writes, others wait, leave or read; and growing, whatever the steps."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import CHUNK, few, files, heavy_rows, shrunk, write_activations, write_tokens

from sae.cache.store.manifest import MANIFEST
from sae.cache.tokens import TokenStore

PROJECT = Path(__file__).resolve().parents[3]
BEGIN = """
import sys
from pathlib import Path
sys.path[:0] = ["tests"]
from support.small_tokens import *
from sae.cache import tokens
from sae.cache.errors import Busy
from sae.cache.tokens import TokenStore, TokenWriter
tokens.CHUNK_TOKENS, tokens.WINDOW_CHUNKS = 256, 4
root, contexts = Path(sys.argv[1]), int(sys.argv[2])
"""
WRITER = f"{BEGIN}\nwrite_tokens(root, contexts)"
READER = f"""{BEGIN}
path, seen, sizes = next(root.glob("tokens/*")), 0, 0
print("reading", flush=True)
while seen < contexts:
    store = TokenStore(path)
    assert store.n_rows >= seen, (store.n_rows, seen)
    right = window_arrays(store.recipe, 0, store.n_rows)["tokens"].astype("int64")
    assert store.contexts(0, store.n_rows).tobytes() == right.tobytes()
    assert not any(map(store.damage, [*store.metadata(), *store.committed_files()]))
    sizes += store.n_rows > seen
    seen = store.n_rows
print(sizes)
"""
WAITER = f"""{BEGIN}
recipe = token_recipe()
try:
    with TokenWriter(root, "synthetic", recipe, wait=sys.argv[3] == "wait") as writer:
        print("rows", writer.store.n_rows, "notice", writer.notice)
except Busy as error:
    print(error)
"""


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=PROJECT, text=True, stdout=subprocess.PIPE)


def test_readers_beside_a_writer(tmp_path: Path) -> None:
    """Two processes open the store again and again while another grows it, and check every byte each time."""
    rows = 40 * CHUNK
    write_tokens(tmp_path, CHUNK)
    readers = [start(READER, tmp_path, rows) for _ in range(2)]
    assert [reader.stdout.readline() for reader in readers if reader.stdout] == ["reading\n"] * 2
    with start(WRITER, tmp_path, rows) as writer:
        said = [reader.communicate()[0] for reader in readers]
    assert writer.returncode == 0
    assert [reader.returncode for reader in readers] == [0, 0]
    assert max(map(int, said)) > 2  # they saw it grow


def test_a_second_harvester_waits_or_leaves(tmp_path: Path) -> None:
    with start(WRITER, tmp_path, 100_000) as writer:
        while not list(tmp_path.glob(f"tokens/*/{MANIFEST}")):
            assert writer.poll() is None
            time.sleep(0.01)
        left, _ = start(WAITER, tmp_path, 0, "leave").communicate()
        assert f"process {writer.pid} on" in left
        assert left.endswith("is writing here; wait for it or end it\n")
        waiting = start(WAITER, tmp_path, 0, "wait")
        time.sleep(0.5)
        assert waiting.poll() is None
        writer.send_signal(signal.SIGKILL)
    got, _ = waiting.communicate()
    (path,) = tmp_path.glob("tokens/*")
    assert got == f"rows {TokenStore(path).n_rows} notice {path}: took over the lock that process {writer.pid} on " + (
        f"{os.uname().nodename} left behind\n"
    )


@few
@given(st.lists(st.integers(1, 17 * CHUNK), min_size=1, max_size=6))
def test_growing_keeps_every_byte(tmp_path_factory: pytest.TempPathFactory, steps: list[int]) -> None:
    """Whatever was asked for on the way, each step keeps all that was there, and the last is as if asked at once."""
    root, before = tmp_path_factory.mktemp("steps"), {}
    boundary = TokenStore.layout({"context_length": 8}).round_up
    for rows in (*steps, 17 * CHUNK):
        now = files(write_tokens(root, boundary(rows)).path)
        for name, data in before.items():
            grown = now[name].startswith(data) if name == MANIFEST else now[name] == data
            assert grown or name.endswith("zarr.json"), name
        before = now
    assert before == files(write_tokens(tmp_path_factory.mktemp("once"), boundary(17 * CHUNK)).path)
    assert before[MANIFEST].count(b"\n") >= 6


def test_a_prefix_is_what_a_smaller_store_holds(tmp_path: Path) -> None:
    rows = heavy_rows(12 * CHUNK, 5)
    large = write_activations(tmp_path / "large", rows)
    for n in (CHUNK, 2 * CHUNK, 4 * CHUNK, 8 * CHUNK):
        small = write_activations(tmp_path / str(n), rows[:n])
        assert small.rows(0, n).tolist() == large.rows(0, n).tolist()
        assert small.positions(0, n).tolist() == large.positions(0, n).tolist()
