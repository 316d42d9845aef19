"""SAELens' CacheActivationsRunner on a random model of GPT-2 small's shape, for bench/harvest.py, which starts this.

    PYTHON bench/harvest_saelens.py LAYER CONTEXTS BATCH THREADS CLOCK

PYTHON has sae_lens (6.54 was tried). Says "ready", then for every line on stdin makes one run and says tokens/s. The
runner only needs token ids, so the tokenizer is a stand-in, and the data set is made of random ids in memory.
"""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
CONTEXT, WIDTH, VOCABULARY = 128, 768, 50257


class Tokenizer:
    """What the runner asks of a tokenizer when the data set holds token ids."""

    bos_token_id = eos_token_id = pad_token_id = 50256
    bos_token = eos_token = "<|endoftext|>"
    name_or_path, padding_side, model_max_length = "none", "right", 1024


def main() -> None:
    try:
        import sae_lens.cache_activations_runner as runner
    except ImportError:
        print("missing", flush=True)
        return
    import torch
    from datasets import Dataset
    from sae_lens.config import CacheActivationsRunnerConfig
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    layer, contexts, batch, threads = map(int, sys.argv[1:5])
    clock = time.process_time if sys.argv[5] == "cpu" else time.perf_counter
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    shape = HookedTransformerConfig(
        n_layers=12, d_model=WIDTH, n_ctx=1024, d_head=64, n_heads=12, d_mlp=4 * WIDTH, d_vocab=VOCABULARY,
        act_fn="gelu_new", normalization_type="LN", device="cpu",
    )  # fmt: skip
    model: Any = HookedTransformer(shape)
    model.tokenizer = Tokenizer()
    runner.load_model = lambda **_: model
    contexts -= contexts % batch  # it works in whole batches
    ids = torch.randint(0, VOCABULARY, (2 * contexts, CONTEXT)).tolist()
    data = Dataset.from_dict({"input_ids": ids})
    print("ready", flush=True)
    for _ in sys.stdin:
        folder = tempfile.mkdtemp()
        shutil.rmtree(folder)  # it wants to make it
        config = CacheActivationsRunnerConfig(
            dataset_path="local", model_name="gpt2", model_batch_size=batch, hook_name=f"blocks.{layer}.hook_mlp_out",
            d_in=WIDTH, training_tokens=contexts * CONTEXT, context_size=CONTEXT, new_cached_activations_path=folder,
            shuffle=False, device="cpu", buffer_size_gb=0.02, streaming=False, prepend_bos=False,
        )  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):
            begun = clock()
            rows = len(runner.CacheActivationsRunner(config, override_dataset=data).run()) * CONTEXT
            taken = clock() - begun
        shutil.rmtree(folder)
        print(rows / taken, flush=True)


if __name__ == "__main__":
    main()
