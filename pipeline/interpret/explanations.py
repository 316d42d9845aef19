"""Records (`eval/explanations.json`) of what latents were explained with, and of how much that foretells.

`sae explain` writes them, pages show them. Explanations are words of a language model that read strangers' text: they
are data, to be escaped wherever they are shown.
"""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import ValidationError

from sae.cache.errors import DamagedStore
from sae.cache.runs import EXPLANATIONS, Run
from sae.pipeline.interpret.examples import Record


class Judged(Record):
    """How an explanation did in one way of judging.

    score: balanced accuracy, or the correlation of a simulation; control: the same of another latent's explanation on
    the same questions; chance: what answers that know nothing score. accuracy: the share of right answers. asked: how
    many questions there were; answered, control_answered: to how many the answers were usable.
    """

    scoring: Literal["detection", "fuzzing", "simulation"]
    score: float | None
    control: float | None
    chance: float
    balanced_accuracy: float | None
    control_balanced_accuracy: float | None
    accuracy: float | None
    asked: int
    answered: int
    control_answered: int


class Explained(Record):
    """A latent in words. None where there is no explanation, or no score of it; `errors` say why.

    score, control: those of the first of `scores`. control_feature: whose explanation the control is. density: the
    share of rows on which the latent fires. backend, model: who explained and judged.
    """

    feature: int
    explanation: str | None
    score: float | None
    control: float | None
    scores: list[Judged]
    control_feature: int | None
    density: float
    backend: str
    model: str | None
    errors: list[str]


class Explanations(Record):
    """The explanations of a run: one a latent. made: how the last of them were, by the settings and what they cost."""

    features: list[Explained]
    made: dict[str, Any]


def explanations(run: Run) -> Explanations | None:
    """Return the explanations that a run folder keeps; None where there are none. Raises DamagedStore for others."""
    if not (run.path / EXPLANATIONS).exists():
        return None
    try:
        return Explanations.model_validate(run.read_json(EXPLANATIONS))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedStore(
            f"{run.path / EXPLANATIONS}: is not what was written ({where}: {first['msg']}); remove it, explain again"
        ) from error


def joined(new: Explanations, old: Explanations | None) -> Explanations:
    """The new explanations, and the old ones of other latents, in the order of latents."""
    every: Iterable[Explained] = [*(old.features if old else []), *new.features]
    latest = {one.feature: one for one in every}
    return Explanations(features=[latest[latent] for latent in sorted(latest)], made=new.made)
