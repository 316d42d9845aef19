"""A table of tokens, made and read without any language model: what a latent does on each token, on average.

It is what an explanation in words has to beat. A token foretells what the latent did on it in the examples, whatever
stands before it; tokens that were not among them, or mean little, foretell nothing.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import compress
from typing import Any

from sae.pipeline.explain.backend import AnyBackend, Explanation, Surroundings
from sae.pipeline.explain.config import ExplainConfig
from sae.pipeline.explain.corpus import Window
from sae.pipeline.explain.questions import SCALE, Question

MOST = 10  # tokens in a table
LEAST = 0.05  # of the largest mean: what is less foretells nothing
FIRES = 1 / 3  # of the largest mean: a token with more says that the latent fires


class Backend(AnyBackend):
    """The tokens with the largest mean activation, each on a scale where the largest activation is 10."""

    def __init__(self, config: ExplainConfig, around: Surroundings) -> None: ...

    def explain(self, examples: Sequence[Window]) -> Explanation:
        on: dict[int, list[float]] = defaultdict(list)
        texts: dict[int, str] = {}
        for window in examples:
            for token, text, value in zip(window.tokens, window.texts, window.activations, strict=True):
                on[token].append(value)
                # the shortest: where a character is split, a text may have parts of other tokens
                texts[token] = min(filter(None, (texts.get(token), text)), key=len, default="")
        largest = max((max(values) for values in on.values()), default=0.0) or 1.0
        means = {token: SCALE * (sum(values) / len(values)) / largest for token, values in on.items()}
        top = max(means.values(), default=0.0)
        ranked = sorted((token for token in means if means[token] > LEAST * top), key=lambda one: (-means[one], one))
        table = {token: means[token] for token in ranked[:MOST]}
        said = [f"{repr(texts[one]) if texts[one] else f'token {one}'} {mean:.3g}" for one, mean in table.items()]
        return Explanation(f"fires on {', '.join(said) or 'no token in particular'}", table)

    def answer(self, explanation: Explanation, question: Question) -> list[int]:
        top = max(explanation.table.values(), default=1.0)
        table = {token: mean / top for token, mean in explanation.table.items()}
        each = [[table.get(token, 0.0) for token in window.tokens] for window in question.windows]
        if question.scoring == "simulation":
            return [round(SCALE * value) for value in each[0]]
        if question.scoring == "detection":
            return [int(max(values) >= FIRES) for values in each]
        marked = [list(compress(*both)) for both in zip(each, question.marks, strict=True)]
        return [int(2 * sum(value >= FIRES for value in values) >= len(values)) for values in marked]

    def about(self) -> dict[str, Any]:
        return {"model": None}
