"""The report's opening lines: what happened, in words with numbers."""

from collections.abc import Mapping
from typing import Any

THIN = "\u202f"  # a narrow space at which no line breaks


def percent(share: float) -> str:
    """A share as a percentage, with a decimal only where it says something."""
    points = 100 * share
    return f"{points:.0f}" if points in (0, 100) or points >= 9.95 else f"{points:.1f}"


def shown(found: Mapping[str, Any] | None, is_rate: bool, signed: bool = False) -> dict[str, str] | None:
    """An estimate as text: `value`, `interval` and, where there are any, the `unscored` share."""
    if not found or not found["n"]:
        return None

    def number(value: float) -> str:
        digits = 1 if signed and abs(value) < 9.95 else 0
        text = percent(abs(value)) if is_rate else f"{abs(value):.{digits}f}"
        sign = "−" if value < 0 and text.strip("0.") else "+" if signed and text.strip("0.") else ""
        return sign + text

    interval = "" if found["low"] is None else f"{number(found['low'])} to {number(found['high'])}"
    unscored = found["unscored"] / (found["n"] + found["unscored"])
    return {
        "value": number(found["value"]) + (f"{THIN}%" if is_rate and not signed else ""),
        "interval": interval,
        "unscored": f"{percent(unscored)}{THIN}% unscored" if unscored else "",
    }


def headline_arm(metrics: Mapping[str, Any]) -> str | None:
    """The arm the story is about: `tuned`, else the first that is not base."""
    others = [arm for arm in metrics["arms"] if arm != "base"]
    return "tuned" if "tuned" in others else next(iter(others), None)


def story(metrics: Mapping[str, Any]) -> list[str]:
    """Sentences for the top of the page; a sentence whose numbers are missing is left out."""
    arm = headline_arm(metrics)
    names = [name for name in ("base", arm) if name and name in metrics["arms"]]
    steered = [(name, metrics["arms"][name].get("steered", {})) for name in names]
    told = [_restarts(steered), _scores(steered)]
    if arm:
        told += [_gain(metrics, arm), _unsteered(names, metrics)]
    return [sentence for sentence in told if sentence]


def _restarts(steered: list[tuple[str, Mapping[str, Any]]]) -> str | None:
    parts = [
        f"{name} restarted in {text['value']} of responses ({text['interval']})"
        for name, found in steered
        if (text := shown(found.get("multi_attempt_rate"), True))
    ]
    return f"Under steering, {', '.join(parts)}." if parts else None


def _scores(steered: list[tuple[str, Mapping[str, Any]]]) -> str | None:
    parts = []
    for name, found in steered:
        first, last = shown(found.get("first_score"), False), shown(found.get("last_score"), False)
        if first and last:
            parts.append(f"{last['value']} for {name} (first attempt {first['value']})")
    return f"The last attempt scores {', '.join(parts)} of 100 on average." if parts else None


def _gain(metrics: Mapping[str, Any], arm: str) -> str | None:
    found = metrics["paired"].get(f"{arm}-base", {}).get("steered", {}).get("last_score")
    text = shown(found, False, signed=True)
    if not text or not found:
        return None
    where = f"{text['interval']}; {found['n']} cells"
    return f"On the same cells, {arm} minus base is {text['value']} points ({where})."


def _unsteered(names: list[str], metrics: Mapping[str, Any]) -> str | None:
    parts = [
        f"{name} in {text['value']} of responses ({text['interval']})"
        for name in names
        if (text := shown(metrics["arms"][name].get("unsteered", {}).get("restart_rate"), True))
    ]
    return f"Unsteered, they restart needlessly: {', '.join(parts)}." if parts else None
