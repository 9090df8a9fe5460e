"""What metrics.json holds: every metric of every arm and condition, and what sets arms and conditions apart."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import eval.statistics as statistics
from esr_train.errors import InputError
from esr_train.files import read_json
from esr_train.values import typed
from eval.conditions import CONDITIONS, is_attack
from eval.metrics import METRICS, Gap, attempts_histogram, headline, pair_key
from eval.resistance import Resistance
from eval.retention import Retention
from eval.statistics import Estimate, cluster_of
from eval.store import Trial

STEERED, RECALIBRATED = "steered", "steered_recalibrated"
LAST = "last_score"
TWO_WAY_RESAMPLES = 1000
"""Most resamples of the two-way bootstrap: it is a check beside the intervals, not one of them."""

Of = TypeVar("Of")
Table = Mapping[str, Mapping[str, Mapping[str, Of]]]
"""Arm (or difference of arms) -> condition -> metric -> a number or more."""
Conditions = Mapping[str, Mapping[str, Sequence[Trial]]]
"""Arm -> condition -> its trials."""


@dataclass(frozen=True)
class Summary:
    """Everything metrics.json holds, its keys in this order.

    Args:
        arms: every metric of every arm and condition.
        paired: every arm minus `base` (named `<arm>-base`) on the cells both have.
        within: an arm's other conditions minus its own `steered` (named `<condition>-steered`), likewise, and minus
            the one that a condition is against (`eval.conditions.Condition`).
        two_way: of `arms` and `paired` the ends, `low` and `high`, of intervals that resample prompts, too.
        sign_flip: p-values of `paired` by flipping the sign of whole latents, where they are defined: `p`, and `holm`,
            adjusted for the number of all `tests`.
        tests: how many of them there are.
        attempts: arm -> condition -> how many responses have 1, 2, … attempts.
        not_degenerate: of `arms` the headline's metrics over responses that the judge did not call degenerate.
        resistance: arm -> its own thresholds over the base model's, for arms that were recalibrated.
        retention: arm -> perplexity on the base model's unsteered replies over the base's own.
        tasks: arm -> `task/metric` of lm-evaluation-harness -> `own`, and `minus_base` (see `eval.harness.kept`).
        goals: arm (or `<arm>-base`) -> goal of good steering, or `all` -> what `eval.obedience` says of it.
        efficacy: attack (a condition) -> the base model's last score under it minus its score when nobody steers.
    """

    schema: int
    arms: Table[Estimate]
    paired: Table[Estimate]
    within: Table[Estimate]
    two_way: Mapping[str, Table[Mapping[str, float | None]]]
    sign_flip: Table[Mapping[str, float]]
    tests: int
    attempts: Table[int]
    not_degenerate: Table[Estimate] = field(default_factory=dict)
    resistance: Mapping[str, Resistance] = field(default_factory=dict)
    retention: Mapping[str, Retention] = field(default_factory=dict)
    tasks: Table[Estimate] = field(default_factory=dict)
    efficacy: Mapping[str, Estimate] = field(default_factory=dict)
    goals: Table[Estimate] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return asdict(self)

    @property
    def conditions(self) -> set[str]:
        """Every condition that was measured."""
        return {condition for conditions in self.arms.values() for condition in conditions}

    def proves_nothing(self, attack: str) -> bool:
        """Whether an attack is known not to move the base model: the interval of `efficacy` does not lie below 0."""
        found = self.efficacy.get(attack)
        return found is not None and (found.high is None or found.high >= 0)


def read_summary(path: Path | str) -> Summary:
    """A metrics.json.

    Raises:
        InputError: if there is none or it is malformed, naming the key.
    """
    try:
        return typed(Summary, read_json(path))
    except ValueError as error:
        raise InputError(f"this is not a metrics.json: {error}", str(path), "Name a run directory.") from None


def summarise(
    rows_by_arm: Mapping[str, Sequence[Trial]], bootstrap: int = statistics.RESAMPLES, seed: int = 0
) -> Summary:
    """Every number there is about trials.

    Args:
        rows_by_arm: the trials of each arm.
        bootstrap: resamples.
        seed: of the resampling; the same trials in any order give the same numbers.
    """
    groups = {arm: _by_condition(rows) for arm, rows in rows_by_arm.items()}
    single = {
        arm: {condition: {name: _values(rows, name) for name in METRICS} for condition, rows in conditions.items()}
        for arm, conditions in groups.items()
    }
    paired, within = _paired_with_base(groups), _paired_within(groups)
    single_estimate = partial(_estimate, bootstrap=bootstrap, seed=seed)
    difference = partial(_difference, bootstrap=bootstrap, seed=seed)
    sign_flip = _adjusted(_each(paired, partial(_p_value, seed=seed)))
    return Summary(
        schema=1,
        arms=_each(single, single_estimate),
        paired=_each(paired, difference),
        within=_each(within, difference),
        two_way={
            part: _each(values, lambda _, measured: _two_way(measured, bootstrap, seed))
            for part, values in (("arms", single), ("paired", paired))
        },
        sign_flip=sign_flip,
        tests=sum(len(metrics) for conditions in sign_flip.values() for metrics in conditions.values()),
        attempts={
            arm: {name: attempts_histogram(rows) for name, rows in conditions.items()}
            for arm, conditions in groups.items()
        },
        not_degenerate=_each(_not_degenerate(groups), single_estimate),
        efficacy={name: difference(LAST, measured) for name, measured in _effects(groups.get("base", {})).items()},
    )


def estimate(trials: Sequence[Trial], name: str, bootstrap: int = statistics.RESAMPLES, seed: int = 0) -> Estimate:
    """One metric over trials, clustered by `cluster_of`; value None and n 0 where it is undefined."""
    return _estimate(name, _values(trials, name), bootstrap, seed)


@dataclass(frozen=True)
class Measured:
    """One metric's values, each with its trial; and how many trials are unscored."""

    values: list[float]
    trials: list[Trial]
    unscored: int

    @property
    def clusters(self) -> list[Hashable]:
        """The clusters of the values."""
        return [cluster_of(trial) for trial in self.trials]


def _values(trials: Sequence[Trial], name: str) -> Measured:
    values = [METRICS[name].of(trial) for trial in trials]
    defined = [trial for value, trial in zip(values, trials, strict=True) if not isinstance(value, Gap)]
    unscored = sum(value is Gap.UNSCORED for value in values)
    return Measured([value for value in values if not isinstance(value, Gap)], defined, unscored)


def _differences(
    trials: Sequence[Trial], base: Sequence[Trial], name: str, key: Callable[[Trial], Hashable] | None = None
) -> Measured:
    """Per shared cell the difference, trials minus base; two conditions share cells whatever their strength."""
    of = METRICS[name].of
    alike = {trial.condition for trial in trials} == {trial.condition for trial in base}
    key = key or (pair_key if alike else _cell_key)
    base_trials = {key(trial): trial for trial in base}
    values, kept, unscored = [], [], 0
    for trial in trials:
        partner = base_trials.get(key(trial))
        if partner is None:
            continue
        value, base_value = of(trial), of(partner)
        if not isinstance(value, Gap) and not isinstance(base_value, Gap):
            values.append(value - base_value)
            kept.append(trial)
        elif Gap.UNSCORED in (value, base_value):
            unscored += 1
    return Measured(values, kept, unscored)


def _not_degenerate(groups: Conditions) -> Table[Measured]:
    """The headline's metrics where a judge looked for degenerate responses, without those that it found."""
    names = headline()
    return {
        arm: {
            condition: {name: _values([row for row in rows if not row.flags.get("degenerate")], name) for name in names}
            for condition, rows in conditions.items()
            if any("degenerate" in row.flags for row in rows)
        }
        for arm, conditions in groups.items()
    }


def _cell_key(trial: Trial) -> tuple[Hashable, ...]:
    """What is left of `pair_key` without condition and strength."""
    return trial.cell.prompt, trial.cell.latent, trial.cell.seed, trial.seed


def _prompt_key(trial: Trial) -> tuple[Hashable, ...]:
    """What a steered cell shares with the unsteered one that it was made from."""
    return trial.cell.prompt, trial.cell.seed, trial.seed


def _effects(conditions: Mapping[str, Sequence[Trial]]) -> dict[str, Measured]:
    """The last score under each attack minus that of the same prompt and seed when nobody steers."""
    unsteered = conditions.get("unsteered", [])
    found = {
        name: _differences(rows, unsteered, LAST, _prompt_key) for name, rows in conditions.items() if is_attack(name)
    }
    return {name: measured for name, measured in found.items() if measured.values}


def _by_condition(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Trials of each condition, sorted by what they are, so that file order cannot change a number."""
    groups: dict[str, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: repr(pair_key(trial))):
        groups.setdefault(trial.condition, []).append(trial)
    return groups


def _each(groups: Table[Measured], of: Callable[[str, Measured], Of]) -> dict[str, dict[str, dict[str, Of]]]:
    """`of` (metric, values) for every arm, condition and metric."""
    return {
        arm: {
            condition: {name: of(name, measured) for name, measured in metrics.items()}
            for condition, metrics in conditions.items()
        }
        for arm, conditions in groups.items()
    }


def _paired_with_base(groups: Conditions) -> Table[Measured]:
    """Every arm minus base; recalibrated trials pair with those of the base at its own thresholds, `steered`."""
    base = groups.get("base", {})
    paired = {}
    for arm, conditions in groups.items():
        if arm == "base" or not base:
            continue
        partners = {each: base.get(each, base.get(STEERED) if each == RECALIBRATED else None) for each in conditions}
        paired[f"{arm}-base"] = {
            condition: {name: _differences(rows, partner, name) for name in METRICS}
            for condition, rows in conditions.items()
            if (partner := partners[condition]) is not None
        }
    return paired


def _paired_within(groups: Conditions) -> Table[Measured]:
    """Every arm's conditions minus its own `steered` and minus what each is against, on the cells they share."""
    within: dict[str, dict[str, dict[str, Measured]]] = {}
    for arm, conditions in groups.items():
        keys = {condition: {_cell_key(trial) for trial in rows} for condition, rows in conditions.items()}
        within[arm] = {
            f"{condition}-{partner}": {name: _differences(rows, conditions[partner], name) for name in METRICS}
            for condition, rows in conditions.items()
            for partner in _partners(condition)
            if partner != condition and partner in conditions and keys[condition] & keys[partner]
        }
    return within


def _partners(condition: str) -> list[str]:
    against = CONDITIONS[condition].against if condition in CONDITIONS else None
    return [STEERED, *([against] if against else [])]


def _estimate(name: str, measured: Measured, bootstrap: int, seed: int) -> Estimate:
    given = (measured.values, measured.clusters, measured.unscored, bootstrap, seed)
    if METRICS[name].is_rate:
        return statistics.rate(*given)
    return statistics.mean(*given, bounds=METRICS[name].bounds)


def _difference(name: str, measured: Measured, bootstrap: int, seed: int) -> Estimate:
    metric = METRICS[name]
    span = metric.bounds[1] - metric.bounds[0]
    given = (measured.values, measured.clusters, measured.unscored, bootstrap, seed)
    return statistics.paired(*given, of_rates=metric.is_rate, bounds=(-span, span))


def _p_value(name: str, measured: Measured, seed: int) -> float | None:
    return statistics.sign_flip(measured.values, measured.clusters, seed=seed) if METRICS[name].tested else None


def _two_way(measured: Measured, bootstrap: int, seed: int) -> dict[str, float | None]:
    latents = [trial.cell.latent for trial in measured.trials]
    prompts = [trial.cell.prompt for trial in measured.trials]
    resamples = min(bootstrap, TWO_WAY_RESAMPLES)
    low, high = statistics.two_way_interval(measured.values, latents, prompts, resamples, seed)
    return {"low": low, "high": high}


def _adjusted(p_values: Table[float | None]) -> Table[Mapping[str, float]]:
    """The p-values there are, each with Holm's adjustment for their number."""
    given = [
        (pair, condition, name, p)
        for pair, conditions in p_values.items()
        for condition, metrics in conditions.items()
        for name, p in metrics.items()
        if p is not None
    ]
    result: dict[str, dict[str, dict[str, dict[str, float]]]] = {
        pair: {condition: {} for condition in conditions} for pair, conditions in p_values.items()
    }
    for (pair, condition, name, p), adjusted in zip(given, statistics.holm([p for *_, p in given]), strict=True):
        result[pair][condition][name] = {"p": p, "holm": adjusted}
    return result
