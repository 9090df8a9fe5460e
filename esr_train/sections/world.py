"""What an experiment stands on: model, SAE, judge, prompts, engine, sampling, thresholds."""

from typing import Annotated, Literal

from pydantic import Field

from esr_train.sections.values import AtLeastOne, Count, Fraction, Positive, Range, Section


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
