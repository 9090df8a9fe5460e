"""Off-policy rows by a language model: it writes detour, acknowledgement and answer (the paper's way)."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from data_gen.collect import Make, Outcome, candidate_rng
from data_gen.context import Context
from data_gen.cues import Cues, read_cues, stem
from data_gen.draws import draw_count
from data_gen.prompted import outcome
from esr_train.recipe import PromptedSection
from esr_train.restarts import attempts, split_cue
from eval.cells import Prompt, fingerprint
from eval.judging.judge import JudgeItem
from eval.llm import Answer, Asker

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


@dataclass(frozen=True)
class Task:
    """What one row is to be: drawn from its number alone.

    Args:
        prompt: the user's question.
        subject: what the detour is about.
        sentences: of the detour.
        cue: the words with which the acknowledgement begins; the whole of it if `silent`.
        silent: whether the reply returns without taking anything back; the writer then writes two parts only.
        words: most words of the answer.
    """

    prompt: Prompt
    subject: str
    sentences: int
    cue: str
    silent: bool
    words: int

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
            words=self.words,
            prompt=self.prompt.text,
            keys=", ".join(f'"{part}"' for part in self.parts),
        )
        return re.sub(r"\n{3,}", "\n\n", text)

    def read(self, text: str) -> dict[str, str]:
        """The parts in a writer's reply.

        Raises:
            ValueError: saying what is wrong with it, for the writer to read.
        """
        values = _object(text)
        found = {name: value.strip() for name in self.parts if isinstance(value := values.get(name), str)}
        missing = [name for name in self.parts if not found.get(name)]
        if missing:
            raise ValueError(f"the JSON object has no text under {missing[0]!r}")
        if self.silent:
            return {**found, "acknowledgement": self.cue}
        cue = found["acknowledgement"]
        if split_cue(cue) is None or len(attempts(f"{found['detour']} {cue} {found['answer']}")) != 2:
            raise ValueError("the acknowledgement alone must take something back, plainly and once")
        return found


def written(
    context: Context, section: PromptedSection, prompts: Sequence[Prompt], subjects: Sequence[str], asker: Asker
) -> Make:
    """Makes rows that a language model writes.

    Args:
        context: its judge scores the rows; its model is not asked.
        section: shapes of the rows.
        prompts: of training topics.
        subjects: of the detours; see `data_gen.subjects.training_subjects`.
        asker: the writer.
    """
    cues = read_cues(section.cues, section.registers)
    pairs = _Pairs(prompts, subjects, context.seed)

    def make(numbers: Sequence[int]) -> list[Outcome]:
        tasks = [_task(context.seed, section, cues, pairs, number) for number in numbers]
        answers = asker.ask([task.question() for task in tasks], lambda place, text: tasks[place].read(text))
        return _outcomes(context, section, numbers, tasks, answers)

    return make


class _Pairs:
    """Every prompt with every subject, in a seeded order; the next subject for one that is the prompt's own topic."""

    def __init__(self, prompts: Sequence[Prompt], subjects: Sequence[str], seed: int) -> None:
        self.prompts, self.subjects = prompts, subjects
        count = len(prompts) * len(subjects)
        self.order = Random(f"{seed}/pairs").sample(range(count), count)

    def __getitem__(self, number: int) -> tuple[Prompt, str]:
        row, column = divmod(self.order[number % len(self.order)], len(self.subjects))
        prompt, subject = self.prompts[row], self.subjects[column]
        if fingerprint(subject) == fingerprint(prompt.topic):
            subject = self.subjects[(column + 1) % len(self.subjects)]
        return prompt, subject


def _task(seed: int, section: PromptedSection, cues: Cues, pairs: _Pairs, number: int) -> Task:
    rng = candidate_rng(seed, "written", number)
    prompt, subject = pairs[number]
    cue = cues.draw(rng, subject)
    silent = split_cue(cue) is None
    sentences = draw_count(rng, section.cut)
    return Task(prompt, subject, sentences, cue if silent else stem(rng, cue), silent, section.answer_words)


def _outcomes(
    context: Context,
    section: PromptedSection,
    numbers: Sequence[int],
    tasks: Sequence[Task],
    answers: Sequence[Answer[dict[str, str]]],
) -> list[Outcome]:
    """Judge what was written; a row that was not has the writer's last word as its reason."""
    done = [(task, answer.value) for task, answer in zip(tasks, answers, strict=True) if answer.value is not None]
    detours = context.scores([JudgeItem(task.prompt.text, parts["detour"], task.subject) for task, parts in done])
    finals = context.scores([JudgeItem(task.prompt.text, parts["answer"], task.subject) for task, parts in done])
    scores = iter(zip(detours, finals, strict=True))
    outcomes = []
    for number, task, answer in zip(numbers, tasks, answers, strict=True):
        if answer.value is None:
            outcomes.append(Outcome(None, "writer: malformed answer" if answer.replied else "writer: no answer"))
            continue
        detour, final = next(scores)
        row = f"written-{context.seed}-{number:07d}"
        texts = [answer.value[name] for name in PARTS]
        outcomes.append(outcome(context, section, row, task.prompt, task.subject, texts, (detour, final)))
    return outcomes


def _object(text: str) -> dict[str, object]:
    """The JSON object in a reply, which may stand in a fence or between words."""
    start = text.find("{")
    if start < 0:
        raise ValueError("there is no JSON object in it")
    try:
        found, _ = json.JSONDecoder(strict=False).raw_decode(text[start:])
    except json.JSONDecodeError as error:
        raise ValueError(f"the JSON object is broken ({error.msg})") from None
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found
