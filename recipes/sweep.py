"""Which arms of a recipe are a sweep: trained alike but for the share of self-correction rows."""

import json
import re

from esr_train.recipe import Recipe

_NUMBER = re.compile(r"[-_]?\d+(\.\d+)?$")


def mixtures(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Sweep -> arm -> share of self-correction rows; a sweep has two shares at least.

    A sweep is named after its first arm with a number at the end, without that number.
    """
    groups: dict[str, dict[str, float]] = {}
    for arm in recipe.trained_arms:
        section, seen = recipe.arms[arm], recipe.for_arm(arm)
        if seen.data.self_correction is None:
            continue
        data = seen.data.model_dump(mode="json", exclude={"self_correction"})
        other = section.model_dump(mode="json", exclude={"data", "train"})
        alike = json.dumps([data, seen.train.model_dump(mode="json"), other], sort_keys=True)
        groups.setdefault(alike, {})[arm] = seen.data.self_correction
    found: dict[str, dict[str, float]] = {}
    for arms in groups.values():
        if len(set(arms.values())) > 1:
            numbered = (arm for arm in arms if _NUMBER.search(arm))
            name = _NUMBER.sub("", next(numbered, next(iter(arms))))
            found[name if name and name not in found else "+".join(arms)] = arms
    return found
