"""What is decomposed: its matrices, the batches it is shown, how far it is from itself when products are replaced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.cache.disk.parsing import whole
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Batch, Batches
from sae.cache.points import point_of
from sae.cache.tokens import TokenStore
from sae.pipeline.decompose.config import LiveConfig, LocalConfig, ToyConfig
from sae.pipeline.decompose.contexts import Contexts, TokenBatch
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.language_model.matrices import Matrix, Product, chosen, multiplying
from sae.pipeline.saes.contract import generator_of
from sae.pipeline.worlds.superposition import Presence, Toy, samples

UNLIKE = 0.1  # share of the variance that a model's MLP may miss of what a store says it gave: codecs round
TRIED = 16  # rows that its matrices are found with
SAMPLED = 8192  # rows that the variance of what an MLP gives is measured on


class Clean(NamedTuple):
    """The model itself on one batch.

    read: what each matrix reads, [..., d_in]. rows: bool [...], which of these rows count; None: all. measured: the
    figures of the model with some products replaced, by name, scalars of which the first is the divergence.
    """

    read: dict[str, Tensor]
    rows: Tensor | None
    measured: Callable[[Mapping[str, Product]], dict[str, Tensor]]

    def divergence(self, products: Mapping[str, Product]) -> Tensor:
        """How far the output with these products is from the model's own."""
        return next(iter(self.measured(products).values()))


class Subject(ABC):
    """Something with weight matrices.

    matrices: those to decompose, float32 [d_out, d_in], with instances [I, d_out, d_in]. instances: how many models
    these are of, side by side; None: of one. unit: what is counted in a batch.
    """

    matrices: dict[str, Tensor]
    instances: int | None = None
    unit: str

    @property
    def held_out_batches(self) -> int:
        """How many batches are kept for judging."""
        return 1 << 30

    @abstractmethod
    def batches(self, held_out: bool = False) -> Feed:
        """What it is trained on, without an end; or what is kept for judging, from its beginning."""

    @abstractmethod
    def clean(self, batch: Any) -> Clean:
        """The model itself on a batch."""

    def kept(self) -> dict[str, Tensor]:
        """The model, where nobody else keeps it."""
        return {}


class Feed(ABC):
    """Batches, one after another, and where the next one starts."""

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...

    @abstractmethod
    def state_dict(self) -> dict[str, int]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, int]) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Let go of what reads ahead."""


class Counted(Feed):
    """Batches that are a function of their number."""

    def __init__(self, batch: Callable[[int], Any]) -> None:
        self._batch, self._next = batch, 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            self._next += 1
            yield self._batch(self._next - 1)

    def state_dict(self) -> dict[str, int]:
        return {"batch": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = whole(state, "batch")

    def close(self) -> None: ...


class Loaded(Feed):
    """Batches of rows that a loader reads."""

    def __init__(self, loader: Batches) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        yield from self._loader

    def state_dict(self) -> dict[str, int]:
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._loader.load_state_dict(state)

    def close(self) -> None:
        self._loader.close()


class LocalMLP(Subject):
    """One MLP of a language model, on rows of what it read and gave.

    Its divergence is the squared error from what the store says it gave, as a share of the variance of that.
    """

    unit = "rows"

    def __init__(self, config: LocalConfig, dataset: Dataset, model: LanguageModel) -> None:
        """dataset: inputs at `mlp_in`, targets at `mlp_out` of one layer. Raises SaeError where they are not."""
        self.config, self.dataset, self.model = config, dataset, model
        self.layer = mlp_of(dataset)
        self._held_out = dataset.held_out()
        self._mlp = model.mlp(self.layer)
        sample = dataset.sample(min(SAMPLED, dataset.n_rows)).to(model.device)
        self._variance = float((sample.y - sample.y.mean(0)).square().sum(1).mean())
        with torch.no_grad():
            off = float((self._mlp(sample.x).float() - sample.y).square().sum(1).mean())
        if not off <= UNLIKE * self._variance:
            raise SaeError(
                f"{dataset.targets[0].key}: is not what the MLP of layer {self.layer} of {model.name} gives for its "
                f"input: squared error {off:.3g}, variance {self._variance:.3g}; harvest both again"
            )
        inside = {name: model.matrices[name] for name in _deciding(self._mlp, sample.x[:TRIED], model.matrices)}
        self._there = chosen(inside, config.matrices, f"the MLP of layer {self.layer} of {model.name}")
        self.matrices = weights(self._there)

    @property
    def held_out_batches(self) -> int:
        return -(-self._held_out.n_rows // self.config.batch)

    def batches(self, held_out: bool = False) -> Feed:
        data = self._held_out if held_out else self.dataset
        batch = min(self.config.batch, data.n_rows)
        return Loaded(data.batches(batch, seed=self.config.seed, device=self.model.device))

    def clean(self, batch: Batch) -> Clean:
        def measured(products: Mapping[str, Product]) -> dict[str, Tensor]:
            error = (self.predict(batch.x, products) - batch.y).square().sum(1).mean()
            return {"fvu": error / self._variance}

        return Clean(self.read(batch.x), None, measured)

    @torch.no_grad()
    def read(self, x: Tensor) -> dict[str, Tensor]:
        """What each matrix reads, [n, ...], where the MLP reads rows [n, d_in]."""
        found: dict[str, Tensor] = {}
        self.predict(x, reading(found, self._there))
        return found

    def predict(self, x: Tensor, products: Mapping[str, Product]) -> Tensor:
        """What the MLP makes of rows [n, d_in] with some products replaced, [n, d_out]."""
        with multiplying({name: partial(_of_rows, product) for name, product in products.items()}, self._there):
            return self._mlp(x).float()


class LiveModel(Subject):
    """A language model on tokens. Its divergence is KL(model itself || with products replaced), nats a token."""

    unit = "contexts"

    def __init__(
        self, names: tuple[str, ...], batch: int, seed: int, model: LanguageModel, tokens: TokenStore,
        held_out: TokenStore, contexts: int,
    ) -> None:  # fmt: skip
        """contexts: of `tokens`, how many of the first are read."""
        self.model, self.tokens, self.held_out = model, tokens, held_out
        self._there = chosen(model.matrices, names, model.name)
        self.matrices = weights(self._there)
        self._orders = {False: Contexts(tokens, contexts, seed), True: Contexts(held_out, held_out.n_contexts, 0)}
        self._batch = batch

    @classmethod
    def of(
        cls, config: LiveConfig, model: LanguageModel, tokens: TokenStore, held_out: TokenStore, contexts: int
    ) -> LiveModel:
        return cls(config.matrices, config.batch, config.seed, model, tokens, held_out, contexts)

    @property
    def held_out_batches(self) -> int:
        return -(-self.held_out.n_contexts // self._batch)

    def batches(self, held_out: bool = False) -> Feed:
        order = self._orders[held_out]
        size = min(self._batch, order.count)
        return Counted(lambda number: order.batch(number * size, size))

    def clean(self, batch: TokenBatch) -> Clean:
        read: dict[str, Tensor] = {}
        with torch.no_grad():
            logits = self.model.logits(batch.tokens, reading(read, self._there))
        read = {name: x.view(*batch.tokens.shape, x.shape[-1]) for name, x in read.items()}
        lengths = batch.lengths.to(logits.device)[:, None]
        rows = torch.arange(logits.shape[1], device=logits.device) < lengths
        tokens = batch.tokens.to(logits.device)
        itself = logits[rows].log_softmax(-1)
        chances = itself.exp()

        def measured(products: Mapping[str, Product]) -> dict[str, Tensor]:
            changed = self.model.logits(batch.tokens, products).log_softmax(-1)
            kl = (chances * (itself - changed[rows])).sum(-1).mean()
            ce = -changed[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0][rows[:, 1:]].mean()
            return {"kl": kl, "ce": ce}

        return Clean(read, rows, measured)


class ToyModels(Subject):
    """Toy models of superposition, x' = ReLU(W^T W x + b), side by side. Their divergence is the mean squared error.

    in: W [d, G]; out: W^T [G, d]; hidden: the identity [d, d] between them, where there is one.
    """

    unit = "samples"

    def __init__(self, config: ToyConfig, toy: Toy, device: torch.device) -> None:
        self.config, self.toy = config, Toy(*(values.to(device) for values in toy))
        self.instances = len(toy.weight)
        self.presence = presence_of(config)
        self.matrices = {"in": self.toy.weight.mT}
        if config.identity:
            eye = torch.eye(config.hidden, device=device)
            self.matrices["hidden"] = eye.expand(self.instances, -1, -1)
        self.matrices["out"] = self.toy.weight

    def kept(self) -> dict[str, Tensor]:
        return self.toy._asdict()

    def batches(self, held_out: bool = False) -> Feed:
        purpose = "held out" if held_out else "samples"

        def batch(number: int) -> Tensor:
            seeds = range(self.config.seed, self.config.seed + (self.instances or 0))
            generators = [generator_of(seed, purpose, number) for seed in seeds]
            return samples(self.presence, self.config.batch, generators).to(self.toy.weight.device)

        return Counted(batch)

    def clean(self, batch: Tensor) -> Clean:
        read: dict[str, Tensor] = {}
        itself = self.output(batch, reading(read, self.matrices))

        def measured(products: Mapping[str, Product]) -> dict[str, Tensor]:
            return {"mse": (self.output(batch, products) - itself).square().flatten(1).mean(1).sum()}

        return Clean(read, None, measured)

    def output(self, x: Tensor, products: Mapping[str, Product]) -> Tensor:
        """x' [I, n, G] of samples [I, n, G] with some products replaced."""
        for name, weight in self.matrices.items():
            new = products[name](x) if name in products else None
            x = x @ weight.mT if new is None else new
        return torch.relu(x + self.toy.bias[:, None])


def presence_of(config: ToyConfig) -> Presence:
    """Which features are in a toy's samples: each by itself, with the same chance."""
    return Presence(torch.full((config.instances, config.features), config.probability, dtype=torch.float64))


def _of_rows(product: Product, x: Tensor) -> Tensor | None:
    """A product of rows [n, d_in], where the model has them as contexts of one token [n, 1, d_in]."""
    new = product(x.flatten(0, -2))
    return None if new is None else new.view(*x.shape[:-1], -1)


@torch.no_grad()
def _deciding(run: Callable[[Tensor], Tensor], x: Tensor, there: Mapping[str, Matrix]) -> list[str]:
    """The names of the matrices without which a function gives something else."""
    used: dict[str, Tensor] = {}
    with multiplying(reading(used, there), there):
        whole = run(x)

    def without(name: str) -> Tensor:
        zeros = there[name].weight.new_zeros(len(there[name].weight))
        with multiplying({name: lambda rows: zeros.expand(*rows.shape[:-1], -1)}, there):
            return run(x)

    return [name for name in used if not torch.equal(without(name), whole)]


def weights(there: Mapping[str, Matrix]) -> dict[str, Tensor]:
    return {name: one.weight.detach().float() for name, one in there.items()}


def reading(into: dict[str, Tensor], names: Iterable[str]) -> dict[str, Product]:
    """Products that change nothing and keep what each of some matrices reads."""

    def keep(name: str, x: Tensor) -> None:
        into[name] = x.detach().float()

    return {name: partial(keep, name) for name in names}


def mlp_of(dataset: Dataset) -> int:
    """The layer whose MLP read the inputs and gave the targets. Raises SaeError where there is none."""
    points = [[point_of(store) for store in side] for side in (dataset.inputs, dataset.targets)]
    reads, writes = (side[0] if len(side) == 1 else None for side in points)
    if reads is None or writes is None or reads[0] != writes[0] or (reads[1], writes[1]) != ("mlp_in", "mlp_out"):
        keys = " -> ".join(
            " + ".join(store.key for store in side) or "nothing" for side in (dataset.inputs, dataset.targets)
        )
        raise SaeError(
            f"{keys}: is not what one MLP reads and gives; give `input` N.mlp_in and `target` N.mlp_out of a layer N"
        )
    return reads[0]
