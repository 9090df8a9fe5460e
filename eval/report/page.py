"""One self-contained HTML page that tells what an experiment found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esr_train.files import replacing
from eval.conditions import order, title
from eval.metrics import METRICS
from eval.report.drawing import arm_colours, inline_svg
from eval.report.figures import draw_figures, save_figures
from eval.report.material import Material
from eval.report.story import shown, story
from eval.report.template import HERE, render
from eval.report.transcripts import embedded, script_json
from eval.store import Trial

FIRST = ("steered", "unsteered", "steered_recalibrated")
"""Conditions that stand before the figures; the others are controls."""
HEADLINE = {
    "multi_attempt_rate": "Second attempt",
    "esr_rate": "ESR",
    "esr10_rate": "ESR ≥ 10",
    "worsening_rate": "Worse",
    "first_score": "First score",
    "last_score": "Last score",
}


def write_report(
    run_dir: Path,
    heading: str,
    metrics: Mapping[str, Any],
    rows_by_arm: Mapping[str, Sequence[Trial]],
    thresholds: Mapping[str, Any] | None,
    notes: Mapping[str, Any],
    agreement: Mapping[str, Any] | None = None,
    mixtures: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write `report.html` and `figures/*.{svg,csv}` into `run_dir`.

    Args:
        run_dir: the run's folder.
        heading: of the page.
        metrics: as in metrics.json.
        rows_by_arm: the trials of each arm.
        thresholds: as in thresholds.json (`thresholds`: entries with `latent`, `label`, `norm`, `low`, `high`,
            `bound`), or None: then strengths are read from the trials.
        notes: `held_out` says what training never saw (text, a list, or name -> text); every other entry is
            shown as a line of "How this was measured".
        agreement: as in agreement.json, where several judges were asked.
        mixtures: sweep -> arm -> share of self-correction rows in its training file.

    Returns:
        The path of `report.html`.
    """
    figures = draw_figures(Material(metrics, rows_by_arm, thresholds, agreement, mixtures or {}))
    save_figures(run_dir / "figures", figures)
    arms = list(metrics["arms"])
    trials = embedded(rows_by_arm)
    page = render(
        HERE,
        "page.html",
        title=heading,
        story=story(metrics),
        arms=list(enumerate(arms)),
        colours=list(arm_colours(arms).values()),
        tables=[
            {"groups": _groups(metrics["arms"], wanted), "differences": _groups(metrics["paired"], wanted, signed=True)}
            for wanted in _halves(metrics["arms"])
        ],
        headline=HEADLINE,
        everything=_everything(metrics["arms"]),
        figures=[(figure, inline_svg(figure.svg, arm_colours(arms))) for figure in figures],
        held_out=_lines(notes.get("held_out")),
        notes={name.replace("_", " "): _lines(value) for name, value in notes.items() if name != "held_out"},
        embedded=len(trials),
        trials=sum(len(rows) for rows in rows_by_arm.values()),
        data=script_json({"arms": arms, "conditions": _titles(metrics["arms"]), "trials": trials}),
    )
    with replacing(run_dir / "report.html") as file:
        file.write(page)
    return run_dir / "report.html"


def _halves(arms: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The conditions of the headline, and the controls; where there is no headline, the controls take its place."""
    conditions = list(_titles(arms))
    first = [name for name in conditions if name in FIRST]
    return (first, [name for name in conditions if name not in FIRST]) if first else (conditions, [])


def _groups(arms: Mapping[str, Any], wanted: Sequence[str], signed: bool = False) -> list[dict[str, Any]]:
    """Per wanted condition a row for every arm measured under it, a cell for every column."""
    conditions = _titles(arms)
    return [
        {
            "title": conditions[condition],
            "rows": [
                {
                    "arm": arm,
                    "n": found[condition]["multi_attempt_rate"]["n"],
                    "cells": [_cell(found[condition], name, signed) for name in HEADLINE],
                }
                for arm, found in arms.items()
                if condition in found
            ],
        }
        for condition in wanted
        if condition in conditions
    ]


def _cell(found: Mapping[str, Any], name: str, signed: bool) -> dict[str, Any]:
    estimate = found.get(name)
    text = shown(estimate, METRICS[name].is_rate, signed) or {"value": "–", "interval": "", "unscored": ""}
    clear = bool(signed and estimate and estimate["low"] is not None and estimate["low"] * estimate["high"] > 0)
    return {**text, "sure": clear}


def _everything(arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every estimate there is, one row each."""
    return [
        {
            "condition": condition,
            "metric": name.replace("_", " "),
            "arm": arm,
            "n": estimate["n"],
            "missing": estimate["unscored"],
            **text,
        }
        for condition in _titles(arms)
        for name in METRICS
        for arm, found in arms.items()
        if (estimate := found.get(condition, {}).get(name)) and (text := shown(estimate, METRICS[name].is_rate))
    ]


def _titles(arms: Mapping[str, Any]) -> dict[str, str]:
    """Every condition that was measured, in reading order, and what it is called."""
    return {name: title(name) for name in sorted({name for found in arms.values() for name in found}, key=order)}


def _lines(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [f"{name}: {text}" for name, text in value.items()]
    return [str(line) for line in value] if isinstance(value, list | tuple) else [str(value)]
