"""A writer stopped at any instant: readers see whole windows only, and the next writer ends with the same bytes."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.killing import Killed
from support.small_stores import (
    CHUNK,
    files,
    heavy_rows,
    shrunk,
    token_recipe,
    window_arrays,
    write_activations,
    write_tokens,
)

from sae.cache.disk import durable
from sae.cache.disk.durable import PARTIAL
from sae.cache.errors import SaeError
from sae.cache.store.manifest import MANIFEST, Manifest
from sae.cache.store.store import Store
from sae.cache.tokens import TokenStore

N = CHUNK + 5
WHOLE = (0, CHUNK, N)  # row counts of whole windows


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


class Countdown:
    """Stops the writer at its n-th call to the system that changes something on the disk."""

    def __init__(self, patch: pytest.MonkeyPatch, stop: int, error: Callable[[], BaseException]) -> None:
        self.left, self.error = stop, error
        for name in ("fsync", "replace", "mkdir", "unlink"):
            patch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:  # a dead process does nothing more; a full disk stays full
                raise self.error()
            return call(*args, **options)

        return counted


def expect_whole_windows(path: Path) -> int:
    """Rows of a store after a crash (0 where it was not begun), every one of them readable."""
    if not (path / "recipe.json").exists():
        return 0
    store = TokenStore(path)
    assert store.n_rows in WHOLE
    for name in store.committed_files():
        store.stored(name)
    assert store.contexts(0, store.n_rows).tobytes() == (
        window_arrays(store.recipe, 0, store.n_rows)["tokens"].astype("int64").tobytes()
    )
    return store.n_rows


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, small: None) -> dict[str, bytes]:
    """The files of the token store that every interrupted writer must end with."""
    return files(write_tokens(tmp_path_factory.mktemp("whole"), N, ended=True).path)


def finished(root: Path) -> dict[str, bytes]:
    return files(write_tokens(root, N, ended=True).path)


def store_path(root: Path) -> Path:
    return next(iter([*root.glob("tokens/[!.]*"), root / "tokens" / "none"]))


def test_killed_at_every_step(tmp_path_factory: pytest.TempPathFactory, uninterrupted: dict[str, bytes]) -> None:
    seen = set()
    for stop in range(10_000):
        root = tmp_path_factory.mktemp("killed")
        try:
            with pytest.MonkeyPatch.context() as patch:
                Countdown(patch, stop, Killed)
                write_tokens(root, N, ended=True)
        except Killed:
            seen.add(expect_whole_windows(store_path(root)))
            assert finished(root) == uninterrupted, stop
        else:
            break
    assert seen == set(WHOLE)
    assert stop > 70
    assert files(store_path(root)) == uninterrupted


def test_killed_while_appending_to_the_manifest(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    """The line of the second window is torn at every place; its chunks are all there."""
    path = write_tokens(tmp_path, 2 * CHUNK).path
    data = (path / MANIFEST).read_bytes()
    first = data.index(b"\n") + 1
    store = TokenStore(path)
    for length in range(first, len(data), 7):
        (path / MANIFEST).write_bytes(data[:length])
        for spec in store.arrays.values():  # Zarr's metadata would have been written next
            (path / spec.name / "zarr.json").write_bytes(spec.metadata(CHUNK))
        assert expect_whole_windows(path) == CHUNK
    assert finished(tmp_path) == uninterrupted


def test_killed_between_two_stores_of_one_pass(tmp_path: Path) -> None:
    """Stores of several sites need not be equally far: each continues where it stands, with the same bytes."""
    rows = heavy_rows(5 * CHUNK, 5)
    whole = write_activations(tmp_path / "whole", rows, ended=True)
    for start in (CHUNK, 2 * CHUNK, 4 * CHUNK):
        root = tmp_path / str(start)
        write_activations(root, rows[:start])
        (next(root.glob("activations/*")) / "rows/c/99").mkdir()
        assert files(write_activations(root, rows, ended=True).path) == files(whole.path)


def test_what_a_crash_left_is_cleared_away(tmp_path: Path) -> None:
    store = write_tokens(tmp_path, 2 * CHUNK)
    before = files(store.path)
    for name in (f"tokens/c/0/0.123{PARTIAL}", f"request.json.9{PARTIAL}", "tokens/c/2/0", "length/c/3"):
        (store.path / name).parent.mkdir(parents=True, exist_ok=True)
        (store.path / name).write_bytes(b"left")
    (store.path / "tokens/zarr.json").write_bytes(store.arrays["tokens"].metadata(CHUNK))
    assert store.refreshed().n_rows == 2 * CHUNK
    write_tokens(tmp_path, 2 * CHUNK)
    assert files(store.path) == before


SAID = {errno.ENOSPC: "no space left on the disk; what was committed is safe", errno.EIO: "Input/output error"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_at_every_step(
    tmp_path_factory: pytest.TempPathFactory, uninterrupted: dict[str, bytes], code: int
) -> None:
    """Every failure is one line, and what was committed stays."""
    for stop in range(2, 10_000, 5):
        root = tmp_path_factory.mktemp("full")
        message = ""
        with pytest.MonkeyPatch.context() as patch:
            Countdown(patch, stop, lambda: OSError(code, os.strerror(code)))
            try:
                write_tokens(root, N, ended=True)
            except SaeError as error:
                message = str(error)
        if not message:
            break
        assert SAID[code] in message
        assert "\n" not in message
        expect_whole_windows(store_path(root))
        assert finished(root) == uninterrupted
    assert stop > 50


class Nearly:
    """A file on a disk that is full after some more writes: the one that hits the end leaves half of its bytes."""

    def __init__(self, file: Any, left: list[int]) -> None:
        self._file, self._left = file, left

    def __enter__(self) -> "Nearly":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        self._left[0] -= 1
        if self._left[0] < 0:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data))


def test_a_full_disk_in_the_middle_of_every_write(
    tmp_path_factory: pytest.TempPathFactory, uninterrupted: dict[str, bytes]
) -> None:
    for stop in range(10_000):
        root, left, message = tmp_path_factory.mktemp("full"), [stop], ""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(durable, "open", lambda *how, left=left: Nearly(open(*how), left), raising=False)  # noqa: SIM115
            try:
                write_tokens(root, N, ended=True)
            except SaeError as error:
                message = str(error)
        if not message:
            break
        assert SAID[errno.ENOSPC] in message
        assert not list(store_path(root).rglob(f"*{PARTIAL}"))  # what could not be finished gives its room back
        expect_whole_windows(store_path(root))
        assert finished(root) == uninterrupted
    assert stop > 15


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True)
    if tried.returncode:
        pytest.skip("no right to mount a disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, tmp_path: Path) -> None:
    """The store stays valid, and goes on to the same bytes when there is room."""
    with pytest.raises(SaeError, match="no space left on the disk; what was committed is safe, free some and repeat"):
        write_tokens(small_disk, 20 * CHUNK)
    store = TokenStore(store_path(small_disk))
    assert 0 < store.n_rows < 20 * CHUNK
    assert not any(map(store.damage, store.committed_files()))
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    whole = write_tokens(tmp_path / "whole", 20 * CHUNK)
    assert files(write_tokens(small_disk, 20 * CHUNK).path) == files(whole.path)


BEGIN = """
import resource, sys
from pathlib import Path
sys.path[:0] = ["tests"]
from support.small_tokens import write_tokens
from sae.cache import tokens
from sae.cache.errors import SaeError
tokens.CHUNK_TOKENS, tokens.WINDOW_CHUNKS = 256, 4
root = Path(sys.argv[1])
"""
LIMITED = f"""{BEGIN}
write_tokens(root, 32)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
try:
    write_tokens(root, 1024)
except SaeError as error:
    print(error)
"""


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """A real failing write, in the middle of the data."""
    done = run_python(LIMITED, tmp_path)
    assert done.stdout.endswith(f"{os.strerror(errno.EFBIG)}\n")
    assert rows_now(tmp_path) in (CHUNK, 2 * CHUNK)
    assert not list(store_path(tmp_path).rglob(f"*{PARTIAL}"))
    whole = write_tokens(tmp_path / "whole", 4 * CHUNK)
    assert files(write_tokens(tmp_path, 4 * CHUNK).path) == files(whole.path)


WRITER = f"{BEGIN}\nwrite_tokens(root, 6000)"
PROJECT = Path(__file__).resolve().parents[1]


def run_python(script: str, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, str(root)], cwd=PROJECT, capture_output=True, text=True, check=True
    )


def test_kill_9(tmp_path: Path) -> None:
    """A real process, killed by SIGKILL three times wherever it happens to be."""
    root, rows = tmp_path / "killed", 0
    for delay in (0.0, 0.05, 0.13):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(root)], cwd=PROJECT) as process:
            while rows == rows_now(root):  # it has committed something new
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        store = TokenStore(store_path(root))
        assert store.n_rows > rows
        for name in store.committed_files():
            store.stored(name)
        assert store.n_rows == store.windows.round_up(store.n_rows)
        rows = store.n_rows
    resumed = write_tokens(root, rows + 4 * CHUNK)
    assert files(resumed.path) == files(write_tokens(tmp_path / "whole", rows + 4 * CHUNK).path)


def rows_now(root: Path) -> int:
    path = store_path(root)
    return Manifest.read(path).rows if path.exists() else 0


def test_a_reader_beside_a_writer(tmp_path: Path) -> None:
    """It sees the rows of when it opened the store, and more after asking again."""
    recipe = token_recipe()
    store: Store = write_tokens(tmp_path, CHUNK)
    write_tokens(tmp_path, 4 * CHUNK)
    assert store.n_rows == CHUNK
    assert store.read("tokens", 0, CHUNK).tobytes() == window_arrays(recipe, 0, CHUNK)["tokens"].astype("<u2").tobytes()
    with pytest.raises(AssertionError):
        store.read("tokens", 0, CHUNK + 1)
    assert store.refreshed().n_rows == 4 * CHUNK
