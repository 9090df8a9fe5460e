"""Sweeps over mixtures, written as a list: `data.self_correction: [0.1, 0.5, 0.9]` is an arm for each share."""

from collections.abc import Mapping
from typing import Any

KEY = "self_correction"
ELSEWHERE = ("of", "adapter", "model")
"""Keys of arms that are not trained."""


def swept(values: Any) -> Any:
    """A recipe's values with every list of shares written out as arms, `tuned-10`, `tuned-50`, `tuned-90`.

    A list under the recipe's `data` makes arms of every trained arm that names no share; one under an arm's `data`
    of this arm alone. Values of another form are left to the recipe to refuse.

    Raises:
        ValueError: for a list without shares, with one twice, or an arm that is there already.
    """
    if not isinstance(values, Mapping):
        return values
    everywhere, arms = _shares(values), values.get("arms", {"tuned": {}})
    if not isinstance(arms, Mapping):
        return values
    found: dict[str, Any] = {}
    for name, arm in arms.items():
        shares = _shares(arm)
        if shares is None and isinstance(arm, Mapping) and _takes_the_recipes(arm):
            shares = everywhere
        made = {name: arm} if shares is None else {_name(name, share): _with(arm, share) for share in shares}
        if shares is not None and len(made) < max(len(shares), 1):
            raise ValueError(f"arms.{name}: the list data.{KEY} needs shares that differ")
        if both := sorted({*made} & {*found, *(other for other in arms if other != name)}):
            raise ValueError(f"arms.{both[0]}: an arm of the sweep over data.{KEY} has this name too; rename it")
        found |= made
    changed = {**values, "arms": found} if "arms" in values or everywhere is not None else values
    return {**changed, "data": {**values["data"], KEY: None}} if everywhere is not None else changed


def _shares(section: Any) -> list[Any] | None:
    data = section.get("data") if isinstance(section, Mapping) else None
    found = data.get(KEY) if isinstance(data, Mapping) else None
    return list(found) if isinstance(found, list | tuple) else None


def _takes_the_recipes(arm: Mapping[str, Any]) -> bool:
    data = arm.get("data") or {}
    return not any(arm.get(key) for key in ELSEWHERE) and isinstance(data, Mapping) and KEY not in data


def _name(arm: str, share: Any) -> str:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"data.{KEY}: {share!r} is no share; give numbers from 0 to 1, such as [0.1, 0.5, 0.9]")
    return f"{arm}-{100 * share:.6g}"


def _with(arm: Any, share: float) -> dict[str, Any]:
    return {**arm, "data": {**(arm.get("data") or {}), KEY: share}}
