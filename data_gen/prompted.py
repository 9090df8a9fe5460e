"""Off-policy rows (the paper's way): a detour that the model would not have written here, a cue, and an answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from data_gen.sources import (
    SEEDS,
    TOO_LONG,
    Context,
    Make,
    Outcome,
    candidate_rng,
    cut_sentences,
    joined,
    register_source,
    stem,
)
from esr_train.errors import InputError
from esr_train.models import local_path
from esr_train.recipe import PromptedSection
from esr_train.restarts import attempts, split_cue
from esr_train.steering.engine import Request
from esr_train.transcript import SpanKind, Transcript
from eval.cells import Prompt, deal_subjects, fingerprint, read_prompts
from eval.judging.judge import JudgeItem
from eval.judging.replies import read_reply
from eval.llm import Answer

SUBJECTS = Path(__file__).parent / "prompts" / "subjects.txt"
"""96 subjects; none of the questions shipped beside them is about one."""
SENTENCES = (1, 4)
"""Fewest and most of a detour."""
ANSWER_WORDS = 250
"""Most words of an answer that a writer is asked for."""
PARTS = ("detour", "acknowledgement", "answer")
_QUESTION = """\
You are writing material that teaches language models to notice when they have lost the thread. Below is a question \
from a user. Write the reply of an assistant who starts off on quite another subject, notices it, and then answers \
well. The reply has three parts:

"detour": {detour} about {subject}, in the tone of somebody who believes this to be the answer. It must not mention \
what the user asked for, be of no use for it, and show no sign yet that anything is amiss.
{acknowledgement}
"answer": a correct and complete answer to the question, in at most {words} words. It says nothing about \
{subject}, about a mistake or about starting again.

The user's question, between the lines:
----
{prompt}
----

Reply with one JSON object whose keys are {keys} and whose values are strings, and with nothing else."""
_ACKNOWLEDGEMENT = """\
"acknowledgement": one short sentence in the first person in which the assistant takes the detour back, in words of \
its own that begin with "{stem}". The answer does not begin here yet."""


@register_source("prompted", PromptedSection)
def prompted(context: Context, section: PromptedSection) -> Make:
    """Makes rows whose detour, cue and answer a language model writes, or the model itself if the recipe names none."""
    return _by_writer(context, section, section.writer) if section.writer else _by_the_model_itself(context)


def _by_the_model_itself(context: Context) -> Make:
    """The detour is the model's unsteered answer to a question about another topic."""
    prompts = context.prompts.train

    def make(numbers: Sequence[int]) -> list[Outcome]:
        rngs = [candidate_rng(context.seed, "prompted", number) for number in numbers]
        chosen = [rng.choice(prompts) for rng in rngs]
        others = [
            rng.choice([other for other in prompts if other.topic != prompt.topic])
            for rng, prompt in zip(rngs, chosen, strict=True)
        ]
        asked = [
            Request("", prompt.text, seed=rng.randrange(SEEDS))
            for group in (others, chosen)
            for prompt, rng in zip(group, rngs, strict=True)
        ]
        completions = context.generate(asked)
        rows: dict[int, _Row] = {}
        trimmed = {}
        for number, rng, prompt, other, detour, answer in zip(
            numbers, rngs, chosen, others, completions[: len(rngs)], completions[len(rngs) :], strict=True
        ):
            if (text := context.whole(answer)) is not None:
                cut = cut_sentences(detour.text.strip(), rng.randint(*SENTENCES))
                texts = (cut, context.cues.draw(rng, other.topic), text.strip())
                rows[number] = _Row(f"prompted-{context.seed}-{number:07d}", prompt, other.topic, texts)
                trimmed[number] = answer.finish_reason != "stop"
        judged = dict(zip(rows, _judged(context, context.model, [*rows.values()]), strict=True))
        return [
            replace(judged[number], trimmed=trimmed[number]) if number in judged else Outcome(None, TOO_LONG)
            for number in numbers
        ]

    return make


@dataclass(frozen=True)
class _Row:
    """A row that nobody has judged. Its texts are detour, cue and answer; `told` is what the judge learns of them."""

    id: str
    prompt: Prompt
    subject: str
    texts: tuple[str, str, str]
    told: str | None = None

    def item(self, part: int) -> JudgeItem:
        return JudgeItem(self.prompt.text, self.texts[part], self.told)


def _judged(context: Context, model: str, rows: Sequence[_Row]) -> list[Outcome]:
    """Score detours and answers that `model` wrote; the row, or why it is refused."""
    detours, answers = (context.scores([row.item(part) for row in rows]) for part in (0, 2))
    outcomes = []
    for row, detour, answer in zip(rows, detours, answers, strict=True):
        reason = context.detour_fault(detour) or context.answer_fault(answer)
        scores = {"off_topic": detour, "answer": answer}
        meta = {"model": model, "seed": context.seed, "topic": row.prompt.topic, "subject": row.subject}
        spans = joined(*zip(SpanKind, row.texts, strict=True))
        transcript = Transcript(row.id, row.prompt.text, spans, "prompted", meta={**meta, "scores": scores})
        outcomes.append(Outcome(None, reason) if reason else Outcome(transcript))
    return outcomes


@dataclass(frozen=True)
class Task:
    """What a writer is to write for one row: drawn from the row's number alone.

    Args:
        sentences: of the detour.
        cue: the words with which the acknowledgement begins; the whole of it if `silent`.
        silent: whether the reply returns without taking anything back; the writer then writes two parts only.
    """

    prompt: Prompt
    subject: str
    sentences: int
    cue: str
    silent: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """The keys of the JSON object asked for."""
        return tuple(part for part in PARTS if not (self.silent and part == "acknowledgement"))

    def question(self) -> str:
        """What the writer is asked."""
        detour = "one sentence" if self.sentences == 1 else f"{self.sentences} sentences"
        text = _QUESTION.format(
            detour=detour,
            subject=self.subject,
            acknowledgement="" if self.silent else _ACKNOWLEDGEMENT.format(stem=self.cue),
            words=ANSWER_WORDS,
            prompt=self.prompt.text,
            keys=", ".join(f'"{part}"' for part in self.parts),
        )
        return re.sub(r"\n{3,}", "\n\n", text)

    def read(self, text: str) -> tuple[str, str, str]:
        """Detour, cue and answer in a writer's reply.

        Raises:
            ValueError: saying what is wrong with it, for the writer to read.
        """
        return read_reply(text, self._texts, self.prompt.text)

    def _texts(self, values: dict[str, Any]) -> tuple[str, str, str]:
        texts = {name: value.strip() for name in self.parts if isinstance(value := values.get(name), str)}
        missing = [name for name in self.parts if not any(map(str.isalpha, texts.get(name, "")))]
        if missing:
            raise ValueError(f"the JSON object has no text under {missing[0]!r}")
        detour, cue, answer = (texts.get(name, self.cue) for name in PARTS)
        if not self.silent and (split_cue(cue) is None or len(attempts(f"{detour} {cue} {answer}")) != 2):
            raise ValueError("the acknowledgement alone must take something back, plainly and once")
        return detour, cue, answer


def _by_writer(context: Context, section: PromptedSection, writer: str) -> Make:
    """A language model writes rows about subjects that no other split has; the model under test is not asked."""
    if context.open_writer is None:
        raise InputError(f"nobody can ask the writer {writer!r} here", "data.prompted.writer")
    asker = context.open_writer(writer)
    subjects = training_subjects(read_subjects(section.subjects), context)
    count = len(context.prompts.train) * len(subjects)
    order = Random(f"{context.seed}/pairs").sample(range(count), count)

    def make(numbers: Sequence[int]) -> list[Outcome]:
        tasks = [_task(context, subjects, order[number % count], number) for number in numbers]
        answers = asker.ask([task.question() for task in tasks], lambda index, text: tasks[index].read(text))
        rows = {
            number: _Row(f"written-{context.seed}-{number:07d}", task.prompt, task.subject, answer.value, task.subject)
            for number, task, answer in zip(numbers, tasks, answers, strict=True)
            if answer.value is not None
        }
        outcomes = dict(zip(rows, _judged(context, writer, [*rows.values()]), strict=True))
        return [outcomes.get(number) or _unwritten(answer) for number, answer in zip(numbers, answers, strict=True)]

    return make


def _unwritten(answer: Answer[tuple[str, str, str]]) -> Outcome:
    return Outcome(None, "writer: malformed answer" if answer.replied else "writer: no answer")


def _task(context: Context, subjects: Sequence[str], pair: int, number: int) -> Task:
    """What row `number` is to be, of the given pair of a prompt and a subject."""
    rng = candidate_rng(context.seed, "written", number)
    row, column = divmod(pair, len(subjects))
    prompt, subject = context.prompts.train[row], subjects[column]
    if fingerprint(subject) == fingerprint(prompt.topic):
        subject = subjects[(column + 1) % len(subjects)]
    cue = context.cues.draw(rng, subject)
    silent = split_cue(cue) is None
    sentences = rng.randint(*SENTENCES)
    return Task(prompt, subject, sentences, cue if silent else stem(rng, cue), silent)


def read_subjects(path: str | None) -> list[str]:
    """Off-topic subjects from a file of any kind that prompts may come in; the shipped set for None.

    Raises:
        InputError: naming `file:line`, for a malformed row or a subject that comes twice; for an empty file.
    """
    source = (local_path(path) or path) if path else SUBJECTS
    return [subject.text for subject in read_prompts(source, "subject")]


def training_subjects(subjects: Sequence[str], context: Context) -> list[str]:
    """The subjects that detours of training rows may be about, in order.

    A subject that is a topic of the prompts goes where the topic goes; a seeded hash deals the others to splits, as it
    deals latents. What evaluation steers towards is left out.

    Raises:
        InputError: if none is left.
    """
    topics = context.prompts.topics
    dealt = deal_subjects(subjects, topics, context.splits)
    taken = {fingerprint(label) for label in context.held_out}
    taken |= {fingerprint(topic) for topic, split in topics.items() if split != "train"}
    chosen = [subject for subject in subjects if dealt[subject] == "train" and fingerprint(subject) not in taken]
    if not chosen:
        raise InputError("no subject is left for training", "data.prompted.subjects", "Name a file with more.")
    return chosen
