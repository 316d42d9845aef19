"""Any server that speaks OpenAI's chat completions, by the `openai` client: a company's, vLLM, llama.cpp, Ollama.

Where it is, is said by `base_url` or OPENAI_BASE_URL. The key is OPENAI_API_KEY of the environment and is written
nowhere: what a server says is searched for it first. What may pass (too many requests, faults, silence) is tried again
with growing pauses by the client; what a server refuses for good ends the command, and what it refuses of one request
is counted.
"""

import ipaddress
import os
import threading
from typing import Any
from urllib.parse import urlsplit

from sae.cache.disk.parsing import parsed_mapping
from sae.cache.errors import SaeError, needing
from sae.pipeline.explain.answers import Answer
from sae.pipeline.explain.asked import Asked
from sae.pipeline.explain.backend import Surroundings, Unusable
from sae.pipeline.explain.config import ExplainConfig
from sae.pipeline.explain.prompts import LETTERS_A_TOKEN, Request

OPENAI = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"
FAILURES = 5  # requests in a row, all tries of each, after which a server counts as out of order
SHORTEST_KEY = 8  # letters below which a key is a placeholder, and its letters stand in ordinary text
REFUSALS = {
    401: f"it does not know the key; set {KEY}",
    403: f"it forbids it to this key; set another {KEY}",
    404: "it has no such model, or no chat completions at this address; see `model` and `base_url`",
}


class Backend(Asked):
    """Asks a model of a server."""

    def __init__(self, config: ExplainConfig, around: Surroundings) -> None:
        super().__init__(config, around)
        self.concurrency = config.concurrency
        if config.model is None:
            raise SaeError("backend = openai: needs a model that the server has; name it with `model`")
        self.address = (config.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
        _expect_address(self.address)
        if around.offline and not _is_here(self.address):
            raise SaeError(f"base_url = {self.address}: the network is not to be touched; leave out `offline`")
        self._key_said = os.environ.get(KEY, "").strip()
        if not self._key_said and self.address == OPENAI:
            raise SaeError(f"backend = openai: no key; set {KEY}, or name another server by `base_url`")
        with needing("backend = openai", extra="explain"):
            import openai
        self._failed, self._lock = 0, threading.Lock()
        try:
            self._client = openai.OpenAI(
                api_key=self._key_said or "none", base_url=self.address, timeout=config.timeout,
                max_retries=config.tries - 1,
            )  # fmt: skip
        except (openai.OpenAIError, ValueError, UnicodeError) as error:
            raise SaeError(f"backend = openai: {self._line(str(error))}") from error

    @property
    def identity(self) -> dict[str, Any]:
        config = self.config
        named = ("model", "temperature", "seed", "answer_tokens", "structured")
        return {"address": self.address, **{name: getattr(config, name) for name in named}}

    def about(self) -> dict[str, Any]:
        return {**super().about(), "address": self.address}

    def send(self, request: Request) -> Answer:
        import openai

        try:
            raw = self._client.chat.completions.with_raw_response.create(**self._parameters(request))
            body = raw.http_response.content
        except openai.APITimeoutError as error:
            raise self._failure(f"no answer within {self.config.timeout:g} s, {self.config.tries} times") from error
        except openai.APIConnectionError as error:
            why = self._line(str(error.__cause__ or error))
            raise SaeError(f"base_url = {self.address}: cannot be reached ({why}); answers so far are kept") from None
        except openai.APIStatusError as error:
            self._expect_wanted(error.status_code)
            raise self._failure(f"status {error.status_code}: {self._line(error.response.text)}") from None
        except (openai.OpenAIError, ValueError) as error:  # what the client itself cannot read
            raise self._failure(self._line(str(error))) from None
        with self._lock:
            self._failed = 0
        return self._answer(body, request)

    def close(self) -> None:
        self._client.close()

    def _parameters(self, request: Request) -> dict[str, Any]:
        config, form = self.config, request.form
        # OpenAI's newer models refuse the older name, other servers know no other
        limit = "max_completion_tokens" if self.address == OPENAI else "max_tokens"
        found: dict[str, Any] = {
            "model": config.model, "messages": request.messages, limit: config.answer_tokens, "seed": config.seed
        }  # fmt: skip
        if config.temperature is not None:
            found["temperature"] = config.temperature
        if config.structured == "json_schema":
            schema = {"name": "answer", "strict": True, "schema": form.schema()}
            found["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif config.structured == "json_object":
            found["response_format"] = {"type": "json_object"}
        return found

    def _answer(self, body: bytes, request: Request) -> Answer:
        """What a completion says. A body that is none is an answer of no words, and as unusable."""
        try:
            found = parsed_mapping(body)
            choice = found["choices"][0]
            text, ended = choice["message"]["content"], choice.get("finish_reason") != "length"
        except (ValueError, LookupError, TypeError, AttributeError):
            raise Unusable("the server's answer is no chat completion") from None
        text = self._hidden(text) if isinstance(text, str) else ""
        usage = found.get("usage")
        counts = [
            usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
        ]
        guesses = request.expected_tokens, len(text) // LETTERS_A_TOKEN + 1
        asked, answered = (
            count if type(count) is int and 0 <= count < 1 << 40 else guess
            for count, guess in zip(counts, guesses, strict=True)
        )
        return Answer(text, asked, answered, ended)

    def _expect_wanted(self, status: int) -> None:
        """Raise SaeError for a status that every request would be answered with."""
        if status in REFUSALS:
            raise SaeError(f"base_url = {self.address}, model = {self.config.model}: {REFUSALS[status]}")

    def _failure(self, why: str) -> Unusable:
        """The failure of one request; raises SaeError where too many have failed in a row."""
        with self._lock:
            self._failed += 1
            failed = self._failed
        if failed >= FAILURES:
            hint = "; try explain.structured = none" if "status 4" in why and self.config.structured != "none" else ""
            raise SaeError(
                f"base_url = {self.address}: {failed} requests failed in a row, the last with {why}{hint} (answers so "
                "far are kept)"
            )
        return Unusable(why)

    def _line(self, text: str) -> str:
        """The beginning of what a server says, in one line, without the key."""
        return " ".join(self._hidden(text).split())[:200] or "no reason given"

    def _hidden(self, text: str) -> str:
        return text.replace(self._key_said, "***") if len(self._key_said) >= SHORTEST_KEY else text


def _expect_address(address: str) -> None:
    try:
        parts = urlsplit(address)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        right, parts = False, urlsplit("")
    if parts.username or parts.password:
        raise SaeError(f"base_url: holds a name or a password; leave it out, and set {KEY}")
    if not right or parts.query or parts.fragment:
        raise SaeError(f"base_url = {address}: is no address of a server, as https://api.openai.com/v1")


def _is_here(address: str) -> bool:
    """Return whether an address is of this machine."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
