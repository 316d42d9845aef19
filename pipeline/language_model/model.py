"""`LanguageModel`: what the stages ask of a language model. Activations at points, and losses with a point replaced."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sae.cache.arguments import checked
from sae.cache.device.landing import moved
from sae.cache.errors import SaeError
from sae.cache.points import hook_name
from sae.pipeline.language_model.files import RANDOM, find_model, slug
from sae.pipeline.language_model.interventions import Intervention, changed
from sae.pipeline.language_model.matrices import Matrix, Product
from sae.pipeline.language_model.sites import SITES, Point
from sae.pipeline.runtime import devices

if TYPE_CHECKING:
    from sae.pipeline.language_model.bridge import Hooked
    from sae.pipeline.language_model.loading import Loaded

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Logits are made for this many (row, token) pairs at a time: below the 32 MiB where the CPU allocator slows down,
# and large enough to fill a GPU.
_LOGITS_AT_ONCE = {"cpu": 2**23 - 1, "cuda": 2**27}


class Spliced(NamedTuple):
    """The effect of an intervention on each prediction. float32 [B, T-1], nats."""

    ce: Tensor  # cross-entropy of tokens[:, 1:]
    kl: Tensor  # KL(clean || spliced)


class Comparison(NamedTuple):
    """Losses of one batch: clean, and with each intervention in place."""

    clean: Tensor  # cross-entropy of tokens[:, 1:], float32 [B, T-1], nats
    spliced: dict[str, Spliced]


class LanguageModel:
    """A causal language model, frozen. Made by `boot`."""

    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        """Wrap a loaded model, which is changed in place."""
        from sae.pipeline.language_model.bridge import Bridge

        self.name = loaded.name
        self.slug = slug(loaded.name.replace(":", "-"))
        self.device = device
        self._loaded = loaded
        self._bridge = Bridge(loaded.model, loaded.name, device)
        self._interventions: list[Intervention] = []
        self.n_layers = self._bridge.n_layers
        self.n_vocab = self._bridge.n_vocab
        self.context_length = self._bridge.context_length

    @classmethod
    @checked
    def boot(
        cls,
        name: str | os.PathLike[str] = "gpt2",
        *,
        device: str | torch.device = "auto",
        dtype: str = "float32",
        revision: str | None = None,
        offline: bool = False,
    ) -> LanguageModel:
        """Load a model.

        `name`: a hub name, a local Hugging Face folder, "tiny" (embedded), or "random:<folder or GPT-2 name>" for an
        untrained model of that shape (benchmarks, controls). `device` "auto" is cuda where there is one, else cpu.

        Raises SaeError (one line, what to try) for a name that is unknown, out of reach, incomplete or damaged.
        """
        name = os.fspath(name)
        if dtype not in _DTYPES:
            raise SaeError(f"harvest.dtype = {dtype}: the forward pass runs in {' or '.join(_DTYPES)}")
        where = devices.resolve_device(device)
        if name.startswith(RANDOM):
            if revision is not None:
                raise SaeError(f"revision = {revision}: {name} has no revisions")
            from sae.pipeline.language_model.loading import load_random

            return cls(load_random(name.removeprefix(RANDOM), _DTYPES[dtype]), where)
        files = find_model(name, revision=revision, offline=offline)  # first: a wrong name is said at once
        from sae.pipeline.language_model.loading import load

        return cls(load(files, _DTYPES[dtype]), where)

    def recipe(self) -> dict[str, str | None]:
        """Return what decides the activations: the weights (by the hub's commit or by digest), their processing,
        precision.

        The attention kernel and the device are left out: they change values by rounding only.
        """
        return {
            "model": self.name,
            "revision": self._loaded.revision,
            "weights": self._digest,
            "processing": "none",
            "dtype": str(self._bridge.dtype).removeprefix("torch."),
        }

    @property
    def revision(self) -> str | None:
        """The commit of a hub's model; None for others."""
        return self._loaded.revision

    def width(self, point: Point) -> int:
        """Width of the activations at a point. Raises SaeError where the model has no such point."""
        self.check(point)
        return self._bridge.sites(point.layer)[point.site]

    def hook(self, point: Point) -> str:
        """Return transformer_lens' name of a point: `blocks.6.hook_mlp_out`."""
        return hook_name(*point)

    def check(self, point: Point) -> None:
        """Raise SaeError, listing what exists, unless the model has this point."""
        if point.site not in SITES:
            raise SaeError(f"site = {point.site}: the sites are {', '.join(SITES)}")
        if not 0 <= point.layer < self.n_layers:
            raise SaeError(f"layer = {point.layer}: {self.name} has layers 0 to {self.n_layers - 1}")
        there = self._bridge.sites(point.layer)
        if point.site not in there:
            raise SaeError(
                f"site = {point.site}: tried out, nothing in layer {point.layer} of {self.name} is "
                f"{SITES[point.site]}; it has {', '.join(there) or 'no site that is what its name says'}"
            )

    @contextmanager
    def intervene(self, changes: Intervention) -> Iterator[None]:
        """Within this context every pass sends the activations at each point through the function given for it.

        A function gets [B, T, width] in the model's precision, and returns what goes on in their place, or None where
        it only looks; an identity changes nothing, to the last bit. It is called in each pass that reaches its point,
        in the order in which the model computes the points. Contexts nest: at a point of both the inner one is given
        what the outer one left. Raises SaeError where the model has no such point.
        """
        changes = dict(changes)
        for point in changes:
            self.check(point)
        self._interventions.append(changes)
        try:
            yield
        finally:
            self._interventions = [other for other in self._interventions if other is not changes]

    def activations(self, tokens: Tensor, points: Sequence[Point]) -> dict[Point, Tensor]:
        """One pass, no further than needed: [B, T, width] for each point, in the model's precision, on its device.

        `tokens` int [B, T], on any device. `attn_z` comes flattened to [B, T, heads * d_head].
        """
        for point in points:
            self.check(point)
        wanted = {point: self._bridge.point(*point) for point in points}
        return self._bridge.capture(self._ids(tokens), wanted, self._hooks())

    def mlp(self, layer: int) -> Callable[[Tensor], Tensor]:
        """Return a layer's MLP as a function of rows: what reads `mlp_in` [n, width] and gives `mlp_out`, with a graph.

        In the model's precision. Raises SaeError where the model has no such sites.
        """
        for site in ("mlp_in", "mlp_out"):
            self.check(Point(layer, site))
        return lambda rows: self._bridge.at("mlp_out", layer, ("mlp_in", rows))

    def predictions(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Logits float32 [T - first, n_vocab] after each of the tokens [T] of a context, from position `first` on."""
        return self._bridge.logits(self._bridge.final(self._ids(tokens[None]), self._hooks())[0, first:])

    def continued(self, tokens: Tensor, before: Any = None) -> tuple[Tensor, Any]:
        """Logits float32 [n_vocab] after the last of some tokens [T], and what the model keeps of all tokens so far.

        before: what it kept of those before them, which is used up. Interventions see the tokens [1, T] alone.
        """
        logits, kept = self._bridge.continued(self._ids(tokens[None]), before, self._hooks())
        return logits[0], kept

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of tokens[:, 1:], nats, float32 [B, T-1]."""
        return self.compare(tokens, {}).clean

    @torch.no_grad()
    def compare(self, tokens: Tensor, interventions: Mapping[str, Intervention]) -> Comparison:
        """Losses of a batch, clean (that is, as the open contexts of `intervene` have it) and with each intervention.

        Layers before an intervention's points run once, and logits are held for a few rows at a time: memory does not
        grow with [B, T, n_vocab].
        """
        from sae.pipeline.language_model.bridge import Hooked

        ids = self._ids(tokens)
        around = [point for changes in self._interventions for point in changes]
        for point in [*around, *(point for changes in interventions.values() for point in changes)]:
            self.check(point)
        first = {
            name: min((point.layer for point in [*around, *changes]), default=0)
            for name, changes in interventions.items()
        }
        entries = {layer: self._bridge.point(layer, "resid_pre") for layer in {*first.values()}}
        starts: dict[int, Tensor] = {}

        # copies, so that a function which writes into its argument spoils its own pass only
        def keep(layer: int, value: Tensor) -> None:
            starts[layer] = value.clone()

        enters = [Hooked(at, partial(keep, layer)) for layer, at in entries.items()]
        clean = self._bridge.final(ids, [*enters, *self._hooks()])
        finals = {}
        for name, changes in interventions.items():
            resumed = Hooked(entries[first[name]], partial(lambda layer, _: starts[layer].clone(), first[name]))
            with self._bridge.blocks_skipped(first[name]), self.intervene(changes):
                finals[name] = self._bridge.final(ids, [resumed, *self._hooks()])
        return self._compare(ids, clean, finals)

    @property
    def matrices(self) -> dict[str, Matrix]:
        """The weight matrices that a pass multiplies by, by the names that they have in the Hugging Face model."""
        return self._bridge.matrices

    def logits(self, tokens: Tensor, products: Mapping[str, Product] = MappingProxyType({})) -> Tensor:
        """float32 [B, T, n_vocab], as the open contexts of `intervene` have them, with other products in the place of
        some matrices'. What is put there keeps its graph.
        """
        return self._bridge.multiplied(self._ids(tokens), products, self._hooks())

    @cached_property
    def _digest(self) -> str | None:
        return self._loaded.weights() if self._loaded.weights is not None else None

    def _ids(self, tokens: Tensor) -> Tensor:
        """Token ids on the model's device. Raises SaeError where the model cannot read them."""
        assert tokens.ndim == 2 and not tokens.is_floating_point(), (tokens.shape, tokens.dtype)
        if tokens.shape[1] > self.context_length:
            raise SaeError(
                f"context = {tokens.shape[1]}: {self.name} reads at most {self.context_length} tokens; "
                "tokenize again with a smaller `context`"
            )
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= self.n_vocab:  # on a GPU the look-up would take the whole process down
            raise SaeError(
                f"token {low if low < 0 else high}: {self.name} knows tokens 0 to {self.n_vocab - 1}; "
                "tokenize with the model's own tokenizer (`tokenizer`)"
            )
        return moved(tokens.long(), self.device)

    def _hooks(self) -> list[Hooked]:
        """The interventions of every context that is open, as hooks; the outermost first."""
        return [
            self._bridge.replacing(*point, partial(changed, change, point=point))
            for changes in self._interventions
            for point, change in changes.items()
        ]

    def _compare(self, ids: Tensor, clean: Tensor, finals: Mapping[str, Tensor]) -> Comparison:
        """Cross-entropies and divergences from what the unembedding reads, a few rows of logits at a time."""
        shape, targets = ids[:, 1:].shape, ids[:, 1:].flatten()
        clean = clean[:, :-1].flatten(0, 1)
        rows = {name: final[:, :-1].flatten(0, 1) for name, final in finals.items()}
        ce = torch.empty(len(targets), device=self.device)
        spliced = {name: Spliced(torch.empty_like(ce), torch.empty_like(ce)) for name in rows}
        step = max(1, _LOGITS_AT_ONCE.get(self.device.type, _LOGITS_AT_ONCE["cpu"]) // self.n_vocab)
        for part in (slice(at, at + step) for at in range(0, len(targets), step)):
            logits = self._bridge.logits(clean[part])
            log_z = logits.logsumexp(1)
            ce[part] = log_z - logits.gather(1, targets[part, None])[:, 0]
            chances = logits.softmax(1) if rows else logits
            for name, final in rows.items():
                changed = self._bridge.logits(final[part])
                changed_log_z = changed.logsumexp(1)
                spliced[name].ce[part] = changed_log_z - changed.gather(1, targets[part, None])[:, 0]
                # sum p (log p - log q), arranged so that equal logits give exactly 0
                differences = torch.sub(logits, changed, out=changed)
                spliced[name].kl[part] = torch.linalg.vecdot(chances, differences) + (changed_log_z - log_z)
        return Comparison(
            ce.view(shape), {name: Spliced(both.ce.view(shape), both.kl.view(shape)) for name, both in spliced.items()}
        )
