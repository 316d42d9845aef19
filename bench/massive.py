"""What massive rows do to training and to its figures, on stores that were harvested before.

    python bench/massive.py CACHE [KEY ...] [--rules none,auto,3] [--lr 1e-3] [--steps 128] [--usual 5]

A line a training store (by the beginnings of keys; all of them without any) and rule of `train.outliers`: the rows that
lie far out, with the positions, the share of variance and the likeness that decide; FVU over all held-out rows and over
those of a usual norm, the error of the median row, all of a TopK dictionary trained by that rule. Without `--steps` (0)
it trains nothing. The dictionaries are judged by the same rows, whatever they were trained on.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.loader.dataset import Dataset
from sae.cache.massive import MEDIANS, beyond_usual
from sae.pipeline.evaluate.judging import EvalConfig, judge
from sae.pipeline.formats import trained
from sae.pipeline.metrics.metric import Subject
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.train.stage import TrainConfig, open_run, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("keys", nargs="*", default=[""])
    parser.add_argument("--rules", default="none,auto")
    parser.add_argument("--d-sae", type=int, default=1152)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--usual", type=float, default=MEDIANS, help="medians of norm up to which a row is usual")
    args = parser.parse_args()
    print("| store | rows far out | positions | share | alike | left out | rule | FVU, all | FVU, usual | median row |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    stores = [one for one in catalogue.readable(args.cache)[0] if isinstance(one, ActivationStore)]
    chosen = [one for one in stores if one.split == "train" and one.key.startswith(tuple(args.keys))]
    for store in chosen:
        told = line(store)
        for rule in args.rules.split(",") if args.steps else ():
            print("|", " | ".join([*told, rule, *figures(store, rule, args)]), "|", flush=True)
            told = [""] * len(told)
        if not args.steps:
            print("|", " | ".join([*told, "", "", "", ""]), "|", flush=True)


def line(store: ActivationStore) -> list[str]:
    """What the rule sees of a store."""
    found = beyond_usual(store, store.n_rows)
    name = store.key.rpartition("-")[0]
    if found is None:
        return [name, f"0 of {store.n_rows:,}", "", "", "", "no"]
    first = ", ".join(f"{position} ({rows})" for position, rows in [*found.positions.items()][:3])
    more = f" and {len(found.positions) - 3} more" if len(found.positions) > 3 else ""
    rows = f"{found.rows:,} of {found.of:,}"
    shares = [f"{100 * found.share:.1f} %", f"{found.alike:.3f}"]
    return [name, rows, first + more, *shares, "yes" if found.massive else "no"]


def figures(store: ActivationStore, rule: str, args: argparse.Namespace) -> list[str]:
    """FVU and the error of the median row of a dictionary that is trained by a rule."""
    dataset = Dataset.of(store)
    config = TrainConfig.model_validate({
        "sae": {"arch": "topk", "d_sae": args.d_sae, "k": args.k}, "steps": args.steps, "batch": 1024, "lr": args.lr,
        "outliers": rule,
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(config, dataset, Path(folder), "one", resume=False)
        train([run], dataset, Silent(), device="cpu")
        sae = trained.load_run(run)
    by_norm = dataset.kept_up_to(dataset.limits_by(args.usual))
    found = judge(Subject(sae), by_norm, by_norm.held_out(), EvalConfig(dead_rows=0), Silent())
    assert found.kept is not None
    shown = [found.figures["fvu"], found.kept.figures["fvu"], found.kept.figures["row_error"]]
    return [f"{value:.4f}" for value in shown if value is not None]


if __name__ == "__main__":
    main()
