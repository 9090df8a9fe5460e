"""A run's arms beside each other, as text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.conditions import order, title
from eval.metrics import METRICS
from eval.report.page import HEADLINE
from eval.report.story import shown


def lines(metrics: Mapping[str, Any], everything: bool = False) -> list[str]:
    """Per condition: every arm's estimates with their intervals, then every arm minus base on shared cells.

    Args:
        metrics: as in metrics.json.
        everything: every metric instead of the headline's.
    """
    names = list(METRICS) if everything else list(HEADLINE)
    said: list[str] = []
    for condition in sorted({name for each in metrics["arms"].values() for name in each}, key=order):
        for heading, arms, signed in (
            (title(condition), metrics["arms"], False),
            ("Differences on shared cells (rates in percentage points)", metrics["paired"], True),
        ):
            found = {arm: each[condition] for arm, each in arms.items() if condition in each}
            if found:
                said += ["", heading, *_table(found, names, signed)]
    return said[1:] or ["no arm has been measured"]


def _table(arms: Mapping[str, Any], names: Sequence[str], signed: bool) -> list[str]:
    """A row for every metric and a column for every arm, padded to equal widths."""
    rows = [["", *arms]]
    rows += [[name, *(_cell(found.get(name), name, signed) for found in arms.values())] for name in names]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(found: Mapping[str, Any] | None, name: str, signed: bool) -> str:
    text = shown(found, METRICS[name].is_rate, signed)
    if not found or not text:
        return "–"
    interval = f" [{text['interval']}]" if text["interval"] else ""
    unscored = f", {text['unscored']}" if text["unscored"] else ""
    return f"{text['value']}{interval} (n {found['n']}{unscored})"
