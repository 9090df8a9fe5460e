"""Transcripts become rows of token ids, labels and steering; figures and tokens for a person to check."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from esr_train.errors import InputError
from esr_train.files import write_jsonl
from esr_train.interchange import read_training_file
from esr_train.masking import Labelled, Policy, label, label_pair
from esr_train.recipe import Recipe
from esr_train.training.batches import best_fit
from esr_train.transcript import SaeRef, Steering, Transcript, VectorRef

HELD_OUT = 0.05
"""Share of the rows whose loss is watched where `train.args.eval_strategy` asks for it (the paper's)."""


@dataclass(frozen=True)
class VectorSource:
    """Where a row's steering vector comes from: a latent of an SAE, or a vector of a file (index 0), by its name."""

    origin: SaeRef | VectorRef
    layer: int
    index: int
    name: str | None = None

    @staticmethod
    def of(steering: Steering) -> "VectorSource":
        """The source that a transcript names."""
        origin = steering.sae or steering.vector
        assert origin is not None
        return VectorSource(origin, steering.layer, steering.latent or 0, steering.label if steering.vector else None)


@dataclass(frozen=True)
class TrainingRow:
    """One transcript as the trainer gets it.

    Args:
        vector: what steered it; None for an unsteered row.
        threshold_raw: strength, in decoder rows, that counts as one times the threshold.
        reply_start: index of the first token that holds some of the reply; 0 for an unsteered row.
        answer_start: the same of the answer that ends the reply (see `masking.Labelled`).
        rejected: the row with the reply to which this one is preferred, where training prefers.
    """

    labelled: Labelled
    source: str
    vector: VectorSource | None
    threshold_raw: float
    reply_start: int
    answer_start: int
    transcript: Transcript
    rejected: "TrainingRow | None" = None

    @property
    def trained(self) -> int:
        """How many tokens carry a label."""
        return self.labelled.trained


def read_rows(recipe: Recipe, data: Path, tokenizer: PreTrainedTokenizerBase) -> list[TrainingRow]:
    """Read the training file and label its rows.

    Raises:
        InputError: an empty file, two rows of one id, rows steered at different layers under live injection,
            or a row that cannot be labelled (see `masking.label`).
    """
    transcripts = read_training_file(data)
    if not transcripts:
        raise InputError("there are no training rows", str(data), "Generate data first.")
    repeated = [key for key, count in Counter(transcript.id for transcript in transcripts).items() if count > 1]
    if repeated:
        raise InputError(f"{len(repeated)} ids occur more than once, such as {repeated[0]!r}", str(data))
    train = recipe.train
    made = preference_row if train.method == "dpo" else training_row
    rows = [made(tokenizer, transcript, train.loss, train.max_length) for transcript in transcripts]
    if train.live:
        _check_steering(rows, data)
    return rows


def training_row(
    tokenizer: PreTrainedTokenizerBase, transcript: Transcript, policy: Policy = "masked", max_length: int | None = None
) -> TrainingRow:
    """Label a transcript (see `masking.label`) and note what steered it."""
    return _steered_row(label(tokenizer, transcript, policy, max_length), transcript)


def preference_row(
    tokenizer: PreTrainedTokenizerBase, transcript: Transcript, policy: Policy = "masked", max_length: int | None = None
) -> TrainingRow:
    """Label a transcript and its rejected reply (see `masking.label_pair`), both under the same steering."""
    chosen, rejected = label_pair(tokenizer, transcript, policy, max_length)
    return replace(_steered_row(chosen, transcript), rejected=_steered_row(rejected, transcript))


def _steered_row(labelled: Labelled, transcript: Transcript) -> TrainingRow:
    steering = transcript.steering
    if steering is None:
        return TrainingRow(labelled, transcript.source, None, 0.0, 0, 0, transcript)
    threshold = transcript.meta.get("threshold")
    raw = float(threshold["raw"]) if threshold else steering.strength.raw
    starts = labelled.reply_start, labelled.answer_start
    return TrainingRow(labelled, transcript.source, VectorSource.of(steering), raw, *starts, transcript)


def _check_steering(rows: Sequence[TrainingRow], data: Path) -> None:
    layers = {row.vector.layer for row in rows if row.vector}
    if not layers:
        raise InputError(
            "no row was steered, so there is nothing to inject",
            str(data),
            "Leave out train.live, or train on rows with `steering`.",
        )
    if len(layers) > 1:
        raise InputError(f"rows are steered at different layers ({sorted(layers)})", str(data))
    zero = next((row.labelled.id for row in rows if row.vector and row.threshold_raw <= 0), None)
    if zero is not None:
        raise InputError(f"row {zero!r} has a steering strength that is not positive", str(data))


def table(rows: Sequence[TrainingRow]) -> list[VectorSource]:
    """The vectors that occur, each once, in a stable order."""
    sources = {row.vector for row in rows if row.vector}
    return sorted(
        sources,
        key=lambda each: (type(each.origin).__name__, astuple(each.origin), each.index, each.name or ""),
    )


def to_dataset(sequences: Sequence[Sequence[TrainingRow]], sources: Sequence[VectorSource]) -> Dataset:
    """Sequences of one or more rows as columns: tokens and labels one after the other, the rest a list of the rows'.

    `length` is the sequence's, `lengths` are the rows'; `vector` is the index in `sources` (-1: unsteered),
    `threshold_raw` the strength in decoder rows at one times the threshold, `reply_start` and
    `answer_start` the first token of the row's reply and of its last answer, `key` a number that stands for the id in
    random draws.
    """
    indices = {source: index for index, source in enumerate(sources)}
    return Dataset.from_dict(
        {
            "input_ids": [[token for row in rows for token in row.labelled.input_ids] for rows in sequences],
            "labels": [[token for row in rows for token in row.labelled.labels] for rows in sequences],
            "length": [sum(len(row.labelled.input_ids) for row in rows) for rows in sequences],
            "lengths": [[len(row.labelled.input_ids) for row in rows] for rows in sequences],
            "vector": [[indices[row.vector] if row.vector else -1 for row in rows] for rows in sequences],
            "threshold_raw": [[row.threshold_raw for row in rows] for rows in sequences],
            "reply_start": [[row.reply_start for row in rows] for rows in sequences],
            "answer_start": [[row.answer_start for row in rows] for rows in sequences],
            "key": [[row_key(row.labelled.id) for row in rows] for rows in sequences],
        }
    )


def to_prompts(rows: Sequence[TrainingRow], sources: Sequence[VectorSource]) -> Dataset:
    """What the model is to reply to, as columns: `prompt`, `system`, the `label` of what steers, and the steering as
    in `to_dataset`."""
    indices = {source: index for index, source in enumerate(sources)}
    labels = (row.transcript.steering and row.transcript.steering.label for row in rows)
    return Dataset.from_dict(
        {
            "prompt": [row.transcript.prompt for row in rows],
            "system": [row.transcript.system for row in rows],
            "label": list(labels),
            "vector": [indices[row.vector] if row.vector else -1 for row in rows],
            "threshold_raw": [row.threshold_raw for row in rows],
            "key": [row_key(row.labelled.id) for row in rows],
        }
    )


def singly(rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
    """Every row a sequence of its own."""
    return [[row] for row in rows]


def paired(rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
    """Every row with its rejected one (see `batches.PairCollator`)."""
    return [[row, row.rejected] for row in rows if row.rejected]


def packed(rows: Sequence[TrainingRow], max_length: int) -> list[list[TrainingRow]]:
    """Rows packed whole into sequences of at most `max_length` tokens."""
    numbers = best_fit([len(row.labelled.input_ids) for row in rows], max_length)
    return [[rows[number] for number in sequence] for sequence in numbers]


def row_key(name: str) -> int:
    """A whole number below 2**63 that stands for a row's id on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


def hold_out(rows: Sequence[TrainingRow], share: float = HELD_OUT) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Training rows and held-out rows (at least one), dealt by their ids' hashes.

    Raises:
        InputError: if there are not enough rows for both.
    """
    if len(rows) < 2:
        raise InputError("one row cannot be both trained on and held out", "train.args.eval_strategy")
    order = sorted(rows, key=lambda row: row_key(row.labelled.id))
    held_out = {row.labelled.id for row in order[: max(1, round(share * len(rows)))]}
    kept = [row for row in rows if row.labelled.id not in held_out]
    return kept, [row for row in rows if row.labelled.id in held_out]


def statistics(rows: Sequence[TrainingRow]) -> dict[str, Any]:
    """Figures for a person to check before training."""
    replies = [each for row in rows for each in (row, row.rejected) if each]
    longest = max(replies, key=lambda row: len(row.labelled.input_ids))
    tokens = sum(len(row.labelled.input_ids) for row in replies)
    return {
        "rows": len(rows),
        "rows per source": dict(sorted(Counter(row.source for row in rows).items())),
        "steered rows": sum(row.vector is not None for row in rows),
        "tokens": tokens,
        "trained share of tokens": round(sum(row.trained for row in replies) / tokens, 4),
        "longest row": {"id": longest.labelled.id, "tokens": len(longest.labelled.input_ids)},
        "straddling tokens": sum(row.labelled.straddling for row in rows),
    }


def dump_tokens(rows: Sequence[TrainingRow], path: Path) -> int:
    """Write what the trainer gets, one object a row: `id`, `input_ids`, `labels`; returns the number of rows.

    Rows of preferences have a second object of the same `id`, their rejected reply.
    """
    labelled = (each.labelled for row in rows for each in (row, row.rejected) if each)
    write_jsonl(
        path, ({"id": row.id, "input_ids": list(row.input_ids), "labels": list(row.labels)} for row in labelled)
    )
    return len(rows)
