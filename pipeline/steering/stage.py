"""Steering: what a model predicts and writes after a prompt, as it is and with one latent of a dictionary changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sae.cache.errors import SaeError
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.steering.config import SteerConfig, expect_strengths
from sae.pipeline.steering.doses import Dose, Nothing, unit_size
from sae.pipeline.steering.generating import Treatment, continuation, log_chances
from sae.pipeline.steering.opened import Opened
from sae.pipeline.studies.plots import Panel, draw

FOLDER = "steering"
COSTS = {
    "kl": "KL at the next token, nats", "perplexity": "perplexity of the continuation",
    "target_change": "change of the target's log-probability",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a model makes of a prompt.

    text: its continuation. tokens: the ids of that. next: the likeliest next tokens after the prompt, with their
    probabilities. perplexity: of the continuation under the model as it is; None where nothing was generated.
    target: the log-probability of the target as the next token; None where none was named.
    """

    text: str
    tokens: list[int]
    next: list[dict[str, Any]]
    perplexity: float | None
    target: float | None


@dataclass(frozen=True)
class Steered:
    """An outcome under a strength, and what it costs.

    kl: KL(as it is || steered) at the next token after the prompt, nats. kl_continuation: its mean over the tokens of
    the steered continuation; None without one. target_change: what the target's log-probability gained.
    """

    strength: float
    outcome: Outcome
    kl: float
    kl_continuation: float | None
    target_change: float | None

    def as_json(self) -> dict[str, Any]:
        costs = {name: getattr(self, name) for name in ("kl", "kl_continuation", "target_change")}
        return {"strength": self.strength, **asdict(self.outcome), **costs}


@dataclass(frozen=True)
class Steering:
    """The model as it is, and under every strength in the order they were asked for."""

    about: dict[str, Any]
    baseline: Outcome
    doses: list[Steered]

    def as_json(self) -> dict[str, Any]:
        """`steered` and `kl` are those of the last strength."""
        last = self.doses[-1]
        return {
            **self.about, "baseline": asdict(self.baseline), "steered": last.as_json(), "kl": last.kl,
            "doses": [dose.as_json() for dose in self.doses],
        }  # fmt: skip

    def panels(self) -> list[Panel]:
        """The responses to a dose: a panel for each of what it costs."""
        told = [{**dose.as_json()} for dose in sorted(self.doses, key=lambda dose: dose.strength)]
        return [
            Panel(title, "strength", {"": [(one["strength"], one[name]) for one in told]})
            for name, title in COSTS.items()
        ]


def steer(
    opened: Opened, feature: int, prompt: str, strengths: Sequence[float], progress: Progress, *,
    config: SteerConfig | None = None, target: str | None = None,
) -> Steering:  # fmt: skip
    """Look at what a model makes of a prompt as it is, and with a latent changed by each of some strengths.

    target: a token whose log-probability is watched. Several strengths leave `steering/FEATURE.json` and a plot in the
    run folder. Raises SaeError for what cannot be, before anything is computed.
    """
    config = config or SteerConfig()
    chosen = expect_strengths(tuple(float(number) for number in strengths), config.mode)
    if config.mode == "clamp" and config.unit == "norm":
        raise SaeError("unit = norm: is of what is added, and a clamped latent has a value; use `unit = max` or raw")
    opened.known(feature)
    ids = opened.encoded(prompt, "prompt = ...")
    opened.expect_room(len(ids) + config.length, f"length = {config.length}: with the prompt")
    last = len(ids) + config.length - 1
    if isinstance(config.positions, tuple) and (beyond := [place for place in config.positions if place > last]):
        raise SaeError(f"positions = {beyond[0]}: the prompt and what is generated have positions 0 to {last}")
    watched = None if target is None else opened.token(target, "target")
    size = unit_size(opened, config, feature, progress)
    look = _Looking(opened, config, ids, watched)
    progress.start("steering", len(chosen) + 1, "texts")
    try:
        baseline, chances = look.at(Nothing())
        progress.advance(1)
        doses = []
        for strength in chosen:
            doses.append(look.dosed(Dose(opened, config, feature, strength, size, len(ids)), baseline, chances))
            progress.advance(1)
    finally:
        progress.finish()
    about = {
        "run": str(opened.run.path), "feature": feature, "mode": config.mode,
        "unit": {"name": config.unit, "size": size}, "positions": config.positions, "prompt": prompt,
        "prompt_tokens": ids.tolist(), "temperature": config.temperature, "seed": config.seed, "target": target,
    }  # fmt: skip
    return Steering(about, baseline, doses)


def write(found: Steering, opened: Opened) -> dict[str, str]:
    """Write the responses to several strengths into the run folder, as JSON and as a plot: the paths of both."""
    name = f"{FOLDER}/{found.about['feature']}.json"
    path = opened.run.write_json(name, found.as_json())
    draw(found.panels(), plot := path.with_suffix(".png"))
    return {"json": str(path), "plot": str(plot)}


@dataclass(frozen=True)
class _Looking:
    """A prompt [T] and what is looked at after it."""

    opened: Opened
    config: SteerConfig
    ids: Tensor
    target: int | None

    def at(self, treatment: Treatment) -> tuple[Outcome, Tensor]:
        """The outcome under a treatment, and the log-probabilities [n_vocab] of the next token."""
        model, config = self.opened.model, self.config
        chances = log_chances(model, treatment, self.ids, len(self.ids) - 1)[0]
        found = continuation(
            model, treatment, self.ids, config.length, temperature=config.temperature, seed=config.seed,
            ends=self.opened.ends,
        )  # fmt: skip
        likeliest = chances.topk(min(config.predictions, len(chances)))
        named = [
            {"token": self.opened.text([i]), "id": i, "probability": chance}
            for i, chance in zip(likeliest.indices.tolist(), likeliest.values.exp().tolist(), strict=True)
        ]
        watched = None if self.target is None else chances[self.target].item()
        text = self.opened.text(found.tolist())
        return Outcome(text, found.tolist(), named, self._perplexity(found), watched), chances

    def dosed(self, dose: Dose, baseline: Outcome, clean: Tensor) -> Steered:
        """The outcome under a dose, beside what the model does without, whose log-probabilities [n_vocab] are given."""
        outcome, chances = self.at(dose)
        gained = None if baseline.target is None or outcome.target is None else outcome.target - baseline.target
        return Steered(dose.strength, outcome, float(kl(clean, chances)), self._divergence(outcome, dose), gained)

    def _perplexity(self, found: Tensor) -> float | None:
        """Of a continuation [n], under the model as it is."""
        if not len(found):
            return None
        whole = torch.cat([self.ids, found])
        chances = log_chances(self.opened.model, Nothing(), whole[:-1], len(self.ids) - 1)
        return float(chances.gather(1, found[:, None].to(chances.device)).mean().neg().exp())

    def _divergence(self, outcome: Outcome, dose: Dose) -> float | None:
        """The mean KL(as it is || steered) where the tokens of a steered continuation are predicted."""
        if not outcome.tokens:
            return None
        whole, first = torch.cat([self.ids, torch.tensor(outcome.tokens)])[:-1], len(self.ids) - 1
        return float(kl(*(log_chances(self.opened.model, one, whole, first) for one in (Nothing(), dose))).mean())


def kl(clean: Tensor, steered: Tensor) -> Tensor:
    """KL(clean || steered) in nats of log-probabilities [..., n]; exactly 0 where they are equal."""
    chances = clean.exp()
    return torch.where(chances > 0, chances * (clean - steered), 0.0).sum(-1)
