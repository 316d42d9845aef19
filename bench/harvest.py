"""The harvest stage against a bare Hugging Face forward of the same model that stops after the same block.

    python bench/harvest.py [--layer 6] [--site mlp_out] [--codec int8] [--threads 1,2] [--repeats 5] [--json]

Model: the shape of GPT-2 small with random weights (`random:gpt2`), saved nowhere. Reference: sdpa attention, a forward
hook that stops the pass, nothing written. Ours: the whole stage, from the token store to flushed chunks on disk.
Same contexts, batch and threads; runs alternate; medians of ratios pair by pair.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bench.rows import Row, show
from cache.tokens import TokenStore, TokenWriter
from pipeline.harvest import HarvestConfig, harvest
from pipeline.language_model import LanguageModel
from pipeline.progress import Silent

CONTEXT = 128


class Stop(Exception):
    """Raised by the hook: nothing beyond it is needed."""


def token_store(root: Path, contexts: int) -> TokenStore:
    """Random GPT-2 tokens."""
    recipe = {
        "source": {"name": "random"},
        "tokenizer": {"name": "gpt2", "n_vocab": 50257, "begin": 50256},
        "context_length": CONTEXT,
        "packing": "concat",
        "split": "train",
    }
    with TokenWriter(root, "random", recipe) as writer:
        while (left := contexts - writer.store.n_contexts) > 0:
            start, stop = writer.store.windows.bounds(len(writer.store.manifest.windows))
            shape = (min(left, stop - start), CONTEXT)
            tokens = np.random.default_rng(start).integers(0, 50256, shape).astype(np.uint16)
            length = np.full(shape[0], CONTEXT, np.uint32)
            writer.append({"tokens": tokens, "document": np.zeros(shape, np.uint32), "length": length}, {})
        writer.close()
        return writer.store


def bare_forward(model: Any, layer: int, tokens: torch.Tensor, batch: int) -> float:
    """Seconds for all tokens [n, T] in batches, stopping after the MLP of a block."""

    def stop(*_: object) -> None:
        raise Stop

    handle = model.transformer.h[layer].mlp.register_forward_hook(stop)
    begun = time.perf_counter()
    with torch.no_grad():
        for part in tokens.split(batch):
            try:
                model.transformer(part, use_cache=False)
            except Stop:
                continue
    taken = time.perf_counter() - begun
    handle.remove()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--site", default="mlp_out")
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--contexts", type=int, default=131, help="131 make one window of 16,384 rows")
    parser.add_argument("--batch", type=int, default=32, help="contexts in a forward pass")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = GPT2LMHeadModel(GPT2Config()).eval()
    config = HarvestConfig(
        model="random:gpt2", layer=(args.layer,), site=tuple(args.site.split(",")), codec=args.codec,
        batch_tokens=args.batch * CONTEXT,
    )  # fmt: skip
    harvested = LanguageModel.boot("random:gpt2", device="cpu")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as tokens_folder:
        store = token_store(Path(tokens_folder), args.contexts)
        tokens = torch.from_numpy(store.contexts(0, store.n_contexts))
        for threads in map(int, args.threads.split(",")):
            torch.set_num_threads(threads)
            bare_forward(model, args.layer, tokens[: args.batch], args.batch)
            reference, ours = [], []
            for _ in range(args.repeats):
                reference.append(tokens.numel() / bare_forward(model, args.layer, tokens, args.batch))
                with tempfile.TemporaryDirectory() as folder:
                    begun = time.perf_counter()
                    harvest(config, [store], Path(folder), Silent(), model=harvested)
                    ours.append(tokens.numel() / (time.perf_counter() - begun))
            name = f"bare forward stopped after block {args.layer}, {threads} threads"
            ratio = statistics.median(a / b for a, b in zip(ours, reference, strict=True))
            rows.append(Row(name, statistics.median(reference), "tokens/s", 1.0, name))
            what = f"sae harvest {args.layer}.{args.site} {args.codec}, {threads} threads"
            rows.append(Row(what, statistics.median(ours), "tokens/s", ratio, name))
    show("harvest", rows, as_json=args.json)


if __name__ == "__main__":
    main()
