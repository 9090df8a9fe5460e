"""What a report opens with: what was done, which effect was the largest, and what it cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.metrics import DETOUR_TOKENS, METRICS, OFF_TOPIC_BELOW
from eval.report.figures import Material
from eval.report.story import Shown, percent, shown
from eval.statistics import Estimate
from eval.summary import STEERED, Summary

MOSTLY = 0.75
"""A part of the gain that is at least so much of it gives it its name."""
SUBJECTS = {
    "latent": "latents (a latent is a unit of a sparse autoencoder, SAE, that stands for a subject)",
    "vector": "vectors (a vector is a direction of the hidden state that stands for a subject)",
}
MOST_ARMS = 6
"""Arms that the opening sentences name."""


def headline_arm(arms: Sequence[str]) -> str | None:
    """The arm the story is about: `tuned`, else the first that is not base."""
    others = [arm for arm in arms if arm != "base"]
    return "tuned" if "tuned" in others else next(iter(others), None)


def opening(material: Material, held_out: bool) -> list[str]:
    """Two sentences on what was done, for somebody who knows nothing of it; none where nobody steered.

    Args:
        held_out: whether training is known not to have seen the prompts and directions.
    """
    rows = [trial for rows in material.rows_by_arm.values() for trial in rows]
    trials = [trial for trial in rows if trial.cell.latent is not None]
    directions = {trial.cell.latent for trial in trials}
    prompts = {trial.cell.prompt for trial in trials}
    if not directions:
        return []
    arms = list(material.summary.arms)
    named = ", ".join(arms[:MOST_ARMS]) + (f" and {len(arms) - MOST_ARMS} more" if len(arms) > MOST_ARMS else "")
    unseen, too = (" that training had not seen", " equally unseen") if held_out else ("", "")
    judges = ", ".join(sorted({trial.judge for trial in trials}))
    return [
        f"A language model answered {len(prompts)} questions{unseen} while it was steered: its hidden state was pushed "
        f"along one of {len(directions)}{too} {SUBJECTS[material.noun]}, so that its answer drifts towards it.",
        f"Every arm (a model under test; here {named}, where base is the model as it is) answered the same questions "
        f"under the same steering, and a judge ({judges}) scored every attempt at an answer from 0, off-topic, to 100.",
    ]


def story(summary: Summary) -> list[str]:
    """The findings, the main effect first; a sentence whose numbers are missing is left out."""
    arm = headline_arm(list(summary.arms))
    if arm is None:
        return _base_alone(_Arm(summary, "base")) if "base" in summary.arms else []
    about, base = _Arm(summary, arm), _Arm(summary, "base")
    found = (main_effect(about, base), _attempts(about), _recovery(about, base), _pushed(about), _cost(about, base))
    return [sentence for sentence in found if sentence]


@dataclass(frozen=True)
class _Arm:
    """An arm's numbers as text."""

    summary: Summary
    name: str

    def estimate(self, metric: str, condition: str = STEERED) -> Estimate | None:
        found = self.summary.arms.get(self.name, {}).get(condition, {}).get(metric)
        return found if found and found.n else None

    def text(self, metric: str, condition: str = STEERED) -> Shown | None:
        return shown(self.estimate(metric, condition), METRICS[metric].is_rate)

    def minus_base(self, metric: str) -> Estimate | None:
        found = self.summary.paired.get(f"{self.name}-base", {}).get(STEERED, {}).get(metric)
        return found if found and found.n else None


def _base_alone(base: _Arm) -> list[str]:
    score, restarts = base.text("last_score"), base.text("multi_attempt_rate")
    if not score or not restarts:
        return []
    return [f"Steered, base scores {score.value} of 100 and begins again in {restarts.value} of responses."]


def main_effect(arm: _Arm, base: _Arm) -> str | None:
    """The difference in the last score, named after what makes up most of it: better beginnings, or restarts."""
    gain, by_first = arm.minus_base("last_score"), arm.minus_base("first_score")
    points = shown(gain, False, signed=True)
    firsts, lasts = ([each.text(f"{which}_score") for each in (arm, base)] for which in ("first", "last"))
    if not gain or not by_first or not points or None in (*firsts, *lasts):
        return None
    (first, base_first), (last, base_last) = ([text.value for text in texts if text] for texts in (firsts, lasts))
    said = f"steered, answers of {arm.name} score {last} of 100 on average where those of base score {base_last}"
    measured = f"The difference on the same cells is {points.value} points ({points.interval or 'no interval'})."
    if gain.low is None or gain.high is None or gain.low * gain.high <= 0:
        return f"No clear change: {said}. {measured}"
    if (gain.value or 0) < 0:
        return f"Harm: {said}. {measured}"
    beside = f"base {base_first}"
    share = (by_first.value or 0) / (gain.value or 1)
    if share >= MOSTLY:
        return (
            f"Silent resistance: {said}, and already their first attempts score {first} (base {base_first}). {measured}"
        )
    if share <= 1 - MOSTLY:
        return f"Recovery: {said}; first attempts score {first} ({beside}), the rest is restarts. {measured}"
    return (
        f"Silent resistance and recovery: {said}. First attempts already score {first} ({beside}), and restarts "
        f"bring them to {last}. {measured}"
    )


def _attempts(arm: _Arm) -> str | None:
    """Where second attempts went: better, worse, or nowhere, and how many had anything to take back."""
    names = ("multi_attempt_rate", "esr_rate", "worsening_rate", "esr_after_shown_detour_of_all")
    found = [estimate for name in names if (estimate := arm.estimate(name))]
    if len(found) < len(names) or not found[0].value:
        return None
    several, better, worse, recovered = (estimate.value or 0 for estimate in found)
    alike = max(several - better - worse, 0)
    early = arm.text("restart_before_detour_rate")
    text = (
        f"In {percent(several)} % of its steered responses {arm.name} restarts (breaks off in so many words and makes "
        f"a second attempt): {percent(better)} % end better than they began (ESR), {percent(worse)} % worse, and "
        f"{percent(alike)} % score the same."
    )
    if early:
        text += (
            f" {early.value} of the second attempts began before anything had gone wrong, within "
            f"{DETOUR_TOKENS} tokens or behind a good beginning; {percent(recovered)} % of responses recover from a "
            "detour that can be seen."
        )
    return text.replace(" %", "\u202f%")


def _recovery(arm: _Arm, base: _Arm) -> str | None:
    found, rate = arm.estimate("esr_after_shown_detour"), arm.text("esr_after_shown_detour")
    if not found or not rate:
        return None
    of_base, count = base.text("esr_after_shown_detour"), base.estimate("esr_after_shown_detour")
    beside = f"; base: {of_base.value} of {count.n}" if of_base and count else ""
    return (
        f"ESR after a shown detour, a first attempt of at least {DETOUR_TOKENS} tokens that scores below "
        f"{OFF_TOPIC_BELOW:.0f}: {rate.value} ({rate.interval}) of the {found.n} responses that show one{beside}."
    )


def _pushed(arm: _Arm) -> str | None:
    found = arm.summary.resistance.get(arm.name)
    if not found or found.value is None:
        return None
    least = "at least " if found.at_high > found.at_low else ""
    interval = "" if found.low is None else f" ({found.low:.2f} to {found.high:.2f})"
    censored = f"; {found.at_high} lie at the highest strength searched" if found.at_high else ""
    return (
        f"It takes {least}{found.value:.2f} × the strength{interval} to drag {arm.name} as far off as base: its own "
        f"thresholds over the base's, {found.n} directions{censored}."
    )


def _cost(arm: _Arm, base: _Arm) -> str | None:
    """What ordinary answers show: needless restarts, score, perplexity."""
    restarts, score = arm.text("restart_rate", "unsteered"), arm.text("last_score", "unsteered")
    of_base, base_score = base.text("restart_rate", "unsteered"), base.text("last_score", "unsteered")
    if not restarts or not score:
        return None
    beside = f" (base {of_base.value})" if of_base else ""
    text = f"When nobody steers, {arm.name} restarts needlessly in {restarts.value} of responses{beside}, and scores "
    text += f"{score.value}" + (f" (base {base_score.value})" if base_score else "")
    kept = arm.summary.retention.get(arm.name)
    if kept and kept.value is not None:
        interval = "" if kept.low is None else f" ({kept.low:.3f} to {kept.high:.3f})"
        text += f"; its perplexity on the base's own replies is {kept.value:.3f} × the base's{interval}"
    return text + "."
