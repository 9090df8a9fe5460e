"""Which cells are run: prompts and latents dealt to splits, and cells spread evenly over what is held out."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from esr_train.errors import InputError
from esr_train.files import read_rows
from esr_train.recipe import SplitSection

if TYPE_CHECKING:
    from esr_train.steering.directions import Direction

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Prompt:
    """A user's message and the topic that it is about."""

    text: str
    topic: str


def read_prompts(path: Path | str, column: str = "prompt") -> list[Prompt]:
    """Read prompts from a text, JSONL or CSV file, or from a data set (see `esr_train.files`).

    A prompt without a `topic` beside it is a topic by itself.

    Raises:
        InputError: naming `file:line`, for a malformed row or a prompt that comes twice (by `fingerprint`); for an
            empty file.
    """
    prompts: list[Prompt] = []
    first: dict[str, str] = {}
    for where, values in read_rows(path, column):
        prompt = _prompt(where, column, values)
        earlier = first.setdefault(fingerprint(prompt.text), where)
        if earlier != where:
            raise InputError(f"the {column} {prompt.text!r} comes twice", where, f"It was at {earlier}; remove one.")
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"there is no {column} in the file", str(path), f"Write one {column} a line.")
    return prompts


def _prompt(where: str, column: str, values: Mapping[str, Any]) -> Prompt:
    text, topic = values[column], values.get("topic")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"a {column} must be a text that is not empty", where)
    if topic is not None and not isinstance(topic, str):
        raise InputError(f"the topic {topic!r} is no text", where)
    return Prompt(text.strip(), (topic or "").strip() or text.strip())


def split_topics(topics: Iterable[str], section: SplitSection) -> dict[str, Split]:
    """Deal topics to splits: sorted by a seeded hash and cut at the exact proportions.

    A split whose share is above 0 gets one topic at least.

    Raises:
        InputError: if no topic is left for training.
    """
    ordered = sorted(set(topics), key=lambda topic: _hash("topic", section.seed, topic))
    test, validation = (_share(len(ordered), part) for part in (section.test, section.validation))
    if test + validation >= len(ordered):
        raise InputError(
            f"{len(ordered)} topics are too few: with {test} for test and {validation} for validation"
            " none is left for training",
            "prompts.splits",
            "Give more topics, or smaller shares.",
        )
    return {
        topic: "test" if place < test else "validation" if place < test + validation else "train"
        for place, topic in enumerate(ordered)
    }


def _share(count: int, part: float) -> int:
    return max(round(count * part), 1 if part > 0 else 0)


@dataclass(frozen=True)
class Pools:
    """Prompts by use.

    Args:
        topics: topic -> its split.
        train: prompts of training topics, for self-correction rows and for calibration.
        validation: evaluation prompts of validation topics.
        test: evaluation prompts of test topics.
        normal: prompts for normal answers, of all topics: those of training topics, and of every other topic
            the half that is not reserved for evaluation.
    """

    topics: dict[str, Split]
    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    normal: tuple[Prompt, ...]

    @property
    def all_prompts(self) -> list[Prompt]:
        """Every prompt once."""
        return list(dict.fromkeys((*self.train, *self.validation, *self.test, *self.normal)))


def make_pools(prompts: Sequence[Prompt], section: SplitSection) -> Pools:
    """Deal prompts to pools by their topic; a held-out topic's prompts are halved by a seeded hash.

    Raises:
        InputError: if no topic is left for training.
    """
    topics = split_topics((prompt.topic for prompt in prompts), section)
    reserved = _reserved(prompts, section.seed)
    pools: dict[str, list[Prompt]] = {name: [] for name in (*SPLITS, "normal")}
    for prompt in prompts:
        split = topics[prompt.topic]
        if split == "train" or prompt in reserved:
            pools[split].append(prompt)
        if split == "train" or prompt not in reserved:
            pools["normal"].append(prompt)
    return Pools(topics, **{name: tuple(pool) for name, pool in pools.items()})


def _reserved(prompts: Sequence[Prompt], seed: int) -> set[Prompt]:
    """The larger half of every topic's prompts: a topic's only prompt is there for evaluation."""
    by_topic: dict[str, list[Prompt]] = {}
    for prompt in sorted(prompts, key=lambda prompt: _hash("prompt", seed, prompt.text)):
        by_topic.setdefault(prompt.topic, []).append(prompt)
    return {prompt for group in by_topic.values() for prompt in group[: (len(group) + 1) // 2]}


def split_latents(
    latents: Sequence["Direction"], topics: Mapping[str, Split], section: SplitSection
) -> dict[Split, list["Direction"]]:
    """Deal latents to splits by what they stand for, so that no off-topic subject is on both sides.

    A latent whose label is a topic goes where the topic is; others are dealt by the hash of their label, and
    latents without one by their index.
    """
    subjects = [subject_of(latent) for latent in latents]
    dealt = deal_subjects(subjects, topics, section)
    result: dict[Split, list[Direction]] = {split: [] for split in SPLITS}
    for latent, subject in zip(latents, subjects, strict=True):
        result[dealt[subject]].append(latent)
    return result


def deal_subjects(subjects: Iterable[str], topics: Mapping[str, Split], section: SplitSection) -> dict[str, Split]:
    """The split of every subject: a topic's own for a topic, by the subject's hash for any other."""
    found = set(subjects)
    unknown = found - set(topics)
    dealt = {**topics, **(split_topics(unknown, section) if unknown else {})}
    return {subject: dealt[subject] for subject in found}


def subject_of(latent: "Direction") -> str:
    """What a latent stands for: its label, or its index if it has none."""
    return latent.label or f"latent {latent.latent}"


@dataclass(frozen=True)
class Cell:
    """What one trial runs, whatever the arm.

    Args:
        latent: index of the steering latent; None is unsteered.
        label: what the latent stands for.
        multiple: the strength, in multiples of the latent's threshold.
        seed: of the sampling; no two cells of one `make_cells` share it.
    """

    prompt: str
    topic: str
    latent: int | None
    label: str | None
    multiple: float
    seed: int

    @property
    def key(self) -> str:
        """A name that depends on the cell's content alone."""
        return _hash(self.prompt, self.latent, self.multiple, self.seed)[:16]


def make_cells(
    prompts: Sequence[Prompt], latents: Sequence["Direction"], count: int, seed: int, multiple: float = 1.0
) -> list[Cell]:
    """`count` cells, spread as evenly as possible over latents and prompts; deterministic.

    Latents come in turn; each takes the prompt that it met least so far and, of those, the one that was used
    least. A latent never steers a prompt of its own topic.

    Raises:
        InputError: if there are no prompts or latents, or a latent has no prompt of another topic.
    """
    if not prompts or not latents:
        missing = "prompt" if not prompts else "latent"
        raise InputError(f"there is no {missing} to evaluate on", "prompts.splits", "Hold out more topics.")
    rng = Random(seed)
    prompts, latents = rng.sample(list(prompts), len(prompts)), rng.sample(list(latents), len(latents))
    used: Counter[Prompt] = Counter()
    met: Counter[tuple[Prompt, int]] = Counter()
    cells = []
    for number in range(count):
        latent = latents[number % len(latents)]
        prompt = _least_used(prompts, latent, used, met)
        used[prompt] += 1
        met[prompt, latent.latent] += 1
        draw = derived_seed(seed, number)
        cells.append(Cell(prompt.text, prompt.topic, latent.latent, latent.label, multiple, draw))
    return cells


def _least_used(
    prompts: Sequence[Prompt],
    latent: "Direction",
    used: Mapping[Prompt, int],
    met: Mapping[tuple[Prompt, int], int],
) -> Prompt:
    others = [prompt for prompt in prompts if prompt.topic != latent.label]
    if not others:
        raise InputError(
            f"latent {latent.latent} ({latent.label}) has no evaluation prompt of another topic",
            "prompts.path",
            "Add prompts of other topics.",
        )
    return min(others, key=lambda prompt: (met[prompt, latent.latent], used[prompt]))


def unsteered(cells: Iterable[Cell]) -> list[Cell]:
    """The same prompts and seeds without steering."""
    return [replace(cell, latent=None, label=None, multiple=0.0) for cell in cells]


@dataclass(frozen=True)
class Side:
    """What training or evaluation uses: prompts, latents, and what the detours are about."""

    prompts: frozenset[str] = frozenset()
    latents: frozenset[Hashable] = frozenset()
    subjects: frozenset[str] = frozenset()

    @property
    def fingerprint(self) -> str:
        """A name that depends on its content alone."""
        parts = (self.prompts, map(repr, self.latents), self.subjects)
        return _hash(*(tuple(sorted(part)) for part in parts))[:16]


def check_disjoint(training: Side, evaluation: Side, where: str | None = None) -> None:
    """Refuse training and evaluation that share anything; texts are compared by `fingerprint`.

    Args:
        training, evaluation: what each of them has.
        where: the training file, if somebody else made it.

    Raises:
        InputError: naming what both sides have.
    """
    texts = {
        "prompt": (training.prompts, evaluation.prompts),
        "off-topic subject": (training.subjects, evaluation.subjects),
    }
    shared: dict[str, list[Hashable]] = {}
    for name, (ours, theirs) in texts.items():
        prints = {fingerprint(text) for text in ours}
        shared[name] = [text for text in sorted(theirs) if fingerprint(text) in prints]
    shared["latent"] = sorted(training.latents & evaluation.latents, key=repr)
    found = [f"{len(both)} {name}{'s' * (len(both) > 1)} ({_some(both)})" for name, both in shared.items() if both]
    if found:
        raise InputError(
            f"training and evaluation share {', '.join(found)}",
            where,
            "Remove them from the training data, or evaluate on others.",
        )


def _some(values: Sequence[Hashable]) -> str:
    return ", ".join(repr(value) for value in values[:3]) + (", …" if len(values) > 3 else "")


def fingerprint(text: str) -> str:
    """Hash of a text without its case, punctuation, and kind and amount of white space."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return _hash(" ".join(re.findall(r"\w+", plain)) or plain.strip())


def derived_seed(*parts: Hashable) -> int:
    """A sampling seed below 2^31 that depends on `parts` alone (strings and numbers)."""
    return int(_hash("seed", *parts)[:8], 16) >> 1


def _hash(*parts: Hashable) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
