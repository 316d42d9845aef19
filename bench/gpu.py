"""Everything that is asked of a card, measured in one run of ten minutes at most, each target beside its figure.

    python bench/gpu.py [--small] [--only STAGES] [--minutes 9] [--peers PYTHON]

Prints a figure as soon as it is there, and at the end once more those of which something is wanted, and what failed.
The stages (bench/gpu_stages.py) go one after the other in one process, the most important first. What fails is a line
that says so; where its process dies with it, or it takes longer than LIMIT, or the card does not answer that process
any more, the next stages have a new one. What the minutes did not suffice for is named. The exit code is 1 where
anything was not measured.

`--only` names some stages, comma-separated. `--small` tries it without a card, with sizes of which the figures mean
nothing. `--peers` names an interpreter with eai-sparsify and dictionary_learning (bench/step_peers.py).
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

STAGES = (
    "topk", "train", "harvest", "batchtopk", "jumprelu", "l1", "matryoshka", "gated", "peers", "right", "loader",
    "many", "dead", "start", "profile", "precision", "update", "tests",
)  # fmt: skip
LIMIT = 180.0
"""Seconds that a stage may take, with the start of its process."""

DONE = "-- done: "
"""Begins the line that says that a stage is over."""

ANEW = 75
"""The exit code of a process that leaves the stages that are left to another."""


def through(script: Path, names: Sequence[str], given: Sequence[str], end: float, limit: float) -> Iterator[str]:
    """What a script prints of stages, in as many processes as it takes; by `end` (of time.monotonic) it is over."""
    left, began = [*names], False
    while left and time.monotonic() < end:
        begun = time.monotonic()
        line = [sys.executable, str(script), ",".join(left), *given]
        with subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, process_group=0,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},  # so that nothing that is timed waits for a network
        ) as process:  # fmt: skip
            clock = _ended_after(process, min(limit, end - begun))
            try:
                assert process.stdout is not None
                for said in process.stdout:
                    began = True
                    yield said.rstrip()
                    if said.startswith(DONE):
                        clock.cancel()
                        begun = time.monotonic()
                        left.pop(0)
                        clock = _ended_after(process, min(limit, end - begun))
                code = process.wait()
            finally:
                clock.cancel()
                _end(process)
        if not began:
            sys.exit(f"bench/gpu.py: nothing can be measured here (code {code}); the reason is above")
        if left and code != ANEW and time.monotonic() < end:
            spent = time.monotonic() - begun
            yield f"| {left.pop(0)} FAILED: its process ended with {code} after {spent:.0f} s | | | NO |"
    for name in left:
        yield f"| {name} FAILED: there was no time left | | | NO |"


def _ended_after(process: "subprocess.Popen[str]", seconds: float) -> threading.Timer:
    """A clock that ends a process, and those that it began, unless it is stopped."""
    clock = threading.Timer(max(0.0, seconds), _end, [process])
    clock.daemon = True
    clock.start()
    return clock


def _end(process: "subprocess.Popen[str]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="on the CPU, at sizes of which the figures mean nothing")
    parser.add_argument("--only", default=",".join(STAGES), help=f"stages, comma-separated, of: {', '.join(STAGES)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no stage goes on; default: 9")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with the other tools; default: none of them")
    args = parser.parse_args()
    names, end = args.only.split(","), time.monotonic() + 60 * args.minutes
    if unknown := [name for name in names if name not in STAGES]:
        sys.exit(f"bench/gpu.py: --only {unknown[0]}: choose from {', '.join(STAGES)}")
    given = [*(["--small"] if args.small else []), *(["--peers", args.peers] if args.peers else [])]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for line in through(Path(__file__).with_name("gpu_stages.py"), names, [folder, *given], end, LIMIT):
            print(line, flush=True)
            found += [line] if line.startswith("|") and not line.endswith("|  |") else []
    print("\n".join(["| what | figure | wanted | held |", "|---|---|---|---|", *found]))
    sys.exit(1 if any(" FAILED: " in line for line in found) else 0)


if __name__ == "__main__":
    main()
