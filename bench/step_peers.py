"""Training steps of other tools, for bench/step.py, which starts this.

    PYTHON bench/step_peers.py BATCH D_IN D_SAE K THREADS CLOCK [DEVICE]

PYTHON has sae_lens (6.54), dictionary_learning (0.1) and eai-sparsify (1.3), or some of them. Says "ready", then for
every case named on stdin (`CASES`) makes one step and says its seconds, or "nan" where it cannot. A step is
what the tool's own trainer does with a batch, in float32: SAELens' `SAETrainer.step`, dictionary_learning's
`trainer.update`. sparsify has no such method, so its `SparseCoder` is driven as its trainer drives it, with that
trainer's torch.optim.Adam (and once with a fused one, and with that under autocast), without its count of dead latents.
"""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CASES = (
    "SAELens topk", "SAELens batchtopk", "SAELens standard", "SAELens jumprelu",
    "dictionary_learning topk", "dictionary_learning batch_top_k", "dictionary_learning standard",
    "dictionary_learning jumprelu",
    "sparsify topk", "sparsify topk, fused Adam", "sparsify topk, fused Adam, bfloat16",
)  # fmt: skip
STEPS = 10**6  # of the training they think they are in

DEVICE = sys.argv[7] if len(sys.argv) > 7 else "cpu"

Step = Callable[[Any], object]


def saelens(kind: str, batch: int, d_in: int, d_sae: int, k: int) -> Step:
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "topk": ("TopK", {"k": k}),
        "batchtopk": ("BatchTopK", {"k": k}),
        "standard": ("Standard", {"l1_coefficient": 5.0}),
        "jumprelu": ("JumpReLU", {"l0_coefficient": 1.0}),
    }
    name, own = kinds[kind]
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=d_in, d_sae=d_sae, device=DEVICE, dtype="float32", **own
    )
    total = STEPS * batch
    settings = SAETrainerConfig(
        total_training_samples=total, train_batch_size_samples=batch, lr=1e-6, lr_end=1e-7, device=DEVICE
    )
    trainer = SAETrainer(settings, getattr(sae_lens, f"{name}TrainingSAE")(config).to(DEVICE), iter(()))

    def step(x: Any) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def dictionary_learning(kind: str, batch: int, d_in: int, d_sae: int, k: int) -> Step:
    from dictionary_learning import dictionary, trainers
    from dictionary_learning.trainers import batch_top_k, top_k

    made, own = {
        "topk": (top_k.TopKTrainer, {"k": k, "dict_class": top_k.AutoEncoderTopK}),
        "batch_top_k": (batch_top_k.BatchTopKTrainer, {"k": k, "dict_class": batch_top_k.BatchTopKSAE}),
        "standard": (trainers.StandardTrainer, {"dict_class": dictionary.AutoEncoder}),
        "jumprelu": (trainers.JumpReluTrainer, {"dict_class": dictionary.JumpReluAutoEncoder, "target_l0": float(k)}),
    }[kind]
    common = {"steps": STEPS, "activation_dim": d_in, "dict_size": d_sae, "layer": 0, "lm_name": "none", "lr": 1e-6}
    trainer, done = made(**common, **own, device=DEVICE, seed=0), 0

    def step(x: Any) -> None:
        nonlocal done
        trainer.update(done, x)
        done += 1

    return step


def sparsify(kind: str, batch: int, d_in: int, d_sae: int, k: int) -> Step:
    import torch
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device=DEVICE, dtype=torch.float32)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-6, fused="fused" in kind)

    def step(x: Any) -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast(DEVICE, torch.bfloat16, enabled="bfloat16" in kind):
            fvu = coder(x).fvu
        fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextlib.contextmanager
def said(case: str) -> Iterator[None]:
    """Say what goes wrong within, and go on: a tool that is missing, or of another version, is not the only one."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr)


def main() -> None:
    os.environ |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    if DEVICE == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch

    from bench.planted import planted_rows
    from bench.rows import timed

    batch, d_in, d_sae, k, threads = map(int, sys.argv[1:6])
    clock = time.process_time if sys.argv[6] == "cpu" else time.perf_counter
    torch.set_num_threads(threads)
    x = planted_rows(batch, d_in, 0).to(DEVICE)

    @cache
    def made(case: str) -> Step | None:
        tool, _, kind = case.partition(" ")
        make = {"SAELens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}[tool]
        with said(case):
            return make(kind, batch, d_in, d_sae, k)
        return None

    print("ready", flush=True)
    for line in sys.stdin:
        taken = float("nan")
        with contextlib.redirect_stdout(sys.stderr):  # some of them print
            if (step := made(line.strip())) is not None:
                with said(line.strip()):
                    taken = timed(lambda: step(x), DEVICE, clock)
        print(taken, flush=True)


if __name__ == "__main__":
    main()
