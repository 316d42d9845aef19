"""Latents are explained, and questions about them answered, several at a time as far as a backend can."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from sae.pipeline.explain.backend import AnyBackend, Explanation, Job, Unusable
from sae.pipeline.runtime.progress import Progress

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass
class Work:
    """Explanations and answers, as far as they are there, and what went wrong.

    explained: by latent. answers: by latent, number of the question, and the latent whose explanation it was answered
    by. errors: what could not be used, in words, by latent.
    """

    backend: AnyBackend
    jobs: Sequence[Job]
    progress: Progress
    explained: dict[int, Explanation] = field(default_factory=dict)
    answers: dict[tuple[int, int, int | None], list[int]] = field(default_factory=dict)
    errors: dict[int, list[str]] = field(default_factory=dict)

    def explain(self) -> None:
        """Have every latent explained."""
        found = self._each("explain", [job.examples for job in self.jobs], self.backend.explain)
        for job, one in zip(self.jobs, found, strict=True):
            if isinstance(one, Unusable):
                self._fault(job.latent, f"explanation: {one}")
            else:
                self.explained[job.latent] = one

    def judge(self) -> None:
        """Have every question answered by the latent's own explanation and by its control's."""
        asked = [
            (job, i, of)
            for job in self.jobs
            if job.latent in self.explained
            for i in range(len(job.questions))
            for of in (job.latent, job.control)
            if of is not None and of in self.explained
        ]

        def answered(one: tuple[Job, int, int]) -> list[int]:
            job, i, of = one
            return self.backend.answer(self.explained[of], job.questions[i])

        found = self._each("judge", asked, answered)
        for (job, i, of), one in zip(asked, found, strict=True):
            if isinstance(one, Unusable):
                whose = "" if of == job.latent else " of the control"
                self._fault(job.latent, f"{job.questions[i].scoring}{whose}: {one}")
            else:
                self.answers[job.latent, i, of] = one

    @property
    def failed(self) -> int:
        """How many explanations and answers could not be used."""
        return sum(map(len, self.errors.values()))

    def _fault(self, latent: int, says: str) -> None:
        self.errors.setdefault(latent, []).append(says)

    def _each(self, title: str, given: Sequence[Given], call: Callable[[Given], Made]) -> list[Made | Unusable]:
        """The results of calls in the order of what they are given."""

        def one(what: Given) -> Made | Unusable:
            try:
                return call(what)
            except Unusable as error:
                return error

        self.progress.start(title, len(given), "calls")
        try:
            results = []
            for result in _mapped(one, given, self.backend):
                results.append(result)
                self.progress.advance(1)
            return results
        finally:
            self.progress.finish()


def _mapped(call: Callable[[Given], Made], given: Sequence[Given], backend: AnyBackend) -> Iterator[Made]:
    """Calls in threads, where the backend can do several at once.

    Where one fails, those not begun are left out, and those under way end: they are paid for, and kept.
    """
    if backend.concurrency == 1:
        yield from map(call, given)
        return
    pool = ThreadPoolExecutor(backend.concurrency)
    try:
        yield from pool.map(call, given)
    except KeyboardInterrupt:
        backend.close()  # nobody waits for a server any more
        raise
    finally:
        pool.shutdown(cancel_futures=True)
