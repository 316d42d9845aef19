"""How good our dictionaries are beside SAELens', dictionary_learning's and sparsify's own, trained on equal batches.

Three commands, in this order (a root is the cache that `sae demo --cache ROOT` fills):

    python bench/quality.py rows --root ROOT --out ROWS                  # ROWS/tiny and ROWS/planted, .npy files
    python bench/quality.py train --rows ROWS --results R.jsonl [--tools saelens,sparsify --peers PYTHON] [--arch topk]
    python bench/quality.py table --results R.jsonl

`store TRAIN HELD --out ROWS/NAME` takes the rows of two stores (folders), and `train --shape NAME=D_SAE:K` trains on
them.

`train` adds a line a training and leaves out those that are there: stop it, repeat it, run one a tool. Every tool sees
the same rows in the same order at the same rates; `--best` trains at every rate with seed 0, and with the other seeds
at the best of them alone. Figures are of held-out rows. FVU is compared at equal L0: ours is steered to several (or
has several k), log FVU is interpolated in log L0, and read off at the L0 the other tool reached. `table --best`
compares each tool's best rate with ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from bench.peer import Peer
from bench.quality_peers import DECAY, WARMUP, Job, batches, load, widths
from sae.cache.activations import ActivationStore
from sae.pipeline import saes
from sae.pipeline.harvest.sources.synthetic import GroundTruth, Independent, SyntheticConfig
from sae.pipeline.metrics.recovery import Recovery
from sae.pipeline.train import optimising
from sae.pipeline.train.config import TrainConfig

TRAIN, HELD = 400_000, 20_000
SHAPES = {"tiny": (512, 16), "planted": (256, 8)}  # d_sae and k for each set of rows
TOOLS = {
    "ours": ("topk", "batchtopk", "matryoshka", "l1", "jumprelu", "gated", "p_anneal"),
    "saelens": ("topk", "batchtopk", "matryoshka", "l1", "jumprelu", "gated"),
    "dictionary_learning": ("topk", "batchtopk", "matryoshka", "l1", "jumprelu", "gated", "p_anneal"),
    "sparsify": ("topk",),
}
PREFIXES = (0.03125, 0.09375, 0.21875, 0.46875)  # of matryoshka, the same for every tool: ours
COEFFICIENTS = {
    ("saelens", "l1"): (3.0,),
    ("saelens", "jumprelu"): (3.0,),
    ("saelens", "gated"): (1.0,),
    ("dictionary_learning", "l1"): (0.2,),
    ("dictionary_learning", "gated"): (0.1,),
    ("dictionary_learning", "p_anneal"): (0.1,),
}
"""Weights of penalties. What aims at an L0 (all of ours, dictionary_learning's jumprelu) has multiples of k instead."""
SLOPE = 0.6
"""About how log FVU falls with log L0, where nothing else says it."""


def write_store(train: Path, held: Path, out: Path) -> None:
    """The rows of two stores, as `write_rows` writes them."""
    stores = ActivationStore(train), ActivationStore(held)
    _write(out, stores[0].rows(0, stores[0].n_rows), stores[1].rows(0, min(2 * HELD, stores[1].n_rows)))


def _write(folder: Path, train: Tensor, held: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mean = train.mean(0)
    scale = (train - mean).square().mean().rsqrt()
    for part, rows in (("train", train), ("held", held)):
        np.save(folder / f"{part}.npy", ((rows - mean) * scale).numpy())


def write_rows(root: Path, out: Path) -> None:
    """Both sets of rows, centred and of mean squared norm d, as train.npy, held.npy and (planted) truth.npy."""
    stores = [ActivationStore(path) for path in sorted((root / "activations").iterdir())]
    train, held = sorted(stores, key=lambda store: "validation" in store.path.name)[:2]
    truth = GroundTruth(SyntheticConfig(d=128, features=256, presence=Independent(probability=1 / 32)))
    made, _ = truth.draw(0, TRAIN + HELD)
    sets = {
        "tiny": (train.rows(0, min(TRAIN, train.n_rows)), held.rows(0, HELD)),
        "planted": (made[:-HELD], made[-HELD:]),
    }
    for name, parts in sets.items():
        _write(out / name, *parts)
    np.save(out / "planted" / "truth.npy", truth.features.numpy())


def ours(rows: Tensor, held: Tensor, job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one of ours as `sae train` does, and judge it."""
    sae_settings = {"arch": job.arch, "d_sae": job.d_sae}
    if job.arch in ("topk", "batchtopk", "matryoshka"):
        sae_settings["k"] = round(job.k * job.coefficient)
        if job.prefixes:
            sae_settings["prefixes"] = job.prefixes
    else:
        sae_settings["target_l0"] = job.k * job.coefficient
    own = {key: value for key, value in settings.items() if not key.startswith("sae.")}
    sae_settings |= {key[4:]: value for key, value in settings.items() if key.startswith("sae.")}
    config = TrainConfig(sae=saes.parse(sae_settings), lr=job.lr, warmup=WARMUP, decay=DECAY, **own)
    sae = saes.create(config.sae, rows.shape[1], seed=job.seed)
    sae.initialise(rows[: config.initial_rows])
    optimiser = optimising.adam(sae, job.lr, job.steps, config.decay_rates, config.eps)
    for step, x in enumerate(batches(rows, job)):
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            losses = sae.loss(x, clock=saes.Clock(step, job.steps, job.batch))
        optimiser.zero_grad()
        losses.total.backward()
        sae.track(sae.observe(losses))
        sae.before_step()
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), config.clip)
        optimising.set_rates(optimiser, *config.rates_at(step, job.steps))
        optimiser.step()
        sae.after_step()
    sae.eval()
    with torch.no_grad():
        latents = [sae.encode(x) for x in held.split(4096)]
        x_hat = torch.cat([sae.decode(part) for part in latents])
        nested = [0.0] * len(widths(job) if job.prefixes else ())
        for x, part in zip(held.split(4096), latents, strict=True):
            for place, width in enumerate(widths(job)[: len(nested)]):
                first = part.edited(part.dense() * (torch.arange(job.d_sae) < width))
                nested[place] += (x - sae.decode(first)).double().square().sum().item()
    fired = sum(part.fired() for part in latents)
    assert isinstance(fired, Tensor)
    return figures(held, x_hat, fired, fired.sum().item() / len(held), sae.W_dec.detach(), Path(job.rows), nested)


def figures(
    held: Tensor, x_hat: Tensor, fired: Tensor, l0: float, table: Tensor, folder: Path, nested: Sequence[float]
) -> dict[str, Any]:
    """What a dictionary is judged by: FVU, L0, dead share, recovery of the truth where it is known, nested FVU."""
    error, whole = (held - x_hat).double().square().sum(), (held - held.mean(0)).double().square().sum().item()
    found: dict[str, Any] = {"fvu": error.item() / whole, "l0": l0}
    if nested:
        found["nested"] = [one / whole for one in nested]
    found["dead"] = (fired == 0).double().mean().item()
    if (folder / "truth.npy").exists():
        scores = Recovery(table, load(str(folder), "truth")).result()
        found |= {"mmcs": scores["true_to_learned"], "recovered": scores["recovered"]}
    return found


class Trainer(Peer):
    """`quality_peers.py` in the other tools' interpreter."""

    def figures(self, job: Job) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(job._asdict()), file=self.process.stdin, flush=True)
        path = Path(self._line())
        arrays = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
        path.unlink()
        held = load(job.rows, "held")
        shown = [arrays[name] for name in ("x_hat", "fired")]
        l0, nested = arrays["l0"].item(), arrays["nested"].tolist()
        return figures(held, *shown, l0, arrays["W_dec"], Path(job.rows), nested)


def jobs(args: argparse.Namespace, done: Sequence[dict[str, Any]]) -> Iterator[Job]:
    """Every training asked for, seed after seed, so that a sweep that is stopped has something of everything."""
    shapes = dict(args.shape) or SHAPES
    for seed, arch, tool, rows in itertools.product(range(args.seeds), args.arch, args.tools, shapes):
        if arch not in TOOLS[tool]:
            continue
        d_sae, k = shapes[rows]
        folder = str(args.rows / rows)
        of_arch = COEFFICIENTS.get((tool, arch), args.l0)
        coefficients = args.penalty or (of_arch if tool == "ours" or (tool, arch) in COEFFICIENTS else (1.0,))
        for lr, coefficient in itertools.product(args.lr, coefficients):
            prefixes = PREFIXES if arch == "matryoshka" else ()
            job = Job(tool, arch, folder, lr, seed, d_sae, k, args.steps, args.batch, coefficient, prefixes)
            if not (args.best and seed) or lr == best(done, job):
                yield job


def best(done: Sequence[dict[str, Any]], job: Job) -> float:
    """The rate at which seed 0 ended with the least FVU, brought to an L0 of k.

    Rates that end beyond half or twice of that L0 are left to last: the slope says nothing there.
    """
    alike = job._replace(seed=0)._asdict()
    found = {
        entry["job"]["lr"]: (abs(math.log2(entry["l0"] / job.k)) > 1, entry["fvu"] * (entry["l0"] / job.k) ** SLOPE)
        for entry in done
        if entry["job"] | {"lr": job.lr} == alike
    }
    return min(found, key=lambda lr: found[lr])


def read(results: Path) -> list[dict[str, Any]]:
    """The lines of a file of results, if there is one."""
    entries = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for entry in entries:
        job = Job(**entry["job"])
        entry["job"] = job._replace(prefixes=tuple(job.prefixes))._asdict()
    return entries


def of_tool(tool: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of `--set`, which are ours alone."""
    return settings if tool == "ours" else {}


def train(args: argparse.Namespace) -> None:
    """Train what the results lack, a line each."""
    settings = {key: json.loads(value) for key, value in (given.split("=", 1) for given in args.set)}
    done = [entry for entry in read(args.results) if entry["settings"] == of_tool(entry["job"]["tool"], settings)]
    peers: Trainer | None = None
    for job in jobs(args, done):
        mine = of_tool(job.tool, settings)
        entry = {"job": job._asdict(), "settings": mine}
        if any(entry.items() <= other.items() for other in done):
            continue
        if job.tool == "ours":
            found = ours(load(job.rows, "train"), load(job.rows, "held"), job, mine)
        else:
            peers = peers or Trainer(args.peers, "quality_peers.py")
            if peers.missing:
                raise SystemExit(
                    f"quality.py: error: --peers {args.peers}: needs sae-lens, dictionary-learning, eai-sparsify"
                )
            found = peers.figures(job)
        done.append(entry | found)
        with args.results.open("a") as file:
            print(json.dumps(entry | found), file=file)
        print(job, found, file=sys.stderr)


def at_l0(curve: Sequence[dict[str, Any]], l0: float) -> float:
    """FVU at an L0: log FVU against log L0 between two neighbouring points, or beyond the ends on their line.

    Of one point, by the usual slope.
    """
    if len({entry["l0"] for entry in curve}) == 1:
        return float(curve[0]["fvu"]) * (curve[0]["l0"] / l0) ** SLOPE
    points = sorted((math.log(entry["l0"]), math.log(entry["fvu"])) for entry in curve)
    pairs = list(itertools.pairwise(points))
    (x, y), (u, v) = next((pair for pair in pairs if math.log(l0) <= pair[1][0]), pairs[-1])
    return math.exp(y + (v - y) * (math.log(l0) - x) / (u - x))


def table(args: argparse.Namespace) -> None:
    """Print, for rows and rate, our figures and the ratio of our FVU at another tool's L0 to its own, over seeds.

    Each weight of another tool's penalty is a line of its own; ours, which aim at an L0, are one, if any aim at k.
    """
    runs: dict[tuple[str, str, str, float], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for entry in read(args.results):
        job = Job(**entry["job"])
        if not entry["settings"]:
            weight = 1.0 if job.tool == "ours" else job.coefficient
            runs[job.arch, Path(job.rows).name, job.tool, weight][job.lr].append(entry)
    print("| architecture | rows | tool | rate | its figures | ours at its L0 / its own |")
    print("|---" * 6 + "|")
    for arch, rows, tool, weight in sorted(runs):
        those, ours = runs[arch, rows, tool, weight], runs[arch, rows, "ours", 1.0]
        aimed = [entry for entry in _flat(ours) if entry["job"]["coefficient"] == 1]
        if tool == "ours" and not aimed:
            continue
        job = Job(**_flat(those)[0]["job"])._replace(coefficient=weight)
        rates = [best(_flat(those), job)] if args.best else sorted(those)
        for lr in rates:
            beside = best(aimed, job._replace(tool="ours", coefficient=1.0)) if args.best and aimed else lr
            told = f"{tool}, {weight:g}" if (tool, arch) in COEFFICIENTS else tool
            shown = describe(those[lr]), compare(ours[beside], those[lr])
            print("|", " | ".join([arch, rows, told, f"{lr:g}", *shown]), "|")


def _flat(by_rate: dict[float, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [entry for entries in by_rate.values() for entry in entries]


def compare(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> str:
    """The ratios of FVU seed by seed: their mean, deviation, and whether the mean is above 1 by two standard errors."""
    ratios = []
    for entry in theirs:
        curve = [other for other in ours if other["job"]["seed"] == entry["job"]["seed"]]
        ratios += [at_l0(curve, entry["l0"]) / entry["fvu"]] if curve and entry["job"]["tool"] != "ours" else []
    if not ratios:
        return ""
    mean = statistics.mean(ratios)
    if len(ratios) == 1:
        return f"**{mean:.3f}** (one seed)"
    error = statistics.stdev(ratios) / math.sqrt(len(ratios))
    verdict = "no difference" if abs(mean - 1) <= 2 * error else "better" if mean < 1 else "worse"
    return f"**{mean:.3f}** ± {statistics.stdev(ratios):.3f}, {verdict}"


def floats(text: str) -> list[float]:
    """Numbers with commas between them."""
    return [float(one) for one in text.split(",")]


def shape(text: str) -> tuple[str, tuple[int, int]]:
    """NAME=D_SAE:K."""
    name, _, sizes = text.partition("=")
    d_sae, k = map(int, sizes.split(":"))
    return name, (d_sae, k)


def describe(entries: Sequence[dict[str, Any]]) -> str:
    """The means of a tool's own figures, of FVU with its deviation over seeds, at the L0 nearest to k."""
    nearest: dict[int, dict[str, Any]] = {}
    for entry in sorted(entries, key=lambda entry: -abs(math.log(entry["l0"] / entry["job"]["k"]))):
        nearest[entry["job"]["seed"]] = entry
    names = {"fvu": "FVU", "l0": "L0", "dead": "dead", "recovered": "recovered"}
    found = {key: [entry[key] for entry in nearest.values() if key in entry] for key in names}
    cells = [f"{names[key]} {statistics.mean(values):.3g}" for key, values in found.items() if values]
    if len(nearest) > 1:
        cells[0] += f" ± {statistics.stdev(found['fvu']):.1g}"
    return ", ".join(cells) + f" ({len(nearest)} seeds)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("rows")
    command.add_argument("--root", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run=lambda args: write_rows(args.root, args.out))
    command = commands.add_parser("store")
    command.add_argument("train", type=Path)
    command.add_argument("held", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run=lambda args: write_store(args.train, args.held, args.out))
    command = commands.add_parser("train")
    command.add_argument("--rows", type=Path, required=True)
    command.add_argument("--results", type=Path, required=True)
    command.add_argument("--tools", type=lambda text: text.split(","), default=["ours"])
    command.add_argument("--arch", type=lambda text: text.split(","), default=list(TOOLS["ours"]))
    command.add_argument("--lr", type=floats, default=[3e-4, 1e-3, 3e-3])
    command.add_argument("--shape", action="append", type=shape, default=[], help="other rows, as NAME=D_SAE:K")
    command.add_argument("--peers", default="python", help="an interpreter that has the other tools")
    command.add_argument("--l0", type=floats, default=[1.0], help="multiples of k that ours aim at")
    command.add_argument("--penalty", type=floats, help="the penalties' weights (multiples of k) to train with instead")
    command.add_argument("--best", action="store_true", help="seeds after the first at the best rate alone")
    command.add_argument("--set", action="append", default=[], help="a setting of ours, sae.init='\"april\"'")
    for name, value in {"seeds": 3, "steps": 1000, "batch": 256}.items():
        command.add_argument(f"--{name}", type=int, default=value)
    command.set_defaults(run=train)
    command = commands.add_parser("table")
    command.add_argument("--results", type=Path, required=True)
    command.add_argument("--best", action="store_true", help="each tool at its best rate")
    command.set_defaults(run=table)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.run(args)


if __name__ == "__main__":
    main()
