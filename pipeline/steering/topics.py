"""Topic ablation: the latents that tell a topic best are zeroed; does that cost the topic more than other text?

Contexts of text on the topic and of general text are halved. On the first halves each latent is scored by how well its
mean activation in a context tells the topic (AUROC); on the second halves the best ones are put to zero, the
dictionary's error left in, and the cross-entropy that this adds is compared: selectivity is that of the topic over that
of general text. As many live latents drawn at random are the control.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.cache.errors import SaeError
from sae.cache.printable import printable
from sae.pipeline.metrics.coefficients import auroc
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.steering.config import LEAST, SteerConfig
from sae.pipeline.steering.opened import Opened

MOST_BYTES = 1 << 28  # of a file of text
ELEMENTS = 1 << 24  # values of latents that are held at a time
NOTHING = 1e-6  # nats a token: what costs general text less has no selectivity


class Texts(NamedTuple):
    """Contexts [n, T] on a topic and of general text."""

    topic: Tensor
    general: Tensor

    def half(self, second: bool) -> Texts:
        """The contexts that latents are chosen by, or the second ones, which they are judged on."""
        return Texts(*(part[len(part) // 2 :] if second else part[: len(part) // 2] for part in self))


def ablate_topic(
    opened: Opened, topic: Path, general: Path, progress: Progress, *, config: SteerConfig | None = None
) -> dict[str, Any]:  # fmt: skip
    """Zero the latents that tell a topic best, `top` at a time: what that adds to the cross-entropy of which text.

    topic, general: files of plain UTF-8 text. Returns the latents, best first, with their AUROC, and a row for each of
    the counts. Raises SaeError for files that say too little, and for more latents than tell the topic.
    """
    config = config or SteerConfig()
    counts = config.top
    texts = Texts(*(_contexts(opened, *each, config) for each in (("topic", topic), ("general", general))))
    chosen_by = texts.half(second=False)
    progress.start("topic", sum(map(len, chosen_by)) + 2 * len(counts), "passes")
    try:
        means = [_means(opened, part, progress) for part in chosen_by]
        scores, alive = _scores(*means), torch.cat(means).ne(0).any(0)
        best = [i for i in scores.argsort(descending=True, stable=True).tolist() if alive[i] and scores[i] > 0.5]
        if not best:
            raise SaeError(
                f"topic = {topic.name}: no latent of {opened.run.name} fires more on it than on {general.name}; "
                "give another text"
            )
        if max(counts) > len(best):
            raise SaeError(
                f"top = {max(counts)}: only {len(best)} latents of {opened.run.name} fire more on {topic.name} than on "
                f"{general.name}; give fewer"
            )
        judged = texts.half(second=True)
        clean = [_losses(opened, part, []) for part in judged]
        live = alive.nonzero().view(-1)
        order = live[torch.randperm(len(live), generator=torch.Generator().manual_seed(config.seed))].tolist()
        rows = []
        for count in counts:
            chosen, control = (_costs(opened, judged, clean, which[:count]) for which in (best, order))
            progress.advance(2)
            rows.append({"top": count, **chosen, **{f"{name}_control": value for name, value in control.items()}})
    finally:
        progress.finish()
    return {
        "run": str(opened.run.path), "topic": str(topic), "general": str(general),
        "contexts": {"topic": len(texts.topic), "general": len(texts.general), "length": config.context},
        "ce": dict(zip(("topic", "general"), clean, strict=True)),
        "latents": [{"feature": i, "auroc": scores[i].item()} for i in best[: max(counts)]], "ablations": rows,
    }  # fmt: skip


def _contexts(opened: Opened, name: str, path: Path, config: SteerConfig) -> Tensor:
    """Contexts int64 [n, T] of a file: its text from the beginning, cut where a context is full."""
    said = f"{name} = {printable(str(path))}"
    try:
        if path.exists() and not path.is_file():
            raise SaeError(f"{said}: is no file; give one of plain text")
        if path.stat().st_size > MOST_BYTES:
            raise SaeError(f"{said}: has more than {MOST_BYTES >> 20} MB; give a part of it")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SaeError(f"{said}: cannot be read ({error.strerror}); give a file of plain text") from error
    except UnicodeDecodeError as error:
        raise SaeError(f"{said}: is not UTF-8 ({error.reason}); give a file of plain text") from error
    begin = [] if opened.rows.text.recipe.get("begin") == "none" else [opened.tokenizer.begin]
    length = config.context - len(begin)
    opened.expect_room(config.context, f"context = {config.context}")
    ids = opened.tokenizer.encode_batch([text])[0][: length * config.contexts].tolist()
    found = [begin + ids[first : first + length] for first in range(0, len(ids) - length + 1, length)]
    if len(found) < LEAST:
        raise SaeError(
            f"{said}: is {len(found)} contexts of {config.context} tokens, and {LEAST} are the least; give more text, "
            "or a smaller `context`"
        )
    return torch.tensor(found)


@torch.no_grad()
def _means(opened: Opened, contexts: Tensor, progress: Progress) -> Tensor:
    """[n, d_sae]: the mean activation of every latent in each context, over tokens that become rows."""
    found = []
    for ids in contexts.split(_together(opened, contexts)):
        rows = opened.model.activations(ids, [opened.reads])[opened.reads]
        there = opened.learned(ids).to(rows.device)[..., None]
        values = opened.dictionary.encode(rows).dense()
        found.append((torch.where(there, values, 0.0).sum(1) / there.sum(1).clamp_min(1)).cpu())
        progress.advance(len(ids))
    return torch.cat(found)


def _scores(topic: Tensor, general: Tensor) -> Tensor:
    """float64 [d_sae]: AUROC of every latent's means [n, d_sae] as a sign of the topic."""
    values = torch.cat([topic, general])
    there = torch.arange(len(values)) < len(topic)
    return auroc(values, there[:, None].expand_as(values))


def _losses(opened: Opened, contexts: Tensor, latents: Sequence[int]) -> float:
    """Mean cross-entropy a token, in nats, with some latents zeroed at the tokens that become rows."""
    total, which = 0.0, list(latents)
    for ids in contexts.split(_together(opened, contexts)):
        there = opened.learned(ids).to(opened.model.device)[..., None]

        def zeroed(values: Tensor, there: Tensor = there) -> Tensor:
            new = values.clone()
            new[..., which] = torch.where(there, 0.0, new[..., which])
            return new

        with opened.attached.edit(zeroed):
            total += float(opened.model.losses(ids).double().sum())
    return total / contexts[:, 1:].numel()


def _together(opened: Opened, contexts: Tensor) -> int:
    """Contexts whose latents are held at a time."""
    return max(1, ELEMENTS // (contexts.shape[1] * opened.dictionary.d_sae))


def _costs(opened: Opened, texts: Texts, clean: Sequence[float], latents: Sequence[int]) -> dict[str, float | None]:
    """What zeroing latents adds to the cross-entropy of a topic and of general text, and the one over the other."""
    topic, general = (_losses(opened, part, latents) - before for part, before in zip(texts, clean, strict=True))
    selectivity = topic / general if abs(general) > NOTHING else None
    return {"topic": topic, "general": general, "selectivity": selectivity}
