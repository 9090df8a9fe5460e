"""A language model that is a function: an OpenAI-compatible server on this machine, with faults on request.

    with LlmStub(answer=lambda messages: "…", faults=Faults(share=0.3)) as stub:
        for name, value in stub.environment().items():
            monkeypatch.setenv(name, value)
        ... ask inspect_ai for stub.model ...

The same request gets the same answer however often, in whatever order and by however many processes it is sent.
Whether it meets a fault depends on its content and on how often it was sent before, and on nothing else.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Messages = list[dict[str, Any]]
KEY = "sk-stub-never-to-be-written-anywhere"
TRANSPORT_FAULTS = ("429", "500", "drop", "hang", "torn")
"""Refused for its rate, failed, cut off, never answered, an HTTP body that is half a JSON object."""
TEXT_FAULTS = ("half", "prose", "empty", "out_of_range", "not_a_number")
"""An answer cut in half, prose, no text at all, every `score` 250, every `score` the word "high"."""
HARMLESS = ("as_strings",)
"""Every `score` a string of digits, which a tolerant reader takes."""
FAULTS = (*TRANSPORT_FAULTS, *TEXT_FAULTS, *HARMLESS)
PROSE = "That is a lovely question, and I would rather talk about it at length than fill in a form."


@dataclass(frozen=True)
class Faults:
    """Which requests go wrong, and how.

    Args:
        share: of the requests, drawn by a hash of the request and of how often it came before.
        kinds: drawn from evenly.
        script: instead of a share: what happens to a subject's first, second, … request; None is no fault, and
            so is the script's end.
        seed: of the draw.
    """

    share: float = 0.0
    kinds: Sequence[str] = FAULTS
    script: Sequence[str | None] = ()
    seed: int = 0

    def of(self, subject: str, before: int) -> str | None:
        """The fault that a request meets which was sent `before` times already."""
        if self.script:
            return self.script[before] if before < len(self.script) else None
        digest = hashlib.sha256(repr((self.seed, subject, before)).encode()).digest()
        if int.from_bytes(digest[:4]) / 2**32 >= self.share:
            return None
        return self.kinds[digest[4] % len(self.kinds)]


class LlmStub:
    """The server, up between `with` and its end.

    Args:
        answer: messages ({"role", "content"}) -> the assistant's text.
        faults: what goes wrong.
        subject: what makes two requests the same to `faults`; all their messages unless given.
        refuses: settings of a request that it answers with an error of the client's.
    """

    model = "openai-api/stub/oracle"

    def __init__(
        self,
        answer: Callable[[Messages], str],
        faults: Faults | None = None,
        subject: Callable[[Messages], str] = lambda messages: json.dumps(messages, sort_keys=True),
        refuses: Sequence[str] = (),
    ) -> None:
        self.answer, self.faults, self.subject, self.refuses = answer, faults or Faults(), subject, refuses
        self.bodies: list[dict[str, Any]] = []
        """Every request as it came, those that were refused, too."""
        self.requests: list[Messages] = []
        """The messages of every request, in the order of arrival."""
        self.met: Counter[str] = Counter()
        """How often each fault was met."""
        self.busiest = 0
        """The most requests that were being answered at once."""
        self._open = 0
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))

    @property
    def url(self) -> str:
        """Where the API begins."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def environment(self) -> dict[str, str]:
        """What inspect_ai must find in the environment to reach `LlmStub.model`."""
        return {"STUB_API_KEY": KEY, "STUB_BASE_URL": self.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def __enter__(self) -> "LlmStub":
        without_waiting()
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def take(self, messages: Messages) -> tuple[str, str | None]:
        """Note a request; its answer and its fault."""
        subject = self.subject(messages)
        with self._lock:
            before = self._seen[subject]
            self._seen[subject] += 1
            self.requests.append(messages)
            fault = self.faults.of(subject, before)
            if fault:
                self.met[fault] += 1
        return self.answer(messages), fault

    def opened(self, step: int) -> None:
        """Count a request that opens (1) or closes (-1)."""
        with self._lock:
            self._open += step
            self.busiest = max(self.busiest, self._open)

    def hang(self) -> None:
        """Wait until the server closes."""
        self._closing.wait()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    """More than any client asks at once: a connection that is turned away is a fault that nobody ordered."""


def without_waiting() -> None:
    """Have inspect_ai send failed requests again at once, in this process; it waits for three seconds and more."""
    from inspect_ai.model import _retry

    async def at_once(seconds: float) -> None:
        return

    _retry._sleep = at_once


def _handler(stub: LlmStub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                self._send(401, {"error": {"message": "Incorrect API key provided.", "type": "invalid_request_error"}})
                return
            stub.bodies.append(body)
            if unknown := [name for name in stub.refuses if name in body]:
                self._send(400, {"error": {"message": f"unknown: {unknown}", "type": "invalid_request_error"}})
                return
            stub.opened(1)
            try:
                text, fault = stub.take(body["messages"])
            finally:
                stub.opened(-1)
            self._reply(body["model"], body["messages"], text, fault)

        def _reply(self, model: str, messages: Messages, text: str, fault: str | None) -> None:
            if fault in ("429", "500"):
                headers = {"Retry-After": "0"} if fault == "429" else {}
                self._send(int(fault), {"error": {"message": f"scripted {fault}", "type": "server_error"}}, headers)
            elif fault in ("drop", "hang"):
                if fault == "hang":
                    stub.hang()
                self.close_connection = True
            else:
                whole = completion(model, messages, spoiled(text, fault))
                self._send(200, whole, torn=fault == "torn")

        def _send(
            self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None, torn: bool = False
        ) -> None:
            data = json.dumps(value).encode()
            data = data[: len(data) // 2] if torn else data
            self.send_response(status)
            for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def handle(self) -> None:
            # A client that was killed or that lost patience is no news.
            try:
                super().handle()
            except (ConnectionError, TimeoutError):
                self.close_connection = True

        def log_message(self, format: str, *arguments: Any) -> None:
            return

    return Handler


def completion(model: str, messages: Messages, text: str) -> dict[str, Any]:
    """A chat completion as the API sends it; tokens are counted as words."""
    asked = sum(len(str(message["content"]).split()) for message in messages)
    made = len(text.split())
    return {
        "id": "chatcmpl-stub",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made},
    }


def spoiled(text: str, fault: str | None) -> str:
    """An answer as the fault leaves it."""
    if fault == "half":
        return text[: len(text) // 2]
    if fault == "prose":
        return PROSE
    if fault == "empty":
        return ""
    rescored = {"out_of_range": lambda _: 250, "not_a_number": lambda _: "high", "as_strings": str}
    if fault in rescored:
        return _with_scores(text, rescored[fault])
    return text


def _with_scores(text: str, change: Callable[[Any], Any]) -> str:
    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: change(each) if key == "score" else walk(each) for key, each in value.items()}
        return [walk(each) for each in value] if isinstance(value, list) else value

    try:
        return json.dumps(walk(json.loads(text)))
    except json.JSONDecodeError:
        return text
