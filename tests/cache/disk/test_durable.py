"""Writes that are whole or absent, and what the user reads when one fails."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import some

from sae.cache.disk.durable import append_line, checksum, expect_writable, whole_lines_end, write_atomic
from sae.cache.errors import SaeError


def test_the_checksum_is_crc32c() -> None:
    assert checksum(b"123456789") == "e3069283"
    assert checksum(memoryview(b"123456789")) == checksum(bytearray(b"123456789")) == "e3069283"
    assert checksum(b"") == "00000000"


class Recorder:
    """What reached the disk, in order: ("flush", inode), ("rename", inode), ("folder", inode)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        fsync, replace, mkdir = os.fsync, os.replace, os.mkdir

        def record_fsync(handle: int) -> None:
            fsync(handle)
            self.events.append(("flush", os.fstat(handle).st_ino))

        def record_replace(source: Path, target: Path) -> None:
            replace(source, target)
            self.events.append(("rename", os.stat(target).st_ino))

        def record_mkdir(path: Path, mode: int = 0o777) -> None:
            mkdir(path, mode)
            self.events.append(("folder", os.stat(path).st_ino))

        patch.setattr(os, "fsync", record_fsync)
        patch.setattr(os, "replace", record_replace)
        patch.setattr(os, "mkdir", record_mkdir)

    def when(self, what: str, path: Path) -> int:
        """The last time something happened to what is at `path`."""
        event = (what, path.stat().st_ino)
        return len(self.events) - 1 - self.events[::-1].index(event)


def test_a_write_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data before the name, the name before the return, and every new folder in its own parent."""
    recorder = Recorder(monkeypatch)
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"data")
    renamed = recorder.when("rename", path)
    assert recorder.when("flush", path) < renamed < recorder.when("flush", path.parent)
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        assert recorder.when("folder", folder) < recorder.when("flush", folder.parent)
    assert path.read_bytes() == b"data"
    assert os.listdir(path.parent) == ["file"]


def test_a_log_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    append_line(tmp_path / "log", "first")
    assert recorder.when("flush", tmp_path / "log") < recorder.when("flush", tmp_path)


@pytest.mark.parametrize("stage", ["open", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open" if stage == "open" else f"os.{stage}", full)
    with pytest.raises(SaeError, match="no space left on the disk; what was committed is safe"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(SaeError, match=r"cannot write here .*; choose another folder"):
            write_atomic(path, b"data")


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_line(path, "one")
    with open(path, "ab") as file:
        file.write(b"tor")
    append_line(path, "two")
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_failed_append_is_cut_off_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    append_line(path, "one")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(SaeError, match="Input/output error"):
            append_line(path, "two")
    with open(path, "ab+") as file:  # how much of it reached the disk is not known: say, all but the end
        file.truncate(len(b"one\ntw"))
    append_line(path, "three")
    assert path.read_bytes() == b"one\nthree\n"


@some
@given(st.binary(max_size=40).map(lambda data: data.replace(b"x", b"\n")))
def test_whole_lines_end_after_the_last_newline(data: bytes) -> None:
    end = whole_lines_end(data)
    assert b"\n" not in data[end:]
    assert end == 0 or data[end - 1 : end] == b"\n"


def test_what_can_be_written_is_asked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays of the question, also where the folder is yet to be made."""
    expect_writable(tmp_path / "a" / "b" / "file.json")
    expect_writable(tmp_path / "file.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SaeError, match="is a folder, and a file is to go there"):
        expect_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SaeError, match="file: cannot write here"):
        expect_writable(tmp_path / "file" / "b" / "c")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sae.cache.disk.durable.open", refuse, raising=False)
    with pytest.raises(SaeError, match="no space left on the disk"):
        expect_writable(tmp_path / "c")
