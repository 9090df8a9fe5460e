"""What a terminal shows while trials run: a bar with the numbers so far, and a line for every finished condition."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from eval.metrics import METRICS, Gap
from eval.report.story import shown
from eval.store import Trial
from eval.summary import estimate

if TYPE_CHECKING:
    from tqdm import tqdm

TOLD = {"multi_attempt_rate": "second attempt", "esr_rate": "ESR", "last_score": "last score"}


class Bar:
    """A bar on standard error: responses/s, tokens/s, the time left, and what the trials so far have given."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        self._bar, self._tokens, self._found = bar, 0, ""

    def __call__(self, rows: int, tokens: int) -> None:
        """Count finished responses and their tokens."""
        self._tokens += tokens
        self._bar.update(rows)
        self._show()

    def watch(self, trials: Sequence[Trial]) -> None:
        """Show the numbers of the trials so far."""
        self._found = brief(trials)
        self._show()

    def _show(self) -> None:
        elapsed = self._bar.format_dict["elapsed"]
        speed = [f"{self._tokens / elapsed:,.0f} tok/s"] if elapsed and self._tokens else []
        self._bar.set_postfix_str(", ".join([*speed, *([self._found] if self._found else [])]), refresh=False)


@contextmanager
def progress_bar(total: int, label: str, visible: bool = True) -> Iterator[Bar]:
    """A bar for `total` responses; of several processes only one should be `visible`."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="resp", dynamic_ncols=True, disable=not visible) as bar:
        yield Bar(bar)


def brief(trials: Sequence[Trial]) -> str:
    """Second attempts, ESR and last score so far, without intervals; nothing if no trial is scored."""
    parts = []
    for name, title in TOLD.items():
        found = [value for each in trials if not isinstance(value := METRICS[name].of(each), Gap)]
        if found:
            mean = sum(found) / len(found)
            parts.append(f"{title} {mean:.0%}" if METRICS[name].is_rate else f"{title} {mean:.0f}")
    return ", ".join(parts)


def finished_line(arm: str, condition: str, trials: Sequence[Trial]) -> str:
    """An arm's numbers under a condition with their intervals, on one line."""
    parts = [f"{len(trials)} trials"]
    for name, title in TOLD.items():
        if text := shown(estimate(trials, name).to_json(), METRICS[name].is_rate):
            parts.append(f"{title} {text['value']} ({text['interval'] or 'no interval'})")
    if unscored := estimate(trials, "multi_attempt_rate").unscored:
        parts.append(f"{unscored} unscored")
    return f"{arm}, {condition}: {', '.join(parts)}"
