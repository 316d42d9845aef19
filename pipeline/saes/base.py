"""Training of every dictionary: its loss and one training step's worth of methods. Its computation is in `dictionary`.

An architecture is one file in this package: its Config (frozen, tagged by `arch`) and its final class, under @register.
Importing the package imports every file in it, so a new architecture is found by being there. A class fills in `rule`
(which latents are active at inference, from the pre-activations), and `_activate` where training chooses otherwise
(`_reconstruct`, too, where it decodes other values than those that count as active), and `_asked` where nobody knows
how many are active and its loss takes no more of them than sums. It may add parameters (`_build`, and then
`latent_parameters`, `parameter_groups` and `_reset`), loss terms (`_terms`), what follows a step (`_update`), and what
a file says of it (`_written`, `_take`). Everything else is implemented once, and not overridden.

A training step, for a batch x [B, d_in] (and target y [B, d_out] for a transcoder):

    losses = sae.loss(x, y, Clock(step, steps, B))   # named terms; losses.total is their sum
    losses.total.backward()
    sae.before_step()                             # unit decoder: drop the gradient along each row
    optimizer.step()
    sae.after_step()                              # unit decoder: rows back to norm 1
    sae.track(sae.observe(losses))                # dead counters, firing rates, thresholds

A batch may be computed in parts, one after the other or on several processes: the first two lines come once a part, and
`track` is told of all parts at once. `loss` changes no state, so judging held-out rows is the same call. `train()` and
`eval()` matter only to architectures whose choice of latents depends on the batch.

Randomness: whatever training draws comes from a generator seeded by the dictionary's seed, the step and the purpose
(`Trainable.generator`). There is no random state to save, and a dictionary draws the same whatever trains beside it.

Units: with input_scale "rms" ("unit") a dictionary lives where E||x||^2 = d (1). `fold` leaves the space, and then the
latents too are in the data's units (f / c for a scale c) while W_dec is untouched, so unit rows are unit in the saved
file. This is folding c into W_enc, W_dec and b_dec and then moving the decoder's row norms into the encoder; it is
exact because the activations are positively homogeneous once everything measured in units of a latent (`latent_units`)
is scaled along. With "per_token" each row is standardised, and its reconstruction put back. Stores whose rows lie side
by side have a scale each: then W_dec is divided by the scales instead, and latents stay as they are.

Reduction: the squared error is summed over features and averaged over the batch (`sum_d`) unless the Config says
otherwise. A term whose weight is a share (AuxK, ghost gradients, alignment, a target of L0) is measured by what the
squared error itself is, or would be without a dictionary, so that its weight means the same at every reduction, scale
and width. Penalties on activations are not: their coefficients are weights beside the error as it is reduced.

Free rows: with decoder_norm "free" a latent counts by its value times the norm g of its decoder row. What acts is
g W_enc, g b_enc and W_dec / g (`weights`), which is the same function for a ReLU, and for a choice among latents one
that no stretching of rows can change. Of several stores g is the sum of the norms that a row's parts have, so that a
penalty on a latent's value is one on the sum of its decoders' norms.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae.pipeline.declared.importing import enter

from . import counting, initial, sparse, uncounted
from .config import FINISHED, Clock, Config
from .contract import ParameterGroup, Trainable
from .dictionary import Dictionary, Weights
from .encoder import Preactivations
from .ghosts import ghost_loss
from .inference import Formula
from .latents import Latents, RowScaling, RowStats
from .losses import Losses, LossInputs, Observed, SparseLosses
from .over_stores import OverStores
from .uncounted import Asked, Uncounted
from .widths import Width, norms_by_store

RATE_MEMORY = 0.01
"""Weight of the newest batch in a latent's firing rate: about the last hundred batches count."""


class Chosen(NamedTuple):
    """What an encoder made of a batch: x as it was read, pre-activations, active latents, and the weights that act."""

    x: Tensor
    pre: Preactivations
    latents: Latents
    weights: Weights


class SAE(Dictionary, OverStores):
    """A dictionary that can be trained: its loss, and what goes with a step. Given d_out, it is a transcoder.

    Float32 and on the CPU when made; `.to()` moves it. The same config, widths and seed give the same weights.
    """

    config_type: ClassVar[type[Config]]
    config: Config
    stacks: ClassVar[bool] = False
    """Whether what it does of its own (`_activate`, `_terms`) is written for a stack of them, too (`stacks`)."""
    configs: tuple[Config, ...]
    """The settings of each dictionary of a stack; of one that is none, its own."""
    latent_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters and buffers measured in units of a latent's activation, which `fold` scales along."""

    rows_since_fired: Tensor
    firing_rate: Tensor
    none_dead_before = 0  # the step from which on a latent can be dead, as far as that is known
    _few_active = False  # whether so few latents were active, when that was looked at, that entries are cheaper

    def __init__(self, config: Config, d_in: Width, d_out: Width | None = None, *, seed: int = 0) -> None:
        OverStores.__init__(self, config, d_in, d_out, seed)
        self.d_sae, self.configs, self._acts = config.d_sae, (config,), False
        several = [len(each) > 1 for each in self._widths]
        generator = torch.Generator().manual_seed(seed)
        table = initial.rows(config.init, self.d_sae, self.d_out, generator)
        unit = config.decoder_norm == "unit"
        self.W_dec = nn.Parameter(F.normalize(table, dim=1) if unit else table)
        # a transcoder's input and output spaces are unrelated, even where their widths agree
        tied = self.W_dec.detach()
        encoder = initial.rows(config.init, self.d_sae, self.d_in, generator) if self.is_transcoder else tied
        self.W_enc_rows = nn.Parameter(encoder * config.encoder_scale)
        self._bias("b_enc", self.d_sae, learned=config.encoder_bias)
        self._bias("b_dec", self.d_out, learned=config.b_dec_init != "none")
        self.register_buffer("rows_since_fired", torch.zeros(self.d_sae, dtype=torch.int64))
        self.register_buffer("firing_rate", torch.zeros(self.d_sae))
        self.register_buffer("scale", torch.ones(self.d_in if several[0] else ()))
        self.register_buffer("target_scale", torch.ones(self.d_out if several[1] else ()))
        self.register_parameter("W_skip", nn.Parameter(torch.zeros(self.d_in, self.d_out)) if config.skip else None)
        self._build(generator)

    # What an architecture may fill in

    def _build(self, generator: torch.Generator) -> None:
        """Register further parameters and buffers."""

    def _written(self) -> Formula:
        """The formula of a folded dictionary."""
        several = (each if len(each) > 1 else () for each in self._widths)
        return Formula(
            self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.rule, self.b_dec_applied_to_input, self.row_scaling,
            self.is_transcoder, self.W_skip, *several,
        )  # fmt: skip

    def _take(self, formula: Formula) -> None:
        """Take what `_written` said of the rule: by default its tensors, each the parameter or buffer of its name."""
        for name, value in formula.rule.values().items():
            if isinstance(value, Tensor):
                getattr(self, name).copy_(value)

    def _asked(self, pre: Preactivations, weights: Weights, clock: Clock) -> Asked | None:
        """What `_terms` takes of latents that `_activate` gives, in sums (`Uncounted`); None where it takes more."""
        return None

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        """Loss terms beside the reconstruction, coefficients included."""
        return {}

    def _observe(self, losses: SparseLosses) -> Tensor:
        """Per-micro-batch statistics for `_update`: a float vector of fixed length; NaN marks a missing value."""
        return self.W_dec.new_empty(0)

    def _update(self, seen: Tensor, clock: Clock) -> None:
        """Update running statistics, given the mean over the parts of what `_observe` returned."""

    def _reset(self, which: Tensor) -> None:
        """Parameters of some latents (int64 [c]) beside their weights back to where they start."""
        self.b_enc[which] = 0

    # What it is

    @property
    def b_dec_applied_to_input(self) -> bool:
        return self.config.pre_encoder_bias and not self.is_transcoder

    @property
    def row_scaling(self) -> RowScaling:
        return "standard" if self.config.input_scale == "per_token" else "none"

    @torch.no_grad()
    def fold(self) -> Self:
        """A copy that takes and gives the data's units with scale 1: the same function, latents divided by c."""
        folded = copy.deepcopy(self)
        for name, value in self.weights()._asdict().items():
            getattr(folded, name).copy_(value)
        latents = self.target_scale
        if latents.dim():  # a number for each column, so that no number of a latent takes it up
            latents = torch.ones_like(latents[0])
            folded.W_dec.div_(self.target_scale)
        folded.W_enc_rows.mul_(self.scale / latents)
        folded.b_dec.div_(self.target_scale)
        for name in self.latent_units:
            getattr(folded, name).div_(latents)
        if folded.W_skip is not None:
            folded.W_skip.mul_(self.scale.view(-1, 1) / self.target_scale)
        folded.scale.fill_(1)
        folded.target_scale.fill_(1)
        folded._acts = True
        return folded

    @torch.no_grad()
    def formula(self) -> Formula:
        return self.fold().requires_grad_(False)._written()

    @classmethod
    @torch.no_grad()
    def from_formula(cls, config: Config, formula: Formula) -> Self:
        """The dictionary that `formula` wrote down: a folded one. ValueError where it is not one of these settings."""
        if formula.d_sae != config.d_sae:
            raise ValueError(f"d_sae: {config.d_sae} in the config, but W_dec has {formula.d_sae} rows")
        reads, writes = formula.widths_in or formula.d_in, formula.widths_out or formula.d_out
        sae = cls(config, reads, writes if formula.transcoder else None)
        sae._acts = True
        own, given = (_numbers(one) for one in (sae._written(), formula))
        if own != given:
            raise ValueError(f"a {cls.__name__} of these settings is {own}, not {given}")
        sae.W_enc_rows.copy_(formula.W_enc.T)
        for name in ("b_enc", "W_dec", "b_dec"):
            getattr(sae, name).copy_(getattr(formula, name))
        if sae.W_skip is not None and formula.W_skip is not None:
            sae.W_skip.copy_(formula.W_skip)
        sae._take(formula)
        return sae

    # Training

    @torch.no_grad()
    def initialise(self, sample: Tensor, targets: Tensor | None = None) -> None:
        """Set the scale and b_dec from a sample of rows [n, d_in], and of targets [n, d_out] for a transcoder.

        Rows in the tens of thousands do; ValueError if they are all zero or not finite.
        """
        outputs = self._targets(sample, targets)
        if self.config.input_scale == "per_token" and not self.is_transcoder:
            outputs = RowStats.of(outputs).normalise(outputs)
        elif self.config.input_scale != "none":
            unit = self.config.input_scale == "unit"
            self.target_scale.copy_(initial.store_scales(outputs, self.widths_out, unit=unit))
            if self.config.input_scale != "per_token":
                self.scale.copy_(initial.store_scales(sample, self.widths_in, unit=unit))
        self._initialise_bias(outputs * self.target_scale)

    def loss(self, x: Tensor, target: Tensor | None = None, clock: Clock = FINISHED) -> SparseLosses:
        """The loss of a batch x [B, d_in], its target being x itself unless this is a transcoder.

        ValueError for a batch without rows, over which there is no mean.
        """
        self.expect_rows(x)
        y = self._targets(x, target)
        read = self.chosen(x, clock)
        y = y * self.target_scale if self.is_transcoder else read.x
        y_hat, squares = self._compared(read.latents, read.weights, y)
        error = self.reduced(squares, y)
        terms = {"reconstruction": error} | self.terms(read, y, y_hat, error, clock)
        return SparseLosses(terms, clock, read.latents, y_hat, self.target_scale, y)

    def _compared(self, active: Latents, weights: Weights, y: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction y_hat [B, d_out] of latents, and the sum of its squared errors."""
        plain = type(active) is Latents  # others are decoded in a way of their own
        if plain and active.entries is not None and sparse.comparable(weights.W_dec, y):
            past = self._past_latents(active)
            return sparse.compare(active.values, active.entries, weights.W_dec, past, y)
        y_hat = self._reconstruct(active, weights)
        if y.dim() == 2:
            return y_hat, F.mse_loss(y_hat, y, reduction="sum")
        return y_hat, F.mse_loss(y_hat, y, reduction="none").sum((-2, -1))  # of each of a stack

    def chosen(self, x: Tensor, clock: Clock) -> Chosen:
        """What the encoder makes of a batch [B, d_in] at a step of training."""
        scaled, row_stats = self._scaled(x)
        weights = self.weights()
        pre = self._preactivations(scaled, weights)
        return Chosen(scaled, pre, self._beside(self._latents(pre, weights, clock), x, row_stats), weights)

    def _latents(self, pre: Preactivations, weights: Weights, clock: Clock) -> Latents:
        """The active latents, or what the loss takes of them where that is cheaper."""
        if self._few_active and uncounted.usable(pre, weights.W_dec):
            asked = self._asked(pre, weights, clock)
            if asked is not None:
                return Uncounted.of(pre, weights.W_dec, asked, partial(self._activate, pre, clock))
        return self._activate(pre, clock)

    def terms(self, read: Chosen, y: Tensor, y_hat: Tensor, error: Tensor, clock: Clock) -> dict[str, Tensor]:
        """The loss terms beside an error, that of y and y_hat [B, d_out] in the space the loss is taken in."""
        terms = self._terms(LossInputs(read.x, y, read.pre, read.latents, y_hat, read.weights.W_dec, clock))
        if self.config.ghost_grads:
            ghosts = ghost_loss(read.pre, self.dead(clock), y, y_hat, read.weights.W_dec)
            terms = terms | {"ghosts": ghosts * error.detach()}
        return terms

    def weights(self) -> Weights:
        own = super().weights()
        if self.config.decoder_norm != "free" or self._acts:  # folded ones were written down as they act
            return own
        norms = norms_by_store(self.W_dec, self.widths_out).sum(1, keepdim=True)
        return Weights(own.W_enc_rows * norms, own.b_enc * norms.view(-1), own.W_dec / norms)

    @torch.no_grad()
    def observe(self, losses: Losses) -> Observed:
        """Return the statistics of a part of a training batch that `track` needs."""
        assert isinstance(losses, SparseLosses), "those of `loss`"
        active = losses.latents
        if isinstance(active, Uncounted):
            active.close()
        fired = active.fired().view_as(self.rows_since_fired)
        return Observed(losses.clock, losses.rows, fired, self._observe(losses))

    @torch.no_grad()
    def track(self, *parts: Observed) -> None:
        """After a training batch, of which these are all parts: who fired and how often, and what `_update` follows."""
        clock = parts[0].clock
        alone = parts[0] if len(parts) == 1 else None
        rows, fired = sum(part.rows for part in parts), alone.fired if alone else _stacked(parts, "fired").sum(0)
        newest = max(1 / (clock.step + 1), RATE_MEMORY)
        counting.follow_(self.rows_since_fired, self.firing_rate, fired, rows, newest)
        self._update(alone.numbers if alone else _stacked(parts, "numbers").nanmean(0), clock)

    def dead(self, clock: Clock) -> Tensor:
        """bool [d_sae]: latents that have not fired for `dead_after` rows of training."""
        return self.rows_since_fired >= clock.rows(self.config.dead_after)

    def look_ahead(self, clock: Clock) -> None:
        left = clock.rows(self.config.dead_after) - int(self.rows_since_fired.max())
        self.none_dead_before = clock.step + 1 + (-(-left // clock.batch) if clock.batch else 0)
        self._few_active = 0 < float(self.firing_rate.mean()) <= uncounted.FEW

    def none_dead(self, clock: Clock) -> bool:
        """Return True if it is known, without waiting, that no latent is dead at a step (`look_ahead`)."""
        return clock.step < self.none_dead_before

    @torch.no_grad()
    def directions(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return a latent's directions for each row: unit [B, d_in] and [B, d_out], and the row's squared error [B]."""
        losses = self.loss(x, target)
        outputs = self._targets(x, target)
        scaled, row_stats = self._scaled(x)
        y = outputs * self.target_scale if row_stats is None or self.is_transcoder else row_stats.normalise(outputs)
        bypass = losses.latents.bypass
        towards = F.normalize(y - self.b_dec if bypass is None else y - self.b_dec - bypass, dim=1)
        inputs = F.normalize(scaled, dim=1) if self.is_transcoder else towards
        return inputs, towards, (y - losses.reconstruction).square().sum(1)

    def latent_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters [d_sae, ...] that hold a row or a number for each latent, by name.

        An architecture adds its own. A latent that starts again loses what the optimiser remembers of its part of them.
        """
        return self._learned("W_enc_rows", "b_enc", "W_dec")

    def parameter_groups(self) -> list[ParameterGroup]:
        kept = self._learned("W_dec") if self.config.decoder_norm == "unit" else {}
        decoder = self._learned("W_dec", "b_dec")
        encoder = [parameter for name, parameter in self.named_parameters() if name not in decoder]
        free = [parameter for name, parameter in decoder.items() if name not in kept]
        groups = [
            ParameterGroup(encoder),
            ParameterGroup([*kept.values()], "decoder", kept="unit"),
            ParameterGroup(free, "decoder"),
        ]
        return [group for group in groups if group.parameters]

    def _learned(self, *names: str) -> dict[str, nn.Parameter]:
        """Those of these tensors that are parameters; a bias that is not learned is a buffer."""
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if isinstance(value, nn.Parameter)}

    @torch.no_grad()
    def restart(self, which: Tensor, encoder_rows: Tensor, decoder_rows: Tensor) -> None:
        """Latents `which` (int64 [c]) start again from rows [c, d_in] and [c, d_out]; they count as alive."""
        self.W_enc_rows[which], self.W_dec[which] = encoder_rows, decoder_rows
        self._reset(which)
        self.rows_since_fired[which] = 0


def _stacked(parts: Sequence[Observed], name: str) -> Tensor:
    return torch.stack([getattr(part, name) for part in parts])


def _numbers(formula: Formula) -> dict[str, object]:
    """Return the numbers of a formula that are no tensors."""
    own = {name: value for name, value in formula.rule.values().items() if not isinstance(value, Tensor)}
    skips = {"skip": True} if formula.W_skip is not None else {}
    return {"rule": formula.rule.name, **own, "centred": formula.centred, "row_scaling": formula.row_scaling, **skips}


ARCHITECTURES: dict[str, type[Trainable]] = {}
"""Every registered class by its Config's tag."""

S = TypeVar("S", bound=type[Trainable])


def register(architecture: S) -> S:
    """Class decorator: make the architecture known under the default of its Config's `arch`, nobody else's."""
    tag = architecture.config_type.model_fields["arch"].default
    assert isinstance(tag, str), f"the tag {tag!r} is no text"
    enter(ARCHITECTURES, "architecture", tag, architecture)
    return architecture
