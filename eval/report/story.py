"""Numbers as text: an estimate in a table, the report's opening sentences, and the tables for a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.conditions import order, title
from eval.metrics import METRICS, headline
from eval.statistics import Estimate
from eval.summary import STEERED, Summary

THIN = "\u202f"  # a narrow space at which no line breaks


@dataclass(frozen=True)
class Shown:
    """An estimate as text; `interval` and `unscored` are empty where there is none."""

    value: str
    interval: str
    unscored: str


def percent(share: float) -> str:
    """A share as a percentage, with a decimal only where it says something."""
    points = 100 * share
    return f"{points:.0f}" if points in (0, 100) or points >= 9.95 else f"{points:.1f}"


def shown(found: Estimate | None, is_rate: bool, signed: bool = False) -> Shown | None:
    """An estimate as text, None if it rests on nothing; `signed` for a difference, of rates in percentage points."""
    if found is None or found.value is None:
        return None

    def number(value: float) -> str:
        digits = 1 if signed and abs(value) < 9.95 else 0
        text = percent(abs(value)) if is_rate else f"{abs(value):.{digits}f}"
        sign = "−" if value < 0 and text.strip("0.") else "+" if signed and text.strip("0.") else ""
        return sign + text

    unscored = found.unscored / (found.n + found.unscored)
    return Shown(
        number(found.value) + (f"{THIN}%" if is_rate and not signed else ""),
        "" if found.low is None or found.high is None else f"{number(found.low)} to {number(found.high)}",
        f"{percent(unscored)}{THIN}% unscored" if unscored else "",
    )


def headline_arm(arms: Sequence[str]) -> str | None:
    """The arm the story is about: `tuned`, else the first that is not base."""
    others = [arm for arm in arms if arm != "base"]
    return "tuned" if "tuned" in others else next(iter(others), None)


def story(summary: Summary) -> list[str]:
    """Sentences for the top of the page; a sentence whose numbers are missing is left out."""
    arm = headline_arm(list(summary.arms))
    names = [name for name in ("base", arm) if name and name in summary.arms]
    steered = {name: summary.arms[name].get(STEERED, {}) for name in names}
    told = [_restarts(steered), _scores(steered)]
    if arm:
        told += [_gain(summary, arm), _unsteered(names, summary)]
    return [sentence for sentence in told if sentence]


def _restarts(steered: Mapping[str, Mapping[str, Estimate]]) -> str | None:
    parts = [
        f"{name} restarted in {text.value} of responses ({text.interval})"
        for name, found in steered.items()
        if (text := shown(found.get("multi_attempt_rate"), True))
    ]
    return f"Under steering, {', '.join(parts)}." if parts else None


def _scores(steered: Mapping[str, Mapping[str, Estimate]]) -> str | None:
    parts = [
        f"{last.value} for {name} (first attempt {first.value})"
        for name, found in steered.items()
        if (first := shown(found.get("first_score"), False)) and (last := shown(found.get("last_score"), False))
    ]
    return f"The last attempt scores {', '.join(parts)} of 100 on average." if parts else None


def _gain(summary: Summary, arm: str) -> str | None:
    found = summary.paired.get(f"{arm}-base", {}).get(STEERED, {}).get("last_score")
    text = shown(found, False, signed=True)
    if not text or not found:
        return None
    return f"On the same cells, {arm} minus base is {text.value} points ({text.interval}; {found.n} cells)."


def _unsteered(names: Sequence[str], summary: Summary) -> str | None:
    parts = [
        f"{name} in {text.value} of responses ({text.interval})"
        for name in names
        if (text := shown(summary.arms[name].get("unsteered", {}).get("restart_rate"), True))
    ]
    return f"Unsteered, they restart needlessly: {', '.join(parts)}." if parts else None


def tables(summary: Summary, everything: bool = False) -> list[str]:
    """Lines for a terminal. Per condition every arm's estimates, then every arm minus base on shared cells.

    Args:
        summary: the numbers.
        everything: every metric instead of the headline's.
    """
    names = list(METRICS) if everything else headline()
    lines: list[str] = []
    for condition in sorted(summary.conditions, key=order):
        for heading, arms, signed in (
            (title(condition), summary.arms, False),
            ("Differences on shared cells (rates in percentage points)", summary.paired, True),
        ):
            found = {arm: each[condition] for arm, each in arms.items() if condition in each}
            if found:
                rows = [[name, *(_cell(each.get(name), name, signed) for each in found.values())] for name in names]
                lines += ["", heading, *_padded([["", *found], *rows])]
    return lines[1:] or ["no arm has been measured"]


def _padded(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(found: Estimate | None, name: str, signed: bool) -> str:
    text = shown(found, METRICS[name].is_rate, signed)
    if not found or not text:
        return "–"
    interval = f" [{text.interval}]" if text.interval else ""
    unscored = f", {text.unscored}" if text.unscored else ""
    return f"{text.value}{interval} (n {found.n}{unscored})"
