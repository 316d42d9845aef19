"""The most memory a training step of each architecture holds, against the least it could: 16 bytes a parameter.

    python bench/train_memory.py [--arch topk,l1] [--batch 2048] [--d-in 768] [--d-sae 8192] [--steps 4] [--json]

The least is a float32 parameter, its gradient and Adam's two moments. Each architecture has a fresh process, which has
imported everything and trained a tiny dictionary (so that libraries have taken what they take) before its resident
memory is noted; then it makes a dictionary and steps on batches made before. What counts is the peak after that, of the
whole process: parameters, optimiser, scratch, the graph, what the allocator does not give back. Architectures whose
sparsity is learned are measured at one per cent of their latents active, and as they start, with about half.
"""

import argparse
import gc
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import subjects
from bench.planted import planted_rows
from bench.rows import Row, show
from sae.pipeline import saes

BYTES = 16  # a parameter, its gradient and two moments, in float32
ROWS = 2048  # from which the bias and the scale are set: fewer than a training takes, so that they are not the peak


def status(name: str) -> int:
    """Bytes of this process: VmRSS, resident now, or VmHWM, the most since `forget_peak`."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def trained(home: Path, arch: str, active: float | None, shape: tuple[int, int], batch: int, steps: int) -> int:
    """Take some steps of a dictionary of `shape` (d_in, d_sae); the bytes resident above before, at the most."""
    d_in, d_sae = shape
    store = subjects.planted_store(home / "cache", ROWS, d_in)
    batches = [planted_rows(batch, d_in, seed) for seed in range(2)]
    gc.collect()
    forget_peak()
    before = status("VmRSS")
    member = subjects.member(subjects.settings({"arch": arch, "d_sae": d_sae}, batch=batch), store, home, "run")
    if active is not None:
        subjects.make_sparse(member.sae, batches[0][:256], active)
    for step in range(steps):
        subjects.take_step(member, batches[step % len(batches)])
    return status("VmHWM") - before


def peak(arch: str, active: float | None, shape: tuple[int, int], batch: int, steps: int) -> int:
    """Bytes that training takes at the most in a process that has imported, and taken, all it ever will beside."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trained(Path(folder) / "tiny", arch, active, (64, 256), 256, 2)
        return trained(Path(folder) / "measured", arch, active, shape, batch, steps)


def parameters(arch: str, d_in: int, d_sae: int) -> int:
    return sum(one.numel() for one in saes.create(saes.parse({"arch": arch, "d_sae": d_sae}), d_in).parameters())


def measure(arch: str, active: float | None, args: argparse.Namespace) -> Row:
    least = BYTES * parameters(arch, args.d_in, args.d_sae)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        most = pool.submit(peak, arch, active, (args.d_in, args.d_sae), args.batch, args.steps).result()
    what = arch if active is None else f"{arch} at {100 * active:.0f} % active"
    print(f"{what}: {most / least:.2f}", file=sys.stderr)
    return Row(what, most / 2**20, "MiB", most / least, f"16 bytes a parameter, {least / 2**20:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch",
        default=",".join(tag for tag, one in saes.ARCHITECTURES.items() if issubclass(one, saes.SAE)),
        help="architectures, comma-separated",
    )
    for name, default in {"batch": 2048, "d-in": 768, "d-sae": 8192, "steps": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="machine-readable rows on stdout")
    args = parser.parse_args()
    rows = []
    for arch in args.arch.split(","):
        learned = subjects.learns_its_sparsity(saes.parse({"arch": arch, "d_sae": args.d_sae}))
        rows += [measure(arch, active, args) for active in ((0.01, None) if learned else (None,))]
    show(f"memory of training, batch {args.batch}, {args.d_in} -> {args.d_sae}", rows, as_json=args.json)


if __name__ == "__main__":
    main()
