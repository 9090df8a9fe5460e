"""One self-contained HTML page that tells what an experiment found, with trials to browse in it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esr_train.files import replacing
from eval.conditions import order, title
from eval.course import TokenSums
from eval.metrics import METRICS, headline, pair_key
from eval.report import arm_figures, prefix_figures  # noqa: F401 - register their figures, behind those of `figures`
from eval.report.attack_figures import SUCCESSES, Attack, attacks
from eval.report.drawing import TEMPLATES, Figure, arm_colours, inline_svg, render, save_figures
from eval.report.figures import Material, draw_figures
from eval.report.findings import opening, story
from eval.report.story import GOAL_COLUMNS, goal_lines, ratios, shown, task_lines, verdict
from eval.report.tables import FIRST, save_tables
from eval.statistics import Estimate
from eval.store import Trial
from eval.summary import LAST, STEERED, Summary, Table

MOST_TRIALS = 600
"""Trials embedded in the page."""
CELLS_IN_TURN = {STEERED: 6, "unsteered": 2}
"""How many cells of a condition are taken in turn to be embedded; one of any other."""
Sums = Mapping[str, Mapping[str, TokenSums]]
"""Arm -> trial key -> the detectors' sum at every token."""
Notes = Mapping[str, str | Sequence[str] | Mapping[str, str]]
"""What a report says about how it was measured: name -> a text, several, or named ones."""


def write_report(run_dir: Path, heading: str, material: Material, notes: Notes) -> Path:
    """Write `report.html`, `figures/*.{svg,csv}` and `tables/*.{csv,md,tex}` into `run_dir`.

    Args:
        run_dir: the run's folder.
        notes: `run` says what was run, `held_out` what training never saw; every other entry is a line of "How this was
            measured".

    Returns:
        The path of `report.html`.
    """
    figures = draw_figures(material)
    save_figures(run_dir / "figures", figures)
    save_tables(run_dir / "tables", material.summary)
    with replacing(run_dir / "report.html") as file:
        file.write(report_page(heading, material, notes, figures))
    return run_dir / "report.html"


def report_page(heading: str, material: Material, notes: Notes, figures: Sequence[Figure]) -> str:
    """The page by itself (see `write_report`)."""
    summary = material.summary
    arms, conditions = list(summary.arms), sorted(summary.conditions, key=order)
    # Where there is no headline, the controls take its place.
    first = [name for name in conditions if name in FIRST] or conditions
    halves = (first, [name for name in conditions if name not in first])
    trials = embedded(material.rows_by_arm, sums=material.token_sums)
    titles = {name: title(name) for name in conditions}
    return render(
        TEMPLATES,
        "page.html",
        title=heading,
        opening=opening(material, "held_out" in notes),
        story=story(summary),
        arms=list(enumerate(arms)),
        colours=list(arm_colours(arms).values()),
        tables=[(_groups(summary.arms, half), _groups(summary.paired, half)) for half in halves],
        everything=_groups(summary.arms, conditions),
        metrics=METRICS,
        headline={name: METRICS[name] for name in headline()},
        shown=shown,
        ratios=ratios(summary),
        tasks=task_lines(summary),
        goals=goal_lines(summary),
        goal_columns=GOAL_COLUMNS,
        attacks=_attack_groups(summary),
        attack_metrics=[LAST, *SUCCESSES],
        target=material.target,
        figures=[(figure, inline_svg(figure.svg, arm_colours(arms))) for figure in figures],
        notes={name.replace("_", " "): _lines(value) for name, value in notes.items()},
        embedded=len(trials),
        summed=sum("sums" in entry for entry in trials),
        trials=sum(len(rows) for rows in material.rows_by_arm.values()),
        noun=material.noun,
        data=script_json({"arms": arms, "conditions": titles, "noun": material.noun, "trials": trials}),
    )


def _groups(arms: Table[Estimate], conditions: Sequence[str]) -> list[tuple[str, dict[str, Mapping[str, Estimate]]]]:
    """Each condition's title, and the estimates of every arm that was measured under it."""
    groups = [(name, {arm: found[name] for arm, found in arms.items() if name in found}) for name in conditions]
    return [(title(name), measured) for name, measured in groups if measured]


def _attack_groups(summary: Summary) -> list[tuple[str, str, list[Attack]]]:
    """Each attack's title, whether it moves the base model, and what it did to every arm."""
    by_name: dict[str, list[Attack]] = {}
    for attack in attacks(summary):
        by_name.setdefault(attack.name, []).append(attack)
    return [(title(name), verdict(summary, name), made) for name, made in by_name.items()]


def _lines(value: str | Sequence[str] | Mapping[str, str]) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{name}: {text}" for name, text in value.items()]
    return [value] if isinstance(value, str) else list(value)


def embedded(
    rows_by_arm: Mapping[str, Sequence[Trial]], most: int = MOST_TRIALS, sums: Sums | None = None
) -> list[dict[str, Any]]:
    """At most `most` trials: whole cells, so that arms stand side by side, of every condition, most of `steered`.

    Cells are taken in the order of a hash of what they are: the same choice whatever the file order, and
    blind to what the responses say.
    """
    cells: dict[str, dict[str, list[tuple[str, Trial]]]] = {}
    for arm, rows in rows_by_arm.items():
        for row in rows:
            key = hashlib.sha256(repr(pair_key(row)).encode("utf-8", "backslashreplace")).hexdigest()
            cells.setdefault(row.condition, {}).setdefault(key, []).append((arm, row))
    turns = [
        (index // CELLS_IN_TURN.get(condition, 1), number, index, cell)
        for number, condition in enumerate(sorted(cells))
        for index, (_, cell) in enumerate(sorted(cells[condition].items()))
    ]
    entries: list[dict[str, Any]] = []
    for number, (*_, cell) in enumerate(sorted(turns, key=lambda turn: turn[:3])):
        if len(entries) + len(cell) > most:
            break
        entries += [{**_entry(arm, row, number), **_summed(row, (sums or {}).get(arm, {}))} for arm, row in cell]
    return entries


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no tag can end it, no line separator can break it."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


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


def _summed(row: Trial, sums: Mapping[str, TokenSums]) -> dict[str, Any]:
    """The response token by token as [text, sum], if it was read and is still the one that was read."""
    read = sums.get(row.key)
    if read is None or "".join(read.tokens) != row.response:
        return {}
    return {"sums": [list(pair) for pair in zip(read.tokens, read.sums, strict=True)]}


def _parts(row: Trial) -> list[list[Any]]:
    """The response in order as [text, score, is_attempt]; offsets are Python's, not JavaScript's UTF-16."""
    parts: list[list[Any]] = []
    at = 0
    for attempt in row.attempts:
        if attempt.start > at:
            parts.append([row.response[at : attempt.start], None, False])
        parts.append([row.response[attempt.start : attempt.end], attempt.score, True])
        at = attempt.end
    return [*parts, [row.response[at:], None, False]] if at < len(row.response) else parts
