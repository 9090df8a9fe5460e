"""What training cost ordinary answers: the perplexity of the base model's own replies, which nobody steered."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import eval.statistics as statistics
from esr_train.steering.engine import Request, Scorer
from esr_train.values import typed
from eval.arms import Variant
from eval.store import RowStore, Trial

MOST_REPLIES = 128
"""Replies that are read: one forward pass each."""
CHUNK_REPLIES = 32
"""Replies between two writes."""


@dataclass(frozen=True)
class Reply:
    """How likely a model finds a reply: its tokens, and the sum of their log-probabilities (nats)."""

    key: str
    prompt: str
    tokens: int
    log_probability: float


@dataclass(frozen=True)
class Retention:
    """An arm's perplexity on the base model's replies, relative to the base's own.

    Args:
        value: the ratio, 1 where nothing was lost; None without a reply.
        low, high: its 95 % interval, clustered by prompt; None for a single one.
        n: replies.
        perplexity: the arm's own.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    tokens: int
    perplexity: float | None


def reply_store(path: Path, writes: bool = True) -> RowStore[Reply]:
    """Where `read_replies` keeps what it has read."""
    return RowStore(path, lambda row: typed(Reply, row), asdict, writes)


def read_replies(engine: Scorer, variant: Variant, trials: Sequence[Trial], store: RowStore[Reply]) -> None:
    """Read how likely an arm, not steered, finds the replies of unsteered trials, as far as the store lacks them.

    The arm's own words around the prompt and changed latents are at work. The end of the turn is not read.

    Args:
        engine: with the arm's weights.
        variant: what the arm changes in every request.
        trials: the base model's; empty replies say nothing and are left out.
        store: by the trials' keys.
    """
    store.touch()
    known = store.keys()
    missing = [trial for trial in trials if trial.key not in known and trial.response.strip()]
    for start in range(0, len(missing), CHUNK_REPLIES):
        part = missing[start : start + CHUNK_REPLIES]
        requests = [
            variant.apply(Request(id=trial.key, prompt=trial.cell.prompt, seed=trial.cell.seed), None) for trial in part
        ]
        found = engine.log_probabilities(requests, [trial.response for trial in part])
        replies = (
            Reply(trial.key, trial.cell.prompt, len(each), float(sum(each)))
            for trial, each in zip(part, found, strict=True)
        )
        store.append((reply.key, reply) for reply in replies)


def retention(
    own: Mapping[str, Reply], base: Mapping[str, Reply], bootstrap: int = statistics.RESAMPLES, seed: int = 0
) -> Retention:
    """The ratio of perplexities over the replies that both have read.

    Every token counts the same: exp of the mean difference of the tokens' log-probabilities.
    """
    shared = sorted(key for key in own if key in base)
    differences = [base[key].log_probability - own[key].log_probability for key in shared]
    tokens = [own[key].tokens for key in shared]
    prompts = [own[key].prompt for key in shared]
    found = statistics.ratio(differences, tokens, prompts, resamples=bootstrap, seed=seed)
    value, low, high = (None if end is None else math.exp(end) for end in (found.value, found.low, found.high))
    count = sum(tokens)
    total = sum(own[key].log_probability for key in shared)
    return Retention(value, low, high, len(shared), count, math.exp(-total / count) if count else None)
