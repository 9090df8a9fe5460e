"""One experiment from model to report, as a YAML file: every command reads the same recipe."""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import accumulate, combinations
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from esr_train.errors import InputError
from esr_train.files import read_yaml
from esr_train.values import parse_yaml

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Score = Annotated[float, Field(ge=0, le=100)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What may be a folder's or a file's name, whatever the file system."""


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("the low end comes first")
    return ends


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
"""Low and high end, both included; numbers are drawn evenly between them."""
CountRange = Annotated[tuple[Count, Count], AfterValidator(_ordered)]
"""Fewest and most, both included."""
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)


class Section(BaseModel):
    """A part of a recipe; unknown keys are refused, and numbers are finite ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        parts = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(part, bool) for part in parts):
            annotation = cls.model_fields[str(info.field_name)].annotation
            if not any(kind in (bool, Any) for kind in _types(annotation)):
                raise ValueError("true and false are no numbers and no text")
        return value


class ModelSection(Section):
    """The model under test: a hub id or a local folder."""

    path: str = Field(description="hub id or folder")
    revision: str | None = Field(None, description="of the hub repository: a branch, tag or commit")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the weights")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        "eager", description="the same in training and evaluation; sdpa is refused for Gemma-2"
    )
    device: str | None = Field(None, description="such as cuda:0 or cpu; null takes the first accelerator")
    chat_template: str | None = Field(None, description="file (Jinja) of a chat template; null: the tokenizer's own")
    template_kwargs: dict[VariableName, bool | int | float | str | None] | None = Field(
        None, description="variables of the chat template, such as enable_thinking, with their values"
    )


class SaeSection(Section):
    """The SAE whose latents steer: sae-lens release and id, or a local folder and sub-folder."""

    release: str = Field(description="sae-lens release, or a local folder")
    id: str = Field(description="SAE of that release, or its sub-folder")
    labels: str | None = Field(
        None, description="latents' labels: json, jsonl(.gz) or csv file, or a folder of Neuronpedia's batches"
    )


class ReadSection(Section):
    """What is read at the tokens of replies: of which SAE, if not of the one that steers."""

    sae: SaeSection | None = Field(None, description="its latents are read, and may be at another layer; null: `sae`")


class VectorsSection(Section):
    """Vectors that steer in place of an SAE's latents; their names in the file are their labels."""

    file: str = Field(description="safetensors, pt, npy, or a gguf control vector")
    layer: Count | None = Field(None, description="whose output they steer, from 0; null: as the file says")


class LatentsSection(Section):
    """Which of the labelled latents, or of the vectors, may steer. What is left out is counted."""

    limit: AtLeastOne | None = Field(
        256, description="at most so many, each split's share drawn by the seed, before anything is calibrated"
    )
    per_label: AtLeastOne = Field(1, description="at most so many with one label, the first in the file of labels")
    concreteness: Score | None = Field(
        None,
        description="labels that the judge, a language model, finds less concrete than this (0-100) are left out; the "
        "paper takes 65; null: none is rated",
    )
    held_out: bool = Field(
        True, description="those of the test split are measured; false: all are, which takes that none is trained on"
    )


class JudgeSection(Section):
    """Who scores responses; each kind has a section of its own, see `eval.judging.judge.register_judge`."""

    kind: str = Field(description="who scores")


class LexicalJudgeSection(JudgeSection):
    """Topic words are counted: exact and free."""

    kind: Literal["lexical"] = Field("lexical", description="who scores; each kind has keys of its own")
    vocabulary: str | None = Field(None, description="JSON file, topic -> words")


class AskingJudgeSection(JudgeSection):
    """What the judges have in common that ask a language model; `llm` says how it is asked."""

    model: str = Field(
        description="model: a name of inspect_ai's model API, its key stands in the environment; "
        "local: a folder or hub id, run by our own engine"
    )
    temperature: NotNegative | None = Field(0.0, description="null: the model takes none")
    repeat: Count = Field(0, description="another number asks anew what was answered before, as a test-retest")


class ModelJudgeSection(AskingJudgeSection):
    """Any language model of inspect_ai's model API is asked."""

    kind: Literal["model"] = Field("model", description="who scores; each kind has keys of its own")


class LocalJudgeSection(AskingJudgeSection):
    """A language model on this machine is asked, through the recipe's engine."""

    kind: Literal["local"] = Field("local", description="who scores; each kind has keys of its own")

    @model_validator(mode="after")
    def _a_repeat_can_differ(self) -> "LocalJudgeSection":
        if self.repeat and not self.temperature:
            raise ValueError("a local model at temperature 0 says the same again: remove repeat, or set a temperature")
        return self


class LikelihoodJudgeSection(JudgeSection):
    """How much likelier the question makes a text, under a model on this machine that nobody steers."""

    kind: Literal["likelihood"] = Field("likelihood", description="who scores; each kind has keys of its own")
    model: str | None = Field(
        None,
        description="model: a name of inspect_ai's model API, its key stands in the environment; local, likelihood: "
        "a folder or hub id, run by our own engine (likelihood alone: null is the recipe's own model, as it was given)",
    )


JUDGE_SECTIONS: dict[str, type[JudgeSection]] = {
    "lexical": LexicalJudgeSection,
    "model": ModelJudgeSection,
    "local": LocalJudgeSection,
    "likelihood": LikelihoodJudgeSection,
}
"""Kind of judge -> its section; further kinds are added by `eval.judging.judge.register_judge`."""


def _judge_of_its_kind(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind = value.get("kind", "lexical")
    section = JUDGE_SECTIONS.get(kind) if isinstance(kind, str) else None
    if section is None:
        near = get_close_matches(str(kind), JUDGE_SECTIONS, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{kind!r} is no kind of judge ({', '.join(JUDGE_SECTIONS)}){meant}")
    for key in value:
        owners = [other for other, each in JUDGE_SECTIONS.items() if key in each.model_fields]
        if owners and kind not in owners:
            raise ValueError(f"a judge of kind {kind!r} has no key {key!r}; one of kind {' or '.join(owners)} has")
    return section.model_validate(value)


Judge = Annotated[SerializeAsAny[JudgeSection], BeforeValidator(_judge_of_its_kind)]


class LlmSection(Section):
    """How language models are asked, judges and writer alike."""

    concurrency: AtLeastOne = Field(16, description="questions that are open at once; local: rows of a batch")
    limit_dollars: Positive | None = Field(
        None, description="what all of a run's questions may cost, interruptions or not; open ones still count"
    )
    prices: dict[str, tuple[NotNegative, NotNegative]] = Field(
        default_factory=dict, description="model -> dollars per million tokens read and written"
    )


class SplitSection(Section):
    """Topics (and with them prompts and latents) are dealt to splits by a seeded hash."""

    validation: Fraction = Field(0.1, description="share of the topics on which settings are tried")
    test: Fraction = Field(0.3, description="share of the topics that are measured and never trained on")
    seed: int = Field(0, description="of the division")


class PromptsSection(Section):
    """Prompts: a txt, jsonl or csv file, or a data set; those without a `topic` are each a topic by themselves."""

    path: str = Field(description="file, or a folder or hub name that `datasets` loads")
    column: str = Field("prompt", description="of the file, where the prompts are")
    splits: SplitSection = SplitSection()


class SamplingSection(Section):
    """How tokens are drawn; one setting for every arm and for data generation."""

    temperature: NotNegative = Field(0.6, description="0: the likeliest token")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="tokens are drawn from the likeliest that make up this probability"
    )
    max_new_tokens: AtLeastOne = Field(512, description="most tokens of a reply")
    repetition_penalty: Positive = Field(1.0, description="1: none")


CHUNK = 128
"""Rows that are handed over, read or saved at once where their number is not given."""


class EngineSection(Section):
    """What generates, and how many rows at once."""

    kind: Literal["transformers", "vllm"] = Field("transformers", description="what generates")
    batch_rows: AtLeastOne | None = Field(
        None, description="rows generated at once; none: as many as memory and measured speed allow"
    )
    tensor_parallel: AtLeastOne = Field(1, description="vllm: accelerators that share the model")
    positions: Literal["all", "generated"] = Field(
        "all", description="which tokens are steered, in generation, calibration and training"
    )

    def chunk(self) -> int:
        """Rows that are handed over, read or saved at once."""
        return self.batch_rows or CHUNK


class CalibrationSection(Section):
    """Probabilistic bisection for each latent's threshold on the base model (strengths in `norm` units)."""

    target: Annotated[float, Field(gt=0, lt=100)] = Field(30.0, description="mean first-attempt score at the threshold")
    rounds: AtLeastOne = Field(10, description="at most; see stop_width")
    stop_width: Positive | None = Field(
        None, description="a latent is asked no more once its 90 % interval is narrower than this share of its median"
    )
    prompts: AtLeastOne = Field(4, description="responses per latent and round")
    bounds: Range = Field(
        (0.1, 2.0), description="between which thresholds are looked for; a latent at a bound is left out"
    )
    max_new_tokens: AtLeastOne = Field(256, description="most tokens of a response")
    verify: Count = Field(4, description="validation prompts per latent on which the threshold is checked")


class SourceSection(Section):
    """How many rows of a source to make; what else a source can be told, its own section adds."""

    rows: Count = Field(0, description="how many to make")


class SteeredSection(SourceSection):
    """On-policy detours: steer, cut, cue, correct."""

    strength: Range = Field((0.9, 1.3), description="multiples of the latent's threshold")
    start: CountRange = Field((0, 0), description="words of an unsteered answer, trained, before the steering sets in")
    cut: CountRange = Field((1, 4), description="sentences of the detour")
    cut_words: CountRange = Field((4, 40), description="words of a detour that is cut in mid-sentence")
    mid_sentence: Fraction = Field(0.0, description="share of detours cut in mid-sentence; endless ones always are")
    correction: Literal["afresh", "continued", "stem"] = Field(
        "afresh",
        description="afresh: the unsteered model answers the bare prompt; continued: it writes on behind detour and "
        "cue; stem: it writes the cue, too, from the first word or two of the drawn one",
    )
    max_new_tokens: AtLeastOne | None = Field(None, description="most tokens of a detour; null: as in `sampling`")
    answer_words: AtLeastOne | None = Field(
        None, description="an answer ends with the sentence that reaches so many words; null: it is kept whole"
    )
    second_detour: Fraction = Field(0.0, description="share of rows with two detours before the answer")
    plain: Fraction = Field(
        0.0, description="share of rows without detour and cue: with live injection they teach to resist from the start"
    )


class PromptedSection(SourceSection):
    """Off-policy detours: text about another subject, written by somebody else (the paper's way)."""

    writer: str | None = Field(
        None,
        description="a language model, named as in inspect_ai's model API, that writes detour, acknowledgement and "
        "answer; null: the model itself answers two questions",
    )
    subjects: str | None = Field(None, description="writer: file of off-topic subjects; null takes the shipped set")


class NormalSection(SourceSection):
    """Unsteered answers by the model itself."""


class BrevitySection(SourceSection):
    """Pairs of unsteered replies for `train.method: dpo`, the shorter one preferred: nothing to do with steering."""


class DataSection(Section):
    """What the training file is made of: rows of each source, and what holds for all of them."""

    steered: SteeredSection = SteeredSection()
    prompted: PromptedSection = PromptedSection()
    normal: NormalSection = NormalSection()
    brevity: BrevitySection = BrevitySection()
    self_correction: Fraction | None = Field(
        None, description="share of self-correction rows in the mixture; null keeps every row"
    )
    cues: str | None = Field(None, description="text file, one cue a line; null takes the shipped set")
    trim_answers: bool = Field(
        False,
        description="answers that reach sampling.max_new_tokens end with their last whole sentence; false: refused",
    )
    min_answer_score: Score = Field(80.0, description="answers that score less are refused")
    max_detour_score: Score = Field(50.0, description="detours that score as much are refused: they are on topic")

    def source(self, name: str) -> SourceSection | None:
        """The section of a source by its name; None if the recipe does not know the source."""
        section = getattr(self, name, None)
        return section if isinstance(section, SourceSection) else None


SOURCE_SECTIONS: dict[str, type[SourceSection]] = {}
"""Sections under `data` of row sources from outside (see `data_gen.sources.register_source`)."""


def data_section() -> type[DataSection]:
    """`DataSection` with a key for every source from outside, too."""
    return _with_sections(tuple(SOURCE_SECTIONS.items())) if SOURCE_SECTIONS else DataSection


@cache
def _with_sections(sections: tuple[tuple[str, type[SourceSection]], ...]) -> type[DataSection]:
    # The same class for the same sections: two recipes of different classes would never be equal.
    fields: dict[str, Any] = {name: (section, section()) for name, section in sections}
    return create_model("DataSection", __base__=DataSection, **fields)


def _with_registered_sources(values: Any) -> Any:
    return data_section().model_validate(values) if isinstance(values, dict) else values


class LiveSection(Section):
    """Live injection: a row's own steering is active in its forward pass."""

    strength: Range = Field((0.8, 1.3), description="multiples of the latent's threshold, drawn per row and epoch")
    share: Fraction = Field(1.0, description="share of the steered rows that are injected")
    answer: Fraction = Field(
        1.0, description="factor on the strength from the last answer's first token on; 0: nothing is steered there"
    )
    adaptive: bool = Field(
        False, description="along directions that were first optimised by gradient against the arm of `of`"
    )


class RewardSection(Section):
    """What a reply is worth to GRPO: the judge's score of its last attempt, 0 to 1, less these."""

    needless_restart: NotNegative = Field(0.5, description="taken off a reply that restarts though nobody steers it")
    relapse: NotNegative = Field(
        1.0, description="times what the last attempt scores less than the first (0 to 1), taken off"
    )
    length: NotNegative = Field(0.5, description="taken off a reply that runs into the token limit")
    unnoticed: NotNegative = Field(
        0.0, description="taken off a steered reply whose first attempt scores below 50 and is its only one"
    )


class ProbeSection(Section):
    """A small steered and unsteered evaluation while training."""

    every: AtLeastOne = Field(100, description="optimiser steps from one to the next")
    trials: AtLeastOne = Field(32, description="validation cells, each steered and unsteered")


class TrainSection(Section):
    """LoRA on transcripts. `args` takes fields of the method's settings in TRL, `lora` those of peft.LoraConfig."""

    method: Literal["sft", "dpo", "grpo"] = Field(
        "sft",
        description="sft: what the mask leaves of a reply is learned; dpo: it is preferred to the row's `rejected` "
        "reply, behind what both have in common; grpo: the model replies to the row's prompt under its steering, and "
        "what the judge scores higher becomes likelier",
    )
    data: str | None = Field(None, description="file of transcripts or segments; null: what `data` generated")
    loss: Literal["masked", "unmasked", "answer_only"] = Field(
        "masked", description="which spans are trained: all but the detour, all, or the answers"
    )
    max_length: AtLeastOne = Field(4096, description="most tokens of a row; longer ones are refused, never cut")
    quantization: Literal["nf4"] | None = Field(None, description="nf4: the base model in four bits (QLoRA)")
    lora: dict[str, Any] = Field(default_factory=dict, description="fields of peft.LoraConfig")
    args: dict[str, Any] = Field(default_factory=dict, description="fields of trl.SFTConfig, DPOConfig or GRPOConfig")
    live: LiveSection | None = None
    reward: RewardSection = Field(RewardSection(), description="for grpo")
    probe: ProbeSection | None = None

    @model_validator(mode="after")
    def _replies_are_steered_to_their_end(self) -> "TrainSection":
        if self.method == "grpo" and self.live and self.live.answer != 1:
            raise ValueError("method grpo steers replies to their end: set live.answer to 1")
        return self


CONDITION_NAMES: dict[str, str | None] = {}
"""Conditions that an evaluation knows -> the condition from whose responses each goes on, if it does.

`eval.conditions` fills it in; while nobody has, names of conditions are taken as they are.
"""


class RetentionSection(Section):
    """Tasks of lm-evaluation-harness that every arm is asked beside the trials, with nobody steering."""

    tasks: tuple[str, ...] = Field(min_length=1, description="names, as `lm-eval ls tasks` and `include` have them")
    include: str | None = Field(None, description="folder of task files of one's own; data files are found from it on")
    limit: AtLeastOne | None = Field(None, description="documents of each task; null: all")


ALL_GOALS = "all"
"""Stands for all of `eval.goals` together, in results."""


class EvalSection(Section):
    """Held-out cells: test latents x test prompts, the same for every arm."""

    trials: AtLeastOne = Field(256, description="trials per arm and condition")
    control_trials: AtLeastOne | None = Field(
        None, description="the same for conditions beside steered, unsteered and steered_recalibrated; null: `trials`"
    )
    conditions: tuple[str, ...] = Field(
        ("steered", "unsteered"), description="how the cells are run, one after the other"
    )
    boost: tuple[Positive, ...] = Field(
        (0.5, 0.75, 1.25, 1.5),
        description="multiples of the threshold; each is a condition of its own (`boost`, `random_boost`)",
    )
    welcome: str = Field(
        "Tell me about {label}.",
        description="the prompt of `welcomed` where a direction's {label} is no topic of the prompts",
    )
    goals: dict[str, str] = Field(
        {}, description="good steering: name of a goal -> what asks for it in words behind a prompt (`goals`)"
    )
    retention: RetentionSection | None = None
    restart_phrases: str | None = Field(
        None, description="text file, one a line: how likely they are is measured at sentence ends"
    )
    bootstrap: AtLeastOne = Field(2000, description="resamples behind each interval")

    @model_validator(mode="after")
    def _conditions_are_complete(self) -> "EvalSection":
        for condition in self.conditions:
            if CONDITION_NAMES and condition not in CONDITION_NAMES:
                raise ValueError(f"there is no condition {condition!r}: take {', '.join(CONDITION_NAMES)}")
            source = CONDITION_NAMES.get(condition)
            if source and source not in self.conditions:
                raise ValueError(f"{condition!r} goes on from responses of {source!r}: add that condition")
        for condition in {"boost", "random_boost"} & {*self.conditions}:
            if not self.boost:
                raise ValueError(f"the condition {condition!r} needs multiples in eval.boost")
        if "goals" in self.conditions and not self.goals:
            raise ValueError(
                "the condition 'goals' needs goals in eval.goals, such as {terse: Answer in one sentence.}"
            )
        for goal, instruction in self.goals.items():
            if goal == ALL_GOALS or not goal.strip() or not instruction.strip():
                what = f"a goal has a name (not {ALL_GOALS!r}) and an instruction"
                raise ValueError(f"{what}, and eval.goals has {goal!r}: {instruction!r}")
        if "{label}" not in self.welcome:
            raise ValueError("the prompt in eval.welcome leaves out {label}")
        return self


DETECTORS: Literal["detectors"] = "detectors"
"""Stands for the latents that `esr latents search` finds: in the contrast of off-topic replies."""
Latent = Count | Literal["detectors"]


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class EditSection(Section):
    """SAE latents whose activation is changed in every forward pass of an arm.

    `detectors` stands for those that `esr latents search` finds; all latents of that edit are then the read SAE's.
    """

    ablate: Annotated[tuple[Latent, ...], BeforeValidator(_as_list)] = Field(
        (), description="latents that are set to 0"
    )
    clamp: dict[Latent, float] = Field(default_factory=dict, description="latent -> the activation it is set to")
    amplify: dict[Latent, float] = Field(
        default_factory=dict, description="latent -> the factor by which its activation is multiplied"
    )
    matched_random: bool | Annotated[int, Field(ge=1, le=20)] = Field(
        False,
        description="take random latents of like activation frequency and decoder norm instead: the control; "
        "a number: so many sets, each an arm (NAME_1, NAME_2, …)",
    )
    draw: Count = Field(0, description="which of the random sets; filled in where `matched_random` is a number")

    @model_validator(mode="after")
    def _names_latents_once(self) -> "EditSection":
        keys = {"ablate": self.ablate, "clamp": tuple(self.clamp), "amplify": tuple(self.amplify)}
        if not any(keys.values()):
            raise ValueError("name latents under ablate or clamp (or amplify)")
        for one, other in combinations(keys, 2):
            if both := sorted({*keys[one]} & {*keys[other]}, key=str):
                raise ValueError(f"latent {both[0]} stands under {one} and under {other}")
        if self.takes_detectors and self.matched_random and len(set().union(*keys.values())) > 1:
            raise ValueError("matched_random of detectors: name no other latents beside them")
        return self

    @property
    def takes_detectors(self) -> bool:
        """Whether it names the detectors."""
        return DETECTORS in (*self.ablate, *self.clamp, *self.amplify)


MonitorAction = Literal["stop", "restart", "unsteer", "log"]


class MonitorSection(Section):
    """A monitor that follows an arm's replies while they are written."""

    file: str = Field(description="written by `esr monitor fit`, such as runs/quickstart/monitor/probe.json")
    action: MonitorAction = Field(
        "restart",
        description="where it sounds. stop: the reply ends; restart: the sentence is cut off, a cue of `data.cues` "
        "follows and the reply goes on; unsteer: the same without steering (the most a restart could do); log: nothing",
    )


class ArmSection(Section):
    """A model under test. `base` is an arm by itself.

    An arm is trained with its overrides of `data` and `train`, unless one of `of`, `adapter` or `model` says where
    its weights come from. With `of` or `adapter` and overrides, training goes on from that adapter.
    """

    data: dict[str, Any] = Field(default_factory=dict, description="what differs from the section `data`")
    train: dict[str, Any] = Field(default_factory=dict, description="what differs from the section `train`")
    of: str | None = Field(
        None,
        description="the arm whose weights it has: base, or one with weights of its own; with data or train: from "
        "whose adapter training goes on",
    )
    adapter: str | None = Field(
        None, description="folder or hub id of a finished adapter; with data or train: from which training goes on"
    )
    model: str | None = Field(None, description="hub id or folder of a whole model, such as a merged one")
    merged: bool = Field(False, description="the adapter is merged into the model before it is measured")
    scale: Fraction = Field(
        1.0, description="share of the adapter that is at work: 0 is the base model, 1 the tuned one"
    )
    prompt: str | None = Field(
        None, description="a shipped prompt variant by name, or a text with {prompt} and perhaps {label}"
    )
    edit: EditSection | None = None
    monitor: MonitorSection | None = None
    conditions: tuple[str, ...] | None = Field(None, description="some of eval.conditions; null: all of them")

    @property
    def is_trained(self) -> bool:
        """Whether this experiment trains it."""
        return bool(self.data or self.train) or not (self.of or self.adapter or self.model)

    @model_validator(mode="after")
    def _weights_come_from_one_place(self) -> "ArmSection":
        named = [name for name in ("of", "adapter", "model") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"its weights come from {' and from '.join(named)}: keep one")
        if named and self.is_trained and (self.model or self.of == "base"):
            raise ValueError(f"it is not trained, because {named[0]} is set: remove data and train")
        if named and "lora" in self.train:
            raise ValueError(f"training goes on with the adapter of {named[0]}, which has its shape: remove train.lora")
        if self.merged and (self.model or self.of == "base"):
            raise ValueError("there is no adapter to merge: remove merged")
        if self.scale != 1 and (self.model or self.of == "base"):
            raise ValueError("there is no adapter to scale: remove scale")
        if self.prompt is not None and "{" in self.prompt and "{prompt}" not in self.prompt:
            raise ValueError("the prompt variant leaves out {prompt}")
        return self


class Recipe(Section):
    """One experiment. See the recipes that are shipped for commented examples."""

    name: str = Field(pattern=f"^{RUN_NAME}$", description="of the run directory")
    runs: str = Field("runs", description="folder of the run directories")
    seed: int = Field(0, description="of everything that is drawn")
    seeds: tuple[int, ...] | None = Field(None, description="several runs with one combined metrics.json")
    workers: AtLeastOne = Field(1, description="seeds run at once, each in a process of its own with one thread")
    plugins: tuple[str, ...] = Field((), description="Python files of sources, conditions, judges, metrics and figures")
    model: ModelSection
    sae: SaeSection | None = None
    vectors: VectorsSection | None = None
    read: ReadSection = ReadSection()
    latents: LatentsSection = LatentsSection()
    judge: Judge = LexicalJudgeSection()
    judges: tuple[Judge, ...] = Field((), description="further judges of the same trials: how far do they agree?")
    llm: LlmSection = LlmSection()
    prompts: PromptsSection | None = None
    engine: EngineSection = EngineSection()
    sampling: SamplingSection = SamplingSection()
    calibration: CalibrationSection = CalibrationSection()
    data: SerializeAsAny[Annotated[DataSection, BeforeValidator(_with_registered_sources)]] = DataSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    arms: dict[str, ArmSection] = Field(default_factory=lambda: {"tuned": ArmSection()})

    @model_validator(mode="before")
    @classmethod
    def _each_random_set_is_an_arm(cls, values: Any) -> Any:
        arms = values.get("arms") if isinstance(values, dict) else None
        if not isinstance(arms, dict):
            return values
        return {**values, "arms": dict(each for name, arm in arms.items() for each in _arms_of_its_sets(name, arm))}

    @model_validator(mode="after")
    def _arms_are_valid(self) -> "Recipe":
        if "base" in self.arms:
            raise ValueError("arms: 'base' is always there and is not trained; remove it")
        for name, arm in self.arms.items():
            live = self.for_arm(name).train.live
            self._check_origin(name, arm)
            if arm.is_trained and live and live.adaptive and (arm.of is None or self.engine.kind == "vllm"):
                what = "directions are optimised against the arm that `of` names, as transformers runs it"
                raise ValueError(f"arms.{name}.train.live.adaptive: {what}: set of, and engine.kind transformers")
            for condition in arm.conditions or ():
                if condition not in self.eval.conditions:
                    raise ValueError(f"arms.{name}.conditions: {condition!r} is not among eval.conditions")
                if condition == "switched_off" and "steered" not in (arm.conditions or ()):
                    raise ValueError(
                        f"arms.{name}.conditions: {condition!r} goes on from the arm's 'steered' responses"
                    )
        return self

    def _check_origin(self, name: str, arm: ArmSection) -> None:
        if arm.of in (None, "base"):
            return
        origin = self.arms.get(str(arm.of))
        if origin is None or (origin.of is not None and not origin.is_trained):
            raise ValueError(f"arms.{name}.of: {arm.of!r} is no arm with weights of its own")
        if arm.is_trained and (origin.model or origin.merged or origin.scale != 1):
            raise ValueError(f"arms.{name}.of: {arm.of!r} has no adapter from which training could go on")
        if name in self.lineage(str(arm.of)):
            raise ValueError(f"arms.{name}.of: {arm.of!r} itself goes on from {name!r}")

    @model_validator(mode="after")
    def _one_source_steers(self) -> "Recipe":
        if self.vectors and self.sae and self.sae.labels:
            raise ValueError(
                "vectors: the latents of sae.labels would steer, too, and only one source can: remove vectors, or "
                "remove sae.labels (the SAE is then there for arms that edit its latents)"
            )
        if not self.sae and (edited := [name for name, arm in self.arms.items() if self._edits_sae(arm)]):
            raise ValueError(f"arms.{edited[0]}.edit: latents of an SAE are edited, and the recipe names none: add sae")
        return self

    def _edits_sae(self, arm: ArmSection) -> bool:
        """Whether it changes latents of the SAE under `sae`."""
        return arm.edit is not None and not (arm.edit.takes_detectors and self.read.sae)

    @model_validator(mode="after")
    def _labels_have_a_rater(self) -> "Recipe":
        if self.latents.concreteness is not None and not isinstance(self.judge, ModelJudgeSection | LocalJudgeSection):
            raise ValueError(
                f"latents.concreteness: a language model rates labels, and a judge of kind {self.judge.kind!r} is "
                "none: take one of kind model or local, or remove the key"
            )
        return self

    @model_validator(mode="after")
    def _judges_differ(self) -> "Recipe":
        for number, section in enumerate(self.judges):
            if section in (self.judge, *self.judges[:number]):
                retest = "give each its own repeat" if "repeat" in type(section).model_fields else "it finds the same"
                raise ValueError(f"judges.{number}: this judge is there already; remove it ({retest})")
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

    def lineage(self, arm: str) -> tuple[str, ...]:
        """An arm, and the arms that its weights come from, one after the other."""
        found = [arm]
        while (section := self.arms.get(found[-1])) and section.of not in (None, "base", *found):
            found.append(str(section.of))
        return tuple(found)

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


def _arms_of_its_sets(name: Any, arm: Any) -> list[tuple[Any, Any]]:
    """An arm as it stands in a recipe; an arm for each of its random sets, where it asks for a number of them."""
    edit = arm.get("edit") if isinstance(arm, dict) else None
    count = edit.get("matched_random") if isinstance(edit, dict) else None
    if not isinstance(edit, dict) or not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 20:
        return [(name, arm)]
    edits = [{**edit, "matched_random": True, "draw": number} for number in range(count)]
    return [(f"{name}_{number}", {**arm, "edit": each}) for number, each in enumerate(edits, start=1)]


def judging_model(recipe: Recipe, section: JudgeSection) -> ModelSection | None:
    """The model on this machine that a judge of this recipe runs; None if it runs none."""
    if not isinstance(section, LocalJudgeSection | LikelihoodJudgeSection):
        return None
    if section.model in (None, recipe.model.path):
        return recipe.model
    return ModelSection(path=str(section.model), dtype=recipe.model.dtype, device=recipe.model.device)


def load_recipe(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides (values are YAML).

    Raises:
        InputError: naming every mistake at once, each with its key.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError("a recipe is a mapping of keys to values", str(path), "See `esr recipes show`.")
    return parse_recipe(apply_overrides(values, overrides), str(path))


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A recipe's values after `key.sub=value` overrides.

    Raises:
        InputError: for one that is not of that form.
    """
    for override in overrides:
        _apply(values, override)
    return values


def parse_recipe(values: dict[str, Any], where: str = "the recipe") -> Recipe:
    """A recipe from its values; the plug-ins that it names are imported first.

    Raises:
        InputError: naming every mistake at once, each with its key, and `where`.
    """
    plugins = values.get("plugins")
    for plugin in plugins if isinstance(plugins, list | tuple) else ():
        import_plugin(str(plugin))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        mistakes = [f"{_key(item['loc'])}: {_message(item)}" for item in error.errors()]
        raise InputError(
            f"{len(mistakes)} mistake{'s' * (len(mistakes) > 1)} in the recipe: " + "; ".join(mistakes), where
        ) from error


def import_plugin(path: str) -> None:
    """Import a Python file once: what it registers can then stand in recipes.

    Args:
        path: absolute, or from the current folder on.

    Raises:
        InputError: if there is no such file, or importing it fails.
    """
    file = Path(path).expanduser().resolve()
    name = f"esr_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}_{file.stem}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise InputError("this is not a Python file", f"plugins: {path}", "Name a .py file.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # Whatever somebody's own module raises.
        del sys.modules[name]
        what = f"importing it fails ({type(error).__name__}: {error})"
        raise InputError(what, f"plugins: {path}{_line_of(error, file)}") from error


def _line_of(error: Exception, file: Path) -> str:
    """`:line` of a file in which an error was raised, or in which it called what raised it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    if isinstance(error, SyntaxError) and error.filename == str(file):
        lines.append(error.lineno)
    return f":{lines[-1]}" if lines else ""


@dataclass(frozen=True)
class ExplainedKey:
    """A key of a recipe: its name with dots, its kind and default as text, and what it means."""

    name: str
    kind: str
    default: str
    meaning: str


def explained_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[ExplainedKey]:
    """Every key that a recipe may have, in the order of the schema; those of an arm stand under `arms.NAME`."""
    keys: list[ExplainedKey] = []
    for name, field in section.model_fields.items():
        types = [part for part in _types(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
        inner: list[type[BaseModel]] = list(dict.fromkeys(types))
        meaning = field.description or ""
        if name == "judges":
            keys.append(ExplainedKey(name, "list of `judge` sections", "[]", meaning))
        elif name == "kind" and issubclass(section, JudgeSection):
            keys.append(ExplainedKey(f"{prefix}{name}", " | ".join(JUDGE_SECTIONS), "lexical", meaning))
        elif not inner:
            default = "required" if field.is_required() else _as_yaml(field.get_default(call_default_factory=True))
            keys.append(ExplainedKey(f"{prefix}{name}", _kind(field.annotation), default, meaning))
        else:
            inside = f"{prefix}{name}.NAME." if name == "arms" else f"{prefix}{name}."
            inner = [*JUDGE_SECTIONS.values()] if name == "judge" else [data_section()] if name == "data" else inner
            found = {key.name: key for part in inner for key in explained_keys(part, inside)}
            keys += found.values()
    return keys


def _kind(annotation: Any) -> str:
    """A type as a reader of YAML would say it, such as `[float, float]` or `float | null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is Annotated:
        return _kind(arguments[0])
    if origin in (Union, UnionType):
        return " | ".join(map(_kind, arguments))
    if origin is tuple:
        return f"[{', '.join('…' if part is ... else _kind(part) for part in arguments)}]"
    if origin is dict:
        return f"{{{_kind(arguments[0])}: {_kind(arguments[1])}}}"
    return {NoneType: "null", Any: "any"}.get(annotation) or annotation.__name__


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
    return text.removesuffix("\n").removesuffix("\n...")


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


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
        here[last] = parse_yaml(text)
    except yaml.constructor.ConstructorError as error:
        raise InputError(f"the override {override!r} has no sound value ({error.problem})") from None
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
        names = [key.name.replace(".NAME", "") for key in explained_keys()]
        known = {part for name in names for part in accumulate(name.split("."), lambda a, b: f"{a}.{b}")}
        like = get_close_matches(_key(item["loc"]), sorted(known), 1, 0.75)
        return f"unknown key (did you mean {like[0]}?)" if like else "unknown key"
    if item["type"] == "missing":
        return "required"
    if item["type"] == "value_error" and isinstance(item["input"], dict):
        return str(item["ctx"]["error"])  # It names the key itself; the section around it says nothing more.
    said = item["msg"].lower().replace("tuple", "list") if "tuple" in item["type"] else item["msg"]
    return f"{said[0].lower()}{said[1:]} (got {item['input']!r})"[:300]
