"""What every source of rows works with."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from esr_train.restarts import sentences
from esr_train.steering.directions import Direction, Positions
from esr_train.steering.engine import Completion, Engine, Progress, Request, Sampling
from esr_train.steering.interventions import Intervention
from esr_train.transcript import Span, SpanKind, Steering
from eval.cells import Prompt
from eval.judging.judge import Judge, JudgeItem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEEDS = 2**31


@dataclass(frozen=True)
class SteerableLatent:
    """A latent that may steer, its label, and its calibrated threshold in `norm` units."""

    direction: Direction
    threshold: float

    def steering(self, norm: float) -> Steering:
        """This latent at a strength, as a transcript records it."""
        direction = self.direction
        return Steering(direction.sae, direction.layer, direction.latent, direction.label, direction.strength(norm))


@dataclass(frozen=True)
class Context:
    """The base model, its judge, and one way of sampling for every source.

    Args:
        engine: generates, steered and unsteered.
        judge: scores detours and answers.
        sampling: of every generation.
        positions: which tokens are steered.
        model: the model's name, for the rows' `meta`.
        seed: of the whole file.
        tokenizer: the model's.
        progress: told of every batch that the engine has finished.
    """

    engine: Engine
    judge: Judge
    sampling: Sampling
    positions: Positions
    model: str
    seed: int
    tokenizer: "PreTrainedTokenizerBase"
    progress: Progress | None = None

    def generate(self, asked: Sequence["Asked"], max_new_tokens: int | None = None) -> list[Completion]:
        """One completion for each of `asked`, in order; `max_new_tokens` shortens them."""
        requests = [
            Request(str(number), each.prompt, prefix=each.prefix, interventions=each.interventions, seed=each.seed)
            for number, each in enumerate(asked)
        ]
        sampling = replace(self.sampling, max_new_tokens=max_new_tokens) if max_new_tokens else self.sampling
        return self.engine.generate(requests, sampling, self.progress)

    def scores(self, items: Sequence[JudgeItem]) -> list[float | None]:
        """The score of each response taken as one attempt; None where the judge failed."""
        judgements = self.judge.judge(items)
        return [None if each.error or not each.attempts else each.attempts[0].score for each in judgements]


@dataclass(frozen=True)
class Asked:
    """One generation that a source asks for."""

    prompt: str
    seed: int
    prefix: str = ""
    interventions: tuple[Intervention, ...] = ()


def cut_sentences(text: str, count: int) -> str:
    """The first `count` sentences of a text, without the whitespace around them."""
    found = sentences(text)[:count]
    return text[: found[-1][1]].strip() if found else ""


def cut_words(text: str, count: int) -> str:
    """The first `count` words of a text, as they stand there."""
    ends = [match.end() for match in re.finditer(r"\S{1,12}", text)][:count]
    return text[: ends[-1]].strip() if ends else ""


def cut_tokens(tokenizer: "PreTrainedTokenizerBase", completion: Completion, count: int) -> str:
    """The text of a completion's first `count` tokens, without the whitespace around it and half characters."""
    ids = list(completion.token_ids[:count])
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).rstrip("\ufffd").strip()


def joined(*parts: tuple[SpanKind, str]) -> tuple[Span, ...]:
    """Spans of a reply, set apart by one space, which belongs to the later span, unless that opens a paragraph."""
    return tuple(
        Span(kind, text if number == 0 or text.startswith("\n") else f" {text}")
        for number, (kind, text) in enumerate(parts)
    )


def other_topic(prompt: Prompt, latents: Sequence[SteerableLatent]) -> list[SteerableLatent]:
    """The latents that may steer this prompt: those of other topics."""
    return [latent for latent in latents if latent.direction.label != prompt.topic]
