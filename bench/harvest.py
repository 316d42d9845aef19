"""The harvest stage against a bare Hugging Face forward of the same model that stops after the same block.

    python bench/harvest.py [--layer 6] [--site mlp_out] [--codec int8] [--dtype float32,bfloat16] [--threads 1]
                            [--contexts 262] [--batch 32] [--repeats 3] [--clock cpu] [--saelens PYTHON] [--json]
                            [--device cpu] [--folder DIR] [--parts]

Model: the shape of GPT-2 small with random weights (`random:gpt2`), saved nowhere. Reference: float32 (on a card the
precision of ours), sdpa attention, a forward hook that stops the pass after the deepest layer's MLP, nothing written.
Ours: the whole stage, from the token store to flushed chunks in a folder (of `--folder`). Same contexts, batch and
threads; runs alternate; medians of ratios pair by pair. On a card the clock counts, whatever `--clock` says.

`--parts` instead: what becomes of rows after the forward pass, part by part, CPU time of one thread, on heavy-tailed
rows of width 768: what a card does where it computes, and what the host's cores do behind it.

SAELens' CacheActivationsRunner (same shape, hook, rows, batch and threads, float32) runs in an interpreter that has
sae_lens, which needs another transformer_lens than this program: `--saelens /other/venv/bin/python`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

import numpy as np
import torch
from support.heavy_tails import HeavyTails
from transformers import GPT2Config, GPT2LMHeadModel

from bench.peer import Peer
from bench.rows import Row, show
from sae.cache.activations import ActivationWriter
from sae.cache.disk.durable import checksum, write_atomic
from sae.cache.store.codecs import calibrate, codec, codec_recipe
from sae.cache.tokens import TokenStore, TokenWriter
from sae.cache.window_buffer import Memory, WindowBuffer
from sae.pipeline.harvest.sources.language_model import HarvestConfig, LanguageModelSource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.runtime.progress import Silent

CONTEXT, WIDTH = 128, 768
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


class Stop(Exception):
    """Raised by the hook: nothing beyond it is needed."""


def token_store(root: Path, contexts: int, split: str = "train") -> TokenStore:
    """Random GPT-2 tokens."""
    recipe = {
        "source": {"name": "random"},
        "tokenizer": {"name": "gpt2", "n_vocab": 50257, "begin": 50256},
        "context_length": CONTEXT,
        "packing": "concat",
        "split": split,
    }
    with TokenWriter(root, "random" if split == "train" else f"random-{split}", recipe) as writer:
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


def parts(text: str, repeats: int) -> list[Row]:
    """Rows a second of each part of what one core does with a window, of the codec named."""
    base = torch.cat([HeavyTails(WIDTH).rows(8192, seed=seed) for seed in range(2)])
    columns, n, memory, seconds = calibrate(base), 8 * len(base), Memory(), Counter[str]()

    @contextmanager
    def part(what: str) -> Iterator[None]:
        begun = time.process_time()
        yield
        seconds[what] += (time.process_time() - begun) / repeats

    recipe = {
        "source": {"source": "heavy tails"}, "split": "train", "d": WIDTH, "codec": codec_recipe(codec(text)),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, ActivationWriter(Path(folder), "parts", recipe) as writer:
        for repeat in range(repeats):
            buffer = WindowBuffer(writer.store, repeat, n, columns, memory)
            for start in range(0, n, len(base)):
                with part("where the model is: encoding, norms"):
                    buffer.add(base, np.arange(start, start + len(base)))
            landed = [values.copy() for values in buffer.made(0, n)]
            with part("a thread: from pinned memory to the window"):
                for there, values in zip(landed, buffer.made(0, n), strict=True):
                    np.copyto(there, values)
            with part("a thread: the order of a window"):
                arrays = buffer.arrays()
            for name, rows in arrays.items():
                spec = writer.store.arrays[name]
                for start in range(0, n, spec.chunk_rows):
                    with part("every core: gathering chunks"):
                        chunk = rows[start : start + spec.chunk_rows]
                    with part("every core: compressing chunks"):
                        data = spec.encode(chunk)
                    with part("every core: checksums"):
                        checksum(data)
                    with part("every core: writing, its flush"):
                        write_atomic(Path(folder, "one"), data)
    whole = f"{text}: every core, together"
    host = sum(each for what, each in seconds.items() if what.startswith("every core"))
    found = {**{f"{text}: {what}": each for what, each in seconds.items()}, whole: host}
    return [Row(what, n / each, "rows/s", host / each, whole) for what, each in found.items()]


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
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--folder", type=Path, help="where the stores are written; default: a temporary folder")
    parser.add_argument("--parts", action="store_true", help="of --codec, or of several, as 'int8;bfloat16'")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    layers, sites, dtypes = [[*text.split(",")] for text in (args.layer, args.site, args.dtype)]
    deepest = max(map(int, layers))
    if args.parts:
        torch.set_num_threads(1)
        found = [row for text in args.codec.split(";") for row in parts(text, args.repeats)]
        show("parts of a harvest, one core", found, as_json=args.json)
        return
    on_cpu = args.device == "cpu"
    clock = CLOCKS[args.clock if on_cpu else "wall"]
    bare = GPT2LMHeadModel(GPT2Config()).eval().to(args.device, torch.float32 if on_cpu else getattr(torch, dtypes[0]))
    models = {dtype: LanguageModel.boot("random:gpt2", device=args.device, dtype=dtype) for dtype in dtypes}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as tokens_folder:
        store = token_store(Path(tokens_folder), args.contexts)
        tokens = torch.from_numpy(store.contexts(0, store.n_contexts)).to(args.device)

        def rate(call: Callable[[], object]) -> float:
            begun = clock()
            call()
            if not on_cpu:
                torch.cuda.synchronize(args.device)
            return tokens.numel() / (clock() - begun)

        def stage(dtype: str) -> None:
            config = HarvestConfig(
                model="random:gpt2", layer=tuple(map(int, layers)), site=tuple(sites), codec=args.codec,
                batch_tokens=args.batch * CONTEXT, dtype=dtype,
            )  # fmt: skip
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
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
