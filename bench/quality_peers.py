"""The trainers of SAELens, dictionary_learning and sparsify on given rows: what `quality.py` runs in their interpreter.

Says "ready", then reads jobs (JSON, one a line, the fields of `Job`), trains each and answers with the path of an .npz:
x_hat [n, d] and the active latents' counts (`fired` [d_sae], `l0`) on held-out rows, W_dec [d_sae, d], and the squared
errors of nested dictionaries (`nested`).

All see the same batches and the same schedule: 5 % of the steps rising, the last 20 % falling to 0. Each keeps its own
defaults otherwise (initial weights, biases, input scale, clipping, Adam's betas, auxiliary losses, thresholds). Where a
default assumes hundreds of thousands of steps (a warm-up, when a latent counts as dead, when a threshold's average
starts) the share of the training is what ours uses. sparsify's trainer wants a language model, so its SparseCoder is
trained with Adam in the way its trainer does.
"""

import itertools
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

WARMUP, DECAY, DEAD = 0.05, 0.2, 0.2  # shares of the steps; DEAD without firing is dead
ANNEAL, P_END = 0.1, 0.2  # of p_anneal: when p begins to fall (by the time rates do it has fallen), and to what
Inference = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]
"""What training leaves: rows -> latents [B, m], latents -> reconstructions, and the directions [m, d]."""


class Job(NamedTuple):
    """One training. rows: a folder with train.npy and held.npy; coefficient: of the penalty, where there is one."""

    tool: str
    arch: str
    rows: str
    lr: float
    seed: int
    d_sae: int
    k: int
    steps: int
    batch: int
    coefficient: float = 0.0
    prefixes: tuple[float, ...] = ()
    """Of matryoshka: what share of the latents each nested dictionary has."""


def load(folder: str, name: str) -> Tensor:
    """Rows [n, d], float32."""
    return torch.from_numpy(np.load(os.path.join(folder, f"{name}.npy"))).float()


def batches(rows: Tensor, job: Job) -> Iterator[Tensor]:
    """The batches of a job: a new permutation an epoch, by the seed alone."""
    generator = torch.Generator().manual_seed(1000 + job.seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(job.steps):
        if len(order) < job.batch:
            order = torch.randperm(len(rows), generator=generator)
        yield rows[order[: job.batch]]
        order = order[job.batch :]


def judge(inference: Inference, held: Tensor, path: str, nested: Sequence[int]) -> None:
    """Write what a dictionary does with held-out rows; of nested ones also the error of each of these widths."""
    encode, decode, directions = inference
    fired, parts, active, errors = torch.zeros(len(directions)), [], 0.0, torch.zeros(len(nested)).double()
    with torch.no_grad():
        for x in held.split(4096):
            latents = encode(x)
            parts.append(decode(latents))
            for place, width in enumerate(nested):
                first = latents * (torch.arange(latents.shape[1]) < width)
                errors[place] += (x - decode(first)).double().square().sum()
            fired += (latents != 0).sum(0)
            active += (latents != 0).sum().item()
        arrays = {"x_hat": torch.cat(parts), "fired": fired, "W_dec": directions, "nested": errors}
    np.savez(path, l0=active / len(held), **{name: value.detach().float().numpy() for name, value in arrays.items()})


def widths(job: Job) -> list[int]:
    """How many latents each of the nested dictionaries has, the whole one last."""
    return [round(share * job.d_sae) for share in (*job.prefixes, 1.0)]


def saelens(rows: Tensor, job: Job) -> Inference:
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name, settings = {
        "topk": ("TopK", {"k": job.k}),
        "batchtopk": ("BatchTopK", {"k": job.k}),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": job.k, "matryoshka_widths": widths(job)}),
        "l1": ("Standard", {"l1_coefficient": job.coefficient, "l1_warm_up_steps": int(job.steps * WARMUP)}),
        "jumprelu": ("JumpReLU", {"l0_coefficient": job.coefficient, "l0_warm_up_steps": int(job.steps * WARMUP)}),
        "gated": ("Gated", {"l1_coefficient": job.coefficient, "l1_warm_up_steps": int(job.steps * WARMUP)}),
    }[job.arch]
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=rows.shape[1], d_sae=job.d_sae, normalize_activations="expected_average_only_in", **settings
    )
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    training = SAETrainerConfig(
        total_training_samples=job.steps * job.batch,
        train_batch_size_samples=job.batch,
        lr=job.lr,
        lr_end=job.lr,
        lr_warm_up_steps=int(job.steps * WARMUP),
        lr_decay_steps=int(job.steps * DECAY),
        dead_feature_window=int(job.steps * DEAD),
    )
    trainer = SAETrainer(training, sae, batches(rows, job))
    trainer.activation_scaler.estimate_scaling_factor(rows.shape[1], batches(rows, job), min(16, job.steps))
    for x in batches(rows, job):
        trainer.step(x)
        trainer.n_training_steps += 1
    sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    with tempfile.TemporaryDirectory() as folder:  # what its users get: BatchTopK becomes a JumpReLU as it is saved
        sae.save_inference_model(folder)
        trained = sae_lens.SAE.load_from_disk(folder)
    return trained.encode, trained.decode, trained.W_dec


def dictionary_learning(rows: Tensor, job: Job) -> Inference:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.p_anneal import PAnnealTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    warmup, decay_start = int(job.steps * WARMUP), int(job.steps * (1 - DECAY))
    common: dict[str, Any] = {"steps": job.steps, "activation_dim": rows.shape[1], "dict_size": job.d_sae, "lr": job.lr}
    common |= {"layer": 0, "lm_name": "", "device": "cpu", "warmup_steps": warmup, "decay_start": decay_start}
    common["seed"] = job.seed
    fixed = {"k": job.k, "threshold_start_step": job.steps // 2}
    shares = [(high - low) / job.d_sae for low, high in itertools.pairwise([0, *widths(job)])]
    trainer_class, settings = {
        "topk": (TopKTrainer, fixed),
        "batchtopk": (BatchTopKTrainer, fixed),
        "matryoshka": (MatryoshkaBatchTopKTrainer, fixed | {"group_fractions": shares}),
        "l1": (StandardTrainer, {"l1_penalty": job.coefficient, "sparsity_warmup_steps": warmup}),
        "jumprelu": (JumpReluTrainer, {"target_l0": job.k * job.coefficient, "sparsity_warmup_steps": warmup}),
        "gated": (GatedSAETrainer, {"l1_penalty": job.coefficient, "sparsity_warmup_steps": warmup}),
        "p_anneal": (
            PAnnealTrainer,
            {
                "initial_sparsity_penalty": job.coefficient,
                "sparsity_warmup_steps": warmup,
                "p_end": P_END,
                "sparsity_function": "Lp^p",
                "anneal_start": int(job.steps * ANNEAL),
                "anneal_end": decay_start,
            },
        ),
    }[job.arch]
    trainer = trainer_class(**common, **settings)
    trainer.dead_feature_threshold = int(job.steps * job.batch * DEAD)
    scale = rows[:32768].square().sum(1).mean().sqrt()  # its buffer's normalisation: mean squared norm 1
    for step, x in enumerate(batches(rows, job)):
        trainer.update(step, x / scale)
    trained = trainer.ae
    table = trained.W_dec if job.arch in ("jumprelu", "matryoshka") else trained.decoder.weight.T
    return (lambda x: trained.encode(x / scale)), (lambda f: trained.decode(f) * scale), table


def sparsify(rows: Tensor, job: Job) -> Inference:
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    assert job.arch == "topk", "sparsify has no other"
    coder = SparseCoder(rows.shape[1], SparseCoderConfig(num_latents=job.d_sae, k=job.k))
    optimiser = torch.optim.Adam(coder.parameters(), lr=job.lr)
    quiet = torch.zeros(job.d_sae)
    for step, x in enumerate(batches(rows, job)):
        if step == 0:
            coder.b_dec.data = x.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=quiet >= job.steps * DEAD)
        (out.fvu + out.auxk_loss / 32).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        rise, fall = (step + 1) / (job.steps * WARMUP), (job.steps - step) / (job.steps * DECAY)
        optimiser.param_groups[0]["lr"] = job.lr * min(1.0, rise, fall)
        optimiser.step()
        optimiser.zero_grad()
        quiet += 1
        quiet[out.latent_indices.unique()] = 0
    coder.set_decoder_norm_to_unit_norm()

    def encode(x: Tensor) -> Tensor:
        found = coder.encode(x)
        return torch.zeros(len(x), job.d_sae).scatter_(1, found.top_indices, found.top_acts)

    return encode, (lambda f: f @ coder.W_dec + coder.b_dec), coder.W_dec


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ |= {"WANDB_MODE": "disabled", "SPARSIFY_DISABLE_TRITON": "1"}
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # what the tools print is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        torch.manual_seed(job.seed)
        inference = globals()[job.tool](load(job.rows, "train"), job)
        path = tempfile.mkstemp(suffix=".npz")[1]
        judge(inference, load(job.rows, "held"), path, widths(job) if job.prefixes else ())
        print(path, file=answers, flush=True)


if __name__ == "__main__":
    main()
