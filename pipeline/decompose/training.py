"""One decomposition in training: its components, its optimiser, its part of a step, its tensors in a checkpoint.

What is drawn at random is a function of the seed and the step, so that there is no random state to save.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae.cache.errors import DamagedStore
from sae.pipeline.decompose.components import FACTORS, components_of
from sae.pipeline.decompose.config import DecomposeConfig
from sae.pipeline.decompose.folder import fill, trained
from sae.pipeline.decompose.losses import Decomposition, faithfulness, layerwise, minimality, reconstruction, stochastic
from sae.pipeline.decompose.subjects import Subject
from sae.pipeline.runtime.optimisers import Adam
from sae.pipeline.saes.contract import generator_of


def blank(config: DecomposeConfig, subject: Subject) -> Decomposition:
    """The components of a subject's matrices as they are before training: a function of the seed."""
    weights = {name: weight.cpu() for name, weight in subject.matrices.items()}
    parts = components_of(
        weights, config.transposes, config.components, config.gate, config.gate_hidden,
        lambda name: generator_of(config.seed, f"components of {name}", 0),
    )  # fmt: skip
    return Decomposition(parts).to(next(iter(subject.matrices.values())).device)


class Training:
    """A decomposition and its optimiser. `begin` makes one at step 0, `take` puts a checkpoint in its place."""

    def __init__(self, config: DecomposeConfig, subject: Subject) -> None:
        self.config, self.subject = config, subject
        self.decomposition = blank(config, subject)
        named = self.decomposition.named_parameters()  # a group each: checkpoints count them in this order
        self.optimiser = Adam([{"params": [p], "multiple": self._multiple(name)} for name, p in named], lr=config.lr)

    def _multiple(self, name: str) -> float:
        return self.config.factor_rate if name.rpartition(".")[2] in FACTORS else 1.0

    def warm_up(self) -> None:
        """Train the components alone to add up to the matrices."""
        parts = [*self.decomposition.parts.values()]
        factors = [value for one in parts for name, value in one.named_parameters() if name in FACTORS]
        optimiser = torch.optim.AdamW(factors, lr=self.config.warmup_lr)
        for _ in range(self.config.warmup):
            optimiser.zero_grad(set_to_none=True)
            faithfulness(parts).backward()
            optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def step(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Take a step on a batch; the terms of its loss, with their weights, and how many components were active."""
        config, decomposition = self.config, self.decomposition
        for group in self.optimiser.param_groups:
            group["lr"] = config.rate(step) * group["multiple"]
        self.optimiser.zero_grad(set_to_none=True)
        terms, active = self.terms(batch, step)
        torch.stack([*terms.values()]).sum().backward()
        self.optimiser.step()
        faithful = faithfulness(decomposition.parts.values()).detach() / (self.subject.instances or 1)
        return {f"loss_{name}": value.detach() for name, value in terms.items()} | active | {"faithfulness": faithful}

    def terms(self, batch: Any, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted terms of the loss, and per matrix the mean number of components above the threshold."""
        config, decomposition = self.config, self.decomposition
        clean = self.subject.clean(batch)
        importances = decomposition.importances(clean.read)
        instances = self.subject.instances is not None
        terms = {"faithfulness": config.faithfulness * faithfulness(decomposition.parts.values())}
        generator = generator_of(config.seed, "masks", step, next(iter(importances.values())).device)
        for kind, weight, divergence in (
            ("stochastic", config.stochastic, reconstruction), ("layerwise", config.layerwise, layerwise),
        ):  # fmt: skip
            if weight and not (kind == "layerwise" and config.stochastic and len(importances) == 1):  # the same twice
                found = [
                    divergence(decomposition, stochastic(importances, generator, delta=config.delta), clean.divergence)
                    for _ in range(config.samples)
                ]
                terms[kind] = weight * torch.stack(found).mean()
        minimal = minimality(importances.values(), config.power(step), instances=instances, rows=clean.rows)
        terms["importance"] = config.importance * minimal
        with torch.no_grad():
            counted = {name: active(one, config.threshold, clean.rows) for name, one in importances.items()}
        return terms, {f"l0_{name}": one for name, one in counted.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The components and the optimiser's state, as a checkpoint has them."""
        found = {f"spd.{name}": value for name, value in trained(self.decomposition).items()}
        for index, entries in self.optimiser.state_dict()["state"].items():
            found |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
        return found

    def take(self, tensors: dict[str, Tensor], where: str) -> None:
        """Go on from a checkpoint's tensors. Raises DamagedStore where they are not those of these settings."""
        fill(self.decomposition, {n.removeprefix("spd."): v for n, v in tensors.items() if n.startswith("spd.")}, where)
        groups = self.optimiser.state_dict()["param_groups"]
        entries: dict[int, dict[str, Tensor]] = {}
        for place, parameter in enumerate(self.decomposition.parameters()):
            for key, like in (("step", torch.zeros(())), ("exp_avg", parameter), ("exp_avg_sq", parameter)):
                value = tensors.get(f"optimiser.{place}.{key}")
                if value is None or value.shape != like.shape:
                    raise DamagedStore(
                        f"{where}: its optimiser.{place}.{key} is missing, or not that of the run's settings"
                    )
                entries.setdefault(place, {})[key] = value
        self.optimiser.load_state_dict({"state": entries, "param_groups": groups})


def active(importance: Tensor, threshold: float, rows: Tensor | None) -> Tensor:
    """How many components are above a threshold, a mean over the rows that count (and over instances)."""
    counts = (importance > threshold).sum(-1).float()
    return (counts if rows is None else counts[rows]).mean()
