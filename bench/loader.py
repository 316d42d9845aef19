"""The shuffled loader against a raw sequential read of the same stored bytes into a reused buffer.

    python bench/loader.py [--cores 1] [--threads N] [--device cpu] [--codecs int8:zstd=none bfloat16 int8]
                           [--rows 2097152] [--pairs 12] [--folder DIR] [--saelens PYTHON] [--memory] [--parts] [--json]

Reference: `readinto` of the chunk files one after the other, a chunk at a time, into one buffer. Ours: batches of
4096 as they are stored (`encoded`), and decoded to float32 on the CPU; an epoch opens up to 63 chunks twice. In its
first pass a loader checks uncompressed chunks as it opens them, compressed ones in every pass. The rows are
tests/support/heavy_tails.py at width 768. All are warm and take turns, a few chunks each; on one core CPU time counts
(the process is pinned, and opens chunks by as many threads as it has cores), on several the clock. With a device
batches go there, which is waited for before a look at the clock. Medians of the pairs' ratios. SAELens reads
a cache of its own layout (float32) in an interpreter that has sae_lens. `--memory` instead: the most memory resident
while 1,000 batches are loaded, as stored, of 1M rows and of 100M (stores of hard links to one chunk), each in a
process of its own. `--parts` instead: the CPU time of the parts of a step (bench/loader_parts.py).
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

import numpy as np
import torch
from support.heavy_tails import HeavyTails

from bench.loader_parts import parts
from bench.peer import Peer
from bench.rows import Row, show
from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.loader.loader import Loader
from sae.cache.store import manifest
from sae.cache.store.codecs import codec, codec_recipe

D, BATCH, BASE = 768, 4096, 65_536
STEPS = 8  # chunks' worth of rows that each side reads in turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--threads", type=int, help="that open chunks; default: as many as cores")
    parser.add_argument("--device", default="cpu", help="where batches go")
    parser.add_argument("--codecs", nargs="+", default=["int8:zstd=none", "bfloat16", "int8"])
    parser.add_argument("--rows", type=int, default=2 << 20)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="where the stores are kept; default: a temporary folder")
    parser.add_argument("--saelens", default=sys.executable, metavar="PYTHON", help="an interpreter with sae_lens")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.cores)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(range(args.cores)))
    rows: list[Row] = []
    threads, device = args.threads or args.cores, torch.device(args.device)
    clock = "cpu" if args.cores == 1 and device.type == "cpu" else "wall"
    peer = None if args.memory or args.parts else Peer(args.saelens, "loader_saelens.py", "512", str(args.cores), clock)
    if peer is not None and peer.missing:
        print("SAELens: left out, sae_lens is not installed there (see --saelens)", file=sys.stderr)
        peer = None
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for text in args.codecs:
            if args.memory:
                rows += resident(folder, text)
            elif args.parts:
                rows += parts(made(folder, text, args.rows), text)
            else:
                rows += measured(made(folder, text, args.rows), text, threads, device, clock, args.pairs, peer)
    where = f"{args.cores} core(s), {threads} thread(s), to {device}"
    show(f"loading, width {D}, batch {BATCH}, {where}", rows, as_json=args.json)


def made(folder: Path, text: str, n: int) -> ActivationStore:
    """A store of n heavy-tailed rows (the same 65,536 again and again), unless it is there."""
    recipe = {
        "source": {"name": "heavy tails"}, "split": "train", "site": "rows", "d": D, "codec": codec_recipe(codec(text)),
    }  # fmt: skip
    source = HeavyTails(D)
    base: list[torch.Tensor] = []
    with ActivationWriter(folder, "bench", recipe) as writer:
        while writer.store.n_rows < n:
            base = base or [source.rows(8192, seed=i) for i in range(BASE // 8192)]
            start, stop = writer.store.windows.bounds(len(writer.store.manifest.windows))
            buffer = writer.window(stop - start)
            for low in range(start, stop, 8192):
                buffer.add(base[low // 8192 % len(base)], np.arange(low, low + 8192))
            writer.append(buffer.arrays(), {"next": stop})
        return writer.store


def measured(
    store: ActivationStore, name: str, threads: int, device: torch.device, kind: str, pairs: int, peer: Peer | None
) -> list[Row]:
    """Rows a second of the raw read, of encoded and of decoded batches, and the ratios to the first."""
    clock = time.process_time if kind == "cpu" else time.perf_counter
    raw = raw_read(store)
    first, later, decoding = (Loader(store, BATCH, threads=threads, device=device) for _ in range(3))
    with first, later, decoding:
        sides: dict[str, tuple[Iterator[int], Loader | None]] = {
            f"{name}: raw sequential read": (raw, None),
            f"{name}: encoded batches, first pass": ((len(batch[0].rows) for batch in first.encoded()), first),
            f"{name}: encoded batches, later passes": ((len(batch[0].rows) for batch in later.encoded()), later),
            f"{name}: float32 batches, later passes": ((len(batch) for batch in decoding), decoding),
        }
        for what, (
            side,
            _,
        ) in sides.items():  # past the start, and warm; uncompressed chunks are checked in the first pass
            taken(side, store.chunk_rows if "first" in what else store.n_rows + store.chunk_rows)
        speeds: dict[str, list[float]] = {what: [] for what in sides}
        for _ in range(pairs):
            for what, (side, loader) in sides.items():
                taken(side, store.chunk_rows)  # the processor's cache is this side's again
                at_rest(loader)  # what a side reads ahead is its own: as much is read as is given
                begun = clock()
                n = taken(side, STEPS * store.chunk_rows)
                at_rest(loader)
                speeds[what].append(n / (clock() - begun))
            if peer is not None:
                speeds.setdefault("SAELens: float32 batches from its Arrow cache", []).append(peer.rate())
    reference = next(iter(sides))
    return [
        Row(
            what,
            statistics.median(found),
            "rows/s",
            statistics.median(a / b for a, b in zip(found, speeds[reference], strict=True)),
            reference,
        )
        for what, found in speeds.items()
    ]


def taken(side: Iterator[int], rows: int) -> int:
    """Have a side deliver at least so many rows; how many it did."""
    n = 0
    while n < rows:
        n += next(side)
    return n


def at_rest(loader: Loader | None) -> None:
    """Return when a loader's threads (of several: but for the last pieces of work) have read as far ahead as they may,
    and its device has done what it was asked."""
    if loader is not None:
        for pool in (loader._threads.opening, loader._threads.filling):
            pool.submit(int).result()
        if loader.device.type == "cuda":
            torch.cuda.synchronize(loader.device)


def raw_read(store: ActivationStore) -> Iterator[int]:
    """The chunk files in order, again and again, each read at once into the same buffer; rows of each."""
    spec = store.arrays["rows"]
    room = bytearray(spec.chunk_bytes)
    while True:
        for chunk in range(store.n_chunks):
            with open(store.path / spec.chunk_file(chunk), "rb", buffering=0) as file:
                assert file.readinto(room) == store.committed(spec.chunk_file(chunk))[0]
            yield spec.chunk_rows


def resident(folder: Path, text: str) -> list[Row]:
    """The most memory resident while a small and a large store are loaded."""
    one = made(folder / "one", text, 1)
    found = {}
    for rows in (1 << 20, 100 << 20):
        path = linked(one, folder / f"{rows}", rows)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found[rows] = pool.submit(most_resident, path).result()
    small = next(iter(found.values()))
    return [
        Row(f"{text}: {rows >> 20}M rows", size / 2**20, "MiB", size / small, f"{text}: 1M rows")
        for rows, size in found.items()
    ]


def linked(few: ActivationStore, root: Path, rows: int) -> Path:
    """A store of so many rows or some more, all of them in links to the files of a store whose chunks are full."""
    path = root / few.path.name
    if path.exists():
        return path
    assert few.n_rows % few.chunk_rows == 0, few.n_rows
    shutil.copytree(few.path, path, copy_function=os.link)
    (path / manifest.MANIFEST).unlink()
    committed = {name: file for window in few.manifest.windows for name, file in window.files.items()}
    growing = [spec for spec in few.arrays.values() if spec.grows]
    for index in range(few.windows.count(rows)):
        start, stop = few.windows.bounds(index)
        files = (
            {} if index else {name: committed[name] for name in committed if not few.arrays[name.split("/")[0]].grows}
        )
        for spec in growing:
            for chunk in range(start // few.chunk_rows, stop // few.chunk_rows):
                source = spec.chunk_file(chunk % few.n_chunks)
                files[spec.chunk_file(chunk)] = committed[source]
                if chunk >= few.n_chunks:
                    link = path / spec.chunk_file(chunk)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    os.link(path / source, link)
        manifest.commit(path, manifest.Window(index, start, stop, files, few.manifest.windows[0].notes))
    return path


def most_resident(path: Path) -> int:
    """Bytes, at the most, of a process that loads 1,000 batches from the store at `path`."""
    with Loader(ActivationStore(path), BATCH) as loader:
        taken((len(batch[0].rows) for batch in loader.encoded()), 1000 * BATCH)
    status = Path("/proc/self/status").read_text()  # getrusage would tell the parent's peak where that was higher
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
