"""What metrics.json holds: every metric of every arm and condition, and what sets arms and conditions apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval import statistics
from eval.metrics import METRICS, Gap, attempts_histogram, pair_key
from eval.statistics import Estimate, cluster_of
from eval.store import Trial

STEERED, RECALIBRATED = "steered", "steered_recalibrated"
TWO_WAY_RESAMPLES = 1000
"""Most resamples of the two-way bootstrap: it is a check beside the intervals, not one of them."""


def summarise(
    rows_by_arm: Mapping[str, Sequence[Trial]], bootstrap: int = statistics.RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Everything metrics.json holds.

    `arms` and `paired` hold every metric of every arm and condition, and every arm minus `base` on shared
    cells. Beside them, in the same order of keys: `within`, an arm's other conditions minus its own `steered`
    on the cells both have; `two_way`, intervals that resample latents and prompts at once; `sign_flip`,
    p-values of the paired differences by flipping the sign of whole latents, with `holm` adjusted for all
    `tests` of them; and `attempts`, how many responses have 1, 2, … attempts.

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
    p_values = _each(paired, lambda _, found: statistics.sign_flip(found.values, found.clusters, seed=seed))
    return {
        "schema": 1,
        "arms": _each(single, lambda name, found: _summary(name, found, bootstrap, seed).to_json()),
        "paired": _each(paired, lambda name, found: _paired(name, found, bootstrap, seed).to_json()),
        "within": _each(within, lambda name, found: _paired(name, found, bootstrap, seed).to_json()),
        "two_way": {
            part: _each(values, lambda _, found: _two_way(found, bootstrap, seed))
            for part, values in (("arms", single), ("paired", paired))
        },
        **_sign_flips(p_values),
        "attempts": {
            arm: {name: attempts_histogram(rows) for name, rows in conditions.items()}
            for arm, conditions in groups.items()
        },
    }


@dataclass(frozen=True)
class Values:
    """One metric's values, each with its cluster, latent and prompt; and how many trials are unscored."""

    values: list[float]
    trials: list[Trial]
    unscored: int

    @property
    def clusters(self) -> list[Any]:
        """The clusters of the values."""
        return [cluster_of(trial) for trial in self.trials]


def _each(groups: Mapping[str, Any], of: Callable[[str, Values], Any]) -> dict[str, Any]:
    """`of` (metric, values) for every arm, condition and metric."""
    return {
        arm: {
            condition: {name: of(name, found) for name, found in metrics.items()}
            for condition, metrics in conditions.items()
        }
        for arm, conditions in groups.items()
    }


def _paired_with_base(groups: Mapping[str, Mapping[str, list[Trial]]]) -> dict[str, Any]:
    """Every arm minus base; recalibrated trials pair with those of the base at its own thresholds, `steered`."""
    base = groups.get("base", {})
    found: dict[str, Any] = {}
    for arm, conditions in groups.items():
        if arm == "base" or not base:
            continue
        partners = {each: base.get(each, base.get(STEERED) if each == RECALIBRATED else None) for each in conditions}
        found[f"{arm}-base"] = {
            condition: {name: differences(rows, theirs, name) for name in METRICS}
            for condition, rows in conditions.items()
            if (theirs := partners[condition]) is not None
        }
    return found


def _paired_within(groups: Mapping[str, Mapping[str, list[Trial]]]) -> dict[str, Any]:
    """Every arm's other conditions that have the same latents and prompts minus its own `steered`."""
    found: dict[str, Any] = {}
    for arm, conditions in groups.items():
        steered = conditions.get(STEERED, [])
        keys = {_cell_key(trial) for trial in steered}
        found[arm] = {
            f"{condition}-{STEERED}": {name: differences(rows, steered, name) for name in METRICS}
            for condition, rows in conditions.items()
            if condition != STEERED and any(_cell_key(trial) in keys for trial in rows)
        }
    return found


def _two_way(found: Values, bootstrap: int, seed: int) -> dict[str, float | None]:
    latents = [trial.cell.latent for trial in found.trials]
    prompts = [trial.cell.prompt for trial in found.trials]
    resamples = min(bootstrap, TWO_WAY_RESAMPLES)
    low, high = statistics.two_way_interval(found.values, latents, prompts, resamples, seed)
    return {"low": low, "high": high}


def _sign_flips(p_values: Mapping[str, Any]) -> dict[str, Any]:
    """The p-values there are, each with Holm's adjustment for their number."""
    found = [
        (pair, condition, name, p)
        for pair, conditions in p_values.items()
        for condition, metrics in conditions.items()
        for name, p in metrics.items()
        if p is not None
    ]
    result: dict[str, Any] = {pair: {condition: {} for condition in p_values[pair]} for pair in p_values}
    for (pair, condition, name, p), adjusted in zip(found, statistics.holm([p for *_, p in found]), strict=True):
        result[pair][condition][name] = {"p": p, "holm": adjusted}
    return {"sign_flip": result, "tests": len(found)}


def estimate(trials: Sequence[Trial], name: str, bootstrap: int = statistics.RESAMPLES, seed: int = 0) -> Estimate:
    """One metric over trials, clustered by `cluster_of`; value None and n 0 where it is undefined."""
    return _summary(name, _values(trials, name), bootstrap, seed)


def _values(trials: Sequence[Trial], name: str) -> Values:
    found = [(METRICS[name].of(trial), trial) for trial in trials]
    defined = [(value, trial) for value, trial in found if not isinstance(value, Gap)]
    unscored = sum(value is Gap.UNSCORED for value, _ in found)
    return Values([value for value, _ in defined], [trial for _, trial in defined], unscored)


def _summary(name: str, found: Values, bootstrap: int, seed: int) -> Estimate:
    given = (found.values, found.clusters, found.unscored, bootstrap, seed)
    if METRICS[name].is_rate:
        return statistics.rate(*given)
    return statistics.mean(*given, bounds=METRICS[name].bounds)


def difference(
    trials: Sequence[Trial],
    base: Sequence[Trial],
    name: str,
    bootstrap: int = statistics.RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """One metric, trials minus base on the cells both have; a cell unscored in either arm is unscored."""
    return _paired(name, differences(trials, base, name), bootstrap, seed)


def _paired(name: str, found: Values, bootstrap: int, seed: int) -> Estimate:
    metric = METRICS[name]
    span = metric.bounds[1] - metric.bounds[0]
    given = (found.values, found.clusters, found.unscored, bootstrap, seed)
    return statistics.paired(*given, of_rates=metric.is_rate, bounds=(-span, span))


def differences(trials: Sequence[Trial], base: Sequence[Trial], name: str) -> Values:
    """Per shared cell the difference, trials minus base; two conditions share cells whatever their strength."""
    of = METRICS[name].of
    alike = {trial.condition for trial in trials} == {trial.condition for trial in base}
    key = pair_key if alike else _cell_key
    theirs = {key(trial): trial for trial in base}
    values, kept, unscored = [], [], 0
    for trial in trials:
        partner = theirs.get(key(trial))
        if partner is None:
            continue
        ours, their = of(trial), of(partner)
        if not isinstance(ours, Gap) and not isinstance(their, Gap):
            values.append(ours - their)
            kept.append(trial)
        elif Gap.UNSCORED in (ours, their):
            unscored += 1
    return Values(values, kept, unscored)


def _cell_key(trial: Trial) -> tuple[Any, ...]:
    """What is left of `pair_key` without condition and strength."""
    return trial.cell.prompt, trial.cell.latent, trial.cell.seed, trial.seed


def _by_condition(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Trials of each condition, sorted by what they are, so that file order cannot change a number."""
    groups: dict[str, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: repr(pair_key(trial))):
        groups.setdefault(trial.condition, []).append(trial)
    return groups
