"""What the values of a recipe may be: shares, counts, ranges, distributions."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Range = Annotated[tuple[float, float], Field(description="low and high end, both included")]


class Section(BaseModel):
    """A part of a recipe; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Normal(Section):
    """A normal distribution, cut at its ends."""

    mean: float
    sd: Positive
    low: float
    high: float

    @model_validator(mode="after")
    def _the_ends_lie_around_the_mean(self) -> "Normal":
        if not self.low <= self.mean <= self.high or self.high - self.low < self.sd:
            raise ValueError("low <= mean <= high is needed, and ends at least one sd apart")
        return self


class Choice(Section):
    """A list of values, drawn evenly or by their weights."""

    values: Annotated[tuple[float, ...], Field(min_length=1)]
    weights: tuple[Positive, ...] | None = None

    @model_validator(mode="after")
    def _every_value_has_a_weight(self) -> "Choice":
        if self.weights and len(self.weights) != len(self.values):
            raise ValueError(f"{len(self.values)} values need as many weights")
        return self


def _drawn_kind(value: Any) -> str:
    if isinstance(value, Normal | Choice):
        return type(value).__name__.lower()
    if isinstance(value, dict):
        return "choice" if "values" in value else "normal"
    return "range"


Drawn = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Normal, Tag("normal")] | Annotated[Choice, Tag("choice")],
    Discriminator(_drawn_kind),
]
"""`[low, high]` (evenly), `{mean, sd, low, high}` (normal, cut at the ends) or `{values, weights}`."""
