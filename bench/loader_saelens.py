"""SAELens' ActivationsStore reading activations it cached, for bench/loader.py, which starts this.

    PYTHON bench/loader_saelens.py CONTEXTS THREADS CLOCK

PYTHON has sae_lens (6.54 was tried). Writes a cache of the layout its CacheActivationsRunner makes (an Arrow data set
of Array2D, float32) with random rows, says "ready", then for every line on stdin loads batches of 4,096 rows for as
many rows as the cache has, mixed in a buffer of 65,536, and says rows/s. No language model is made: reading needs
none.
"""

import contextlib
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
CONTEXT, WIDTH, BATCH, HOOK = 128, 768, 4096, "blocks.6.hook_mlp_out"


def main() -> None:
    try:
        from sae_lens.training.activations_store import ActivationsStore
    except ImportError:
        print("missing", flush=True)
        return
    import numpy as np
    import torch
    from datasets import Array2D, Dataset, Features, disable_progress_bars

    contexts, threads = map(int, sys.argv[1:3])
    clock = time.process_time if sys.argv[3] == "cpu" else time.perf_counter
    torch.set_num_threads(threads)
    disable_progress_bars()

    def rows() -> Iterator[dict[str, Any]]:
        for i in range(contexts):
            yield {HOOK: np.random.default_rng(i).standard_normal((CONTEXT, WIDTH), np.float32)}

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        features = Features({HOOK: Array2D(shape=(CONTEXT, WIDTH), dtype="float32")})
        Dataset.from_generator(rows, features=features, cache_dir=f"{folder}/made").save_to_disk(f"{folder}/cache")
        tokens = Dataset.from_dict({"input_ids": [[0] * CONTEXT]})
        store = ActivationsStore(
            model=None, dataset=tokens, streaming=False, hook_name=HOOK, hook_head_index=None, context_size=CONTEXT,
            d_in=WIDTH, n_batches_in_buffer=512, total_training_tokens=1, store_batch_size_prompts=32,
            train_batch_size_tokens=BATCH, prepend_bos=False, normalize_activations="none",
            device=torch.device("cpu"), dtype="float32", cached_activations_path=f"{folder}/cache",
        )  # fmt: skip
        store.next_batch()
        print("ready", file=sys.__stdout__, flush=True)
        for _ in sys.stdin:
            begun, n = clock(), 0
            while n < contexts * CONTEXT:
                n += len(store.next_batch())
            print(n / (clock() - begun), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
