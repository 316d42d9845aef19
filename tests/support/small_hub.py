"""A stand-in for the hub on 127.0.0.1: folders served as models, which can be told to misbehave."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """What happens to requests whose path holds `where`, for the next `times` of them."""

    where: str
    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    silent: float = 0  # seconds without a byte
    times: int = 1 << 30


@dataclass
class Hub:
    """`models` maps owner/name to a folder."""

    models: dict[str, Path]
    faults: list[Fault] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def fault(self, path: str) -> Fault | None:
        """The fault that hits a request."""
        for fault in self.faults:
            if fault.where in path and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body, as the hub gives them."""
        name = next((name for name in self.models if f"/{name}/" in f"{path}/"), None)
        if name is None:
            return 401, {"X-Error-Message": "Invalid username or password."}, b"{}"
        folder = self.models[name]
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        if path.startswith("/api/") and "/tree/" in path:
            listing = [
                {"type": "file", "path": file, "size": len(data), "oid": _name(data)} for file, data in files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
        if path.startswith("/api/"):
            siblings = [{"rfilename": file} for file in files]
            return (
                200,
                {"Content-Type": "application/json"},
                json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(),
            )
        data = files.get(path.partition("/resolve/")[2].partition("/")[2])
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{_name(data)}"', "X-Repo-Commit": COMMIT}, data


def _name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def hub(models: dict[str, Path], cache: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub is pointed at, with an empty cache of its own."""
    import huggingface_hub
    from huggingface_hub import constants

    found = Hub(models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.startswith("/api/agent-harnesses"):  # huggingface_hub asks for it by itself, once a day
                self.send_error(404)
                return
            found.asked.append(f"{self.command} {self.path}")
            fault = found.fault(self.path)
            if fault is not None and fault.silent:
                time.sleep(fault.silent)
                self.close_connection = True
                return
            status, headers, body = found.answer(self.path.partition("?")[0])
            if fault is not None:
                status, headers, body = fault.status, fault.headers, fault.body.encode()
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_ENDPOINT", address)
            patch.setenv("HF_HUB_OFFLINE", "0")
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "ENDPOINT", address)
            patch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
            )
            patch.setattr(constants, "HF_HUB_CACHE", str(cache))
            patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
            yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        huggingface_hub.close_session()
