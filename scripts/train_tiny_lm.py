"""Train the embedded language model: a small GPT-2 on the training documents of the `python` source.

    python scripts/train_tiny_bpe.py
    OMP_NUM_THREADS=1 python scripts/train_tiny_lm.py --minutes 33

Writes `config.json` and `model.safetensors` (float32) into `pipeline/embedded/model`, and the figures into
`training.json`. Every document begins with `<|endoftext|>`; each epoch shuffles the documents, packs them end to end
from a random offset and cuts the result into windows of one context. The learning rate warms up, holds, and falls
linearly over the last half of the time given: the budget is wall-clock time, so the run fits a busy machine. SIGTERM
(or Ctrl-C) brings the end forward: two minutes of decay, then the weights are saved as if the run had been planned
so. Checkpoints go to the same folder as it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from sae.pipeline.tokenize.sources import is_validation, text_source

VALIDATION = 0.1  # the `tiny` preset's fraction
MATRIX_LR, OTHER_LR = 2e-3, 4e-3  # Muon; AdamW
WARM_UP, DECAY, WEIGHT_DECAY, CLIP = 50, 0.5, 0.1, 1.0


class Deadline:
    """Time as the schedule sees it; `hurry` moves the end to two minutes from now."""

    def __init__(self, minutes: float) -> None:
        self.start = time.monotonic()
        self.end = self.start + 60 * minutes
        self.decay = DECAY * 60 * minutes

    def hurry(self, *_: object) -> None:
        left = min(120.0, self.left())
        # Continue the decay from the present rate: the slope changes, the rate does not jump.
        self.decay = left / max(min(1.0, self.left() / self.decay), 1e-3)
        self.end = time.monotonic() + left

    def left(self) -> float:
        return self.end - time.monotonic()

    def rate(self, step: int) -> float:
        """The share of the peak learning rate."""
        return min(1.0, (step + 1) / WARM_UP, max(0.0, self.left() / self.decay))


class Muon:
    """Momentum whose direction is the nearest orthogonal matrix, for the blocks' weight matrices (Jordan et al. 2024).

    Here it needs half the tokens that AdamW needs for the same loss. torch.optim.Muon iterates in bfloat16, which a CPU
    without such instructions runs ten times slower; this stays in float32, and takes matrices of one shape together.
    """

    def __init__(self, matrices: list[Tensor], width: int) -> None:
        self.matrices, self.momenta = matrices, [torch.zeros_like(p) for p in matrices]
        self.width = width

    def _parts(self, x: Tensor) -> list[Tensor]:
        """Query, key and value are matrices of their own; every matrix short side first."""
        parts = x.split(self.width, 1) if x.shape == (self.width, 3 * self.width) else (x,)
        return [part.mT if part.shape[0] > part.shape[1] else part for part in parts]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        updates, targets = [], []
        for p, momentum in zip(self.matrices, self.momenta, strict=True):
            assert p.grad is not None
            momentum.lerp_(p.grad, 0.05)
            updates += self._parts(p.grad.lerp(momentum, 0.95))
            targets += self._parts(p)
            p.grad = None
        for shape in {tuple(x.shape) for x in updates}:
            chosen = [i for i, x in enumerate(updates) if x.shape == shape]
            # The factor gives updates the size that AdamW's have, so that one scale of learning rates serves both.
            directions = orthogonal(torch.stack([updates[i] for i in chosen])) * 0.2 * max(shape) ** 0.5
            for i, direction in zip(chosen, directions, strict=True):
                targets[i].mul_(1 - lr * WEIGHT_DECAY).sub_(direction, alpha=lr)


def orthogonal(x: Tensor) -> Tensor:
    """Singular values of [n, rows, columns] matrices brought near one, by five steps of a quintic iteration."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def windows(documents: list[Tensor], length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Epoch after epoch of [length + 1] windows over the shuffled, packed documents; neighbours share one token."""
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([documents[i] for i in order])
        offset = int(torch.randint(length, (1,), generator=generator))
        n = (len(stream) - 1 - offset) // length
        for i in torch.randperm(n, generator=generator).tolist():
            a = offset + i * length
            yield stream[a : a + length + 1]


def held_out(documents: list[Tensor], length: int, limit: int | None = None) -> Tensor:
    """[n, length + 1] consecutive windows of the packed validation documents; every `n // limit`-th if limited."""
    stream = torch.cat(documents)
    n = (len(stream) - 1) // length
    rows = torch.stack([stream[i * length : (i + 1) * length + 1] for i in range(n)])
    return rows if limit is None else rows[:: max(1, n // limit)]


def loss(model: GPT2LMHeadModel, x: Tensor) -> Tensor:
    """Mean cross-entropy, nats a token, of predicting x[:, 1:] from [batch, length + 1] tokens."""
    hidden = model.transformer(input_ids=x[:, :-1], use_cache=False).last_hidden_state
    return F.cross_entropy(F.linear(hidden.flatten(0, 1), model.lm_head.weight), x[:, 1:].reshape(-1))


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, rows: Tensor) -> float:
    """The same over many windows, in float64."""
    model.eval()
    total = sum(float(loss(model, part)) * len(part) for part in rows.split(4))
    model.train()
    return total / len(rows)


def unigram(train: list[Tensor], rows: Tensor, n_vocab: int) -> float:
    """Cross-entropy of the targets under the training documents' token frequencies (add-one smoothed)."""
    counts = torch.bincount(torch.cat(train), minlength=n_vocab).double() + 1
    return float(-(counts / counts.sum()).log()[rows[:, 1:]].mean())


def build(n_vocab: int, args: argparse.Namespace) -> GPT2LMHeadModel:
    # gelu_pytorch_tanh is GPT-2's gelu_new as one kernel (a third faster here); the saved config says gelu_new.
    config = GPT2Config(
        vocab_size=n_vocab, n_positions=args.context, n_embd=args.width, n_layer=args.layers, n_head=args.heads,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=n_vocab - 1, eos_token_id=n_vocab - 1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def load(folder: Path) -> GPT2LMHeadModel:
    """What an earlier run saved, to be trained further."""
    model = GPT2LMHeadModel.from_pretrained(folder)
    model.config.activation_function = "gelu_pytorch_tanh"
    for block in model.transformer.h:
        block.mlp.act = torch.nn.GELU(approximate="tanh")
    return model.train()


def save(model: GPT2LMHeadModel, folder: Path) -> None:
    """config.json and model.safetensors; each is replaced whole."""
    staging = folder / ".staging"
    model.config.activation_function = "gelu_new"
    model.save_pretrained(staging)
    for name in ("config.json", "model.safetensors"):
        (staging / name).chmod(0o644)  # safetensors writes files nobody else may read
        (staging / name).replace(folder / name)
    for rest in staging.iterdir():
        rest.unlink()
    staging.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=33.0, help="wall-clock budget of the training itself")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=6, help="contexts a step (small: more steps for the same text)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--further", type=Path, help="folder of an earlier run's weights to train further")
    parser.add_argument("--peak", type=float, default=1.0, help="highest learning rate, as a multiple of the usual one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "pipeline" / "embedded" / "model")
    args = parser.parse_args()

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(args.seed)
    source = text_source("python", offline=True)
    tok = Tokenizer.from_file(str(Path(__file__).parent.parent / "pipeline" / "embedded" / "model" / "tokenizer.json"))
    n_vocab = tok.get_vocab_size()
    texts = list(source.open())
    ids = [torch.tensor([n_vocab - 1, *e.ids]) for e in tok.encode_batch(texts)]
    train = [x for x, text in zip(ids, texts, strict=True) if not is_validation(text, VALIDATION)]
    test = [x for x, text in zip(ids, texts, strict=True) if is_validation(text, VALIDATION)]

    before = json.loads((args.further / "training.json").read_text()) if args.further else None
    model = load(args.further) if args.further else build(n_vocab, args)
    muon = Muon([p for p in model.transformer.h.parameters() if p.dim() == 2], args.width)
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": embeddings, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=OTHER_LR, betas=(0.9, 0.95), eps=1e-8, fused=True)
    n_parameters = sum(p.numel() for p in model.parameters())
    some, all_rows = held_out(test, args.context, 32), held_out(test, args.context)
    n_train = sum(map(len, train))
    print(f"{n_parameters} parameters, {n_train} training tokens, {sum(map(len, test))} held out", flush=True)

    rows = windows(train, args.context, torch.Generator().manual_seed(args.seed))
    deadline = Deadline(args.minutes)
    signal.signal(signal.SIGTERM, deadline.hurry)
    signal.signal(signal.SIGINT, deadline.hurry)
    step, running, checked = 0, math.log(n_vocab), time.monotonic()
    while deadline.left() > 0:
        rate = args.peak * deadline.rate(step)
        for group in adam.param_groups:
            group["lr"] = OTHER_LR * rate
        ce = loss(model, torch.stack([next(rows) for _ in range(args.batch)]))
        ce.backward()
        torch.nn.utils.clip_grad_norm_([*embeddings, *vectors], CLIP)
        adam.step()
        muon.step(MATRIX_LR * rate)
        adam.zero_grad(set_to_none=True)
        step += 1
        running += 0.01 * (float(ce.detach()) - running)
        # Now and then: say how it goes, and leave weights that could be used.
        if time.monotonic() - checked > 60:
            checked = time.monotonic()
            tokens = step * args.batch * args.context
            seconds = checked - deadline.start
            print(
                f"{seconds / 60:5.1f} min  step {step}  {tokens / 1e6:.2f}M tokens  {tokens / seconds:.0f} tokens/s  "
                + f"rate {rate:.2f}  train {running:.3f}  held out (part) {evaluate(model, some):.3f}",
                flush=True,
            )
            save(model, args.out)

    seconds = time.monotonic() - deadline.start
    tokens = step * args.batch * args.context
    command = " ".join(["scripts/train_tiny_lm.py", *sys.argv[1:]])
    save(model, args.out)
    figures = {
        "source": source.recipe(),
        "platform": f"{platform.system()} {platform.machine()}, torch {torch.__version__}",
        "command": "; then ".join([*([before["command"]] if before else []), command]),
        "parameters": n_parameters,
        "training_tokens": n_train,
        "tokens_seen": tokens + (before["tokens_seen"] if before else 0),
        "steps": step + (before["steps"] if before else 0),
        "minutes": round(seconds / 60 + (before["minutes"] if before else 0), 1),
        "tokens_per_second": round(tokens / seconds),
        "held_out_tokens": all_rows[:, 1:].numel(),
        "ce_held_out": round(evaluate(model, all_rows), 4),
        "ce_train": round(evaluate(model, held_out(train, args.context, len(all_rows))), 4),
        "ce_unigram": round(unigram(train, all_rows, n_vocab), 4),
        "ce_uniform": round(math.log(n_vocab), 4),
    }
    (args.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2), flush=True)


if __name__ == "__main__":
    main()
