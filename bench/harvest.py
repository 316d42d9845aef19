"""The harvest stage against a bare Hugging Face forward of the same model that stops after the same block.

    python bench/harvest.py [--layer 6] [--site mlp_out] [--codec int8] [--dtype float32,bfloat16] [--threads 1]
                            [--contexts 262] [--batch 32] [--repeats 3] [--clock cpu] [--saelens PYTHON] [--json]

Model: the shape of GPT-2 small with random weights (`random:gpt2`), saved nowhere. Reference: float32, sdpa attention,
a forward hook that stops the pass after the deepest layer's MLP, nothing written. Ours: the whole stage, from the token
store to flushed chunks on disk. Same contexts, batch and threads; runs alternate; medians of ratios pair by pair.

SAELens' CacheActivationsRunner (same shape, hook, rows, batch and threads, float32) runs in an interpreter that has
sae_lens, which needs another transformer_lens than this program: `--saelens /other/venv/bin/python`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bench.peer import Peer
from bench.rows import Row, show
from sae.cache.tokens import TokenStore, TokenWriter
from sae.pipeline.harvest.sources.language_model import HarvestConfig, LanguageModelSource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.runtime.progress import Silent

CONTEXT = 128
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


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


def bare_forward(model: Any, layer: int, tokens: torch.Tensor, batch: int) -> None:
    """All tokens [n, T] in batches, stopping after the MLP of a block."""

    def stop(*_: object) -> None:
        raise Stop

    handle = model.transformer.h[layer].mlp.register_forward_hook(stop)
    with torch.no_grad():
        for part in tokens.split(batch):
            try:
                model.transformer(part, use_cache=False)
            except Stop:
                continue
    handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", default="6", help="one or several, as 4,5,6")
    parser.add_argument("--site", default="mlp_out", help="one or several, as resid_post,mlp_out")
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--dtype", default="float32", help="of our forward pass; one or several")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--contexts", type=int, default=262, help="262: two windows of 16,384 rows and a bit")
    parser.add_argument("--batch", type=int, default=32, help="contexts in a forward pass")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="cpu counts our writing thread as well")
    parser.add_argument("--saelens", default=sys.executable, metavar="PYTHON", help="an interpreter with sae_lens")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    layers, sites, dtypes = [[*text.split(",")] for text in (args.layer, args.site, args.dtype)]
    deepest = max(map(int, layers))
    clock = CLOCKS[args.clock]
    bare = GPT2LMHeadModel(GPT2Config()).eval()
    models = {dtype: LanguageModel.boot("random:gpt2", device="cpu", dtype=dtype) for dtype in dtypes}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as tokens_folder:
        store = token_store(Path(tokens_folder), args.contexts)
        tokens = torch.from_numpy(store.contexts(0, store.n_contexts))

        def rate(call: Callable[[], object]) -> float:
            begun = clock()
            call()
            return tokens.numel() / (clock() - begun)

        def stage(dtype: str) -> None:
            config = HarvestConfig(
                model="random:gpt2", layer=tuple(map(int, layers)), site=tuple(sites), codec=args.codec,
                batch_tokens=args.batch * CONTEXT, dtype=dtype,
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                source = LanguageModelSource.over(config, [store], Silent(), model=models[dtype])
                harvest(source, Path(folder), Silent())

        for threads in map(int, args.threads.split(",")):
            torch.set_num_threads(threads)
            peer = Peer(
                args.saelens,
                "harvest_saelens.py",
                str(deepest),
                str(args.contexts),
                str(args.batch),
                str(threads),
                args.clock,
            )
            if peer.missing:
                print("SAELens: left out, sae_lens is not installed there (see --saelens)", file=sys.stderr)
            bare_forward(bare, deepest, tokens[: args.batch], args.batch)
            reference: list[float] = []
            ours: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
            theirs: list[float] = []
            for _ in range(args.repeats):
                reference.append(rate(lambda: bare_forward(bare, deepest, tokens, args.batch)))
                for dtype in dtypes:
                    ours[dtype].append(rate(lambda dtype=dtype: stage(dtype)))
                if not peer.missing:
                    theirs.append(peer.rate())
            name = f"bare forward stopped after block {deepest}, {threads} threads"
            measured = {
                f"sae harvest {args.layer}.{args.site} {args.codec}, {d} forward": rates for d, rates in ours.items()
            }
            if theirs:
                measured[f"SAELens CacheActivationsRunner {deepest}.mlp_out"] = theirs
            rows.append(Row(name, statistics.median(reference), "tokens/s", 1.0, name))
            for what, rates in measured.items():
                ratio = statistics.median(a / b for a, b in zip(rates, reference, strict=True))
                rows.append(Row(f"{what}, {threads} threads", statistics.median(rates), "tokens/s", ratio, name))
            if theirs:
                for dtype, rates in ours.items():
                    ratio = statistics.median(a / b for a, b in zip(rates, theirs, strict=True))
                    what = f"sae harvest, {dtype} forward, {threads} threads"
                    rows.append(Row(what, statistics.median(rates), "tokens/s", ratio, "SAELens"))
    show("harvest", rows, as_json=args.json)


if __name__ == "__main__":
    main()
