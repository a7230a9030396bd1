"""A scripted OpenAI-compatible server on loopback: answers by a function of the conversation, and breaks when told to.

with JudgeServer(lambda messages: {"score": 7}) as server:
    ...                                   # server.url, server.requests

python tests/judge_server.py --port 0 --rule hop_search       prints its address and serves
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Messages = Sequence[Mapping[str, str]]
MODEL = "judge"
DRIP_PAUSE_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong with one reply."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: str | None = None
    """Sent in place of the completion."""
    content_type: str = "application/json"
    cut: float = 1.0
    """Share of the body that is sent before the connection closes, though the whole was announced."""
    drips: bool = False
    """One byte at a time."""
    silent: bool = False
    """Never answers."""
    finish_reason: str = ""
    message: Mapping[str, Any] | None = None
    """In place of the completion's message."""


def status(code: int, message: str = "made up", **headers: str) -> Fault:
    """An error as OpenAI words them; a header's underscores are dashes."""
    body = json.dumps({"error": {"message": message, "type": "made_up", "param": None, "code": None}})
    return Fault(
        status=code, body=body, headers=tuple((name.replace("_", "-"), text) for name, text in headers.items())
    )


GARBAGE = Fault(body="\x00\x01 no json at all")
HALF_A_JSON = Fault(body='{"choices": [{"message": {"role": "assistant", "content": "{')
WEB_PAGE = Fault(body="<!DOCTYPE html><html><body>Sign in</body></html>", content_type="text/html")
NO_CHOICES = Fault(body='{"object": "chat.completion", "choices": []}')
CLOSES_MID_REPLY = Fault(cut=0.5)
CLOSES_AT_ONCE = Fault(cut=0.0)
NEVER_ANSWERS = Fault(silent=True)
DRIPS = Fault(drips=True)
CUT_AT_LENGTH = Fault(finish_reason="length")
CONTENT_FILTER = Fault(finish_reason="content_filter")
REFUSAL = Fault(message={"role": "assistant", "content": None, "refusal": "I will not judge this."})
NO_TEXT = Fault(message={"role": "assistant", "content": None})


class JudgeServer:
    """Serves from a thread while it is entered."""

    def __init__(
        self,
        answer: Callable[..., Any] | Any = "yes",
        *,
        faults: Iterable[Fault | None] = (),
        always: Fault | None = None,
        logprobs: Mapping[str, float] | None = None,
        key: str = "",
        port: int = 0,
        latency_s: float = 0.0,
        model: str = MODEL,
    ) -> None:
        """Starts to listen.

        Args:
            answer: the reply's text; or an object, sent as JSON; or a function that gives either from the messages.
                Where the function takes a second argument it gets the request's whole body.
            faults: of the first requests, in the order in which they come; None for one that is answered.
            always: of every later request.
            logprobs: tokens and their log-probabilities, for a server that tells them.
            key: requests without it as bearer are refused.
            port: 0 for any that is free.
            latency_s: seconds that a reply takes.
            model: name that a request must ask for.
        """
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_at_once = self.most_at_once = 0
        self._answer, self._faults, self._always = answer, list(faults), always
        self._logprobs, self._key, self._latency_s, self._model = logprobs, key, latency_s, model
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._closing = threading.Event()
        self._server = _server(self, port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="judge server")
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()  # waits for the threads of the connections
        self._thread.join()

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    def prompts(self) -> list[str]:
        """Text of each request, its messages one after the other."""
        return ["\n".join(message["content"] for message in request["messages"]) for request in self.requests]

    def reply(self, path: str, headers: Mapping[str, str], body: Any) -> tuple[Fault, bytes]:
        """Fault and body of the reply to a request."""
        with self._lock:
            self.requests.append(body)
            self.headers.append({name.lower(): text for name, text in headers.items()})
            fault = (self._faults.pop(0) if self._faults else self._always) or Fault()
        if path != "/v1/chat/completions":
            fault = status(404, f"Not Found: {path}")
        elif self._key and headers.get("authorization") != f"Bearer {self._key}":
            fault = status(401, f"Incorrect API key provided: {headers.get('authorization', 'none')}")
        elif body.get("model") != self._model:
            fault = status(404, f"The model `{body.get('model')}` does not exist.")
        if fault.silent:
            self._closing.wait()
        if self._latency_s:
            self._closing.wait(self._latency_s)
        text = fault.body if fault.body is not None else json.dumps(self._completion(body, fault))
        return fault, text.encode()

    def _completion(self, body: dict[str, Any], fault: Fault) -> dict[str, Any]:
        answer = self._answer
        if callable(answer):
            wants_body = getattr(answer, "__code__", None) is not None and answer.__code__.co_argcount == 2
            answer = answer(body["messages"], body) if wants_body else answer(body["messages"])
        text = answer if isinstance(answer, str) else json.dumps(answer)
        choice: dict[str, Any] = {
            "index": 0,
            "message": fault.message or {"role": "assistant", "content": text},
            "finish_reason": fault.finish_reason or ("length" if body.get("max_tokens") == 1 else "stop"),
            "logprobs": None,
        }
        if body.get("logprobs") and self._logprobs is not None:
            top = [
                {"token": token, "logprob": logprob, "bytes": list(token.encode())}
                for token, logprob in sorted(self._logprobs.items(), key=lambda item: -item[1])
            ][: body.get("top_logprobs", 0)]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        num_prompt = sum(len(message["content"].split()) for message in body["messages"])
        num_reply = len(text.split())
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_reply,
                "total_tokens": num_prompt + num_reply,
            },
        }

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)

    @property
    def is_closing(self) -> bool:
        return self._closing.is_set()

    def count(self, change: int) -> None:
        with self._lock:
            self.num_at_once += change
            self.most_at_once = max(self.most_at_once, self.num_at_once)


def _server(judge: JudgeServer, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            judge.opened(self.connection)

        def finish(self) -> None:
            judge.closed(self.connection)
            super().finish()

        def handle(self) -> None:
            try:
                super().handle()
            except (ConnectionError, TimeoutError):
                self.close_connection = True  # the client has gone

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            judge.count(+1)
            try:
                fault, body = judge.reply(self.path, {k.lower(): v for k, v in self.headers.items()}, json.loads(raw))
                self._send(fault, body)
            finally:
                judge.count(-1)

        def _send(self, fault: Fault, body: bytes) -> None:
            if fault.silent or fault.cut == 0 or judge.is_closing:
                self.close_connection = True
                return
            lines = [
                f"HTTP/1.1 {fault.status} made up",
                f"content-type: {fault.content_type}",
                f"content-length: {len(body)}",
                *(f"{name}: {text}" for name, text in fault.headers),
            ]
            at_once = b"" if fault.drips else body[: int(fault.cut * len(body))]
            self.wfile.write("\r\n".join([*lines, "", ""]).encode() + at_once)
            for place in range(len(body) if fault.drips else 0):
                if judge.is_closing:
                    break
                self.wfile.write(body[place : place + 1])
                time.sleep(DRIP_PAUSE_S)
            self.close_connection = fault.cut < 1

    class Server(ThreadingHTTPServer):
        daemon_threads = False
        request_queue_size = 256

        def handle_error(self, *_: object) -> None:
            kind = sys.exc_info()[0]
            if kind is not None and not issubclass(kind, OSError):
                super().handle_error(*_)

    return Server(("127.0.0.1", port), Handler)


# Rules: judges that know a task by heart


SECTION = re.compile("\u27e6(?P<name>[^\u27e7/]+)\u27e7\n(?P<text>.*?)\n\u27e6/(?P=name)\u27e7", re.DOTALL)
CALL = re.compile(r"^<call> (?:\w+) (?:\w+) (?:\w+ \w+) </call>$")
REFUSED = "<result> error </result>"


def hop_search(messages: Messages, body: Mapping[str, Any]) -> dict[str, Any]:
    """Grades a step of the hop-search task by the shipped prompt of `Principles`, from its text alone.

    All points for a call whose reply is new; only those for its form where the call was refused or made before; none
    for a turn that cannot be read.
    """
    asked = "\n".join(message["content"] for message in messages)
    sections = dict(SECTION.findall(asked))
    said, earlier = _turns(sections["step"]), _turns(sections.get("earlier steps", ""))
    call, reply = said[0] if said else ("", "")
    is_call = bool(CALL.match(call))
    is_new = is_call and reply not in ("", REFUSED) and all(call != each and reply != told for each, told in earlier)
    grades = body["response_format"]["json_schema"]["schema"]["properties"]["scores"]["properties"]
    return {
        "reasoning": "new" if is_new else "a call, and nothing new" if is_call else "no call",
        "scores": {
            name: grade["maximum"] if is_new or (is_call and name == "well_formed") else 0
            for name, grade in grades.items()
        },
    }


def _turns(text: str) -> list[tuple[str, str]]:
    """What the agent said and the environment replied, step after step."""
    turns: list[tuple[str, str]] = []
    for name, part in SECTION.findall(text):
        if name.endswith(": agent"):
            turns.append((part.strip(), ""))
        elif turns:
            turns[-1] = (turns[-1][0], part.strip())
    return turns


RULES: dict[str, Callable[..., Any]] = {"hop_search": hop_search}


def main() -> None:
    """Serve one rule until stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rule", choices=RULES, required=True)
    parser.add_argument("--key", default="", help="requests without it as bearer are refused")
    asked = parser.parse_args()
    with JudgeServer(RULES[asked.rule], port=asked.port, key=asked.key) as server:
        print(server.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
