"""One writer a store, across real processes."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae.cache.disk.locks import LOCK, Lock, held
from sae.cache.errors import Busy, SaeError

HOLDER = """
import sys
from pathlib import Path
from sae.cache.disk.locks import Lock
with Lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A living process that holds the lock of `tmp_path` until its stdin closes."""
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=root, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_until_the_first_dies(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert held(tmp_path)
    with pytest.raises(Busy, match=rf"process {holder.pid} on .* is writing here; wait for it or end it"):
        Lock(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not held(tmp_path)
    with Lock(tmp_path) as lock:
        assert lock.stale is not None
        assert f"took over the lock that process {holder.pid} on" in lock.stale
        assert held(tmp_path)
    with Lock(tmp_path) as lock:
        assert lock.stale is None


def test_waiting_for_the_other_writer(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    taken = threading.Event()

    def wait_and_take() -> None:
        with Lock(tmp_path, wait=True) as lock:
            assert lock.stale is None
            taken.set()

    thread = threading.Thread(target=wait_and_take)
    thread.start()
    assert not taken.wait(0.3)
    holder.communicate("")
    thread.join()
    assert taken.is_set()


def test_a_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Lock(tmp_path):
        raise KeyError
    assert not held(tmp_path)
    with Lock(tmp_path) as lock:
        assert lock.stale is None


def test_nothing_is_held_where_nothing_is(tmp_path: Path) -> None:
    assert not held(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_asking_who_holds_it_does_not_stop_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`held` takes the lock for an instant; a writer that comes just then tries again."""
    asking = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(asking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(asking, fcntl.LOCK_UN))
    with Lock(tmp_path):
        assert held(tmp_path)
    os.close(asking)


def test_a_store_removed_while_we_waited_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock file we waited for is gone with its folder; holding it would keep nobody else out."""
    folder = tmp_path / "store"
    first = Lock(folder)
    first.__enter__()

    def remove(_: float) -> None:
        shutil.rmtree(folder)
        first.__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", remove)
    with Lock(folder, wait=True):
        assert (folder / LOCK).exists()
        monkeypatch.setattr(time, "sleep", lambda _: None)
        with pytest.raises(Busy):
            Lock(folder).__enter__()


def test_erasing_a_lock_leaves_what_else_is_there(tmp_path: Path) -> None:
    for others in ([], ["mine"]):
        folder = tmp_path / str(len(others))
        with Lock(folder) as lock:
            for name in others:
                (folder / name).write_bytes(b"")
            lock.erase()
        assert folder.exists() == bool(others)
        assert not others or os.listdir(folder) == others


def test_erasing_leaves_what_somebody_began_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "store"
    unlink = os.unlink

    def unlinked(path: Path, **options: int) -> None:
        unlink(path, **options)
        if Path(path).name == LOCK:
            (folder / LOCK).write_bytes(b"")

    with Lock(folder) as lock:
        monkeypatch.setattr(os, "unlink", unlinked)
        lock.erase()
    assert os.listdir(folder) == [LOCK]


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SaeError, match="cannot write here"):
        Lock(tmp_path / "file").__enter__()


@pytest.mark.parametrize("text", [b"", bytes(9), b'{"pid": ', b'{"pid": 3}'])
def test_what_a_power_cut_leaves_of_a_lock_will_do(tmp_path: Path, text: bytes) -> None:
    (tmp_path / LOCK).write_bytes(text)
    with Lock(tmp_path) as lock:
        assert (lock.stale is None) == (not text.strip(b"\0"))
