"""A causal language model of a folder or of the hub, run here.

It writes the sentence that explains; where an answer is numbers or truths, it is held to the form: the words in between
are put there, and of the values that may stand in a place the one is taken that the model gives more probability, token
by token. So any model answers in the right form, base models too; whether it understands is what the scores say.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sae.cache.disk.parsing import shown
from sae.cache.errors import SaeError
from sae.pipeline import embedded
from sae.pipeline.explain.answers import Answer
from sae.pipeline.explain.asked import Asked
from sae.pipeline.explain.backend import Surroundings, Unusable
from sae.pipeline.explain.config import ExplainConfig
from sae.pipeline.explain.prompts import KEY, WORDS_EXPECTED, Request
from sae.pipeline.language_model.files import find_model
from sae.pipeline.language_model.loading import load
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import said_if_slow
from sae.pipeline.tokenizers.tokenizer import tokenizer


class Backend(Asked):
    """Asks a model in memory, one request after the other."""

    def __init__(self, config: ExplainConfig, around: Surroundings) -> None:
        super().__init__(config, around)
        if config.model is None:
            raise SaeError(
                "backend = local: needs a causal language model; name it, or its Hugging Face folder, with `model`"
            )
        self._files = find_model(config.model, offline=around.offline)
        of_hub = self._files.revision is not None
        named = config.model if config.model == embedded.NAME else str(self._files.folder)
        self._tokenizer = tokenizer(f"hf:{config.model}" if of_hub else named, offline=around.offline)
        self._device = devices.resolve_device(around.device)

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """Weights and tokenizer by content; always the likeliest token, so neither seed nor temperature."""
        weights = self._files.revision or self._files.digest()
        return {"local": weights, "tokenizer": self._tokenizer.recipe()["digest"]}

    @cached_property
    def _model(self) -> Any:
        with said_if_slow(self.around.progress, f"loading {self._files.name}"):
            return load(self._files, torch.float32).model.eval().to(self._device)

    @torch.no_grad()
    def send(self, request: Request) -> Answer:
        text = f"{request.system}\n\n{request.user}\n\n"
        writer = _Writer(self._model, self._ids(text, begin=True), self._device)
        form = request.form
        if form.numbers:
            said = ""
            for i, key in enumerate(form.keys):
                put = f'{" " if i else "{"}"{key}":'
                writer.put(self._ids(put))
                end = "}" if i + 1 == form.numbers else ","
                best = writer.choose([self._ids(f" {choice}{end}") for choice in form.choices])
                said += f"{put} {form.choices[best]}{end}"
        else:
            said = self._sentence(writer)
        return Answer(said, writer.asked, writer.answered)

    def _sentence(self, writer: "_Writer") -> str:
        """An explanation, up to the quote or the line that ends it."""
        writer.put(self._ids(f'{{"{KEY}": "'))
        vocabulary, found = self._tokenizer.vocabulary(), b""
        for _ in range(WORDS_EXPECTED):
            token = writer.next()
            if token == self._tokenizer.end or token >= len(vocabulary):
                break
            found += vocabulary[token]
            if b'"' in found or b"\n" in found.strip():
                break
        words = found.decode("utf-8", "ignore").strip().split('"')[0].split("\n")[0].strip()
        return json.dumps({KEY: words})

    def _ids(self, text: str, *, begin: bool = False) -> list[int]:
        ids = self._tokenizer.encode_batch([text])[0].tolist()
        return [self._tokenizer.begin, *ids] if begin else ids


class _Writer:
    """A text that a model goes on with, token by token; what came before is computed once."""

    def __init__(self, model: Any, ids: Sequence[int], device: torch.device) -> None:
        self.model, self.device = model, device
        self.asked, self.answered = len(ids), 0
        self.cache: Any = None
        self.length = 0
        self.longest = getattr(model.config, "max_position_embeddings", None)
        self.logits = self._run(ids)

    def put(self, ids: Sequence[int]) -> None:
        """Go on with tokens that are given."""
        self.logits = self._run(ids)

    def next(self) -> int:
        """Go on with the likeliest token."""
        token = int(self.logits.argmax())
        self.answered += 1
        self.put([token])
        return token

    def choose(self, options: Sequence[Sequence[int]]) -> int:
        """Go on with the likeliest of some options, token by token; its number. None may begin another."""
        left = list(range(len(options)))
        at = 0
        while True:
            allowed = sorted({options[i][at] for i in left})
            token = allowed[int(self.logits[allowed].argmax())]
            left = [i for i in left if options[i][at] == token]
            at += 1
            self.answered += 1
            self.put([token])
            if len(left) == 1:
                if rest := options[left[0]][at:]:
                    self.put(rest)
                return left[0]

    def _run(self, ids: Sequence[int]) -> Tensor:
        self.length += len(ids)
        if self.longest is not None and self.length > self.longest:
            raise Unusable(f"the request has more than the {shown(self.longest)} tokens that the model reads")
        given = torch.tensor([[*ids]], device=self.device)
        found = self.model(input_ids=given, past_key_values=self.cache, use_cache=True)
        self.cache = found.past_key_values
        return found.logits[0, -1].float()
