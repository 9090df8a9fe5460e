"""What resistance costs good steering: are steered replies such as the base model gives when it is asked in words?

The base model, not steered, reads a reply twice: behind the prompt with a goal's instruction, and behind the prompt
alone. By how much the first makes it likelier, a token, is its gain; the base's own replies without and with the
instruction set the scale.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import eval.statistics as statistics
from esr_train.recipe import ALL_GOALS
from esr_train.steering.engine import Request, Scorer
from esr_train.values import typed
from eval.metrics import METRICS, Gap, pair_key
from eval.statistics import Estimate
from eval.store import RowStore, Trial
from eval.summary import LAST, Table

OBEDIENCE, RESTARTS = "obedience", "multi_attempt_rate"
MEASURES = (OBEDIENCE, LAST, RESTARTS)
"""What is said of every arm and goal."""
CHUNK_REPLIES = 32
"""Replies between two writes."""


@dataclass(frozen=True)
class Written:
    """A reply to be read.

    Args:
        key: of the trial, or of the base model's own reply.
        goal: by whose instruction it is read.
        prompt: without the instruction.
        asked: whether it was written behind the instruction.
    """

    key: str
    goal: str
    prompt: str
    reply: str
    asked: bool = False


@dataclass(frozen=True)
class Reading:
    """How likely the base model finds a reply: mean log-probability of a token (nats).

    Args:
        key, goal, prompt, asked: as in `Written`.
        plain: behind the prompt alone.
        instructed: behind the prompt with the goal's instruction.
    """

    key: str
    goal: str
    prompt: str
    asked: bool
    plain: float
    instructed: float


@dataclass(frozen=True)
class Scale:
    """Mean gains of the base model's own replies: 0 and 100 of a goal's obedience.

    Args:
        plain: without the instruction.
        instructed: with it.
        differs: whether the interval (95 %, clustered by prompt) of their difference lies above 0.
    """

    plain: float
    instructed: float
    differs: bool

    def obedience(self, reading: Reading) -> float:
        """A reply's place on the scale: 0 as if nobody had asked, 100 as if asked in words."""
        return 100 * (gain(reading) - self.plain) / (self.instructed - self.plain)


def instructed(prompt: str, instruction: str) -> str:
    """A prompt with what asks for a goal behind it."""
    return f"{prompt} {instruction}"


def gain(reading: Reading) -> float:
    """How much likelier the instruction makes the reply (nats a token)."""
    return reading.instructed - reading.plain


def reading_store(path: Path, writes: bool = True) -> RowStore[Reading]:
    """Where `read_replies` keeps what it has read."""
    return RowStore(path, lambda row: typed(Reading, row), asdict, writes)


def read_replies(
    base: Scorer, instructions: Mapping[str, str], replies: Sequence[Written], store: RowStore[Reading]
) -> None:
    """Read replies as far as the store lacks them; empty ones say nothing and are left out.

    Args:
        base: the base model, which nothing steers.
        instructions: goal -> its instruction.
        store: by the replies' keys.
    """
    store.touch()
    known = store.keys()
    missing = [each for each in replies if each.key not in known and each.reply.strip()]
    for start in range(0, len(missing), CHUNK_REPLIES):
        part = missing[start : start + CHUNK_REPLIES]
        prompts = [each.prompt for each in part] + [instructed(each.prompt, instructions[each.goal]) for each in part]
        requests = [Request(str(number), prompt) for number, prompt in enumerate(prompts)]
        found = [mean(each) for each in base.log_probabilities(requests, [each.reply for each in part] * 2)]
        store.append(
            (each.key, Reading(each.key, each.goal, each.prompt, each.asked, found[place], found[place + len(part)]))
            for place, each in enumerate(part)
        )


def scales(readings: Sequence[Reading]) -> dict[str, Scale]:
    """Goal -> its scale, from readings of the base model's own replies with and without the instruction."""
    found = {}
    for goal in dict.fromkeys(each.goal for each in readings):
        plain, asked = (
            {each.prompt: gain(each) for each in readings if each.goal == goal and each.asked is was_asked}
            for was_asked in (False, True)
        )
        both = [prompt for prompt in asked if prompt in plain]
        low = statistics.paired([asked[prompt] - plain[prompt] for prompt in both], both).low if both else None
        if both:
            found[goal] = Scale(mean(plain.values()), mean(asked.values()), low is not None and low > 0)
    return found


Key = tuple[Hashable, ...]
Values = Mapping[str, Mapping[Key, float]]
"""Measure -> `pair_key` of a trial -> its value, or difference from the base model's."""


def good_steering(
    rows_by_arm: Mapping[str, Sequence[Trial]],
    obedience_of: Mapping[str, Mapping[Key, float]],
    bootstrap: int = statistics.RESAMPLES,
    seed: int = 0,
) -> Table[Estimate]:
    """Arm -> goal, or all of them -> measure -> its estimate; and every arm minus base (`<arm>-base`) on shared cells.

    Intervals are clustered by prompt: goals are no sample of others.

    Args:
        rows_by_arm: trials that are steered towards goals; a trial's label is its goal.
        obedience_of: arm -> `pair_key` of a trial -> the obedience of its reply; an empty one has none.
    """
    cells = {pair_key(row): row.cell for rows in rows_by_arm.values() for row in rows}
    goals = [*dict.fromkeys(str(cell.label) for cell in cells.values()), ALL_GOALS]
    own = {arm: _values(rows, obedience_of.get(arm, {})) for arm, rows in rows_by_arm.items() if rows}
    minus_base = {f"{arm}-base": _differences(own[arm], own["base"]) for arm in own if arm != "base" and "base" in own}

    def estimate(values: Values, name: str, goal: str, is_difference: bool) -> Estimate:
        chosen = {key: value for key, value in values[name].items() if goal in (ALL_GOALS, cells[key].label)}
        given = list(chosen.values()), [cells[key].prompt for key in chosen], 0, bootstrap, seed
        is_rate = name == RESTARTS
        if is_difference:
            return statistics.paired(*given, of_rates=is_rate)
        return statistics.rate(*given) if is_rate else statistics.mean(*given)

    return {
        arm: {goal: {name: estimate(values, name, goal, arm not in own) for name in MEASURES} for goal in goals}
        for arm, values in (own | minus_base).items()
    }


def _values(rows: Sequence[Trial], obedience: Mapping[Key, float]) -> Values:
    found: dict[str, dict[Key, float]] = {name: {} for name in MEASURES}
    for row in sorted(rows, key=lambda row: repr(pair_key(row))):  # File order is not to change a number.
        key = pair_key(row)
        if key in obedience:
            found[OBEDIENCE][key] = obedience[key]
        for name in (LAST, RESTARTS):
            if not isinstance(value := METRICS[name].of(row), Gap):
                found[name][key] = value
    return found


def _differences(own: Values, base: Values) -> Values:
    return {
        name: {key: value - base[name][key] for key, value in values.items() if key in base[name]}
        for name, values in own.items()
    }
