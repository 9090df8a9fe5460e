"""Questions to a language model that are asked until the answer can be used, and never twice once it could."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from esr_train.errors import InputError
from esr_train.files import read_json, replacing, write_json

Value = TypeVar("Value")
ROUNDS = 6
"""How often a question is asked in all, if its answers cannot be used."""


@dataclass(frozen=True)
class Reply:
    """What came back for a question: a text, or why there is none."""

    text: str | None
    error: str | None = None


Answered = Callable[[int, Reply], None]
"""Told of a question's place and its reply, as soon as that comes."""


def ignored(place: int, reply: Reply) -> None:
    """An `Answered` that does nothing."""


@dataclass
class Spent:
    """What questions have cost so far.

    Args:
        asked: replies that came.
        lost: requests that got no reply: refused for their rate, timed out, cut off.
        cached: answers taken from the disk instead.
        refused: replies that could not be used, so that the question was asked again.
        failed: questions that stayed without an answer.
        read, written: tokens of questions and of replies.
        dollars: None where no price is known.
    """

    asked: int = 0
    lost: int = 0
    cached: int = 0
    refused: int = 0
    failed: int = 0
    read: int = 0
    written: int = 0
    dollars: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.asked:,} asked", f"{self.cached:,} from the cache"]
        if self.lost:
            parts.append(f"{self.lost:,} without reply")
        if self.refused:
            parts.append(f"{self.refused:,} replies refused")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        parts.append(f"{self.read:,} tokens read, {self.written:,} written")
        if self.dollars is not None:
            parts.append(f"${self.dollars:,.2f}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Limit:
    """What questions may cost in all; None is no limit. Requests that are open when it is reached still count."""

    tokens: int | None = None
    dollars: float | None = None

    def reached(self, spent: Spent) -> bool:
        """Whether nothing more may be asked.

        Raises:
            InputError: if dollars are limited and replies came of which nobody knows the price.
        """
        if self.dollars is not None and spent.asked and spent.dollars is None:
            raise InputError(
                "dollars are limited, but what this model costs is not known",
                "limit_dollars",
                "Set `price` (dollars per million tokens read and written), or limit tokens instead.",
            )
        tokens = self.tokens is not None and spent.read + spent.written >= self.tokens
        return tokens or (self.dollars is not None and (spent.dollars or 0.0) >= self.dollars)


class Llm(Protocol):
    """A language model that answers single messages.

    Attributes:
        name: the model's.
        spent: counted by whoever asks and by the model itself.
    """

    name: str
    spent: Spent

    @property
    def settings(self) -> dict[str, Any]:
        """Whatever else decides what it answers (JSON values)."""
        ...

    def ask(self, questions: Sequence[str], answered: "Answered" = ignored) -> list[Reply]:
        """One reply a question, in order; `answered` is called with the place and the reply as each comes.

        Raises:
            InputError: if no question can ever be answered, such as for want of a key.
            RunError: if none of many questions was answered: the model is out of reach; if a limit is reached.
        """
        ...


@dataclass(frozen=True)
class Answer(Generic[Value]):
    """A question's parsed answer, the text it was read from, or why there is none; whether there was a reply at all."""

    value: Value | None
    text: str = ""
    error: str | None = None
    replied: bool = True


@dataclass(frozen=True)
class Cache:
    """Usable answers on disk, one small file each; any number of processes may share the folder.

    Args:
        folder: made when the first answer is kept.
    """

    folder: Path

    def get(self, key: str) -> str | None:
        """The kept text; an unreadable file counts as none."""
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if isinstance(found, str) else None

    def put(self, key: str, model: str, text: str) -> None:
        """Keep a text; the file is there whole or not at all."""
        with replacing(self._path(key)) as file:
            json.dump({"model": model, "answer": text}, file, ensure_ascii=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


@dataclass
class Asker:
    """Asks a model until each answer can be parsed; usable answers are kept on disk.

    Args:
        llm: who is asked.
        cache: where answers are kept; None keeps none.
        repeat: another number asks anew what is in the cache already.
        rounds: how often a question is asked at most.
        label: shown with the progress.
        ledger: file of what was spent so far, kept up to date with every reply and read again by a later run.
    """

    llm: Llm
    cache: Cache | None = None
    repeat: int = 0
    rounds: int = ROUNDS
    label: str = field(default="asking", kw_only=True)
    ledger: Path | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Go on counting where an earlier run stopped."""
        if self.ledger and self.ledger.is_file():
            earlier = Spent(**read_json(self.ledger))
            for name, count in asdict(earlier).items():
                if count is not None:
                    setattr(self.spent, name, count)

    @property
    def spent(self) -> Spent:
        """What was asked so far."""
        return self.llm.spent

    def ask(self, questions: Sequence[str], parse: Callable[[int, str], Value]) -> list[Answer[Value]]:
        """The parsed answer of each question, in order.

        A reply that `parse` refuses is asked for again, with the reason put behind the question. What was seen
        last stands in the `error` of a question that never got a usable one.

        Args:
            questions: whole messages.
            parse: takes a question's place and a reply's text; raises ValueError for a reply it cannot use.
        """
        keys = [self._key(question) for question in questions]
        answers = [self._kept(place, key, parse) for place, key in enumerate(keys)]
        texts = list(questions)
        for _ in range(self.rounds):
            pending = [place for place, answer in enumerate(answers) if answer.value is None]
            if not pending:
                break

            def take(number: int, reply: Reply, pending: list[int] = pending) -> None:
                place = pending[number]
                answers[place] = self._taken(keys[place], _parsed(place, reply, parse))

            self._round([texts[place] for place in pending], take)
            for place in pending:
                if answers[place].replied and answers[place].value is None:
                    texts[place] = again(questions[place], str(answers[place].error))
        self.spent.failed += sum(answer.value is None for answer in answers)
        self._write()
        return answers

    def _round(self, questions: Sequence[str], take: Answered) -> None:
        """Ask once. A reply is taken when it comes, so that an interruption loses those alone that are open."""
        from tqdm import tqdm

        taken: set[int] = set()
        with tqdm(
            total=len(questions), desc=self.label, unit="answer", leave=False, delay=1, dynamic_ncols=True
        ) as bar:

            def answered(number: int, reply: Reply) -> None:
                taken.add(number)
                take(number, reply)
                bar.set_postfix_str(str(self.spent), refresh=False)
                bar.update()

            for number, reply in enumerate(self.llm.ask(questions, answered)):
                if number not in taken:
                    take(number, reply)

    def _taken(self, key: str, answer: Answer[Value]) -> Answer[Value]:
        if answer.value is None:
            self.spent.refused += answer.replied
        elif self.cache:
            self.cache.put(key, self.llm.name, answer.text)
        self._write()
        return answer

    def _write(self) -> None:
        if self.ledger:
            write_json(self.ledger, asdict(self.spent))

    def _kept(self, place: int, key: str, parse: Callable[[int, str], Value]) -> Answer[Value]:
        text = self.cache.get(key) if self.cache else None
        if text is None:
            return Answer(None)
        answer = _parsed(place, Reply(text), parse)
        self.spent.cached += answer.value is not None
        return answer

    def _key(self, question: str) -> str:
        told = [self.llm.name, self.llm.settings, self.repeat, question]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def again(question: str, why: str) -> str:
    """The question as it is put after a reply that could not be used."""
    return f"{question}\n\nAn earlier reply could not be used: {why}. Reply anew, in exactly the form asked for."


def _parsed(place: int, reply: Reply, parse: Callable[[int, str], Value]) -> Answer[Value]:
    if reply.text is None:
        return Answer(None, "", reply.error, replied=False)
    try:
        return Answer(parse(place, reply.text), reply.text)
    except ValueError as error:
        return Answer(None, reply.text, str(error).rstrip("."))


def without_secrets(text: str) -> str:
    """A text in which every key and token of the environment is blotted out; for messages of model APIs."""
    for name, value in os.environ.items():
        if len(value) >= 8 and name.upper().endswith(("KEY", "TOKEN", "SECRET", "PASSWORD")):
            text = text.replace(value, "***")
    return text
