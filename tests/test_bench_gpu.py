"""What is asked of a card goes on where a part of it dies, hangs, or loses the card."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import gpu

ROOT = Path(__file__).resolve().parents[1]
STAGES = f"""
import os, sys, time
for name in sys.argv[1].split(","):
    if name == "cannot":
        sys.exit("no card")
    print("|", name, *sys.argv[2:], flush=True)
    if name == "dies":
        os.kill(os.getpid(), 9)
    if name == "hangs":
        time.sleep(600)
    print("{gpu.DONE}" + name, flush=True)
    if name == "breaks":
        os._exit({gpu.ANEW})
"""


def through(tmp_path: Path, names: Sequence[str], seconds: float = 600, limit: float = 3) -> list[str]:
    (tmp_path / "stages.py").write_text(STAGES)
    found = gpu.through(tmp_path / "stages.py", names, ["told"], time.monotonic() + seconds, limit)
    return [line for line in found if not line.startswith(gpu.DONE)]


def test_a_stage_takes_no_other_with_it(tmp_path: Path) -> None:
    names = ["one", "dies", "two", "breaks", "three", "hangs", "four"]
    found = [line.split(" after ")[0] for line in through(tmp_path, names)]
    ended = "FAILED: its process ended with -9"
    assert found == [
        "| one told", "| dies told", f"| dies {ended}", "| two told", "| breaks told", "| three told", "| hangs told",
        f"| hangs {ended}", "| four told",
    ]  # fmt: skip


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    found = through(tmp_path, ["one", "hangs", "two"], seconds=1, limit=600)
    assert found[-1] == "| two FAILED: there was no time left | | | NO |"
    assert through(tmp_path, ["one"], seconds=0) == ["| one FAILED: there was no time left | | | NO |"]


def test_what_cannot_begin_ends_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing can be measured"):
        through(tmp_path, ["cannot", "one"])


@pytest.mark.slow
def test_it_can_be_tried_without_a_card() -> None:
    line = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--small", "--only", "topk,update"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "| what | figure | wanted | held |" in done.stdout
    assert "| batch 64: topk |" in done.stdout and "kernels plain" in done.stdout
