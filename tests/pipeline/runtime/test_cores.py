"""Threads: what this process may use, what is busy, what `--threads` and a checkpoint say."""

import os
from pathlib import Path

import pytest
import torch

from sae.cache.errors import SaeError
from sae.pipeline.runtime import cores, devices


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of eight cores, all ours and idle, without quotas, whose kernel tells what is in this folder."""
    monkeypatch.setattr(cores, "mine", lambda: set(range(8)))
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "MINE", tmp_path / "mine")
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return tmp_path


def busy(monkeypatch: pytest.MonkeyPatch, machine: Path, now: int, load: float) -> None:
    """So many of the cores work while one looks, and that was the load of the last minute."""
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))

    def tick(_seconds: float) -> None:
        lines = [f"cpu{i} {110 if i < now else 100} 0 0 {100 if i < now else 110} 0 0 0 0 0 0" for i in range(8)]
        (machine / "stat").write_text("\n".join(["cpu  1 2 3 4", *lines, "intr 5"]))

    (machine / "stat").write_text("\n".join(f"cpu{i} 100 0 0 100 0 0 0 0 0 0" for i in range(8)))
    monkeypatch.setattr(cores.time, "sleep", tick)


@pytest.mark.parametrize(
    ("mine", "files", "expected"),
    [
        ("", {}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a\n", {"cpu.max": "150000 100000"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("4:cpu,cpuacct:/x\n", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu,cpuacct:/x\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": "200000",
                                "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, 8),
        ("3:memory:/x\n", {"memory/x/cpu.max": "100000 100000"}, 8),
        ("0::/\n", {"cpu.max": "9900000 100000"}, 8),
    ],
)  # fmt: skip
def test_quotas_count(machine: Path, mine: str, files: dict[str, str], expected: int) -> None:
    (machine / "mine").write_text(mine)
    for name, text in files.items():
        path = machine / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cores.usable() == expected


@pytest.mark.parametrize(
    ("now", "load", "expected"),
    [(0, 0.0, 8), (3, 5.0, 5), (8, 20.0, 1), (0, 8.0, 8), (8, 0.2, 8), (8, 2.0, 6)],
)  # fmt: skip
def test_busy_cores_are_left_alone(
    machine: Path, monkeypatch: pytest.MonkeyPatch, now: int, load: float, expected: int
) -> None:
    """The load remembers a command that has just ended, a look sees a moment's work: the smaller one counts."""
    busy(monkeypatch, machine, now, load)
    assert cores.free() == expected


def test_a_quota_is_no_share_of_what_others_use(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy(monkeypatch, machine, 3, 3.0)
    (machine / "mine").write_text("0::/\n")
    (machine / "cgroup").mkdir()
    (machine / "cgroup" / "cpu.max").write_text("200000 100000\n")
    assert cores.free() == 2


@pytest.mark.parametrize(
    ("processes", "there", "said"),
    [
        (8, 8, ""), (9, 8, "workers = 9: so many processes have 8 cores between them here, and are no faster than 8"),
        (2, 1, "workers = 2: so many processes have 1 core between them here, and are no faster than 1"),
        (8, 1, "workers = 8: so many processes have 1 core between them here, and are no faster than 1"),
    ],
)  # fmt: skip
def test_more_processes_than_cores_are_noted(
    monkeypatch: pytest.MonkeyPatch, processes: int, there: int, said: str
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(cores, "usable", lambda: there)
    cores.expect_few(processes, "workers =", notes.append)
    assert notes == [said] * bool(said)


@pytest.mark.parametrize(("processes", "there"), [(9, 1), (64, 2)])
def test_a_crowd_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch, processes: int, there: int) -> None:
    monkeypatch.setattr(cores, "usable", lambda: there)
    with pytest.raises(SaeError, match=rf"^workers = {processes}: so many .* {there} core.* here; try {there}$"):
        cores.expect_few(processes, "workers =", print)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads that were asked of torch."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(devices, "_said", False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return asked


def test_threads_by_default_are_the_free_cores(
    machine: Path, monkeypatch: pytest.MonkeyPatch, threads: list[int]
) -> None:
    notes: list[str] = []
    busy(monkeypatch, machine, 6, 6.0)
    devices.take_threads(None, notes.append)
    assert notes == ["threads: 2 of 8, the other cores are busy; `threads = N` says otherwise"]
    busy(monkeypatch, machine, 0, 6.0)
    devices.take_threads(None, notes.append)
    assert threads == [2, 8] and len(notes) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    devices.take_threads(None, notes.append)
    assert threads == [2, 8], "the variable has been heard by torch"


def test_threads_that_are_said_are_taken(machine: Path, threads: list[int]) -> None:
    devices.take_threads(3, print)
    devices.take_threads_again(5)
    assert threads == [3], "a checkpoint does not change the user's word"
    with pytest.raises(SaeError, match="threads = 9: this process may use 8 cores; give fewer"):
        devices.take_threads(9, print)


def test_threads_of_before_are_taken_again(machine: Path, threads: list[int]) -> None:
    for before in (5, 0, 9):
        devices.take_threads_again(before)
    assert threads == [5], "of a machine with more cores, or of no number, nothing is taken"


def test_processes_share_the_threads(machine: Path, threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    devices.take_threads(7, print)
    assert devices.threads_of_each(2) == (3, True) and devices.threads_of_each(9) == (1, True)
    devices.take_share((3, True))
    devices.take_threads_again(4)
    assert threads == [7, 3]
