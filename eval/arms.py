"""An arm, a model under test: its engine and judge, the words around its prompts, interventions of its own."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esr_train.errors import InputError
from esr_train.steering.engine import Engine, Request, Sampling
from esr_train.steering.interventions import Intervention
from eval.cells import derived_seed
from eval.judging.judge import Judge

NEAREST = 8
"""A stand-in is drawn from this many nearest candidates: more would match worse, one would not be random."""
UNKNOWN_LABEL = "something else"
"""Stands for {label} where nothing steers, or the latent has no label."""

PROMPTS = {
    "monitor": (
        "{prompt}\n\nKeep an eye on your own text while you write. As soon as a sentence has nothing to do with what "
        "I asked, say so and return to my question."
    ),
    "restart": (
        "{prompt}\n\nAfter every sentence, ask yourself whether it helps with my question. If it does not, write "
        '"Wait, that was off-topic." and begin your answer again.'
    ),
    "resist": (
        "{prompt}\n\nSomething may pull your answer towards another subject. Do not follow it. If you notice that you "
        "did, break off, say that you slipped, and answer what I asked."
    ),
    "warned": (
        "{prompt}\n\nYour answer may be pulled towards this: {label}. Stay with my question; if you slip, stop and "
        "start over."
    ),
}
"""Self-monitoring instructions, by name. `{prompt}` is the user's message, `{label}` what the latent stands for."""


@dataclass(frozen=True, eq=False)
class Variant:
    """What an arm does to every request.

    Args:
        prompt: text with {prompt} and perhaps {label} that takes the prompt's place; None leaves it.
        interventions: applied after the cell's steering, in every condition.
        edits: the interventions as trial rows describe them.
        monitor: what a monitor does to its replies where it sounds, if there is one.
    """

    prompt: str | None = None
    interventions: tuple[Intervention, ...] = ()
    edits: Mapping[str, Any] = field(default_factory=dict)
    monitor: str | None = None

    def apply(self, request: Request, label: str | None) -> Request:
        """The request as this arm runs it; `label` is the steering latent's."""
        # Not str.format: a prompt may contain braces of its own.
        text = self.prompt or "{prompt}"
        parts = [part.replace("{label}", label or UNKNOWN_LABEL) for part in text.split("{prompt}")]
        interventions = (*request.interventions, *self.interventions)
        return replace(request, prompt=request.prompt.join(parts), interventions=interventions)

    def to_json(self) -> dict[str, Any] | None:
        """The variant as it stands in a trial row; None where it changes nothing."""
        watched = {"monitor": self.monitor} if self.monitor else {}
        changed = self.prompt or self.interventions or watched
        return {"prompt": self.prompt, **self.edits, **watched} if changed else None


PLAIN = Variant()


@dataclass(frozen=True, eq=False)
class Arm:
    """A model under test, and how its responses are made and scored.

    Args:
        engine: with the arm's weights.
        judge: that scores every response.
        sampling: the same for every arm of an experiment.
        name: of the arm, as in trial rows.
        variant: what the arm does to every request.
    """

    engine: Engine
    judge: Judge
    sampling: Sampling
    name: str = "base"
    variant: Variant = PLAIN


def prompt_text(prompt: str | None, where: str) -> str | None:
    """A shipped variant's text by its name, or a text with {prompt} as it is.

    Raises:
        InputError: naming `where` and the shipped names.
    """
    if prompt is None or "{prompt}" in prompt:
        return prompt
    if prompt not in PROMPTS:
        raise InputError(
            f"there is no prompt variant {prompt!r}",
            where,
            f"Take one of {', '.join(PROMPTS)}, or a text with {{prompt}}.",
        )
    return PROMPTS[prompt]


def matched_latents(
    wanted: Sequence[int],
    frequency: NDArray[np.float64],
    norms: NDArray[np.float64],
    excluded: Collection[int],
    seed: int,
) -> dict[int, int]:
    """For each wanted latent another one, drawn from the nearest in log frequency and log decoder norm.

    Distances are in standard deviations over all active latents. No latent stands in twice.

    Args:
        wanted: latents to be matched.
        frequency, norms: [n_latents] of the whole SAE.
        excluded: latents that must not stand in; the wanted ones never do.

    Raises:
        InputError: if too few other latents are ever active.
    """
    rng = np.random.default_rng(derived_seed("matched", seed))
    free = {int(latent) for latent in np.flatnonzero(frequency > 0)} - set(excluded) - set(wanted)
    if len(free) < len(wanted):
        raise InputError(
            f"{len(wanted)} latents are to be matched, but only {len(free)} others are ever active",
            "sae",
            "Take a wider SAE, or leave this control out.",
        )
    # A wanted latent that was never seen active counts as one that was nearly never.
    seen = np.log(np.maximum(frequency, frequency[frequency > 0].min(initial=1.0)))
    position = np.stack([_standardised(seen), _standardised(np.log(np.maximum(norms, 1e-12)))], axis=1)
    found = {}
    for latent in wanted:
        candidates = np.array(sorted(free))
        distance = np.linalg.norm(position[candidates] - position[latent], axis=1)
        found[latent] = int(rng.choice(candidates[np.argsort(distance, kind="stable")[:NEAREST]]))
        free.remove(found[latent])
    return found


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    spread = float(values.std())
    # Decoder rows of equal norm differ by rounding alone, which must not decide anything.
    return (values - values.mean()) / spread if spread > 1e-3 else np.zeros_like(values)
