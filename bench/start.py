"""How soon a command is at work, and how long it takes to end: `sae --help`, `sae list`, `sae train`, `sae eval`.

    python bench/start.py [--device cpu] [--d-sae 24576] [--batch 1024] [--rows 16384] [--tokens 1024] [--repeats 1]
                          [--beside FOLDER]

Rows are of GPT-2 small with random weights (width 768), after its first block. Each command runs in a process of its
own, in which the progress bar notes when it advanced; seconds of the clock and of the CPU are from the start of Python.
`--beside` names another version of this project (with its own .venv), whose commands run in turns with ours. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = {
    "help": {"end": "`sae --help`"},
    "list": {"end": "`sae list`"},
    "train": {
        "first": "`sae train` to its first step", "after": "`sae train` from its last step on",
        "end": "`sae train` in all",
    },
    "eval": {"begin": "`sae eval` to its first rows", "after": "`sae eval` after its last tokens", "end": "`sae eval`"},
}  # fmt: skip
"""Of each command, what is told of it."""
AT_MOST = {("train", "first"): 4.0, ("eval", "end"): 5.0}
"""Seconds of the clock that are wanted on a machine with a card, of 63k tokens and as many held-out rows."""

HANGS = 150
"""Seconds after which a command is not waited for any more."""


class Taken(NamedTuple):
    """Seconds of the clock and of the CPU."""

    clock: float
    cpu: float


class Sizes(NamedTuple):
    """Sizes of what is measured. rows: of the training store. tokens: that are judged, and held-out rows."""

    d_sae: int
    batch: int
    rows: int
    tokens: int
    device: str


def prepare(folder: Path, sizes: Sizes) -> None:
    """Put tokens and rows into the cache of a folder."""
    from bench import harvest as harvesting
    from sae.pipeline.harvest.sources.language_model import HarvestConfig, LanguageModelSource
    from sae.pipeline.harvest.stage import harvest
    from sae.pipeline.language_model import LanguageModel
    from sae.pipeline.runtime.progress import Silent

    cache, most = folder / "cache", {"train": sizes.rows, "validation": sizes.tokens}
    stores = [harvesting.token_store(cache, -(-n // harvesting.CONTEXT), split) for split, n in most.items()]
    config = HarvestConfig.model_validate(
        {"model": "random:gpt2", "layer": [0], "site": ["resid_post"], "tokens": "all", "validation_tokens": "all",
         "rows": {"last_window": "short"}}
    )  # fmt: skip
    model = LanguageModel.boot("random:gpt2", device=sizes.device)
    harvest(LanguageModelSource.over(config, stores, Silent(), model=model), cache, Silent())


def commands(sizes: Sizes, name: str) -> dict[str, list[str]]:
    """The command lines, of which `train` makes the run that `eval` judges."""
    judged = ["--tokens", str(sizes.tokens), "--rows", str(sizes.tokens), "--set", f"eval.dead_rows={sizes.rows}"]
    trained = ["--d-sae", str(sizes.d_sae), "--batch", str(sizes.batch), "--steps", "4", "--name", name]
    where = ["--device", sizes.device]
    return {
        "help": ["--help"], "list": ["list"], "train": ["train", "--arch", "topk", "--k", "32", *trained, *where],
        "eval": ["eval", name, *judged, *where],
    }  # fmt: skip


def run(words: list[str], folder: Path, project: Path = ROOT) -> dict[str, Taken]:
    """What one command of a version of the project took until each moment. RuntimeError where it failed, or hangs."""
    python = project / ".venv" / "bin" / "python"
    paths = os.pathsep.join([str(project), *filter(None, [os.environ.get("PYTHONPATH")])])  # where packages may lie
    env = os.environ | {
        "PYTHONPATH": paths, "SAE_CACHE": str(folder / "cache"), "SAE_RUNS": str(folder / "runs"),
        "SAE_OFFLINE": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    line = [str(python) if python.exists() else sys.executable, __file__, "--child", repr(time.time()), *words]
    try:
        ran = subprocess.run(line, env=env, cwd=folder, capture_output=True, text=True, timeout=HANGS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(words)}: not done after {HANGS} seconds") from error
    said = ran.stdout.rpartition("moments ")[2]
    if ran.returncode or not said:
        raise RuntimeError(f"{' '.join(words)}: {ran.stderr[-2000:]}")
    return {name: Taken(*found) for name, found in json.loads(said).items()}


def child(begun: float, words: list[str]) -> None:
    """Be the command, and print when it was where."""
    from sae.cli import main
    from sae.pipeline.commands.bars import Bars

    found: dict[str, tuple[float, float]] = {}
    advance: Any = Bars.advance

    def noted(bars: Bars, n: int, **fields: Any) -> None:
        advance(bars, n, **fields)
        found["last"] = now()
        found.setdefault("first", now())

    def now() -> tuple[float, float]:
        return time.time() - begun, time.process_time()

    start: Any = Bars.start

    def starting(bars: Bars, *args: Any, **more: Any) -> None:
        found.setdefault("begin", now())
        start(bars, *args, **more)

    Bars.advance, Bars.start = noted, starting  # type: ignore[method-assign]
    sys.argv = ["sae", *words]
    code: Any = 0
    try:
        main()
    except SystemExit as left:
        code = left.code
    found["end"] = now()
    if "last" in found:
        found["after"] = (found["end"][0] - found["last"][0], found["end"][1] - found["last"][1])
    print("moments", json.dumps(found))
    sys.exit(code)


def measured(folder: Path, sizes: Sizes, projects: list[Path], repeats: int) -> dict[Path, dict[str, Taken]]:
    """For each version, what is told of each command: medians of runs in turns."""
    every: dict[Path, dict[str, list[Taken]]] = {project: defaultdict(list) for project in projects}
    for turn in range(repeats):
        for number, project in enumerate(projects):
            for command, words in commands(sizes, f"run-{number}-{turn}").items():
                found = run(words, folder, project)
                for moment, what in MOMENTS[command].items():
                    every[project][what].append(found[moment])
    return {
        project: {what: Taken(*map(statistics.median, zip(*each, strict=True))) for what, each in found.items()}
        for project, found in every.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--d-sae", type=int, default=24_576)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--beside", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    sizes = Sizes(args.d_sae, args.batch, args.rows, args.tokens, args.device)
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch), sizes)
        projects = [ROOT, *([args.beside.resolve()] if args.beside else [])]
        found = measured(Path(scratch), sizes, projects, args.repeats)
    print("| seconds (of the CPU) |", " | ".join(map(str, projects)), "|\n|---|", "---|" * len(projects), sep="")
    for what in found[ROOT]:
        told = (found[project][what] for project in projects)
        print(f"| {what} |", " | ".join(f"{one.clock:.1f} ({one.cpu:.1f})" for one in told), "|")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), sys.argv[3:])
    else:
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        main()
