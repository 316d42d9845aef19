"""Whether the network may be used and is there: asked quickly, before a library would retry for half a minute."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from urllib.parse import urlsplit

PATIENCE = 3.0  # seconds to wait for a name to resolve and a connection to open


def offline_wanted(offline: bool) -> bool:
    """Whether requests are forbidden: by our own option, or by the variable the Hugging Face libraries obey."""
    return offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def hub_address() -> str:
    """Where the Hugging Face hub is: a mirror where HF_ENDPOINT names one."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hugging Face libraries raise for names, settings, missing packages and networks that do not work.

    Mostly OSError and ValueError; but a refused connection or a timeout is the HTTP library's own error, which is
    neither and whose name has changed with the library. The hub's error class always derives from it.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError, ValueError, ImportError)


def reachable(url: str) -> bool:
    """Whether the server of `url` (or the proxy that leads to it) accepts a connection within a few seconds."""
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
