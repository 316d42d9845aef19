"""Small token stores without torch, so that a process that writes one starts at once."""

from pathlib import Path

import numpy as np

from sae.cache.disk.identity import Recipe
from sae.cache.tokens import TokenStore, TokenWriter

CHUNK = 32  # rows of a chunk and of the first window in shrunk stores; the largest window has four of them
CONTEXT = 8
VOCABULARY_OF_TESTS = [b"t%d" % i for i in range(40)]
OTHERS = ("lock", "request.json", "hints.json")  # files that say nothing about the data


def token_recipe(split: str = "train", *, n_vocab: int = 1000, context: int = CONTEXT, seed: int = 0) -> Recipe:
    return {
        "source": {"kind": "synthetic", "seed": seed},
        "tokenizer": {"name": "synthetic", "n_vocab": n_vocab, "begin": 0},
        "context_length": context,
        "packing": "concat",
        "split": split,
    }


def window_arrays(recipe: Recipe, start: int, stop: int) -> dict[str, np.ndarray]:
    """Contexts [start, stop) of an endless synthetic token store."""
    shape = (stop - start, recipe["context_length"])
    place = np.arange(start * shape[1], stop * shape[1], dtype=np.uint64).reshape(shape)
    return {
        "tokens": (place * np.uint64(2654435761) % np.uint64(recipe["tokenizer"]["n_vocab"])).astype(np.uint32),
        "document": (place // np.uint64(37)).astype(np.uint32),
        "length": np.full(shape[0], shape[1], np.uint32),
    }


def write_tokens(root: Path, contexts: int, *, ended: bool = False, **recipe: object) -> TokenStore:
    """A token store of the first `contexts` contexts of `window_arrays`."""
    full = token_recipe(**recipe)  # type: ignore[arg-type]
    slug = "synthetic" + ("-validation" if full["split"] == "validation" else "")
    with TokenWriter(root, slug, full) as writer:
        writer.write_vocabulary(VOCABULARY_OF_TESTS)
        while writer.store.n_rows < contexts:
            start, stop = writer.store.windows.bounds(len(writer.store.manifest.windows))
            writer.append(window_arrays(full, start, min(stop, contexts)), {"next": min(stop, contexts)})
        if ended and not writer.store.closed:
            writer.close()
        return writer.store


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a store that its recipe and row count decide."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if name not in OTHERS}
