"""A steered model on a port of this machine: the page, and chat completions as OpenAI's API has them.

A request names what steers it and how much of the adapter is at work: the switch, request by request.
"""

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import TextIOWrapper
from typing import Any, Literal, TextIO

import torch
from pydantic import Field, ValidationError

from esr_train.errors import InputError, RunError, refuse
from esr_train.models import check_layer_number
from esr_train.recipe import AtLeastOne, Count, Fraction, Recipe, Section
from esr_train.steering.directions import Add
from esr_train.steering.engine import Request, Sampling
from eval.report.drawing import render
from recipes.resources import open_resources
from recipes.using.chat import Chat, open_chat, talk

PATH = "/v1/chat/completions"
LISTING = "GET /directions"
LONGEST = 200_000
"""Bytes of a request."""
ROLES = (["user"], ["system", "user"], ["user", "assistant"], ["system", "user", "assistant"])
"""What a conversation may be: one question; a reply that has begun is gone on with."""


def chat(recipe: Recipe, arm: str | None, port: int | None) -> None:
    """Open a recipe's model and answer until the user leaves, in the terminal or at a port of this machine."""
    with open_resources(recipe, asks=False) as resources:
        opened = open_chat(resources, arm)
        with suppress(KeyboardInterrupt):  # the way to leave
            if port is None:
                talk(opened, _typed())
            else:
                serve(opened, port)


def _typed() -> TextIO:
    """What the user types; bytes that are no text become replacement characters instead of an error."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin


class Message(Section):
    """One turn."""

    role: Literal["system", "user", "assistant"] = Field(description="system, user or assistant")
    content: str = Field(description="the turn's text")


class SteeringBody(Section):
    """What pushes a request, and no other one."""

    direction: str | int | None = Field(None, description="label or number of a direction, as GET /directions has it")
    vector: list[float] | None = Field(None, description="in place of a direction: d_model finite numbers")
    layer: Count | None = Field(None, description="the number, from 0, of the layer whose output a vector is added to")
    strength: float = Field(1.0, description="a finite number: of a direction in GET /directions' unit, or a factor")


class Body(Section):
    """A request."""

    messages: list[Message] = Field(description='turns, such as [{"role": "user", "content": "How do I knit?"}]')
    model: str | None = Field(None, description="any text: there is one model")
    max_tokens: AtLeastOne | None = Field(None, description="1 or more; the recipe's sampling.max_new_tokens is most")
    temperature: float | None = Field(None, ge=0, le=2, description="0 (greedy) to 2; the recipe's if left out")
    top_p: float | None = Field(None, gt=0, le=1, description="above 0, up to 1; the recipe's if left out")
    seed: Count = Field(0, description="a whole number from 0 on")
    stream: bool = Field(False, description="false: replies come whole")
    n: Literal[1] = Field(1, description="1: one reply a request")
    steering: SteeringBody | None = Field(None, description="an object with direction or vector, and strength")
    resistance: Fraction = Field(1.0, description="the adapter's share at work, 0 (the base model) to 1")


SECTIONS: Mapping[str, type[Section]] = {"messages": Message, "steering": SteeringBody}
"""What stands under keys of a request."""


def complete(chat: Chat, body: bytes) -> dict[str, Any]:
    """Answer a request; returns OpenAI's chat completion.

    Args:
        chat: the model, and what it may be steered along.

    Raises:
        InputError: for anything that is not a request, naming the key.
    """
    asked = _read(body)
    if chat.arm is None and asked.resistance not in (0, 1):
        raise InputError("there is no adapter whose strength could be set", "resistance", "Train an arm first.")
    made = chat.queue.ask(_request(chat, asked), _sampling(chat.sampling, asked), asked.resistance)
    prompt, generated = made.prompt_tokens, len(made.token_ids)
    return {
        "id": f"chatcmpl-{time.time_ns():x}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": chat.arm or "base",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": made.text},
                "finish_reason": "stop" if made.finish_reason == "stop" else "length",
            }
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated},
    }


def _read(body: bytes) -> Body:
    value = _json(body)
    try:
        asked = Body.model_validate(value)
    except ValidationError as error:
        refuse(_refused(item["type"], item["msg"], item["loc"]) for item in error.errors())
        raise
    if asked.stream:
        raise InputError("replies come whole", "stream", "Set it to false, or leave it out.")
    for number, message in enumerate(asked.messages):
        _check_text(message.content, f"messages.{number}.content")
    if [message.role for message in asked.messages] not in ROLES:
        raise InputError(
            "a conversation is one user's message, perhaps behind a system's and before the beginning of a reply",
            "messages",
            f"Send roles in one of these orders: {'; '.join(', '.join(roles) for roles in ROLES)}.",
        )
    return asked


def _refused(kind: str, said: str, where: tuple[str | int, ...]) -> InputError:
    """What pydantic says of a key, with what may stand there."""
    section = SECTIONS.get(str(where[0]), Body) if len(where) > 1 else Body
    fields = {**Body.model_fields, **section.model_fields}
    names = [str(part) for part in where]
    if kind == "extra_forbidden":
        what, fix = "there is no such key", f"Leave it out; there are {', '.join(section.model_fields)}."
        return InputError(what, ".".join(names), fix)
    names = [str(part) for part in where if isinstance(part, int) or part in fields]  # without the types of a union
    name = next((name for name in reversed(names) if name in fields), "messages")
    fix = f"`{name}` is {fields[name].description}."
    return InputError("it is missing" if kind == "missing" else said, ".".join(names) or "the body", fix)


def _json(body: bytes) -> Any:
    """What a body holds; raises InputError, for nesting too deep to read, too."""
    if len(body) > LONGEST:
        raise InputError(f"the request is longer than {LONGEST} bytes", fix="Send a shorter one.")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is no JSON ({error})") from None


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"this is no text ({error.reason})", where, "Send whole characters.") from None


def _request(chat: Chat, asked: Body) -> Request:
    said = {message.role: message.content for message in asked.messages}
    adds = (_push(chat, asked.steering),) if asked.steering and asked.steering.strength else ()
    most = asked.max_tokens
    return Request("chat", said["user"], said.get("system"), said.get("assistant", ""), adds, asked.seed, most)


def _push(chat: Chat, steering: SteeringBody) -> Add:
    if (steering.direction is None) is (steering.vector is None):
        raise InputError("steering names either a direction or a vector", "steering", "Give one of the two.")
    if steering.direction is not None:
        number = chat.find(str(steering.direction), LISTING)
        return chat.directions[number].add(steering.strength * chat.thresholds.get(number, 1.0))
    assert steering.vector is not None
    width = chat.switch.width
    if steering.layer is None or len(steering.vector) != width:
        raise InputError(f"a vector has {width} numbers and a layer", "steering.vector")
    check_layer_number(steering.layer, chat.switch.layers, "steering.layer")
    return Add(steering.layer, steering.strength * torch.tensor(steering.vector))


def _sampling(own: Sampling, asked: Body) -> Sampling:
    return Sampling(
        own.temperature if asked.temperature is None else asked.temperature,
        own.top_p if asked.top_p is None else asked.top_p,
        own.max_new_tokens,
        own.repetition_penalty,
    )


def serve(chat: Chat, port: int) -> None:
    """Serve the page to this machine alone until Ctrl-C.

    Raises:
        InputError: if the port is taken.
    """
    answering = handler(chat)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), answering)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or "ports are 0 to 65535"
        raise InputError(f"the port cannot be used ({why})", f"port {port}", "Name another one.") from None
    print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    with server:
        server.serve_forever()


class _Replies(BaseHTTPRequestHandler):
    def send_json(self, status: int, value: Any) -> None:
        self.send_body(status, json.dumps(value).encode(), "application/json")

    def read_body(self) -> bytes:
        """The whole body, read to its end; raises InputError if its length is not said."""
        said = self.headers.get("Content-Length", "0")
        if not (said.isascii() and said.isdigit()):
            raise InputError(f"{said!r} is no number of bytes", "Content-Length")
        length, kept = int(said), b""
        while length > 0 and (part := self.rfile.read(min(length, LONGEST))):
            length, kept = length - len(part), kept if len(kept) > LONGEST else kept + part
        return kept

    def send_body(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal belongs to the user."""


def handler(chat: Chat) -> type[BaseHTTPRequestHandler]:
    """What answers requests; those that come meanwhile wait, and are then answered together."""
    page = render("recipes.using", "chat.html", title="Steered and answered", colours=())

    class Handler(_Replies):
        def do_GET(self) -> None:
            if self.path == "/":
                self.send_body(200, page.encode(), "text/html; charset=utf-8")
            elif self.path == "/directions":
                names = [[number, each.label or str(number)] for number, each in chat.directions.items()]
                self.send_json(200, {"directions": names, "unit": chat.unit})
            else:
                self.send_json(404, {"error": "there is no such page"})

        def do_POST(self) -> None:
            # A page of another site can send a form, but not JSON.
            if self.headers.get_content_type() != "application/json" or self.path not in ("/answer", PATH):
                wanted = f"send JSON to /answer or {PATH}, with the header Content-Type: application/json"
                self.send_json(400, {"error": wanted})
                return
            try:
                body = self.read_body()
                found = complete(chat, body) if self.path == PATH else _answers(chat, body)
                self.send_json(200, found)
            except (InputError, ValueError) as error:
                said: Any = {"message": str(error), "type": "invalid_request_error"}
                self.send_json(400, {"error": said if self.path == PATH else str(error)})
            except (RunError, RuntimeError, IndexError) as error:  # The last two: memory, positions.
                self.send_json(500, {"error": {"message": str(error), "type": "server_error"}})

    return Handler


def _answers(chat: Chat, body: bytes) -> dict[str, Any]:
    """What the page shows: the base model's answer and the arm's."""
    asked = _Asked.read(body, chat)
    found = chat.answers(asked.prompt, asked.direction, asked.strength, asked.seed)
    return {"answers": [{"arm": each.arm, "text": each.text, "cues": each.cues} for each in found]}


@dataclass(frozen=True)
class _Asked:
    """A question of the page."""

    prompt: str
    direction: int | None
    strength: float
    seed: int

    @classmethod
    def read(cls, body: bytes, chat: Chat) -> "_Asked":
        """Raises ValueError, or InputError for a direction that is not there."""
        value = _json(body)
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not value["prompt"].strip():
            raise ValueError("there is no question")
        _check_text(value["prompt"], "prompt")
        name = value.get("direction")
        direction = None if name is None else chat.find(str(name), LISTING)
        try:
            return cls(value["prompt"], direction, float(value.get("strength", 1)), int(value.get("seed", 0)))
        except (TypeError, ValueError, OverflowError):
            raise ValueError("strength and seed are numbers") from None
