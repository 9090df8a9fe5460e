"""One experiment from model to report, as a YAML file: every command reads the same recipe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from esr_train.errors import InputError
from esr_train.files import read_yaml
from esr_train.sweeps import swept
from esr_train.values import parse_yaml

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Range = Annotated[tuple[float, float], Field(description="low and high end, both included")]


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
            if not {bool, Any} & set(_types(annotation)):
                raise ValueError("true and false are no numbers and no text")
        return value


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


class ModelSection(Section):
    """The model under test: a hub id or a local folder."""

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = "eager"
    device: str | None = Field(None, description="such as cuda:0 or cpu; None takes the first accelerator")


class SaeSection(Section):
    """The SAE whose latents steer: sae-lens release and id, or a local folder and sub-folder."""

    release: str
    id: str
    labels: str | None = Field(
        None, description="latents' labels: json, jsonl(.gz) or csv file, or a folder of Neuronpedia's batches"
    )


class LatentsSection(Section):
    """Which of the labelled latents may steer. What is dropped is counted."""

    relevant: Literal["drop", "keep"] = Field(
        "drop", description="latents that are active on a prompt of the set: what they bring up may be on topic there"
    )
    twins: Literal["drop", "keep"] = Field(
        "drop", description="latents whose decoder row is nearly that of one before them, whatever their labels say"
    )
    limit: AtLeastOne | None = Field(
        256, description="at most so many, each split's share drawn by the seed, before anything is calibrated"
    )


class JudgeSection(Section):
    """Who scores responses. `lexical` counts topic words; `model` and `local` ask a language model."""

    kind: Literal["lexical", "model", "local"] = "lexical"
    vocabulary: str | None = Field(None, description="lexical: JSON file, topic -> words")
    model: str | None = Field(
        None, description="model: a name of inspect_ai's model API; local: folder or hub id, run by our own engine"
    )
    temperature: Annotated[float, Field(ge=0)] | None = Field(0.0, description="None: the model takes none")
    max_tokens: AtLeastOne = Field(2048, description="of an answer, reasoning included")
    concurrency: AtLeastOne = Field(16, description="questions that are open at once; local: rows of a batch")
    timeout: AtLeastOne = Field(120, description="seconds until an open question is sent again")
    price: tuple[float, float] | None = Field(None, description="dollars per million tokens read and written")
    repeat: Count = Field(0, description="another number asks anew what was answered before, as a test-retest")


class SplitSection(Section):
    """Topics (and with them prompts and latents) are dealt to splits by a seeded hash."""

    validation: Fraction = 0.1
    test: Fraction = 0.3
    seed: int = 0


class PromptsSection(Section):
    """Prompts: a txt, jsonl or csv file, or a data set; those without a topic are each a topic by themselves."""

    path: str = Field(description="file, or a folder or hub name that `datasets` loads")
    column: str = "prompt"
    topic_column: str = "topic"
    split: str = Field("train", description="of a data set, such as train[:500]")
    splits: SplitSection = SplitSection()


class SamplingSection(Section):
    """How tokens are drawn; one setting for every arm and for data generation."""

    temperature: Annotated[float, Field(ge=0)] = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: AtLeastOne = 512
    repetition_penalty: Positive = 1.0


class EngineSection(Section):
    """What generates, and how many rows at once."""

    kind: Literal["transformers", "vllm"] = "transformers"
    batch_rows: AtLeastOne = 32
    tensor_parallel: AtLeastOne = Field(1, description="vllm: accelerators that share the model")
    positions: Literal["all", "generated"] = "all"


class CalibrationSection(Section):
    """Probabilistic bisection for each latent's threshold on the base model (strengths in `norm` units)."""

    target: Annotated[float, Field(gt=0, lt=100)] = 30.0
    rounds: AtLeastOne = Field(10, description="at most; see stop_width")
    stop_width: Positive | None = Field(
        None, description="a latent is asked no more once its 90 % interval is narrower than this share of its median"
    )
    prior: tuple[Positive, Positive] | None = Field(
        None, description="mean and standard deviation of the thresholds; None: the middle and half of the bounds"
    )
    prompts: AtLeastOne = Field(4, description="responses per latent and round")
    bounds: Range = (0.1, 2.0)
    max_new_tokens: AtLeastOne = 256
    verify: Count = Field(4, description="validation prompts per latent on which the threshold is checked")
    latents_per_topic: AtLeastOne = 1


class SteeredSection(Section):
    """On-policy detours: steer, cut, cue, correct."""

    rows: Count = 0
    strength: Drawn = Field((0.9, 1.3), description="multiples of the latent's threshold")
    start: Drawn = Field((0, 0), description="words of an unsteered answer, trained, before the steering sets in")
    cut: Drawn = Field((1, 4), description="sentences of the detour")
    cut_words: Drawn = Field((4, 40), description="words of a detour that is cut in mid-sentence")
    mid_sentence: Fraction = Field(0.0, description="share of detours cut in mid-sentence; endless ones always are")
    cut_tokens: Drawn = Field((8, 64), description="tokens of a detour that is cut at a token")
    at_token: Fraction = Field(0.0, description="share of detours cut at a token, wherever that falls")
    correction: Literal["afresh", "continued", "stem"] = Field(
        "afresh",
        description="afresh: the unsteered model answers the bare prompt; continued: it writes on behind detour and "
        "cue; stem: it writes the cue, too, from the first word or two of the drawn one",
    )
    steering_stays: Fraction = Field(
        0.0, description="share of candidates that stay steered while they write on behind the cue; few pass the judge"
    )
    max_new_tokens: AtLeastOne | None = Field(None, description="most tokens of a detour; None: as in `sampling`")
    second_detour: Fraction = Field(0.0, description="share of rows with two detours before the answer")
    max_detour_score: float = 50.0
    min_answer_score: float = 80.0
    cues: str | None = Field(None, description="text file, one cue a line; None takes the shipped set")
    registers: tuple[str, ...] | None = Field(None, description="[headings] of the cue file to draw from; None: all")


class ContrastSection(Section):
    """Steered rows that stay on topic: nothing to turn back from, so no cue."""

    rows: Count = 0
    strength: Drawn = (0.3, 0.8)
    min_answer_score: float = 90.0


class WriterSection(Section):
    """A language model that writes rows, named as in inspect_ai's model API; its key comes from the environment."""

    model: str
    temperature: Annotated[float, Field(ge=0)] | None = Field(1.0, description="None: the model takes none")
    max_tokens: AtLeastOne = Field(2048, description="of an answer, reasoning included")
    concurrency: AtLeastOne = Field(16, description="questions that are open at once")
    timeout: AtLeastOne = Field(120, description="seconds until an open question is sent again")
    price: tuple[float, float] | None = Field(None, description="dollars per million tokens read and written")
    limit_tokens: AtLeastOne | None = Field(None, description="tokens read and written at most, interruptions or not")
    limit_dollars: Positive | None = Field(None, description="dollars at most; needs a price, if the API gives none")


def _named(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class PromptedSection(Section):
    """Off-policy detours: text about another subject, written by somebody else (the paper's way)."""

    rows: Count = 0
    writer: Annotated[WriterSection | None, BeforeValidator(_named)] = Field(
        None,
        description="a language model that writes detour, acknowledgement and answer, by name or with settings; "
        "None: the model itself answers two questions",
    )
    subjects: str | None = Field(None, description="writer: file of off-topic subjects; None takes the shipped set")
    answer_words: AtLeastOne = Field(250, description="writer: most words of an answer")
    cut: Drawn = Field((1, 4), description="sentences of the detour")
    max_detour_score: float = 50.0
    min_answer_score: float = 80.0
    cues: str | None = Field(
        None, description="text file, one cue a line; None takes the shipped set (of which a writer is given the start)"
    )
    registers: tuple[str, ...] | None = Field(None, description="[headings] of the cue file to draw from; None: all")


class NormalSection(Section):
    """Unsteered answers by the model itself."""

    rows: Count = 0
    min_answer_score: float = 80.0


class FilterSection(Section):
    """What is thrown away for its text alone, after the judge."""

    repetition: Fraction = Field(0.5, description="most of a detour's word triples that it has said before")
    parroting: Fraction = Field(0.5, description="most of a detour's four-word sequences that the answer says again")
    alike: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.9, description="replies of one source that share so many of their word triples are one; None: only copies"
    )


class CueDiversitySection(Section):
    """How differently the rows of a training file must turn back at least; 0 demands nothing."""

    openings: Count = Field(0, description="distinct first three words")
    entropy: Annotated[float, Field(ge=0)] = Field(0.0, description="of the first three words, in bits")


class DataSection(Section):
    """What the training file is made of."""

    steered: SteeredSection = SteeredSection()
    prefixed: SteeredSection = Field(
        SteeredSection(), description="contrast: steered detours as in `steered`, in rows that are trained unsteered"
    )
    prompted: PromptedSection = PromptedSection()
    contrast: ContrastSection = ContrastSection()
    normal: NormalSection = NormalSection()
    self_correction: Fraction | None = Field(
        None,
        description="share of self-correction rows in the mixture; None keeps every row; a list makes an arm of each",
    )
    mix_by: Literal["rows", "trained_tokens"] = Field("rows", description="what that share counts")
    cue_diversity: CueDiversitySection = CueDiversitySection()
    filters: FilterSection = FilterSection()


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

    data: str | None = Field(None, description="file of transcripts or segments; None: what `data` generated")
    loss: Literal["masked", "unmasked", "answer_only"] = "masked"
    max_length: AtLeastOne = 4096
    quantization: Literal["nf4"] | None = None
    lora: dict[str, Any] = Field(default_factory=dict)
    args: dict[str, Any] = Field(default_factory=dict)
    live: LiveSection | None = None
    probe: ProbeSection | None = None


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


def load_recipe(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides (values are YAML).

    Raises:
        InputError: naming every mistake at once, each with its key.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError("a recipe is a mapping of keys to values", str(path), "See `esr recipes show`.")
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
        return "unknown key"
    if item["type"] == "missing":
        return "required"
    return f"{item['msg'][0].lower()}{item['msg'][1:]} (got {item['input']!r})"[:300]
