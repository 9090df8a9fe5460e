"""Numbers as text: in tables, in sentences, and on a terminal while trials run and afterwards."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.conditions import order, title
from eval.metrics import METRICS, Metric, headline
from eval.obedience import OBEDIENCE, RESTARTS
from eval.resistance import Resistance
from eval.retention import Retention
from eval.statistics import Estimate
from eval.store import Trial
from eval.summary import LAST, Summary, estimate
from eval.trials import Observer

if TYPE_CHECKING:
    from tqdm import tqdm

GOOD_STEERING = "Good steering"
GOAL_COLUMNS = ("obedience", "minus base", "last score", "restarts")
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


def shown(measured: Estimate | None, is_rate: bool, signed: bool = False) -> Shown | None:
    """An estimate as text, None if it rests on nothing; `signed` for a difference, of rates in percentage points."""
    if measured is None or measured.value is None:
        return None

    def number(value: float) -> str:
        digits = 1 if signed and abs(value) < 9.95 else 0
        text = percent(abs(value)) if is_rate else f"{abs(value):.{digits}f}"
        sign = "−" if value < 0 and text.strip("0.") else "+" if signed and text.strip("0.") else ""
        return sign + text

    low, high, unscored = measured.low, measured.high, measured.unscored / (measured.n + measured.unscored)
    return Shown(
        number(measured.value) + (f"{THIN}%" if is_rate and not signed else ""),
        "" if low is None or high is None else f"{number(low)} to {number(high)}",
        f"{percent(unscored)}{THIN}% unscored" if unscored else "",
    )


def number_text(estimate: Estimate, digits: int) -> str:
    """A number that is no rate, with its interval in brackets."""
    if estimate.value is None:
        return "–"
    low, high = estimate.low, estimate.high
    return f"{estimate.value:.{digits}f}" + (
        "" if low is None or high is None else f" ({low:.{digits}f} to {high:.{digits}f})"
    )


def tables(summary: Summary, everything: bool = False) -> list[str]:
    """Lines for a terminal. Per condition every arm's estimates, then every arm minus base on shared cells.

    Args:
        everything: every metric instead of the headline's.
    """
    names = list(METRICS) if everything else headline()
    lines: list[str] = []
    for condition in sorted(summary.conditions, key=order):
        for heading, arms, signed in (
            (title(condition), summary.arms, False),
            ("Differences on shared cells (rates in percentage points)", summary.paired, True),
        ):
            measured = {arm: conditions[condition] for arm, conditions in arms.items() if condition in conditions}
            rows = [[name, *(_cell(each.get(name), name, signed) for each in measured.values())] for name in names]
            if measured:
                lines += ["", heading, *_padded([["", *measured], *rows])]
    if beside := ratios(summary):
        rows = [[arm, *(_ratio(*cell) for cell in cells)] for arm, cells in beside.items()]
        lines += ["", "Over the base model", *_padded([["", "resistance factor", "perplexity, unsteered"], *rows])]
    if summary.tasks:
        rows = [list(row) for row in task_lines(summary)]
        lines += ["", "Tasks, nobody steering", *_padded([["", "", "own", "minus base"], *rows])]
    if goals := goal_lines(summary):
        lines += ["", GOOD_STEERING, *_padded([["", "", *GOAL_COLUMNS], *goals])]
    if summary.efficacy:
        rows = [[name, verdict(summary, name)] for name in sorted(summary.efficacy, key=order)]
        lines += ["", "Attacks on the base model", *_padded(rows)]
    return lines[1:] or ["no arm has been measured"]


def task_rows(summary: Summary) -> list[tuple[str, str, Mapping[str, Estimate]]]:
    """Arm, `task/metric` and its estimates (see `eval.harness.kept`), task by task."""
    rows = [(arm, name, found) for arm, tasks in summary.tasks.items() for name, found in tasks.items()]
    return sorted(rows, key=lambda row: row[1])


def task_lines(summary: Summary) -> list[tuple[str, str, str, str]]:
    """`task/metric`, arm, its own score and what that is above base's, as texts."""
    rows = task_rows(summary)
    return [(name, arm, _task(found.get("own")), _task(found.get("minus_base"))) for arm, name, found in rows]


def _task(found: Estimate | None) -> str:
    if found is None or found.value is None:
        return "–"
    interval = "" if found.low is None or found.high is None else f"{found.low:.3f} to {found.high:.3f}"
    return _ratio(f"{found.value:.3f}", interval, f"n {found.n}")


def verdict(summary: Summary, attack: str) -> str:
    """Whether an attack moves the base model's last score, in words; one that does not proves nothing."""
    found = shown(summary.efficacy.get(attack), is_rate=False, signed=True)
    if not found:
        return "whether it moves base is not known"
    points = f"{found.value} ({found.interval or 'no interval'})"
    if summary.proves_nothing(attack):
        return f"proves nothing: base's last score is not lower than unsteered, {points}"
    return f"moves base's last score by {points}"


def goal_lines(summary: Summary) -> list[list[str]]:
    """Goal, arm, and the numbers of `GOAL_COLUMNS` as texts: how far steering brings about what it is meant to."""
    arms = [arm for arm in summary.arms if arm in summary.goals]
    goals = dict.fromkeys(goal for arm in arms for goal in summary.goals[arm])
    return [
        [goal, arm, *_good(summary.goals[arm][goal], summary.goals.get(f"{arm}-base", {}).get(goal, {}))]
        for goal in goals
        for arm in arms
        if goal in summary.goals[arm]
    ]


def _good(own: Mapping[str, Estimate], minus_base: Mapping[str, Estimate]) -> list[str]:
    cells = [(own, OBEDIENCE, False), (minus_base, OBEDIENCE, True), (own, LAST, False), (own, RESTARTS, False)]
    found = [(each.get(name), name == RESTARTS, signed) for each, name, signed in cells]
    texts = [(text, each) for each, is_rate, signed in found for text in (shown(each, is_rate, signed),)]
    return [_ratio(text.value, text.interval, f"n {each.n}") if text and each else "–" for text, each in texts]


Cell = tuple[str, str, str]
"""A number as text, its interval, and what it rests on."""


def ratios(summary: Summary) -> dict[str, list[Cell]]:
    """Of each arm that has one of them: resistance factor and perplexity over the base model's."""
    arms = [arm for arm in summary.arms if arm != "base" and {arm} & {*summary.resistance, *summary.retention}]
    return {arm: [_factor(summary.resistance.get(arm)), _perplexity(summary.retention.get(arm))] for arm in arms}


def _factor(found: Resistance | None) -> Cell:
    if found is None or found.value is None:
        return "–", "", ""
    interval = "" if found.low is None else f"{found.low:.2f} to {found.high:.2f}"
    bounds = [(found.at_high, "highest"), (found.at_low, "lowest")]
    at = "".join(f", {count} at the {which} strength" for count, which in bounds if count)
    return f"{'≥ ' if found.at_high > found.at_low else ''}{found.value:.2f}", interval, f"of {found.n}{at}"


def _perplexity(found: Retention | None) -> Cell:
    if found is None or found.value is None:
        return "–", "", ""
    interval = "" if found.low is None else f"{found.low:.3f} to {found.high:.3f}"
    return f"{found.value:.3f}", interval, f"of {found.n} replies"


def _padded(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(measured: Estimate | None, name: str, signed: bool) -> str:
    text = shown(measured, METRICS[name].is_rate, signed)
    if not measured or not text:
        return "–"
    interval = f" [{text.interval}]" if text.interval else ""
    unscored = f", {text.unscored}" if text.unscored else ""
    return f"{text.value}{interval} (n {measured.n}{unscored})"


def _ratio(text: str, interval: str, basis: str) -> str:
    return text + (f" [{interval}]" if interval else "") + (f" ({basis})" if basis else "")


class Bar(Observer):
    """A bar on standard error: responses/s, tokens/s, the time left, and what the trials so far have given."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        self._bar, self._tokens, self._numbers = bar, 0, ""

    def __call__(self, rows: int, tokens: int) -> None:
        """Count finished responses and their tokens."""
        self._tokens += tokens
        self._bar.update(rows)
        self._show()

    def on_trials_finished(self, trials: Sequence[Trial]) -> None:
        """Show the numbers of the trials so far."""
        self._numbers = brief(trials)
        self._show()

    def _show(self) -> None:
        elapsed = self._bar.format_dict["elapsed"]
        speed = [f"{self._tokens / elapsed:,.0f} tok/s"] if elapsed and self._tokens else []
        self._bar.set_postfix_str(", ".join([*speed, *([self._numbers] if self._numbers else [])]), refresh=False)


@contextmanager
def progress_bar(total: int, label: str, visible: bool = True) -> Iterator[Bar]:
    """A bar for `total` responses; of several processes only one should be `visible`."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="resp", dynamic_ncols=True, disable=not visible) as bar:
        yield Bar(bar)


def brief(trials: Sequence[Trial]) -> str:
    """The mean of every live metric so far, without intervals; nothing if no trial is scored."""
    parts = []
    for metric in (metric for metric in METRICS.values() if metric.live):
        if values := metric.values(trials):
            mean = sum(values) / len(values)
            parts.append(f"{_inline(metric)} {mean:.0%}" if metric.is_rate else f"{_inline(metric)} {mean:.0f}")
    return ", ".join(parts)


def finished_line(arm: str, condition: str, trials: Sequence[Trial]) -> str:
    """An arm's numbers under a condition with their intervals, on one line."""
    parts = [f"{len(trials)} trials"]
    for name, metric in METRICS.items():
        if metric.live and (text := shown(estimate(trials, name), metric.is_rate)):
            parts.append(f"{_inline(metric)} {text.value} ({text.interval or 'no interval'})")
    if unscored := estimate(trials, "multi_attempt_rate").unscored:
        parts.append(f"{unscored} unscored")
    return f"{arm}, {condition}: {', '.join(parts)}"


def _inline(metric: Metric) -> str:
    """A metric's title within a sentence; abbreviations stay in capitals."""
    return metric.title if metric.title.isupper() else metric.title.lower()
