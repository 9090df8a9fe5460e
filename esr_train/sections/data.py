"""What the training file is made of."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from esr_train.sections.values import AtLeastOne, Count, Drawn, Fraction, Positive, Section


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
