"""How an arm is trained."""

from typing import Any, Literal

from pydantic import Field

from esr_train.sections.values import AtLeastOne, Fraction, Range, Section


class LiveSection(Section):
    """Live injection: a row's own steering is active in its forward pass."""

    strength: Range = Field((0.8, 1.3), description="multiples of the latent's threshold, drawn per row and epoch")
    positions: Literal["all", "assistant"] = "all"
    share: Fraction = Field(1.0, description="share of the steered rows that are injected")


class ProbeSection(Section):
    """A small steered and unsteered evaluation while training."""

    every: AtLeastOne = 100
    trials: AtLeastOne = 32


class TrainSection(Section):
    """SFT with LoRA. `args` takes any trl.SFTConfig field, `lora` any peft.LoraConfig field."""

    data: str | None = Field(None, description="transcript or segments file; None: what `data` generated")
    format: Literal["transcripts", "segments"] = "transcripts"
    loss: Literal["masked", "unmasked", "answer_only"] = "masked"
    max_length: AtLeastOne = 4096
    quantization: Literal["nf4"] | None = None
    lora: dict[str, Any] = Field(default_factory=dict)
    args: dict[str, Any] = Field(default_factory=dict)
    live: LiveSection | None = None
    probe: ProbeSection | None = None
