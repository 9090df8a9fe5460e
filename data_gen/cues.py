"""What turns back: phrasings in several registers, drawn evenly over the registers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from esr_train.errors import InputError
from esr_train.files import read_lines
from esr_train.models import local_path

CUES = Path(__file__).parent / "cues.txt"
LABEL = "{label}"
SILENT = "silent"
"""The register of cues that say nothing of a mistake: they lead into the answer."""
_HEADING = re.compile(r"\[([\w -]+)\]")
_STEM_WORDS = 2


@dataclass(frozen=True)
class Cues:
    """Phrasings by register; `{label}` in one stands for what the detour is about."""

    registers: dict[str, tuple[str, ...]]

    def draw(self, rng: Random, label: str | None) -> str:
        """A register, evenly, and of it a cue; one that names the label is drawn only where the label is known.

        Returns:
            The cue with the label in its place.
        """
        usable = [self._usable(cues, label) for cues in self.registers.values()]
        registers = [cues for cues in usable if cues]
        if not registers:
            raise InputError(f"every cue names the topic ({LABEL}), and this detour's is not known", "cues")
        cue = rng.choice(registers[0] if len(registers) == 1 else rng.choice(registers))
        return cue.replace(LABEL, label or "")

    @staticmethod
    def _usable(cues: Sequence[str], label: str | None) -> list[str]:
        return [cue for cue in cues if label or LABEL not in cue]


def stem(rng: Random, cue: str) -> str:
    """The first word or two of a cue, for a model that writes the rest."""
    return " ".join(cue.split()[: rng.randint(1, _STEM_WORDS)])


def read_cues(path: str | None, registers: Sequence[str] | None = None) -> Cues:
    """Cues from a file, one a line, under `[register]` headings if it has any; the shipped set for None.

    Args:
        path: of the file.
        registers: the registers to draw from; None takes all.

    Raises:
        InputError: naming file and line, for a cue that comes twice or holds braces other than `{label}`; for a
            file without cues or without one of the registers.
    """
    file = (local_path(path) or path) if path else CUES
    found: dict[str, list[str]] = {}
    seen: dict[str, int] = {}
    register = "cues"
    for number, cue in read_lines(file):
        heading = _HEADING.fullmatch(cue)
        if heading:
            register = heading[1]
        else:
            _check(cue, f"{file}:{number}", seen.setdefault(cue.casefold(), number), number)
            found.setdefault(register, []).append(cue)
    if not found:
        raise InputError("there is no cue in the file", str(file), "Write one cue a line.")
    missing = [name for name in registers or () if name not in found]
    if missing:
        raise InputError(f"there is no cue under [{missing[0]}]", str(file), f"It has {', '.join(found)}.")
    return Cues({name: tuple(cues) for name, cues in found.items() if registers is None or name in registers})


def _check(cue: str, where: str, first: int, number: int) -> None:
    if first != number:
        raise InputError(f"the cue {cue!r} comes twice", where, f"It was at line {first}; remove one.")
    if re.search(r"[{}]", cue.replace(LABEL, "")):
        raise InputError(f"the only word in braces that a cue may have is {LABEL}", where)
