"""The two ways a command can end badly."""

from collections.abc import Iterable, Sequence
from typing import Any

MOST_LETTERS = 2000


class InputError(Exception):
    """Bad input: one readable paragraph that says what is wrong, where, and what to change (exit code 2).

    Args:
        what: what is wrong, as a sentence without its full stop.
        where: `file:line`, a recipe key, or None.
        fix: what to change, as a sentence.
    """

    def __init__(self, what: str, where: str | None = None, fix: str | None = None) -> None:
        what, where = _short(what), where and _short(where)
        self.what, self.where, self.fix = what, where, fix
        text = f"{where}: {what}." if where else f"{what}."
        super().__init__(f"{text} {fix}" if fix else text)

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, str | None, str | None]]:
        # Its own process may not be the one that reports it: pickled by its parts, not by the finished text.
        return type(self), (self.what, self.where, self.fix)


class Mistakes(InputError):
    """Several mistakes in one paragraph, numbered."""

    def __init__(self, found: Sequence[InputError]) -> None:
        self.found = tuple(found)
        listed = " ".join(f"({number}) {error}" for number, error in enumerate(self.found, start=1))
        super().__init__(f"{len(self.found)} mistakes")
        self.args = (f"{self.what}: {listed}",)  # Each part was shortened by itself.

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.found,)


def refuse(mistakes: Iterable[InputError]) -> None:
    """Raise what was found, all at once and each once; nothing if that is nothing.

    Raises:
        InputError: naming every mistake.
    """
    parts = [part for error in mistakes for part in (error.found if isinstance(error, Mistakes) else (error,))]
    found = list({str(part): part for part in parts}.values())
    if found:
        raise found[0] if len(found) == 1 else Mistakes(found)


def _short(text: str) -> str:
    """The text in one line, and without its middle if it is long: files may hold anything, and a message quotes it."""
    text = text.replace("\n", " ")
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS // 2]} … {text[-MOST_LETTERS // 4 :]}"


class RunError(Exception):
    """A run that failed for reasons other than its input, such as an unsteered trial (exit code 1)."""


def first_line(error: Exception) -> str:
    """The beginning of a library's message, to be quoted in one of ours."""
    text = str(error).strip() or type(error).__name__
    return text.split("\n")[0].rstrip(".")
