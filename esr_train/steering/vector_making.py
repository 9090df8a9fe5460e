"""Steering vectors made from a model's own activations: of two sets of texts, or of its replies about many subjects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from esr_train.errors import InputError
from esr_train.steering.directions import SteeringVector
from esr_train.steering.engine import Engine, Request, Sampling
from esr_train.steering.readout import hidden_states, measure_residual_norm, with_bos
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.template import reply_text

Method = Literal["mean", "pca"]
ASKED = (
    "Tell me a few things about {subject}.",
    "What makes {subject} worth knowing about?",
    "Explain {subject} to somebody who is new to it.",
)
"""What the model is asked about every subject."""
REPLY_TOKENS = 48
TWINS = 0.65
"""Cosine from which two subjects' vectors steer to much the same texts."""


@dataclass(frozen=True)
class Reply:
    """One of the model's own replies: the conversation up to it as the model reads it, and its text."""

    asked: str
    text: str


@dataclass(frozen=True)
class MadeVectors:
    """Vectors, one for each subject.

    Args:
        vectors: with the residual norm of their layer, in the order of the subjects.
        twins: subject that was left out -> the kept one that its vector is too like.
    """

    vectors: tuple[SteeringVector, ...]
    twins: Mapping[str, str] = field(default_factory=dict)


def difference_of_means(
    model: Any,
    tokenizer: Any,
    positive: Sequence[str],
    negative: Sequence[str],
    layer: int,
    *,
    label: str | None = None,
    method: Method = "mean",
    rows: int = 8,
) -> SteeringVector:
    """The direction in a layer's output from one set of texts to another.

    A text counts as the mean of its tokens without BOS. `mean` is the difference of the two sets' means (CAA, arXiv
    2312.06681, averages contrast pairs alike); `pca` the first principal component of the differences of pairs, not
    centred (as in representation engineering, arXiv 2310.01405), as long as the pairs lie apart along it on average.

    Args:
        model: in any wrapper.
        tokenizer: the model's.
        positive: texts, plain or rendered, that the vector leads to.
        negative: texts that it leads away from; with `pca` each is the counterpart of the positive one at its place.
        layer: whose output is read, from 0.
        label: what the vector stands for.
        method: how the direction is taken.
        rows: texts of one forward pass.

    Raises:
        InputError: if there is no text on a side, unequally many under `pca`, a layer that the model does not have, or
            no difference.
    """
    if method == "pca" and len(positive) != len(negative):
        what = f"{len(positive)} positive and {len(negative)} negative texts make no pairs"
        raise InputError(what, "pca", "Give as many of each, line by line.")
    first, second = (_text_means(model, tokenizer, texts, layer, rows) for texts in (positive, negative))
    vector = _principal(first - second) if method == "pca" else first.mean(dim=0) - second.mean(dim=0)
    length = float(vector.norm())
    if not 0 < length < float("inf"):
        raise InputError("the texts of the two sides do not differ", f"layer {layer}", "Give other texts.")
    return SteeringVector(layer, label, vector / length, length, measure_residual_norm(model, tokenizer, layer))


def make_vectors(
    model: Any, tokenizer: Any, subjects: Sequence[str], layer: int, *, seed: int = 0, rows: int = 32
) -> MadeVectors:
    """A vector for each subject: what the model's own replies about it have in common, and those about others have not.

    Args:
        model: in any wrapper.
        tokenizer: the model's.
        subjects: two at least; the more and the more various, the less has a vector of what all replies share.
        layer: whose output is read, from 0.
        seed: of the replies.
        rows: replies generated or read at once.

    Raises:
        InputError: as `vectors_of_replies`.
    """
    engine = TransformersEngine(model, tokenizer, batch_rows=rows)
    return vectors_of_replies(model, tokenizer, own_replies(engine, tokenizer, subjects, Sampling(), seed), layer, rows)


def own_replies(
    engine: Engine, tokenizer: Any, subjects: Sequence[str], sampling: Sampling, seed: int
) -> dict[str, list[Reply]]:
    """The beginnings of a model's replies to three questions about each subject.

    Args:
        engine: of the model.
        sampling: of the replies, which are at most `REPLY_TOKENS` long.
    """
    prompts = [question.format(subject=subject) for subject in subjects for question in ASKED]
    requests = [Request(str(number), prompt, seed=seed + number) for number, prompt in enumerate(prompts)]
    with tqdm(total=len(requests), desc="ask about subjects", unit="reply", mininterval=1) as bar:

        def advance(finished: int, _: int) -> None:
            bar.update(finished)

        done = engine.generate(requests, replace(sampling, max_new_tokens=REPLY_TOKENS), advance)
    replies = [Reply(reply_text(tokenizer, prompt), each.text) for prompt, each in zip(prompts, done, strict=True)]
    count = len(ASKED)
    return {subject: replies[count * number : count * (number + 1)] for number, subject in enumerate(subjects)}


def vectors_of_replies(
    model: Any, tokenizer: Any, replies: Mapping[str, Sequence[Reply]], layer: int, rows: int = 8
) -> MadeVectors:
    """For each subject the mean activation over its replies' tokens, minus the mean over all subjects.

    Of two subjects whose vectors have a cosine of `TWINS` or more the later is left out.

    Args:
        model: in any wrapper.
        replies: subject -> what the model said about it.
        layer: whose output is read, from 0.
        rows: replies of one forward pass.

    Raises:
        InputError: for fewer than two subjects, one about which the model said nothing, or no such layer.
    """
    if len(replies) < 2:
        raise InputError(f"{len(replies)} subject has no others to differ from", "subjects", "Give several.")
    said = [(subject, reply) for subject, group in replies.items() for reply in group if reply.text.strip()]
    if silent := [subject for subject in replies if subject not in {each for each, _ in said}]:
        raise InputError(f"the model said nothing about {silent[0]!r}", "subjects", "Leave it out.")
    means = _reply_means(model, tokenizer, [reply for _, reply in said], layer, rows)
    of_subject = torch.stack([means[[each == subject for each, _ in said]].mean(dim=0) for subject in replies])
    different = of_subject - of_subject.mean(dim=0)
    norm = measure_residual_norm(model, tokenizer, layer)
    vectors = [
        SteeringVector(layer, subject, row / row.norm(), float(row.norm()), norm)
        for subject, row in zip(replies, different, strict=True)
    ]
    return _without_twins(vectors)


def vectors_of_instructions(
    model: Any,
    tokenizer: Any,
    replies: Mapping[str, Sequence[Reply]],
    plain: Sequence[Reply],
    layer: int,
    residual_norm: float,
    rows: int = 8,
) -> list[SteeringVector]:
    """For each instruction the mean activation over its replies' tokens, minus that over replies without it.

    Args:
        model: in any wrapper.
        replies: name of an instruction -> what the model said behind it.
        plain: what it said without any.
        layer: whose output is read, from 0.
        residual_norm: of this layer.
        rows: replies of one forward pass.

    Raises:
        InputError: if there is no reply, or no such layer.
    """
    said = [reply for group in (plain, *replies.values()) for reply in group if reply.text.strip()]
    means = dict(zip(said, _reply_means(model, tokenizer, said, layer, rows), strict=True))

    def mean(group: Sequence[Reply]) -> torch.Tensor:
        if not (found := [means[reply] for reply in group if reply in means]):
            raise InputError("the model said nothing", "instructions", "Give another one.")
        return torch.stack(found).mean(dim=0)

    rows_of = {name: mean(group) - mean(plain) for name, group in replies.items()}
    return [
        SteeringVector(layer, name, row / row.norm(), float(row.norm()), residual_norm) for name, row in rows_of.items()
    ]


def cosines(vectors: Sequence[SteeringVector]) -> torch.Tensor:
    """How alike vectors are, [vectors, vectors]; minus infinity for each with itself."""
    units = normalize(torch.stack([vector.unit for vector in vectors]), dim=1)
    return (units @ units.T).fill_diagonal_(float("-inf"))


def _without_twins(vectors: Sequence[SteeringVector]) -> MadeVectors:
    alike = cosines(vectors)
    kept: list[int] = []
    twins: dict[str, str] = {}
    for index, vector in enumerate(vectors):
        near = max(kept, key=lambda other: float(alike[index, other]), default=None)
        if near is not None and alike[index, near] >= TWINS:
            twins[str(vector.label)] = str(vectors[near].label)
        else:
            kept.append(index)
    return MadeVectors(tuple(vectors[index] for index in kept), twins)


def _principal(differences: torch.Tensor) -> torch.Tensor:
    """The first principal component of differences [pairs, d_model], in the direction and length of their mean."""
    _, _, components = torch.linalg.svd(differences, full_matrices=False)
    return components[0] * (differences.mean(dim=0) @ components[0])


def _reply_means(model: Any, tokenizer: Any, replies: Sequence[Reply], layer: int, rows: int) -> torch.Tensor:
    """The mean state over each reply's own tokens, [replies, d_model] float32 on the CPU."""
    # The first token of a text has no state here (see `hidden_states`).
    starts = [len(with_bos(tokenizer, reply.asked)) - 1 for reply in replies]
    states = hidden_states(model, tokenizer, [reply.asked + reply.text for reply in replies], layer, rows)
    shown = tqdm(states, total=len(replies), desc="read replies", unit="reply", mininterval=1)
    return torch.stack([hidden[start:].float().mean(dim=0).cpu() for start, hidden in zip(starts, shown, strict=True)])


def _text_means(model: Any, tokenizer: Any, texts: Sequence[str], layer: int, rows: int) -> torch.Tensor:
    """The mean state over each text's tokens, [texts, d_model] float32 on the CPU."""
    if empty := [number for number, text in enumerate(texts, start=1) if len(with_bos(tokenizer, text)) < 2]:
        what = f"text {empty[0]} has no token to read behind its first"
        raise InputError(what, None, "Write more, or leave it out.")
    if not texts:
        raise InputError("there is no text on one of the two sides", None, "Give some.")
    states = hidden_states(model, tokenizer, texts, layer, rows)
    shown = tqdm(states, total=len(texts), desc="read texts", unit="text", mininterval=1)
    return torch.stack([hidden.float().mean(dim=0).cpu() for hidden in shown])
