"""The passes of a language model over held-out tokens: clean once, with zeros and the mean once a site, and once with
each dictionary's reconstruction in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae.cache.device import landing
from sae.cache.errors import SaeError
from sae.cache.tokens import TokenStore
from sae.pipeline.evaluate.config import EvalConfig
from sae.pipeline.evaluate.places import TokenPlaces
from sae.pipeline.evaluate.splicing import spliced
from sae.pipeline.evaluate.subjects import Site, Splice, alive, grouped, together
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.language_model.token_mask import TokenMask, rule_of
from sae.pipeline.metrics.metric import Places
from sae.pipeline.runtime.progress import Progress


def judge_tokens(
    splices: Sequence[Splice], model: LanguageModel, tokens: TokenStore, config: EvalConfig, progress: Progress,
    places: TokenPlaces | None = None,
) -> None:  # fmt: skip
    """Show metrics the cross-entropies with the targets' sites replaced by a reconstruction, zero and the mean.

    The reconstruction is of what is read at the inputs' sites (`splicing`). Where a dataset has limits, positions
    above them keep their own activations, and what they predict does not count.
    """
    places = places or TokenPlaces(tokens)
    groups = [_Group(together, rule_of(together[0].site.dataset.inputs[0])) for together in _by_site(splices)]
    length, contexts = tokens.context_length, config.contexts_of(tokens)
    step = max(1, config.batch_tokens // length)
    progress.start("eval cross-entropy", contexts * length, "tokens")
    try:
        for start in range(0, contexts, step):
            if not alive(splices):
                return
            stop = min(start + step, contexts)
            where = Places(*(each[:, :-1] for each in places.of_contexts(start, stop)))
            batch = _Batch.of(tokens, start, stop, where.to(model.device))
            _judge(model, batch, groups)
            progress.advance((stop - start) * length)
    finally:
        progress.finish()
    for one in alive(splices):
        with one.failing():
            if one.sound is not None and not one.sound:
                raise SaeError(
                    f"{one.site.dataset.key}: with its rows' reconstruction or mean cross-entropy is not a number; "
                    "they are too large for the model"
                )
    for group in groups:
        if not group.counted:
            with together(group.splices):
                raise SaeError(f"tokens = {config.tokens}: none of their predictions counts; judge on more")


@dataclass(frozen=True)
class _Batch:
    """Some contexts: ids [B, T], real tokens [B] of each, the begin token, places of the predictions [B, T-1]."""

    ids: np.ndarray
    lengths: np.ndarray
    begin: int
    places: Places

    @classmethod
    def of(cls, tokens: TokenStore, start: int, stop: int, places: Places) -> "_Batch":
        begin = int(tokens.recipe["tokenizer"]["begin"])
        return cls(tokens.contexts(start, stop), tokens.lengths(start, stop), begin, places)

    @property
    def real(self) -> Tensor:
        """bool [B, T-1]: predictions of tokens that are real."""
        return torch.from_numpy(np.arange(1, self.ids.shape[1]) < self.lengths[:, None])


@dataclass(eq=False)
class _Group:
    """All that is spliced in at one site. counted: predictions that counted, on the model's device."""

    splices: Sequence[Splice]
    rule: TokenMask
    counted: Tensor | int = 0

    @property
    def site(self) -> Site:
        return self.splices[0].site


def _by_site(splices: Sequence[Splice]) -> list[list[Splice]]:
    return grouped(splices, lambda one: id(one.site))


def _judge(model: LanguageModel, batch: _Batch, groups: Sequence[_Group]) -> None:
    """Judge a batch at once; where that fails each by itself, so that it is seen which of them it was."""
    living = [group for group in groups if alive(group.splices)]
    each = [one for group in living for one in alive(group.splices)]
    try:
        _pass(model, batch, [(group, alive(group.splices)) for group in living])
    except (SaeError, OSError) as error:
        if len(each) == 1:
            each[0].error = error
            return
        for group in living:
            for one in alive(group.splices):
                with one.failing():
                    _pass(model, batch, [(group, [one])])


def _pass(model: LanguageModel, batch: _Batch, groups: Sequence[tuple[_Group, Sequence[Splice]]]) -> None:
    into = torch.from_numpy(batch.ids)
    plans = []
    for group, splices in groups:
        rows = torch.from_numpy(group.rule.mask(batch.ids, batch.lengths, batch.begin))
        saes = {str(i): one.sae for i, one in enumerate(splices)}
        mean = landing.moved(group.site.mean, model.device)
        plans.append(spliced(saes, model, into, rows, group.site.dataset, mean))
    every = {f"{n} {name}": each for n, plan in enumerate(plans) for name, each in plan.interventions.items()}
    found = model.compare(into, every)
    for n, ((group, splices), plan) in enumerate(zip(groups, plans, strict=True)):
        mask = plan.replaced()[:, :-1] & landing.moved(batch.real, model.device)
        group.counted = group.counted + mask.sum()
        for i, one in enumerate(splices):
            own = {name: found.spliced[f"{n} {of_plan}"] for name, of_plan in plan.of(str(i)).items()}
            sound = torch.stack([each.ce.isfinite().all() for each in own.values()]).all()
            one.sound = sound if one.sound is None else one.sound & sound
            with one.failing():
                for metric in one.metrics:
                    metric.splice(found.clean, own, mask, batch.places)
