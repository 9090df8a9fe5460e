"""Talk to a model while it is steered: the base model beside an arm, in the terminal."""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esr_train.adapters import is_complete, load_adapter
from esr_train.errors import InputError, RunError
from esr_train.models import load_config
from esr_train.recipe import Recipe
from esr_train.restarts import find_cues
from esr_train.steering.directions import Direction
from esr_train.steering.engine import Request, Sampling
from eval.calibration import read_thresholds
from recipes.resources import Resources
from recipes.stages.steering_latents import THRESHOLDS
from recipes.stages.weights import adapter_folder
from recipes.using.switch import LoadedSwitch, Queue, ServedSwitch, Switch

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
        switch: what answers.
        arm: what the adapter is called; None: there is none.
        directions: by number, each with its residual norm.
        thresholds: direction -> its threshold in residual norms; strengths are then multiples of it. Those without one
            are not offered. Empty: nothing was calibrated, and strengths are in residual norms.
    """

    switch: Switch
    arm: str | None
    directions: Mapping[int, Direction]
    thresholds: Mapping[int, float]
    sampling: Sampling
    queue: Queue = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "queue", Queue(self.switch))

    @property
    def unit(self) -> str:
        """What a strength of 1 is."""
        return "in multiples of the base model's threshold" if self.thresholds else "in median residual norms"

    def find(self, name: str, listing: str) -> int:
        """The number of a direction that is given by its label or its number.

        Args:
            listing: what lists the directions to the one who asks.

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
        hint = f"Do you mean {', '.join(near[:5])}?" if near else f"{listing} names what there is."
        raise InputError(f"nothing steers towards {name.strip()!r}", None, hint)

    def answers(self, prompt: str, direction: int | None, strength: float, seed: int = 0) -> list[Answer]:
        """What the base model and the arm say; both draw the same noise.

        Args:
            direction: its number; None: nothing steers.
            strength: in `unit`.
        """
        adds: tuple[Any, ...] = ()
        if direction is not None and strength:
            adds = (self.directions[direction].add(strength * self.thresholds.get(direction, 1.0)),)
        request = Request("chat", prompt, interventions=adds, seed=seed)
        shares = {"base": 0.0} | ({self.arm: 1.0} if self.arm else {})
        found = [(arm, self.queue.ask(request, self.sampling, share).text) for arm, share in shares.items()]
        return [Answer(arm, text, tuple(find_cues(text))) for arm, text in found]


def open_chat(resources: Resources, arm: str | None) -> Chat:
    """A recipe's model, with the adapter of an arm, and what the recipe steers by.

    Args:
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
    switch = _switch(resources, folders[chosen] if chosen else None)
    return Chat(switch, chosen, directions, thresholds, resources.sampling())


def _switch(resources: Resources, adapter: Path | None) -> Switch:
    """What answers, as the recipe's engine has it."""
    recipe = resources.recipe
    if recipe.engine.kind == "vllm":
        config = load_config(recipe.model).get_text_config()
        switch = ServedSwitch(resources.engine, adapter, config.num_hidden_layers, config.hidden_size)
        switch.generate([], resources.sampling(), 1.0)  # starts vLLM
        return switch
    model = resources.base_model()
    return LoadedSwitch(
        load_adapter(model, adapter) if adapter else model, resources.tokenizer(), recipe.engine.batch_rows
    )


def _adapter(recipe: Recipe, arm: str) -> Path | None:
    """The folder of an arm's finished adapter: given, or trained in the run (for its first seed), if there is one."""
    if given := recipe.arms[arm].adapter:
        return adapter_folder(given, f"arms.{arm}.adapter", recipe.model)
    seeds = [recipe.directory / f"seed-{seed}" for seed in recipe.seeds or ()]
    folders = (folder / "adapter" / arm for folder in (recipe.directory, *seeds))
    return next((folder for folder in folders if is_complete(folder)), None)


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
                direction = chat.find(rest, "/list") if word == "/with" else None if word == "/off" else direction
                strength = _strength(rest) if word == "/at" else strength
                print(_state(chat, direction, strength), flush=True)
            elif text.startswith("/"):
                print(HELP.format(unit=chat.unit), flush=True)
            elif text:
                for answer in chat.answers(text, direction, strength):
                    print(f"\n{answer.arm} ({_state(chat, direction, strength)}):\n{_shown(answer)}", flush=True)
        except (InputError, RunError) as error:
            print(error, flush=True)


def _strength(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{text!r} is no number", "/at", "Such as /at 1.2.")
    return found


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
