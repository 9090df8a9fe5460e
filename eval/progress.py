"""What a terminal shows while trials run: a bar with the numbers so far, and a line for every finished condition."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from eval.metrics import METRICS, Metric
from eval.report.story import shown
from eval.store import Trial
from eval.summary import estimate
from eval.trials import Observer

if TYPE_CHECKING:
    from tqdm import tqdm


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
