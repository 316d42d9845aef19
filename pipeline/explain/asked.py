"""A backend that asks a language model, whichever it is."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from sae.pipeline.explain.answers import Answer, Answers, Estimate, Key
from sae.pipeline.explain.backend import AnyBackend, Explanation, Job, Surroundings, Unusable
from sae.pipeline.explain.config import ExplainConfig
from sae.pipeline.explain.corpus import Window
from sae.pipeline.explain.prompts import Request, asking, explaining
from sae.pipeline.explain.questions import Question

UNKNOWN = "what is not known yet, in a sentence of about a hundred letters, which is as long as they usually are"


class Asked(AnyBackend):
    """Puts everything into requests. What sends them says who is asked, and how."""

    def __init__(self, config: ExplainConfig, around: Surroundings) -> None:
        self.config, self.around = config, around
        self.answers = Answers(around.answers, config, around.progress.note)

    @abstractmethod
    def send(self, request: Request) -> Answer:
        """The answer to a request. Raises Unusable where there is none to this one, SaeError where there is none at
        all.
        """

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that decides an answer beside the request."""

    def explain(self, examples: Sequence[Window]) -> Explanation:
        found = self._read(explaining(examples))
        assert isinstance(found, str)
        return Explanation(found)

    def answer(self, explanation: Explanation, question: Question) -> list[int]:
        found = self._read(asking(explanation.text, question))
        assert isinstance(found, list)
        return found

    def about(self) -> dict[str, Any]:
        spent = self.answers.spent
        return {
            "model": self.config.model, "sent": spent.requests, "known": spent.known,
            "asked_tokens": spent.asked_tokens, "answered_tokens": spent.answered_tokens,
            "cost": self.config.cost(spent.asked_tokens, spent.answered_tokens),
        }  # fmt: skip

    def estimate(self, jobs: Sequence[Job]) -> Estimate:
        """What is still to be asked; explanations that are not there yet count as of usual length."""
        found = Estimate()
        texts: dict[int | None, str] = {}
        for job in jobs:
            texts[job.latent] = self._estimated(found, explaining(job.examples))
        for job in jobs:
            for of in (job.latent, job.control):
                for question in job.questions if of is not None else ():
                    self._estimated(found, asking(texts[of], question))
        return found

    def _estimated(self, total: Estimate, request: Request) -> str:
        """Count a request, and return the explanation it was answered with, or one that stands for it."""
        answer = self.answers.known(self._key(request))
        if answer is None:
            total.requests += 1
            total.asked_tokens += request.expected_tokens
            total.answered_tokens += request.form.expected_tokens
            return UNKNOWN
        total.known += 1
        try:
            found = request.form.read(answer.text)
        except Unusable:
            return UNKNOWN
        return found if isinstance(found, str) else UNKNOWN

    def _read(self, request: Request) -> list[int] | str:
        answer = self.answers.get(self._key(request), lambda: self.send(request))
        if not answer.ended:
            most = self.config.answer_tokens
            raise Unusable(f"the answer was cut off after {most:,} tokens; allow more by explain.answer_tokens")
        return request.form.read(answer.text)

    def _key(self, request: Request) -> Key:
        form = request.form
        return {
            **self.identity, "system": request.system, "user": request.user, "form": [form.numbers, form.largest]
        }  # fmt: skip
