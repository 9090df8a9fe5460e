"""Numbers drawn from the distributions that a recipe names."""

from random import Random

from esr_train.recipe import Choice, Drawn, Normal


def draw(rng: Random, drawn: Drawn) -> float:
    """One number: evenly between two ends, from a normal distribution cut at its ends, or from a list."""
    if isinstance(drawn, Normal):
        return _cut_normal(rng, drawn)
    if isinstance(drawn, Choice):
        return rng.choices(drawn.values, drawn.weights)[0]
    return rng.uniform(*drawn)


def draw_count(rng: Random, drawn: Drawn) -> int:
    """One whole number, at least 1; a range includes both ends."""
    if isinstance(drawn, tuple):
        return rng.randint(*map(int, drawn))
    return max(round(draw(rng, drawn)), 1)


def highest(drawn: Drawn) -> float:
    """The largest number that can be drawn."""
    if isinstance(drawn, Normal):
        return drawn.high
    return max(drawn.values) if isinstance(drawn, Choice) else drawn[1]


def _cut_normal(rng: Random, normal: Normal) -> float:
    # By rejection: the ends lie around the mean and an sd apart, so that one draw in three at least is good.
    while True:
        value = rng.gauss(normal.mean, normal.sd)
        if normal.low <= value <= normal.high:
            return value
