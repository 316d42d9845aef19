"""The kill drill, briefly: real harvests, killed at random instants."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DRILL = Path(__file__).resolve().parents[1] / "bench" / "drill.py"


@pytest.mark.slow
def test_ten_kills() -> None:
    done = subprocess.run(
        [sys.executable, str(DRILL), "--kills", "10", "--seed", "1", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["kills"], found["lost"], found["mismatches"]) == (10, 0, 0)
    assert found["finished"] > 0
    assert sum(found["windows"].values()) == 10
