"""One experiment from model to report, as a YAML file: every command reads the same recipe."""

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from esr_train.errors import InputError
from esr_train.files import read_text
from esr_train.sections.arms import ArmSection
from esr_train.sections.data import DataSection
from esr_train.sections.evaluation import EvalSection
from esr_train.sections.train import TrainSection
from esr_train.sections.values import AtLeastOne, Section
from esr_train.sections.world import (
    CalibrationSection,
    EngineSection,
    JudgeSection,
    LatentsSection,
    ModelSection,
    PromptsSection,
    SaeSection,
    SamplingSection,
)
from esr_train.sweeps import swept


class Recipe(Section):
    """One experiment. See the recipes that are shipped for commented examples."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    runs: str = "runs"
    seed: int = 0
    seeds: tuple[int, ...] | None = Field(None, description="several runs with one combined metrics.json")
    workers: AtLeastOne = Field(1, description="seeds run at once, each in a process of its own with one thread")
    model: ModelSection
    sae: SaeSection | None = None
    latents: LatentsSection = LatentsSection()
    judge: JudgeSection = JudgeSection()
    judges: tuple[JudgeSection, ...] = Field(
        (), description="further judges of the same trials: how far do they agree?"
    )
    prompts: PromptsSection | None = None
    engine: EngineSection = EngineSection()
    sampling: SamplingSection = SamplingSection()
    calibration: CalibrationSection = CalibrationSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    arms: dict[str, ArmSection] = Field(default_factory=lambda: {"tuned": ArmSection()})

    @model_validator(mode="before")
    @classmethod
    def _a_list_of_shares_is_a_sweep(cls, values: Any) -> Any:
        return swept(values)

    @model_validator(mode="after")
    def _arms_are_valid(self) -> "Recipe":
        if "base" in self.arms:
            raise ValueError("arms: 'base' is always there and is not trained; remove it")
        for name, arm in self.arms.items():
            self.for_arm(name)
            if arm.of not in (None, "base") and (arm.of not in self.arms or self.arms[arm.of].of is not None):
                raise ValueError(f"arms.{name}.of: {arm.of!r} is no arm with weights of its own")
            for condition in arm.conditions or ():
                if condition not in self.eval.conditions:
                    raise ValueError(f"arms.{name}.conditions: {condition!r} is not among eval.conditions")
                if condition == "switched_off" and "steered" not in (arm.conditions or ()):
                    raise ValueError(
                        f"arms.{name}.conditions: {condition!r} goes on from the arm's 'steered' responses"
                    )
        return self

    @model_validator(mode="after")
    def _one_vllm_at_a_time(self) -> "Recipe":
        if self.workers > 1 and self.engine.kind == "vllm":
            raise ValueError(
                f"workers: {self.workers} processes would each start a vLLM of their own: set workers to 1, and "
                "engine.tensor_parallel for several accelerators"
            )
        return self

    @property
    def trained_arms(self) -> tuple[str, ...]:
        """The arms that are trained here."""
        return tuple(name for name, arm in self.arms.items() if arm.is_trained)

    @property
    def directory(self) -> Path:
        """Where the run's files lie."""
        return Path(self.runs) / self.name

    def for_arm(self, arm: str) -> "Recipe":
        """The recipe as this arm sees it: its overrides of `data` and `train` merged in.

        Raises:
            KeyError: if there is no such arm.
            pydantic.ValidationError: if an override is not valid where it goes.
        """
        section = self.arms[arm]
        values = self.model_dump(exclude={"arms"})
        values["data"] = _merged(values["data"], section.data)
        values["train"] = _merged(values["train"], section.train)
        return Recipe.model_validate({**values, "arms": {}})


class Loader(yaml.SafeLoader):
    """Safe YAML in which `2e-4` is a number; YAML 1.1 takes it for text unless it has a dot."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
)


def load_recipe(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides (values are YAML).

    Raises:
        InputError: naming every mistake at once, each with its key.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        mistakes = [f"{_key(item['loc'])}: {_message(item)}" for item in error.errors()]
        raise InputError(
            f"{len(mistakes)} mistake{'s' * (len(mistakes) > 1)} in the recipe: " + "; ".join(mistakes), str(path)
        ) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path | str) -> dict[str, Any]:
    try:
        values = yaml.load(read_text(path), Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError(f"not valid YAML ({getattr(error, 'problem', error)})", where) from error
    if not isinstance(values, dict):
        raise InputError("a recipe is a mapping of keys to values", str(path), "See `esr recipes show`.")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"the override {override!r} is not of the form key.sub=value")
    *parents, last = key.split(".")
    here = values
    for parent in parents:
        found = here.get(parent)
        if found is None:
            found = here[parent] = {}
        if not isinstance(found, dict):
            raise InputError(f"the override {override!r} goes through {parent!r}, which is not a section")
        here = found
    try:
        here[last] = yaml.load(text, Loader)
    except yaml.YAMLError:
        here[last] = text


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _key(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "recipe"


def _message(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "unknown key"
    if item["type"] == "missing":
        return "required"
    return f"{item['msg'][0].lower()}{item['msg'][1:]} (got {item['input']!r})"[:300]
