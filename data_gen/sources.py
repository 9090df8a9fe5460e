"""Where rows come from: the registry of sources, and what every source works with. `normal` is the smallest one."""

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from esr_train.errors import InputError
from esr_train.files import read_lines
from esr_train.models import local_path
from esr_train.recipe import SOURCE_SECTIONS, DataSection, NormalSection, SourceSection, SplitSection
from esr_train.restarts import sentences
from esr_train.steering.directions import Direction, Positions
from esr_train.steering.engine import Completion, Engine, Progress, Request, Sampling
from esr_train.transcript import Span, SpanKind, Steering, Transcript, VectorRef
from eval.cells import Pools, Prompt
from eval.judging.judge import Judge, JudgeItem, first_scores
from eval.llm import Asker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEEDS = 2**31
CUES = Path(__file__).parent / "cues.txt"
LABEL = "{label}"
TOO_LONG = "answer too long"
"""Why a row is refused whose answer has not ended after `sampling.max_new_tokens`."""
_HEADING = re.compile(r"\[([\w -]+)\]")
_STEM_WORDS = 2
_FINISHED = re.compile(r"(?s)[^\W\d_].*[.!?…][\"')\]”*_]*$")


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate: a transcript, perhaps with a trimmed answer, or the reason why there is none."""

    transcript: Transcript | None
    reason: str | None = None
    trimmed: bool = False


Make = Callable[[Sequence[int]], list[Outcome]]
"""Makes the candidates with these numbers; what number i becomes depends on i alone."""


@dataclass(frozen=True)
class SteerableLatent:
    """A latent, or a vector of one's own, that may steer, its label, and its calibrated threshold in `norm` units."""

    direction: Direction
    threshold: float

    def steering(self, norm: float) -> Steering:
        """This latent at a strength, as a transcript records it."""
        direction, strength = self.direction, self.direction.strength(norm)
        if isinstance(direction.source, VectorRef):
            return Steering(None, direction.layer, None, direction.label, strength, direction.source)
        return Steering(direction.source, direction.layer, direction.latent, direction.label, strength)


@dataclass(frozen=True)
class Cues:
    """Phrasings by register; `{label}` in one stands for what the detour is about."""

    registers: dict[str, tuple[str, ...]]

    def draw(self, rng: Random, label: str | None) -> str:
        """A register, evenly, and of it a cue; one that names the label is drawn only where the label is known.

        Returns:
            The cue with the label in its place.
        """
        usable = [[cue for cue in cues if label or LABEL not in cue] for cues in self.registers.values()]
        registers = [cues for cues in usable if cues]
        if not registers:
            raise InputError(f"every cue names the topic ({LABEL}), and this detour's is not known", "cues")
        cue = rng.choice(registers[0] if len(registers) == 1 else rng.choice(registers))
        return cue.replace(LABEL, label or "")


def read_cues(path: str | None = None) -> Cues:
    """Cues from a file, one a line, under `[register]` headings if it has any; the shipped set for None.

    Raises:
        InputError: naming file and line, for a cue that comes twice or holds braces other than `{label}`; for a
            file without cues.
    """
    file = (local_path(path) or path) if path else CUES
    registers: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    register = "cues"
    for number, cue in read_lines(file):
        if heading := _HEADING.fullmatch(cue):
            register = heading[1]
        else:
            first = lines.setdefault(cue.casefold(), number)
            if first != number:
                fix = f"It was at line {first}; remove one."
                raise InputError(f"the cue {cue!r} comes twice", f"{file}:{number}", fix)
            if re.search(r"[{}]", cue.replace(LABEL, "")):
                raise InputError(f"the only word in braces that a cue may have is {LABEL}", f"{file}:{number}")
            registers.setdefault(register, []).append(cue)
    if not registers:
        raise InputError("there is no cue in the file", str(file), "Write one cue a line.")
    return Cues({name: tuple(cues) for name, cues in registers.items()})


def stem(rng: Random, cue: str) -> str:
    """The first word or two of a cue, for a model that writes the rest."""
    return " ".join(cue.split()[: rng.randint(1, _STEM_WORDS)])


@dataclass(frozen=True)
class Context:
    """What every source works with.

    Args:
        engine: the base model; generates, steered and unsteered.
        judge: scores detours and answers.
        sampling: of every generation.
        positions: which tokens are steered.
        model: the model's name, for the rows' `meta`.
        seed: of the whole file.
        tokenizer: the model's.
        prompts: of the training split, and those for normal answers.
        latents: of the training split; none for sources that do not need any.
        cues: that introduce a correction.
        trim_answers: whether answers that reach the most tokens are cut behind their last sentence, not refused.
        min_answer_score: answers that score less are refused.
        max_detour_score: detours that score as much are refused.
        held_out: labels of the other splits' latents: nothing may be written about them.
        splits: by which subjects that are no topics are dealt.
        open_writer: opens the language model with this name, to ask it for texts.
        progress: told of every batch that the engine has finished.
    """

    engine: Engine
    judge: Judge
    sampling: Sampling
    positions: Positions
    model: str
    seed: int
    tokenizer: "PreTrainedTokenizerBase"
    prompts: Pools
    latents: Sequence[SteerableLatent] = ()
    cues: Cues = field(default_factory=read_cues)
    trim_answers: bool = False
    min_answer_score: float = 80.0
    max_detour_score: float = 50.0
    held_out: Sequence[str] = ()
    splits: SplitSection = field(default_factory=SplitSection)
    open_writer: Callable[[str], Asker] | None = None
    progress: Progress | None = None

    def generate(self, requests: Sequence[Request], max_new_tokens: int | None = None) -> list[Completion]:
        """One completion a request, in order, whatever their ids; `max_new_tokens` shortens them."""
        numbered = [replace(request, id=str(number)) for number, request in enumerate(requests)]
        sampling = replace(self.sampling, max_new_tokens=max_new_tokens) if max_new_tokens else self.sampling
        return self.engine.generate(numbered, sampling, self.progress)

    def whole(self, completion: Completion) -> str | None:
        """The text of an answer that ended by itself, or what is left of it in whole sentences; None to refuse it."""
        if completion.finish_reason == "stop":
            return completion.text
        return (whole_sentences(completion.text) or None) if self.trim_answers else None

    def scores(self, items: Sequence[JudgeItem]) -> list[float | None]:
        """The score of each response taken as one attempt; None where the judge failed."""
        return first_scores(self.judge, items)

    def detour_fault(self, score: float | None) -> str | None:
        """Why a detour with this score is refused; None if it is not."""
        if score is None:
            return "judge failed"
        return "detour on-topic" if score >= self.max_detour_score else None

    def answer_fault(self, score: float | None) -> str | None:
        """Why an answer with this score is refused; None if it is not."""
        if score is None:
            return "judge failed"
        return "answer off-topic" if score < self.min_answer_score else None


AnySection = TypeVar("AnySection", bound=SourceSection)


@dataclass(frozen=True)
class Source:
    """One kind of rows.

    Args:
        name: its key under `data` in a recipe.
        section: what a recipe can say about it.
        make: from the context and the recipe's section to what makes candidates.
        needs_latents: whether it steers: it is then given latents with their thresholds.
        uses_cues: whether its rows hold a cue.
    """

    name: str
    section: type[SourceSection]
    make: Callable[[Context, Any], Make]
    needs_latents: bool = False
    uses_cues: bool = True


SOURCES: dict[str, Source] = {}
"""Every source by its name; a module that defines one registers it when it is imported."""


def register_source(
    name: str, section: type[AnySection], needs_latents: bool = False, uses_cues: bool = True
) -> Callable[[Callable[[Context, AnySection], Make]], Callable[[Context, AnySection], Make]]:
    """Decorate a function `(context, section) -> Make` as a source of rows, which recipes then ask for under `data`.

    Args:
        name: its key under `data`.
        section: its settings, a pydantic class on `SourceSection`. A key `writer` in it names a language model: such
            rows are made a few at once, by one process, and what they cost is counted.
        needs_latents: whether it steers.
        uses_cues: whether its rows hold a cue: they are then made anew when the file of cues changes.

    Raises:
        ValueError: if the name is taken.
    """
    built_in = DataSection.model_fields.get(name)
    if name in SOURCES or (built_in is not None and built_in.annotation is not section):
        raise ValueError(f"the name {name!r} is taken")

    def register(make: Callable[[Context, AnySection], Make]) -> Callable[[Context, AnySection], Make]:
        SOURCES[name] = Source(name, section, make, needs_latents, uses_cues)
        if built_in is None:
            SOURCE_SECTIONS[name] = section
        return make

    return register


@register_source("normal", NormalSection, uses_cues=False)
def normal(context: Context, section: NormalSection) -> Make:
    """Makes unsteered answers by the model itself, so that the adapter learns no other style; prompts in turn."""
    prompts = context.prompts.normal

    def make(numbers: Sequence[int]) -> list[Outcome]:
        chosen = [prompts[number % len(prompts)] for number in numbers]
        seeds = [candidate_rng(context.seed, "normal", number).randrange(SEEDS) for number in numbers]
        requests = [Request("", prompt.text, seed=seed) for prompt, seed in zip(chosen, seeds, strict=True)]
        completions = context.generate(requests)
        answers = {
            number: (prompt, text.strip(), completion.finish_reason != "stop")
            for number, prompt, completion in zip(numbers, chosen, completions, strict=True)
            if (text := context.whole(completion)) is not None
        }
        scores = context.scores([JudgeItem(prompt.text, text) for prompt, text, _ in answers.values()])
        outcomes = dict.fromkeys(numbers, Outcome(None, TOO_LONG))
        for (number, (prompt, text, trimmed)), score in zip(answers.items(), scores, strict=True):
            reason = context.answer_fault(score)
            row = None if reason else _normal_row(context, number, prompt, text, score)
            outcomes[number] = Outcome(row, reason, trimmed)
        return list(outcomes.values())

    return make


def _normal_row(context: Context, number: int, prompt: Prompt, text: str, score: float | None) -> Transcript:
    meta = {"model": context.model, "seed": context.seed, "topic": prompt.topic, "scores": {"answer": score}}
    spans = joined((SpanKind.ANSWER, text))
    return Transcript(f"normal-{context.seed}-{number:07d}", prompt.text, spans, "normal", meta=meta)


def candidate_rng(seed: int, source: str, number: int) -> Random:
    """The random numbers of one candidate, whoever makes it and when."""
    return Random(zlib.crc32(f"{seed}/{source}".encode()) << 32 | number)


def whole_sentences(text: str) -> str:
    """A text up to the end of its last finished sentence, numbers of list entries not counted; empty if none is."""
    ends = [end for start, end in sentences(text) if _FINISHED.search(text[start:end])]
    return text[: ends[-1]] if ends else ""


def cut_sentences(text: str, count: int) -> str:
    """The first `count` sentences of a text, without the whitespace around them."""
    kept = sentences(text)[:count]
    return text[: kept[-1][1]].strip() if kept else ""


def cut_words(text: str, count: int) -> str:
    """The first `count` words of a text, as they stand there."""
    ends = [match.end() for match in re.finditer(r"\S{1,12}", text)][:count]
    return text[: ends[-1]].strip() if ends else ""


def joined(*parts: tuple[SpanKind, str]) -> tuple[Span, ...]:
    """Spans of a reply, set apart by one space, which belongs to the later span, unless that opens a paragraph."""
    return tuple(
        Span(kind, text if number == 0 or text.startswith("\n") else f" {text}")
        for number, (kind, text) in enumerate(parts)
    )


def wanted_sources(data: DataSection) -> dict[Source, SourceSection]:
    """The sources of which a recipe's `data` asks for rows, in their order."""
    sections = {source: data.source(name) for name, source in SOURCES.items()}
    return {source: section for source, section in sections.items() if section and section.rows}


def sources_steer(data: DataSection) -> bool:
    """Whether any source that is asked for steers, and so needs thresholds."""
    return any(source.needs_latents for source in wanted_sources(data))
