"""Talk to a model while it is steered: the base model beside an arm, in the terminal or on a page of this machine."""

import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from esr_train.adapters import is_complete, load_adapter
from esr_train.errors import InputError
from esr_train.recipe import Recipe
from esr_train.restarts import find_cues
from esr_train.steering.directions import Direction
from esr_train.steering.engine import Request, Sampling
from esr_train.steering.transformers_engine import TransformersEngine
from eval.calibration import read_thresholds
from recipes.resources import Resources, open_resources
from recipes.steering_latents import THRESHOLDS
from recipes.weights import adapter_folder

PAGE = Path(__file__).with_name("chat.html")
LONGEST = 20_000
"""Bytes of a question that the page may send."""
HELP = """\
/list            what can steer        /with NAME    steer along it (a label, or its number)
/at 1.2          how hard, {unit}
/off             steer no more         /quit         leave"""


@dataclass(frozen=True)
class Answer:
    """What one arm said; `cues` are the ranges [start, end) in which it takes something back."""

    arm: str
    text: str
    cues: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Chat:
    """A model, with an adapter or without, and what it may be steered along.

    Args:
        model: of transformers.
        tokenizer: the model's.
        arm: what the adapter is called; None: there is none.
        directions: by number, each with its residual norm.
        thresholds: direction -> its threshold in residual norms; strengths are then multiples of it. Those without one
            are not offered. Empty: nothing was calibrated, and strengths are in residual norms.
        sampling: of the answers.
    """

    model: Any
    tokenizer: Any
    arm: str | None
    directions: Mapping[int, Direction]
    thresholds: Mapping[int, float]
    sampling: Sampling

    @property
    def unit(self) -> str:
        """What a strength of 1 is."""
        return "in multiples of the base model's threshold" if self.thresholds else "in median residual norms"

    def find(self, name: str) -> int:
        """The number of a direction that is given by its label or its number.

        Raises:
            InputError: if there is none.
        """
        wanted = name.strip().lower()
        for number, direction in self.directions.items():
            if wanted in (str(number), (direction.label or "").lower()):
                return number
        near = [
            each.label for each in self.directions.values() if each.label and wanted and wanted in each.label.lower()
        ]
        hint = f"Do you mean {', '.join(near[:5])}?" if near else "/list names what there is."
        raise InputError(f"nothing steers towards {name.strip()!r}", None, hint)

    def answers(self, prompt: str, direction: int | None, strength: float, seed: int = 0) -> list[Answer]:
        """What the base model and the arm say; both draw the same noise.

        Args:
            prompt: the user's message.
            direction: its number; None: nothing steers.
            strength: in `unit`.
            seed: of sampling.
        """
        adds: tuple[Any, ...] = ()
        if direction is not None and strength:
            adds = (self.directions[direction].add(strength * self.thresholds.get(direction, 1.0)),)
        request = Request("chat", prompt, interventions=adds, seed=seed)
        plain = self.model.disable_adapter() if self.arm else nullcontext()
        with plain:
            found = [("base", self._say(request))]
        if self.arm:
            found.append((self.arm, self._say(request)))
        return [Answer(arm, text, tuple(find_cues(text))) for arm, text in found]

    def _say(self, request: Request) -> str:
        return TransformersEngine(self.model, self.tokenizer, batch_rows=1).generate([request], self.sampling)[0].text


def open_chat(resources: Resources, arm: str | None) -> Chat:
    """A recipe's model, with the adapter of an arm, and what the recipe steers by.

    Args:
        resources: of the recipe.
        arm: None: the first one whose adapter is there.

    Raises:
        InputError: for an arm without a finished adapter, or a given one that cannot be used.
    """
    recipe = resources.recipe
    folders = {name: folder for name in recipe.arms if (folder := _adapter(recipe, name))}
    if arm is not None and arm not in folders:
        raise InputError(f"there is no finished adapter of the arm {arm!r}", str(recipe.directory), "Train it first.")
    chosen = arm or next(iter(folders), None)
    source, norm, labels = resources.source(), resources.residual_norm(), resources.labels()
    file = recipe.directory / THRESHOLDS
    found = read_thresholds(file).thresholds if file.is_file() else ()
    thresholds = {each.latent: each.norm for each in found if each.bound is None}
    numbers = thresholds or labels
    directions = {number: source.direction(number, norm, labels.get(number)) for number in numbers}
    model = resources.base_model()
    model = load_adapter(model, folders[chosen]) if chosen else model
    return Chat(model, resources.tokenizer(), chosen, directions, thresholds, resources.sampling())


def _adapter(recipe: Recipe, arm: str) -> Path | None:
    """The folder of an arm's finished adapter: given, or trained in the run (for its first seed), if there is one."""
    if given := recipe.arms[arm].adapter:
        return adapter_folder(given, f"arms.{arm}.adapter", recipe.model)
    seeds = [recipe.directory / f"seed-{seed}" for seed in recipe.seeds or ()]
    folders = (folder / "adapter" / arm for folder in (recipe.directory, *seeds))
    return next((folder for folder in folders if is_complete(folder)), None)


def chat(recipe: Recipe, arm: str | None, port: int | None) -> None:
    """Open a recipe's model and answer until the user leaves, in the terminal or at a port of this machine."""
    with open_resources(recipe, asks=False) as resources:
        opened = open_chat(resources, arm)
        if port is None:
            talk(opened, sys.stdin)
        else:
            serve(opened, port)


def talk(chat: Chat, lines: Iterable[str]) -> None:
    """Answer line by line; lines that begin with / change what steers."""
    arms = f"base and {chat.arm}" if chat.arm else "base alone: no arm is trained yet"
    print(
        f"{arms}; {len(chat.directions)} directions. A question, or one of\n{HELP.format(unit=chat.unit)}", flush=True
    )
    direction, strength = None, 1.0
    for line in lines:
        text = line.strip()
        word, _, rest = text.partition(" ")
        try:
            if word == "/quit":
                return
            if word == "/list":
                print(
                    ", ".join(f"{number}: {each.label or '?'}" for number, each in chat.directions.items()), flush=True
                )
            elif word in ("/with", "/at", "/off"):
                direction = chat.find(rest) if word == "/with" else None if word == "/off" else direction
                strength = _strength(rest) if word == "/at" else strength
                print(_state(chat, direction, strength), flush=True)
            elif text.startswith("/"):
                print(HELP.format(unit=chat.unit), flush=True)
            elif text:
                for answer in chat.answers(text, direction, strength):
                    print(f"\n{answer.arm} ({_state(chat, direction, strength)}):\n{_shown(answer)}", flush=True)
        except InputError as error:
            print(error, flush=True)


def _strength(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{text!r} is no number", "/at", "Such as /at 1.2.") from None


def _state(chat: Chat, direction: int | None, strength: float) -> str:
    if direction is None:
        return "not steered"
    return f"steered towards {chat.directions[direction].label or direction} at {strength:g}"


def _shown(answer: Answer) -> str:
    """The text, its corrections in bold where the terminal can."""
    if not sys.stdout.isatty():
        return answer.text
    parts, at = [], 0
    for start, end in answer.cues:
        parts += [answer.text[at:start], f"\033[1m{answer.text[start:end]}\033[0m"]
        at = end
    return "".join([*parts, answer.text[at:]])


def serve(chat: Chat, port: int) -> None:
    """Serve the page to this machine alone until Ctrl-C.

    Raises:
        InputError: if the port is taken.
    """
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler(chat))
    except OSError as error:
        raise InputError(f"the port cannot be used ({error.strerror})", f"--page {port}", "Name another one.") from None
    print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    with server:
        server.serve_forever()


def handler(chat: Chat) -> type[BaseHTTPRequestHandler]:
    """What answers the page's requests, one at a time."""
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
            elif self.path == "/directions":
                names = [[number, each.label or str(number)] for number, each in chat.directions.items()]
                self._send_json(200, {"directions": names, "unit": chat.unit})
            else:
                self._send_json(404, {"error": "there is no such page"})

        def do_POST(self) -> None:
            # A page of another site can send a form, but not JSON.
            if self.headers.get("Content-Type") != "application/json" or self.path != "/answer":
                self._send_json(400, {"error": "send JSON to /answer"})
                return
            try:
                asked = _Asked.read(self.rfile.read(min(int(self.headers.get("Content-Length") or 0), LONGEST)), chat)
            except (InputError, ValueError) as error:
                self._send_json(400, {"error": str(error)})
                return
            with lock:
                found = chat.answers(asked.prompt, asked.direction, asked.strength, asked.seed)
            self._send_json(200, {"answers": [{"arm": a.arm, "text": a.text, "cues": a.cues} for a in found]})

        def _send_json(self, status: int, value: Any) -> None:
            self._send(status, json.dumps(value).encode(), "application/json")

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the terminal belongs to the user."""

    return Handler


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
        value = json.loads(body)
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not value["prompt"].strip():
            raise ValueError("there is no question")
        name = value.get("direction")
        direction = None if name is None else chat.find(str(name))
        return cls(value["prompt"], direction, float(value.get("strength", 1)), int(value.get("seed", 0)))
