"""What an SAE is trained on: the model's own conversations, other text if given, and the states of both."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from esr_train.errors import InputError
from esr_train.files import read_rows
from esr_train.models import hidden_size
from esr_train.provenance import digest
from esr_train.steering.engine import Engine, Request, Sampling
from esr_train.steering.readout import hidden_states, with_bos
from esr_train.template import chat_template, reply_text
from esr_train.values import typed
from eval.cells import Prompt, derived_seed
from eval.store import RowStore

QUESTIONS = (
    "Tell me about {}.",
    "What is interesting about {}?",
    "What should a beginner know about {}?",
    "Describe {} to a friend.",
    "Tell a short story about {}.",
    "Why do people care about {}?",
    "What do people often get wrong about {}?",
    "Write a few lines on the history of {}.",
)
"""What the model is asked about every subject."""
REPLY_TOKENS = 64
"""Most tokens of a reply; what a reply is about shows early."""
PIECE = 2000
"""Characters of a plain text that are read at once."""
HELD_OUT = 20
"""One text in so many is kept for the measurement, with all replies to its prompt."""
WHOLE = 16
"""One conversation in so many is read from its beginning: the others have what the template writes there in common."""


@dataclass(frozen=True)
class Reply:
    """A reply of the unsteered model.

    Args:
        key: unique; from the model, the prompt, the sampling and the seed.
    """

    key: str
    prompt: str
    topic: str
    reply: str


@dataclass(frozen=True)
class Text:
    """A text to read.

    Args:
        text: rendered, or plain.
        start: the first state that counts, BOS not counted.
        held_out: whether it serves the measurement and not the training.
    """

    text: str
    start: int
    held_out: bool


def ask_about(prompts: Sequence[Prompt], subjects: Sequence[str], seed: int) -> list[Prompt]:
    """The prompts and the questions about every subject, in a seeded order."""
    asked = [*prompts, *(Prompt(question.format(each), each) for question in QUESTIONS for each in subjects)]
    Random(derived_seed("sae", seed)).shuffle(asked)
    return asked


def sample_replies(
    engine: Engine,
    tokenizer: Any,
    model: Any,
    asked: Sequence[Prompt],
    sampling: Sampling,
    tokens: int,
    path: Path,
    rows: int,
) -> list[Reply]:
    """Replies until the conversations have `tokens` tokens: to every prompt one, then one more with another seed.

    Args:
        engine: on the unsteered model.
        model: JSON value that tells the model from others, a part of every reply's key.
        asked: prompts in the order in which they are asked.
        tokens: of prompts and replies, what the template writes in front of every prompt not counted.
        path: file of the replies; those that it has are not made again.
        rows: replies of one batch.

    Raises:
        InputError: if there is no prompt.
    """
    if not asked:
        raise InputError("there is no prompt and no subject to ask about", "--subjects", "Name a file with some.")
    store = RowStore(path, partial(typed, Reply), _written)
    known, made = store.by_key(), []
    skip = skipped(tokenizer)
    with tqdm(total=tokens, desc="sample replies", unit="tok", unit_scale=True, mininterval=1) as bar:
        for batch in _batches(asked, rows):
            keyed = {digest([model, prompt.text, asdict(sampling), seed]): (prompt, seed) for prompt, seed in batch}
            missing = {key: value for key, value in keyed.items() if key not in known}
            replies = {reply.key: reply for reply in _generate(engine, missing, sampling)}
            store.append(replies.items())
            known |= replies
            made += [known[key] for key in keyed]
            bar.update(min(sum(_length(tokenizer, known[key]) - skip for key in keyed), tokens - bar.n))
            if bar.n >= tokens:
                return made
    raise AssertionError("prompts are asked again and again")


def _batches(asked: Sequence[Prompt], rows: int) -> Iterator[list[tuple[Prompt, int]]]:
    """Prompts with a seed, without end: a round over all of them after the other."""
    round_number = 0
    while True:
        for start in range(0, len(asked), rows):
            yield [(prompt, derived_seed("reply", round_number, prompt.text)) for prompt in asked[start : start + rows]]
        round_number += 1


def _generate(engine: Engine, asked: dict[str, tuple[Prompt, int]], sampling: Sampling) -> Iterator[Reply]:
    requests = [Request(key, prompt.text, seed=seed) for key, (prompt, seed) in asked.items()]
    for done in engine.generate(requests, sampling) if requests else ():
        prompt, _ = asked[done.id]
        yield Reply(done.id, prompt.text, prompt.topic, done.text)


def _length(tokenizer: Any, reply: Reply) -> int:
    return len(with_bos(tokenizer, reply_text(tokenizer, reply.prompt, reply.reply))) - 1


def skipped(tokenizer: Any) -> int:
    """States that every conversation has in common: of what the template writes in front of the prompt."""
    return max(len(with_bos(tokenizer, chat_template(tokenizer).around[0])) - 1, 0)


def to_read(tokenizer: Any, replies: Iterable[Reply], plain: Iterable[str], seed: int) -> list[Text]:
    """Conversations and pieces of plain text in a seeded order, each held out or not by a hash of its prompt.

    Raises:
        InputError: if all of them are held out, or none.
    """
    skip = skipped(tokenizer)
    texts = [
        Text(reply_text(tokenizer, reply.prompt, reply.reply), skip if number % WHOLE else 0, _held_out(reply.prompt))
        for number, reply in enumerate(replies)
    ]
    texts += [Text(piece, 0, _held_out(piece)) for piece in plain if len(with_bos(tokenizer, piece)) > 1]
    if len({text.held_out for text in texts}) < 2:
        what = f"{len(texts)} texts are too few to keep some for the measurement"
        raise InputError(what, "--tokens", "Ask for more tokens.")
    Random(derived_seed("texts", seed)).shuffle(texts)
    return texts


def _held_out(prompt: str) -> bool:
    return derived_seed("held out", prompt) % HELD_OUT == 0


def read_plain(files: Iterable[Path]) -> Iterator[str]:
    """Pieces of the texts in files of any kind that `esr_train.files` reads, or in plain ones, a text a line."""
    for file in files:
        for _, row in read_rows(file, "text"):
            text = str(row["text"])
            yield from (text[start : start + PIECE] for start in range(0, len(text), PIECE))


@dataclass(frozen=True)
class States:
    """What the model has read.

    Args:
        values: [tokens, d_model] bfloat16, in a file that vanishes with the process.
        means: [texts, d_model] float32, the mean state of each text.
    """

    values: torch.Tensor
    means: torch.Tensor


def read_states(
    model: Any, tokenizer: Any, texts: Sequence[Text], layer: int, tokens: int, rows: int, folder: Path
) -> States:
    """The output of decoder layer `layer` for texts that are not held out, at most `tokens` states.

    Args:
        model: in any wrapper.
        texts: in the order in which they are read.
        layer: counted from 0.
        tokens: most states.
        rows: texts of one forward pass.
        folder: where the file of the states is; an accelerator's, or this machine's, memory need not hold them.

    Raises:
        InputError: if the layer does not exist.
    """
    width = hidden_size(model)
    values, count, means = _mapped(folder, tokens, width), 0, []
    training = [text for text in texts if not text.held_out]
    found = hidden_states(model, tokenizer, [text.text for text in training], layer, rows)
    with tqdm(total=tokens, desc="read states", unit="tok", unit_scale=True, mininterval=1) as bar:
        for text, states in zip(training, found, strict=True):
            part = states[text.start :][: tokens - count].to(torch.bfloat16).cpu()
            if len(part):
                values[count : count + len(part)] = part
                means.append(part.float().mean(dim=0))
            count += len(part)
            bar.update(len(part))
            if count == tokens:
                break
    return States(values[:count], torch.stack(means))


def _mapped(folder: Path, rows: int, width: int) -> torch.Tensor:
    folder.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(folder).free, rows * width * torch.bfloat16.itemsize
    if free < needed:
        what = f"{rows} states need {needed / 2**30:,.1f} GiB, {free / 2**30:,.1f} are free"
        raise InputError(what, str(folder), "Ask for fewer --tokens, or write --out elsewhere.")
    with TemporaryDirectory(dir=folder, prefix=".states.") as aside:
        # The name is gone at once; the space is freed when the process ends, however it ends.
        table = torch.from_file(f"{aside}/states", shared=True, size=rows * width, dtype=torch.bfloat16)
    return table.view(rows, width)


def _written(reply: Reply) -> dict[str, Any]:
    return {"prompt": reply.prompt, "topic": reply.topic, "reply": reply.reply}
