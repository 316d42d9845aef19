"""The network, asked with patience but not without end, and what it answers in plain words.

One way for models, tokenizers and data sets: whether a server is there is asked quickly, before a library would retry
for half a minute; every request has a time limit; what may pass (too many requests, a fault of the server, silence) is
tried again a few times; and what the hub refuses is said so that one knows what to do.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

PATIENCE = 3.0  # seconds to wait for a name to resolve and a connection to open
SILENCE = 10.0  # seconds without a byte after which a server counts as silent
TRIES = 3
PAUSE = 1.0  # seconds before the second try; doubled before each further one
LONGEST_PAUSE = 30.0  # however long a server asks to wait

Kind = Literal["model", "dataset"]
Answer = TypeVar("Answer")
_log = logging.getLogger(__name__)


class Refused(Exception):
    """The hub gave no useful answer; the text says why, in words that follow a name."""

    def __init__(self, why: str, *, definite: bool, silent: bool = False) -> None:
        super().__init__(why)
        self.definite = definite  # asking again later changes nothing
        self.silent = silent


def offline_wanted(offline: bool) -> bool:
    """Return True if requests are forbidden: by our own option, or by the variable the Hugging Face libraries obey."""
    return offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def hub_address() -> str:
    """Return the address of the Hugging Face hub: a mirror where HF_ENDPOINT names one."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the errors of the Hugging Face libraries for names, settings, missing packages and networks that do not
    work.

    Mostly OSError and ValueError; but a refused connection or a timeout is the HTTP library's own error, which is
    neither and whose name has changed with the library. The hub's error class always derives from it.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError, ValueError, ImportError)


def ask(name: str, call: Callable[[], Answer], kind: Kind = "model", *, tries: int = TRIES) -> Answer:
    """Return the hub's answer to `call`, a request about the repository `name` made with huggingface_hub or datasets.

    A fault that may pass is tried again, with a word on the log; silence is not, since that took long enough. Raises
    Refused where there is no answer to be had.
    """
    _limit_silence()
    # the last three, of what a hub would never send
    expected: tuple[type[Exception], ...] = (*hub_errors(), KeyError, TypeError, AttributeError)
    for attempt in range(1, tries + 1):
        try:
            return call()
        except expected as error:
            refused = _refused(error, name, kind)
            if refused.definite or refused.silent or attempt == tries:
                raise refused from error
            pause = _pause(error, attempt)
            _log.warning("%s: %s; trying again in %.0f s", name, refused, pause)
        time.sleep(pause)
    raise AssertionError("unreachable")


def snapshot(name: str, wanted: Sequence[str], *, revision: str | None = None, offline: bool = False) -> Path:
    """Folder with those files of a hub model that match `wanted`: its newest state where the hub answers, else (with a
    word on the log) what the local cache has. Raises Refused where neither does.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    get = functools.partial(snapshot_download, name, revision=revision, allow_patterns=list(wanted))
    refused = Refused(f"{hub_address()} cannot be reached", definite=False)
    if offline_wanted(offline):
        refused = Refused("offline was asked for", definite=False)
    elif reachable(hub_address()):
        try:
            ask(name, lambda: HfApi().model_info(name, revision=revision))
            return Path(ask(name, get, tries=1))  # which tries again by itself
        except Refused as error:
            if isinstance(error.__cause__, errors.RevisionNotFoundError | errors.HFValidationError):
                raise
            refused = error
    try:
        folder = Path(get(local_files_only=True))
    except errors.LocalEntryNotFoundError:
        raise refused from refused.__cause__
    except errors.HFValidationError as error:
        raise _refused(error, name, "model") from error
    if not offline_wanted(offline):
        _log.warning("%s: %s; going on with what the local cache has", name, refused)
    return folder


def download(url: str) -> bytes:
    """A file. Raises OSError, in words, where the server is not there, refuses or falls silent."""
    if not reachable(url):
        raise ConnectionError("no network")
    with urllib.request.urlopen(url, timeout=SILENCE) as answer:
        return bytes(answer.read())


def reachable(url: str) -> bool:
    """Return True if the server of `url` (or the proxy that leads to it) accepts a connection within a few seconds."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    answer: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((parts.hostname or "", port), timeout=PATIENCE).close()
        except OSError:
            return
        answer.append(True)

    # In a thread, because looking a name up has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE + 1)
    return bool(answer)


@functools.cache
def _limit_silence() -> None:
    """Give every request of huggingface_hub that has no time limit one: most of its API calls have none."""
    import huggingface_hub
    from huggingface_hub.utils._http import default_client_factory

    def limit(request: Any) -> None:
        limits = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            step: SILENCE if limits.get(step) is None else limits[step] for step in ("connect", "read", "write", "pool")
        }

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks = {**made.event_hooks, "request": [*made.event_hooks["request"], limit]}
        return made

    huggingface_hub.set_client_factory(client)


def _refused(error: BaseException, name: str, kind: Kind) -> Refused:
    """An error of a request in words."""
    from huggingface_hub import errors

    page = f"{hub_address()}/{'datasets/' if kind == 'dataset' else ''}{name}"
    what = "data set" if kind == "dataset" else "model"
    absent = Refused(f"the hub has no such {what} (if it is private: `hf auth login`)", definite=True)
    if isinstance(error, errors.HFValidationError):
        return Refused("neither a folder nor a hub name (owner/name)", definite=True)
    if isinstance(error, errors.GatedRepoError):
        return Refused(f"its owner asks for a login; accept the terms at {page}, then `hf auth login`", definite=True)
    if isinstance(error, errors.RevisionNotFoundError):
        return Refused("the hub has no such branch, tag or commit of it", definite=True)
    if isinstance(error, errors.RepositoryNotFoundError):
        return absent
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return Refused("the hub lacks a file of it", definite=True)
    if isinstance(error, errors.HfHubHTTPError):
        # where the library does not know its own hub by its address, the status is all there is
        unknown = (
            error.response.status_code == 401 and error.server_message != "Invalid credentials in Authorization header"
        )
        if unknown or error.response.headers.get("X-Error-Code") == "RepoNotFound":
            return absent
        return _status(error.response.status_code, page)
    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and cause is not None:
        return _refused(cause, name, kind)
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return Refused(f"{hub_address()} does not answer within {SILENCE:.0f} s", definite=False, silent=True)
    if isinstance(error, json.JSONDecodeError | KeyError | TypeError | AttributeError):
        return Refused(f"{hub_address()} answers, but not as a hub does (a login page or a proxy?)", definite=True)
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return Refused(first, definite=isinstance(error, ValueError | ImportError | FileNotFoundError))


def _status(status: int, page: str) -> Refused:
    """A status of HTTP in words."""
    words = {
        401: "the hub does not know your token; log in again with `hf auth login`",
        403: f"the hub forbids it to your account or token; see {page}",
        429: "the hub has had too many requests from here",
    }
    fault = "the hub has a fault" if status >= 500 else "the hub refuses"
    return Refused(words.get(status, f"{fault} (status {status})"), definite=status not in (408, 429) and status < 500)


def _pause(error: BaseException, attempt: int) -> float:
    """Seconds until the next try: what the server asks for, within reason, or twice as long each time."""
    answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    asked = answer.headers.get("Retry-After", "") if answer is not None else ""
    return min(float(asked), LONGEST_PAUSE) if asked.isdigit() else PAUSE * 2 ** (attempt - 1)
