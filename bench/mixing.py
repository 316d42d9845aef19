"""How well the loader mixes documents, on a store of the real window and chunk sizes.

    python bench/mixing.py [--rows 16777216] [--documents 500] [--sigma 1] [--batch 4096] [--open 16,32,64] [--json]

Documents have log-normal lengths of a given mean and laid end to end fill contexts of 128 tokens; every token is a row
(of one number: only where rows stand matters). `cache.loader.shuffle_quality` says what a batch has in common where a
document's effect is a share of 0.3 of the variance. The first line is what independent draws would have.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from bench.rows import Row, show
from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.loader.shuffle_quality import mixing
from sae.cache.store.codecs import codec, codec_recipe
from sae.cache.tokens import TokenStore, TokenWriter

CONTEXT = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1 << 24)
    parser.add_argument("--documents", type=float, default=500, help="mean length in tokens")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of a length")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--open", default="16,32,64", help="chunks open at a time")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [Row("independent rows", 1.0, "variance ratio", 1.0, "independent rows")]
    with tempfile.TemporaryDirectory() as folder:
        tokens = documents(Path(folder), args.rows // CONTEXT, args.documents, args.sigma)
        store = every_token(Path(folder), tokens)
        for n in map(int, args.open.split(",")):
            found = mixing(store, tokens, batch=args.batch, open_chunks=n)
            what = f"{n} open chunks: {found.distinct:,.0f} documents, at most {found.most:.1f} rows of one"
            rows.append(Row(what, found.variance_ratio, "variance ratio", found.variance_ratio, "independent rows"))
    title = f"{store.n_rows:,} rows, documents of {args.documents:g} tokens, sigma {args.sigma:g}, batch {args.batch}"
    show(title, rows, as_json=args.json)


def documents(root: Path, contexts: int, mean: float, sigma: float) -> TokenStore:
    """Contexts that say only which document each token is of."""
    recipe = {
        "source": {"name": "random"}, "tokenizer": {"name": "none", "n_vocab": 2, "begin": 1},
        "context_length": CONTEXT, "packing": "concat", "split": "train",
    }  # fmt: skip
    random = np.random.default_rng(0)
    count = int(2 * contexts * CONTEXT / mean) + 10
    lengths = np.maximum(1, random.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)).astype(np.int64)
    owner = np.repeat(np.arange(count, dtype=np.uint32), lengths)[: contexts * CONTEXT].reshape(contexts, CONTEXT)
    with TokenWriter(root, "random", recipe) as writer:
        while (left := contexts - writer.store.n_contexts) > 0:
            start, stop = writer.store.windows.bounds(len(writer.store.manifest.windows))
            part = owner[start : start + min(left, stop - start)]
            full = np.full(len(part), CONTEXT, np.uint32)
            writer.append({"tokens": np.zeros(part.shape, np.uint16), "document": part, "length": full}, {})
        writer.close()
        return writer.store


def every_token(root: Path, tokens: TokenStore) -> ActivationStore:
    """A store with one row a token."""
    recipe = {
        "tokens": tokens.recipe, "model": {"model": "none"}, "layer": 0, "site": "rows", "d": 1,
        "hook": "none", "rows": {}, "codec": codec_recipe(codec("float32")),
    }  # fmt: skip
    with ActivationWriter(root, "bench", recipe) as writer:
        while (left := tokens.n_tokens - writer.store.n_rows) > 0:
            start, stop = writer.store.windows.bounds(len(writer.store.manifest.windows))
            rows = min(left, stop - start)
            buffer = writer.window(rows)
            buffer.add(torch.ones(rows, 1), np.arange(start, start + rows))
            writer.append(buffer.arrays(), {})
        return writer.store


if __name__ == "__main__":
    main()
