"""The models under test."""

from typing import Any

from pydantic import Field, model_validator

from esr_train.sections.evaluation import Condition
from esr_train.sections.values import Count, Section


class EditSection(Section):
    """SAE latents whose activation is changed in every forward pass of an arm."""

    ablate: tuple[Count, ...] = Field((), description="latents that are set to 0")
    clamp: dict[Count, float] = Field(default_factory=dict, description="latent -> the activation it is set to")
    matched_random: bool = Field(
        False, description="take random latents of like activation frequency and decoder norm instead: the control"
    )

    @model_validator(mode="after")
    def _names_latents_once(self) -> "EditSection":
        if not self.ablate and not self.clamp:
            raise ValueError("name latents under ablate or clamp")
        if both := sorted({*self.ablate} & {*self.clamp}):
            raise ValueError(f"latent {both[0]} stands under ablate and under clamp")
        return self


class ArmSection(Section):
    """A model under test. `base` is an arm by itself.

    An arm is trained with its overrides of `data` and `train`, unless one of `of`, `adapter` or `model` says where
    its weights come from.
    """

    data: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    of: str | None = Field(None, description="the arm whose weights it has: base, or one with weights of its own")
    adapter: str | None = Field(None, description="folder of a finished adapter")
    model: str | None = Field(None, description="hub id or folder of a whole model, such as a merged one")
    merged: bool = Field(False, description="the adapter is merged into the model before it is measured")
    prompt: str | None = Field(
        None, description="a shipped prompt variant by name, or a text with {prompt} and perhaps {label}"
    )
    edit: EditSection | None = None
    conditions: tuple[Condition, ...] | None = Field(None, description="some of eval.conditions; None: all of them")

    @property
    def is_trained(self) -> bool:
        """Whether this experiment trains it."""
        return self.of is None and self.adapter is None and self.model is None

    @model_validator(mode="after")
    def _weights_come_from_one_place(self) -> "ArmSection":
        named = [name for name in ("of", "adapter", "model") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"its weights come from {' and from '.join(named)}: keep one")
        if named and (self.data or self.train):
            raise ValueError(f"it is not trained, because {named[0]} is set: remove data and train")
        if self.merged and (self.model or self.of == "base"):
            raise ValueError("there is no adapter to merge: remove merged")
        if self.prompt is not None and "{" in self.prompt and "{prompt}" not in self.prompt:
            raise ValueError("the prompt variant leaves out {prompt}")
        return self
