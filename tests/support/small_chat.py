"""A server on 127.0.0.1 that speaks OpenAI's chat completions, and can be told to misbehave."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-of-the-tests"

Reply = Callable[[dict[str, Any]], str]
"""Given what was asked (the parsed user's message, with `form`: the keys of the answer), the content of the answer."""


@dataclass
class Fault:
    """What the next requests get in the place of an answer: a status and a body, or silence."""

    times: int = 1
    status: int = 200
    body: str = ""
    silent: float = 0


@dataclass
class Chat:
    """What the server says, what it was asked, and what goes wrong first."""

    reply: Reply
    address: str = ""
    faults: list[Fault] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    finish: str = "stop"
    tokens: int = 100  # that a request is said to have
    at_once: int = 0
    most_at_once: int = 0
    let_go: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0:
                fault.times -= 1
                return fault
        return None


def keys(asked: dict[str, Any]) -> list[str]:
    """The keys that an answer must have."""
    form: list[str] = asked["response_format"]["json_schema"]["schema"]["required"]
    return form


def honest(asked: dict[str, Any]) -> str:
    """An answer of the right form: an explanation, or no (or 0) everywhere."""
    if keys(asked) == ["explanation"]:
        return json.dumps({"explanation": "some word"})
    each = asked["response_format"]["json_schema"]["schema"]["properties"]["1"]
    return json.dumps(dict.fromkeys(keys(asked), False if each["type"] == "boolean" else 0))


@contextmanager
def serving(reply: Reply = honest) -> Iterator[Chat]:
    """A server for the time of a context."""
    chat = Chat(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(length := int(self.headers["Content-Length"]))
            if len(body) < length:  # who asked has gone
                return
            asked = json.loads(body)
            with chat.lock:
                chat.asked.append(asked)
                chat.headers.append({name.lower(): value for name, value in self.headers.items()})
                chat.at_once += 1
                chat.most_at_once = max(chat.most_at_once, chat.at_once)
                fault = chat.fault()
            if fault is not None and fault.silent:
                chat.let_go.wait(fault.silent)
            if fault is None:
                message = {"role": "assistant", "content": chat.reply(asked)}
                choice = {"index": 0, "message": message, "finish_reason": chat.finish}
                usage = {"prompt_tokens": chat.tokens, "completion_tokens": 10, "total_tokens": 110}
                said = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                said["usage"] = usage
                status, body = 200, json.dumps(said)
            else:
                status, body = fault.status, fault.body
            with chat.lock:
                chat.at_once -= 1
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body.encode())))
                self.send_header("retry-after-ms", "1")  # so that no test waits
                self.end_headers()
                self.wfile.write(body.encode())
            except OSError:  # who asked has gone
                pass

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    chat.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield chat
    finally:
        chat.let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()
