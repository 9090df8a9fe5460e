"""What a judge is given and what it says, and the registry of kinds. A judge never sees which arm wrote a response."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from esr_train.errors import InputError
from esr_train.recipe import JUDGE_SECTIONS, JudgeSection, LlmSection, ModelJudgeSection
from esr_train.steering.engine import Engine


@dataclass(frozen=True)
class Attempt:
    """A stretch [start, end) of a response, in characters, and its score 0-100 (None: unscored)."""

    start: int
    end: int
    score: float | None


@dataclass(frozen=True)
class JudgeItem:
    """One response to judge.

    Args:
        label: what the steering latent stands for; None: unsteered, or unknown.
        recovery: whether findings beside the scores are wanted that may cost a question of their own
            (`silent_recovery`, `hijacked`).
    """

    prompt: str
    response: str
    label: str | None = None
    recovery: bool = False


@dataclass(frozen=True)
class Judgement:
    """A judge's word on one response.

    Args:
        attempts: in order, covering the response; empty when `error` is set.
        raw: its answer as it came (for a person to check).
        flags: further yes/no findings: `degenerate` (word salad or repetition), `hijacked` (the last attempt is
            mainly about the latent's label), `silent_recovery` (off-topic at first, back on topic at the end,
            without a restart). A finding the judge cannot make is left out; one that it failed to make is None.
        error: why there is no score; the trial is then `unscored`, never 0.
    """

    attempts: tuple[Attempt, ...]
    judge: str
    raw: str = ""
    flags: Mapping[str, bool | None] = field(default_factory=dict)
    error: str | None = None


class Judge(Protocol):
    """Splits responses into attempts and scores each for answering the prompt, 0-100.

    Attributes:
        name: tells apart whatever judges differently: kind, model, settings.
    """

    name: str

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """One judgement an item, in order; failures come back as `error`, they are not raised."""
        ...


def _no_engine(path: str) -> Engine:
    raise InputError("there is no engine here on which a local judge could run", path, "Take a judge of kind model.")


@dataclass(frozen=True)
class JudgeContext:
    """What a judge may need beside its section of the recipe.

    Args:
        key: of the recipe under which the section stands, for messages.
        llm: how language models are asked.
        cache: folder in which usable answers are kept for all runs; None keeps none.
        run: folder of the run, in which requests and costs are counted; None counts in memory.
        is_asked: whether there is anything left to ask; a key that is missing is then refused when the judge is opened.
        open_engine: hub id or folder of a model -> an engine on it.
        locate: a path in the recipe -> the file it names.
        model: hub id or folder of the model under test, for a judge that names none.
    """

    key: str = "judge"
    llm: LlmSection = field(default_factory=LlmSection)
    cache: Path | None = None
    run: Path | None = None
    is_asked: bool = True
    open_engine: Callable[[str], Engine] = _no_engine
    locate: Callable[[str], Path] = Path
    model: str | None = None


AnySection = TypeVar("AnySection", bound=JudgeSection)
_FACTORIES: dict[str, Callable[[Any, JudgeContext], Judge]] = {}


def register_judge(
    kind: str, section: type[AnySection]
) -> Callable[[Callable[[AnySection, JudgeContext], Judge]], Callable[[AnySection, JudgeContext], Judge]]:
    """Register what opens a kind of judge, as a decorator; a recipe may then say `judge: {kind: KIND, …}`.

    Args:
        kind: its name in a recipe.
        section: its keys there; a class of its own, with `kind: Literal[KIND] = KIND`.

    Raises:
        ValueError: if the kind is taken.
    """
    if kind in _FACTORIES:
        raise ValueError(f"there is a kind of judge {kind!r} already")

    def register(factory: Callable[[AnySection, JudgeContext], Judge]) -> Callable[[AnySection, JudgeContext], Judge]:
        JUDGE_SECTIONS[kind] = section
        _FACTORIES[kind] = factory
        return factory

    return register


def open_judge(section: JudgeSection, context: JudgeContext) -> Judge:
    """The judge that a section of a recipe describes; no model is loaded before it is asked.

    Raises:
        InputError: if a file that it names cannot be read, a key is missing, or a price that a limit needs.
    """
    return _FACTORIES[section.kind](section, context)


def judge_responses(
    judge: Judge | str, prompts: Sequence[str], responses: Sequence[str], labels: Sequence[str | None] | None = None
) -> list[Judgement]:
    """Judge responses, one judgement each; also within a running event loop, such as a notebook's.

    Args:
        judge: a judge, or the name of a model of inspect_ai's model API, whose key stands in the environment.
        prompts: what each response answers.
        responses: one for each prompt.
        labels: what each response was steered to; None: nothing, or unknown.

    Raises:
        InputError: if there are not as many of each, or the judge refuses its input.
        RunError: if a judge's model is out of reach.
    """
    labels = [None] * len(prompts) if labels is None else labels
    if not len(prompts) == len(responses) == len(labels):
        raise InputError(f"{len(prompts)} prompts, {len(responses)} responses and {len(labels)} labels do not pair up")
    if isinstance(judge, str):
        judge = open_judge(ModelJudgeSection(model=judge), JudgeContext())
    return judge.judge([JudgeItem(*each) for each in zip(prompts, responses, labels, strict=True)])


def first_scores(judge: Judge, items: Sequence[JudgeItem]) -> list[float | None]:
    """The score of each response's first attempt, None where the judge failed."""
    judgements = judge.judge(items)
    return [None if each.error or not each.attempts else each.attempts[0].score for each in judgements]
