"""What is measured: conditions and their sizes."""

from typing import Literal

from pydantic import Field, model_validator

from esr_train.sections.values import AtLeastOne, Positive, Section

Condition = Literal[
    "steered",
    "unsteered",
    "steered_recalibrated",
    "boost",
    "random_direction",
    "random_latents",
    "unsteered_continues",
    "steered_continues",
    "switched_off",
]
NEEDS: dict[str, str] = {
    "unsteered_continues": "steered",
    "steered_continues": "unsteered",
    "switched_off": "steered",
}
"""Conditions whose replies go on from another condition's responses."""


class BoostSection(Section):
    """Strengths beside the threshold; each is a condition of its own."""

    multiples: tuple[Positive, ...] = Field((0.5, 0.75, 1.25, 1.5), description="of the threshold")
    deviations: tuple[float, ...] = Field((), description="added, in standard deviations of the latent's posterior")


class EvalSection(Section):
    """Held-out cells: test latents x test prompts, the same for every arm."""

    trials: AtLeastOne = Field(256, description="trials per arm and condition")
    control_trials: AtLeastOne | None = Field(
        None, description="the same for conditions beside steered, unsteered and steered_recalibrated; None: `trials`"
    )
    conditions: tuple[Condition, ...] = ("steered", "unsteered")
    boost: BoostSection = BoostSection()
    prefix_sentences: AtLeastOne = Field(2, description="sentences of a response that another condition goes on from")
    restart_phrases: str | None = Field(
        None, description="text file, one a line: how likely they are is measured at sentence ends"
    )
    bootstrap: AtLeastOne = 2000

    @model_validator(mode="after")
    def _conditions_are_complete(self) -> "EvalSection":
        for condition in self.conditions:
            if NEEDS.get(condition, condition) not in self.conditions:
                raise ValueError(f"{condition!r} goes on from responses of {NEEDS[condition]!r}: add that condition")
        if "boost" in self.conditions and not (self.boost.multiples or self.boost.deviations):
            raise ValueError("the condition 'boost' needs boost.multiples or boost.deviations")
        return self
