"""A stand-in for the hub on 127.0.0.1: folders served as models, which can be told to misbehave."""

import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

LFS = 2000  # bytes above which a file is sent as Git LFS
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
    data_sets: set[str] = field(default_factory=set)  # which of `models` are data sets
    root: Path | None = None  # where repositories are made that are asked for
    large: dict[str, bytes] = field(default_factory=dict)  # what was sent as Git LFS, by its hash
    stored: dict[str, dict[str, str]] = field(default_factory=dict)  # hashes of the files that are LFS, by repository

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
        of_data = path.startswith(("/api/datasets/", "/datasets/"))
        if name is None or of_data != (name in self.data_sets):
            return 401, {"X-Error-Message": "Invalid username or password."}, b"{}"
        folder = self.models[name]
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        if path.startswith("/api/") and "/tree/" in path:
            large = self.stored.get(name, {})
            listing = [
                {"type": "file", "path": file, "size": len(data), "oid": _name(data)}
                | ({"lfs": {"oid": large[file], "size": len(data), "pointerSize": 130}} if file in large else {})
                for file, data in files.items()
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

    def write(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Take what is sent to make a repository, or to put files into one."""
        answer: Any = {}
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}" if said.get("organization") else said["name"]
            assert self.root is not None
            self.data_sets |= {name} if said.get("type") == "dataset" else set()
            self.models.setdefault(name, self.root / name).mkdir(parents=True, exist_ok=True)
            answer = {"url": f"{os.environ['HF_ENDPOINT']}/{name}", "id": name}
        elif path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.large[path.removeprefix("/lfs/")] = body
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            href = os.environ["HF_ENDPOINT"] + "/lfs/"
            for one in objects:
                if one["oid"] not in self.large:
                    one["actions"] = {"upload": {"href": href + one["oid"]}}
            answer = {"transfer": "basic", "objects": objects}
        elif "/preupload/" in path:
            files = [
                {"path": one["path"], "uploadMode": "lfs" if one["size"] > LFS else "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            answer = {"files": files}
        elif "/commit/" in path:
            name = next(name for name in self.models if f"/{name}/" in path)
            for line in body.splitlines():
                said = json.loads(line)
                value = said["value"]
                if said["key"] == "header":
                    continue
                data = self.large[value["oid"]] if said["key"] == "lfsFile" else base64.b64decode(value["content"])
                file = self.models[name] / value["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
                if said["key"] == "lfsFile":
                    self.stored.setdefault(name, {})[value["path"]] = value["oid"]
            answer = {"commitUrl": f"{os.environ['HF_ENDPOINT']}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


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
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            reads = self.command in ("GET", "HEAD") and not path.startswith("/lfs/")
            status, headers, body = found.answer(path) if reads else found.write(path, sent)
            if fault is not None:
                status, headers, body = fault.status, fault.headers, fault.body.encode()
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_PUT = do_GET

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
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
            yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        huggingface_hub.close_session()
