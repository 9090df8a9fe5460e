"""How concrete labels are, as a language model finds them: steering needs a subject that a text can be about."""

import json
from collections.abc import Sequence
from functools import partial

from eval.judging.replies import read_reply
from eval.judging.rubric import Parts, filled
from eval.llm import Asker

LABELS_PER_QUESTION = 20
_QUESTION = """\
Each line below describes a feature inside a language model. Suppose somebody writes a text that is about one of them \
and nothing else: could a reader tell from the text which it was? Give every description a whole number from 0 to 100.

100: a thing, place, person, activity or field that such a text would name on every line.
50: a broad theme or a feeling; the text would be recognisable, but could be about many things.
0: no subject at all: grammar, punctuation, layout, a style, a single word's use, or what happens in a conversation \
(who speaks, how a request is met).

{lines}

Reply with one JSON object and nothing else, with exactly {count} scores in the order of the lines:
{{"scores": [{zeros}]}}"""


def rate_labels(labels: Sequence[str], asker: Asker) -> list[float | None]:
    """How concrete each label is, 0-100; None where the model did not say.

    Args:
        labels: in any number; one that comes twice is asked for once.
        asker: of the model. Labels that are asked for together stay together, so that kept answers are found again.
    """
    single = list(dict.fromkeys(labels))
    groups = [single[at : at + LABELS_PER_QUESTION] for at in range(0, len(single), LABELS_PER_QUESTION)]
    answers = asker.ask([_question(group) for group in groups], partial(_scores, groups), Parts)
    rated = {
        label: score
        for group, answer in zip(groups, answers, strict=True)
        for label, score in zip(group, answer.value or [None] * len(group), strict=True)
    }
    return [rated[label] for label in labels]


def _question(labels: Sequence[str]) -> str:
    lines = "\n".join(f"{number}. {json.dumps(label, ensure_ascii=False)}" for number, label in enumerate(labels, 1))
    return _QUESTION.format(lines=lines, count=len(labels), zeros=", ".join("0" for _ in labels))


def _scores(groups: Sequence[Sequence[str]], index: int, reply: str) -> list[float | None]:
    labels = groups[index]
    answer = read_reply(reply, partial(filled, Parts), "\n".join(labels))
    if len(answer.scores) != len(labels):
        raise ValueError(f"it has {len(answer.scores)} scores for {len(labels)} lines")
    return [float(score) for score in answer.scores]
