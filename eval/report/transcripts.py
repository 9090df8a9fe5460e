"""The trials that are embedded in the page, cut so that a browser needs no character arithmetic."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from eval.metrics import pair_key
from eval.store import Trial

MOST_TRIALS = 600
CELLS_IN_TURN = {"steered": 6, "unsteered": 2}
"""How many cells of a condition are taken in turn; one of any other."""
Arrived = tuple[str, Trial]


def embedded(rows_by_arm: Mapping[str, Sequence[Trial]], most: int = MOST_TRIALS) -> list[dict[str, Any]]:
    """At most `most` trials: whole cells, so that arms stand side by side, of every condition, most of `steered`.

    Cells are taken in the order of a hash of what they are: the same choice whatever the file order, and
    blind to what the responses say.
    """
    cells: dict[str, dict[str, list[Arrived]]] = {}
    for arm, rows in rows_by_arm.items():
        for row in rows:
            place = cells.setdefault(row.condition, {})
            place.setdefault(_digest(pair_key(row)), []).append((arm, row))
    queues = {condition: [cell for _, cell in sorted(cells[condition].items())] for condition in sorted(cells)}
    entries: list[dict[str, Any]] = []
    for number, cell in enumerate(_in_turn(queues)):
        if len(entries) + len(cell) > most:
            break
        entries += [_entry(arm, row, number) for arm, row in cell]
    return entries


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no tag can end it, no line separator can break it."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _in_turn(queues: Mapping[str, Sequence[list[Arrived]]]) -> list[list[Arrived]]:
    turns = [
        (place // CELLS_IN_TURN.get(condition, 1), number, place, cell)
        for number, (condition, queue) in enumerate(queues.items())
        for place, cell in enumerate(queue)
    ]
    return [cell for *_, cell in sorted(turns, key=lambda each: each[:3])]


def _digest(key: tuple[Any, ...]) -> str:
    return hashlib.sha256(repr(key).encode("utf-8", "backslashreplace")).hexdigest()


def _entry(arm: str, row: Trial, cell: int) -> dict[str, Any]:
    known, strength = row.cell, row.cell.strength
    return {
        "cell": cell,
        "arm": arm,
        "condition": row.condition,
        "prompt": known.prompt,
        "label": known.label,
        "latent": known.latent,
        "strength": strength.norm if strength else None,
        "raw": strength.raw if strength else None,
        "parts": _parts(row),
        "flags": sorted(name for name, found in row.flags.items() if found),
        "error": row.error,
    }


def _parts(row: Trial) -> list[list[Any]]:
    """The response in order as [text, score, is_attempt]; offsets are Python's, not JavaScript's UTF-16."""
    response, at = row.response, 0
    parts: list[list[Any]] = []
    for attempt in row.attempts:
        if attempt.start > at:
            parts.append([response[at : attempt.start], None, False])
        parts.append([response[attempt.start : attempt.end], attempt.score, True])
        at = attempt.end
    if at < len(response):
        parts.append([response[at:], None, False])
    return parts
