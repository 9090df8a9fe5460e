"""What figures are drawn from, and what a drawn one is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.store import Trial

NUMBERS = ("value", "low", "high", "n", "unscored")
"""What metrics.json says of an estimate, in the order of the figures' tables."""


@dataclass(frozen=True)
class Material:
    """What figures are drawn from.

    Args:
        metrics: as in metrics.json.
        rows_by_arm: the trials of each arm.
        thresholds: the frozen thresholds, if there are any.
        agreement: as in agreement.json, where several judges were asked.
        mixtures: sweep -> arm -> share of self-correction rows in its training file, 0-1.
    """

    metrics: Mapping[str, Any]
    rows_by_arm: Mapping[str, Sequence[Trial]]
    thresholds: Mapping[str, Any] | None
    agreement: Mapping[str, Any] | None = None
    mixtures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def steered(self, arm: str) -> list[Trial]:
        """The arm's trials steered at the base model's thresholds."""
        return [row for row in self.rows_by_arm[arm] if row.condition == "steered"]

    def estimate(self, arm: str, condition: str, metric: str) -> Mapping[str, Any] | None:
        """The estimate in metrics.json, if it rests on anything."""
        found = self.metrics["arms"].get(arm, {}).get(condition, {}).get(metric)
        return found if found and found["n"] else None


@dataclass(frozen=True)
class Figure:
    """A drawn figure: file stem, heading, caption, the SVG document, and its numbers with a header row."""

    name: str
    title: str
    caption: str
    svg: str
    table: list[tuple[Any, ...]]
