"""The tokenize stage against bare tiktoken on the same text with the same number of threads.

    python bench/tokenizing.py [--source python] [--tokenizer gpt2] [--threads 1,2] [--repeats 5] [--json]

Reference: `Encoding.encode_ordinary_batch(texts, num_threads=n)`, texts in memory. Ours: the whole stage with n worker
processes (1: none): reading the source, splitting, shuffling, encoding, packing, compressing, flushing to disk.
Processes start before the clock does where there are any, as a long run would have it. Runs alternate; medians.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiktoken

from bench.rows import Row, show
from sae.pipeline.parallel.process_pool import Pool
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.tokenize.encoding import Encoder
from sae.pipeline.tokenize.sources import text_source
from sae.pipeline.tokenize.stage import TokenizeConfig, tokenize_split
from sae.pipeline.tokenizers.tokenizer import embedded_encoding, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="python")
    parser.add_argument("--tokenizer", default="gpt2", help="a tiktoken name; tiny works offline")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[Row] = []
    source = text_source(args.source, offline=True)
    tok = tokenizer(args.tokenizer, offline=True)
    texts = list(source.open())
    bare = tiktoken.get_encoding(args.tokenizer) if args.tokenizer != "tiny" else embedded_encoding()
    config = TokenizeConfig(source=args.source, tokenizer=args.tokenizer, tokens="all", validation=0)
    for threads in map(int, args.threads.split(",")):
        reference, ours = [], []
        with Pool(threads) if threads > 1 else nullcontext() as pool:
            encoder = Encoder(args.tokenizer, tok, lambda pool=pool: pool, offline=True)
            encoder.warm_up()
            for _ in range(args.repeats):
                begun = time.perf_counter()
                tokens = sum(map(len, bare.encode_ordinary_batch(texts, num_threads=threads)))
                reference.append(tokens / (time.perf_counter() - begun))
                with tempfile.TemporaryDirectory() as folder:
                    begun = time.perf_counter()
                    store = tokenize_split(config, "train", "all", source, tok, encoder, Path(folder), Silent())
                    ours.append(store.n_tokens / (time.perf_counter() - begun))
        name = f"encode_ordinary_batch, {threads} threads"
        ratio = statistics.median(a / b for a, b in zip(ours, reference, strict=True))
        rows.append(Row(name, statistics.median(reference), "tokens/s", 1.0, name))
        rows.append(Row(f"sae tokenize, {threads} workers", statistics.median(ours), "tokens/s", ratio, name))
    show("tokenizing", rows, as_json=args.json)


if __name__ == "__main__":
    main()
