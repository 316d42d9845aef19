"""How fast runs are judged: each by itself, and together.

    python bench/evaluating.py --model FOLDER --text FILE --layers 1,1,1,3 [--tokens 20000] [--rows 20000]

Tokenizes, harvests and trains a small dictionary for each layer named, then times `evaluate` of the first run, of each
run in turn, and `evaluate_all` of all. `--keep DIR` keeps the cache and the runs, for another version to evaluate.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sae
from sae.cache.runs import Run
from sae.pipeline.evaluate.stage import EvalConfig, evaluate, evaluate_all
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.runtime.progress import Silent


def made(lab: sae.Session, model: str, text: str, layers: list[int], tokens: int) -> list[Run]:
    """A store for each layer, and a dictionary for each time it is named."""
    store = lab.tokenize(source=text, tokenizer=model, context=128, tokens=2 * tokens, validation_tokens=tokens)
    rows = lab.harvest(store, model=model, layer=sorted({*layers}), site="resid_post", validation_tokens="all")
    datasets = {layer: rows[f"{layer}.resid_post"] for layer in {*layers}}
    return [
        lab.train(sae.TopK(k=8, d_sae=256), datasets[layer], steps=50, batch=512, seed=seed, name=f"run-{seed}")
        for seed, layer in enumerate(layers)
    ]


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--layers", default="1,1,1,3")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = chosen.keep or Path(scratch)
        lab = sae.Session(root / "cache", root / "runs", device="cpu", offline=True, progress=False)
        runs = made(lab, chosen.model, chosen.text, [int(one) for one in chosen.layers.split(",")], chosen.tokens)
        booted = LanguageModel.boot(chosen.model, device="cpu")
        config = EvalConfig(tokens="all", dead_rows=16_384)

        def alone(some: list[Run]) -> None:
            for run in some:
                evaluate(config, run, lab.cache, Silent(), device="cpu", language_model=booted)

        def together() -> None:
            evaluate_all(config, runs, lab.cache, Silent(), device="cpu", language_model=booted)

        for _ in range(chosen.repeats):
            one, each, all_at_once = seconds(lambda: alone(runs[:1])), seconds(lambda: alone(runs)), seconds(together)
            print(
                f"CPU seconds: 1 run {one:.2f}, {len(runs)} in turn {each:.2f}, {len(runs)} together "
                f"{all_at_once:.2f}, {each / all_at_once:.2f} times as fast"
            )


if __name__ == "__main__":
    main()
