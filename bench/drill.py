"""kill -9 at random instants of real harvests: nothing committed is lost, and the finished bytes are always the same.

    python bench/drill.py [--kills 100] [--seed 0] [--json]

The embedded model and tokens of the Python library's text; windows are small (512 rows, then up to 2,048), so that a
store of eight is harvested in about a second. A process that has everything loaded forks one child a harvest and kills
it after a random time. The next child goes on with what it finds; a store that was finished is compared, and the next
begun. After each kill, with nothing repaired:

    lost         rows whose commit had returned in the child (it says so through a pipe), but that a reader does not see
    mismatches   files a reader sees that are damaged or are not those of a harvest nobody interrupted; at the end of a
                 store, any file that is not

Both must be 0. `windows` says how many windows were committed at each kill, `in_mid_write` how often the kill left a
temporary file, a chunk not yet listed or half a manifest line. A kill is not a power cut: what had not been flushed
survives it. That flushing comes in the right order is tested by itself (tests/cache/disk/test_durable.py).
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork copies no threads, so there must be none

import torch

from bench.children import Child, Say
from sae.cache import activations
from sae.cache.activations import ActivationStore
from sae.cache.disk.durable import PARTIAL, whole_lines_end
from sae.cache.disk.locks import LOCK, held
from sae.cache.disk.paths import listing
from sae.cache.errors import SaeError
from sae.cache.store.head import RECIPE
from sae.cache.store.manifest import MANIFEST, Window, Windows
from sae.cache.store.store import HINTS, REQUEST
from sae.cache.store.writer import Writer
from sae.cache.tokens import TokenStore
from sae.pipeline.harvest.sources.language_model import HarvestConfig, LanguageModelSource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.tokenize.stage import TokenizeConfig, tokenize

CHUNK_ROWS, WINDOWS = 256, Windows(512, 2048)
TOKENS = 12_000  # eight windows
NOT_DATA = (LOCK, REQUEST, HINTS)


@dataclass
class Drill:
    """What happened."""

    kills: int = 0
    lost: int = 0
    mismatches: int = 0
    finished: int = 0  # stores harvested to the end after kills, all their files compared
    in_mid_write: int = 0
    windows: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a store that its recipe and row count decide."""
    return {name: (folder / name).read_bytes() for name in listing(folder) if name not in NOT_DATA}


def stores(root: Path) -> list[Path]:
    return sorted(path.parent for path in (root / "activations").glob(f"*/{RECIPE}"))


def told(run: Callable[[], object], say: Say) -> object:
    """Run a harvest that says, at every commit that has returned, how many rows there are: eight bytes."""
    commit = Writer.commit

    def telling(writer: Writer, window: Window) -> Window:
        done = commit(writer, window)
        say(window.stop.to_bytes(8, "little"))
        return done

    Writer.commit = telling  # type: ignore[method-assign, assignment]
    return run()


def acknowledged(child: Child) -> int:
    """Rows of the last commit that returned."""
    said = child.said()
    return int.from_bytes(said[-8:], "little") if said else 0


def inspect(path: Path | None, whole: dict[str, bytes], promised: int, drill: Drill) -> int:
    """What a reader finds after a kill; returns the rows."""
    store, rows, names = None, 0, []
    if path is not None:
        if held(path):
            drill.wrong.append("the lock outlived its holder")
        store = ActivationStore(path)
        rows, names = store.n_rows, list(store.committed_files())
        drill.windows[len(store.manifest.windows)] += 1
        listed, manifest = set(names), path / MANIFEST
        data = manifest.read_bytes() if manifest.exists() else b""
        left = [n for n in listing(path) if n.endswith(PARTIAL) or ("/c/" in n and n not in listed)]
        drill.in_mid_write += bool(left) or whole_lines_end(data) != len(data)
        for name in names:
            try:
                if store.stored(name) != whole[name]:
                    drill.wrong.append(f"{name}: not the bytes of an uninterrupted harvest")
            except SaeError as error:
                drill.wrong.append(str(error))
        if not whole[MANIFEST].startswith(data[: whole_lines_end(data)]):
            drill.wrong.append(f"{MANIFEST}: not the beginning of an uninterrupted harvest's")
        if rows:
            store.rows(0, rows)  # they can be decoded, too
    else:
        drill.windows[0] += 1
    drill.lost += max(0, promised - rows)
    return rows


def practise(kills: int, seed: int, home: Path, say: Callable[[str], None]) -> Drill:
    """The whole drill, in an empty folder."""
    torch.set_num_threads(1)
    activations.CHUNK_ROWS, activations.WINDOWS = CHUNK_ROWS, WINDOWS
    model = LanguageModel.boot("tiny", device="cpu", dtype="float32", revision=None, offline=True)
    config = TokenizeConfig(source="python", tokenizer="tiny", context=64, tokens=TOKENS, validation=0)
    tokens: TokenStore = tokenize(config, home / "tokens", Silent(), offline=True).stores["train"]
    asked = HarvestConfig(model="tiny", layer=(1,), site=("mlp_out",), tokens=TOKENS, batch_tokens=512)

    def started(root: Path) -> Child:
        source = LanguageModelSource.over(asked, [tokens], Silent(), model=model, device="cpu", offline=True)
        return Child(partial(told, partial(harvest, source, root, Silent())))

    begun = time.monotonic()
    assert not started(home / "whole").killed_after(600)
    length = time.monotonic() - begun
    (path,) = stores(home / "whole")
    whole, windows = files(path), len(ActivationStore(path).manifest.windows)
    say(f"an uninterrupted harvest: {windows} windows, {len(whole)} files, {length:.1f} s")
    chance, drill, root, rows = random.Random(seed), Drill(), home / "killed", 0
    begun = time.monotonic()
    while drill.kills < kills or rows:
        # the last store is harvested to its end
        patience = chance.uniform(0, length) if drill.kills < kills else 600
        child = started(root)
        killed = child.killed_after(patience)
        found = stores(root)
        rows = max(rows, acknowledged(child))
        child.close()
        if killed:
            drill.kills += 1
            rows = inspect(found[0] if found else None, whole, rows, drill)
            if drill.kills % 10 == 0:
                say(f"{drill.kills} kills, {drill.finished} stores finished, {len(drill.wrong)} mismatches")
        else:
            drill.finished += 1
            there = files(found[0])
            drill.wrong += [
                f"{name}: differs at the end" for name in whole | there if whole.get(name) != there.get(name)
            ]
            shutil.rmtree(root)
            rows = 0
    drill.mismatches, drill.seconds = len(drill.wrong), round(time.monotonic() - begun, 1)
    return drill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        drill = practise(given.kills, given.seed, Path(home), lambda line: print(line, file=sys.stderr))
    windows = {str(number): drill.windows[number] for number in sorted(drill.windows)}
    if given.json:
        print(json.dumps({**asdict(drill), "windows": windows}))
    else:
        print(f"{drill.kills} kills, {drill.lost} rows lost, {drill.mismatches} mismatches in {drill.seconds} s")
        print(f"{drill.finished} stores finished; {drill.in_mid_write} kills in the middle of a write")
        print("windows committed at the kill:", ", ".join(f"{n}: {times}" for n, times in windows.items()))
    sys.exit(1 if drill.lost or drill.mismatches else 0)


if __name__ == "__main__":
    main()
