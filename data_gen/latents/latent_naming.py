"""Labels for latents that nobody has labelled: words of the text on which they are most active, or a name for it."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from esr_train.errors import InputError
from esr_train.files import write_jsonl
from esr_train.steering.directions import LoadedSae
from esr_train.steering.readout import Peaks, peaks, with_bos
from eval.cells import derived_seed
from eval.judging.replies import read_reply
from eval.llm import Asker

EXAMPLES = 8
"""Texts shown of each latent."""
LABEL_WORDS = 3
"""Words that make a label where nobody names it."""
BEFORE, BEHIND = 16, 8
"""Tokens shown around the one on which a latent is most active."""
WORDS = 200
"""Words of a text that are read."""
_QUESTION = """\
A feature of a language model is active on the words that stand between << and >> in the excerpts below, strongest \
first. Say in at most eight words what the feature stands for: a subject if the excerpts have one, or else a kind of \
word. Say also how concrete that is, from 0 (grammar, punctuation, a vague mood) to 100 (a thing, place or activity \
that one could point at).

{excerpts}

Reply with one JSON object whose keys are "label" (a string) and "concreteness" (a number), and with nothing else."""


@dataclass(frozen=True)
class LatentLabel:
    """A latent and what it stands for.

    Args:
        frequency: share of all tokens on which it is active.
        examples: texts around the tokens on which it is most active (between << and >>), strongest first.
        concreteness: of the description, 0 to 100, as a language model finds it; None: none was asked.
        strength: in residual norms, at which the latent steered to what the description says, the examples being
            replies; None: it was not steered.
    """

    latent: int
    description: str
    frequency: float
    examples: tuple[str, ...]
    concreteness: float | None = None
    strength: float | None = None


def label_latents(
    model: Any, tokenizer: Any, sae: LoadedSae, texts: Sequence[str], latents: int | None, seed: int, rows: int = 1
) -> list[LatentLabel]:
    """Label latents with what is said where they are most active, and seldom elsewhere.

    Of the words around a latent's peaks those are taken that are in most excerpts and in fewest texts (count times
    inverse document frequency); the very token of the peak is often an article.

    Args:
        model: in any wrapper.
        texts: not the prompts that are to be steered: what is active on them is relevant to them.
        latents: so many of those that are ever active, drawn by `seed`; None: all.
        rows: texts of one forward pass.

    Returns:
        A label for each of them, by index.

    Raises:
        InputError: if there is no text, or no latent is active on any.
    """
    read = [short for text in texts if len(with_bos(tokenizer, short := " ".join(text.split()[:WORDS]))) > 1]
    if not read:
        raise InputError("there is no text to read", "--texts", "Name a file with some.")
    strongest = peaks(model, tokenizer, sae, read, EXAMPLES, rows)
    active = strongest.values[:, 0].nonzero().flatten().tolist()
    if not active:
        raise InputError("no latent is active on any of the texts", "--texts", "Is this SAE the model's own?")
    drawn = sorted(active, key=lambda latent: derived_seed("label", seed, latent))[:latents]
    tokens = [with_bos(tokenizer, text)[1:] for text in read]
    holders = Counter(word for text in read for word in _words(text))
    return [_labelled(tokenizer, strongest, tokens, holders, latent) for latent in sorted(drawn)]


def _labelled(
    tokenizer: Any, strongest: Peaks, tokens: Sequence[Sequence[int]], holders: Mapping[str, int], latent: int
) -> LatentLabel:
    """A latent's label, from its excerpts and from how many of all texts hold each word."""
    count = int((strongest.values[latent] > 0).sum())
    where = zip(strongest.text[latent, :count].tolist(), strongest.token[latent, :count].tolist(), strict=True)
    examples = tuple(excerpt(tokenizer, tokens[text], token) for text, token in where)
    # Words cut by an excerpt's end are in no text.
    common = Counter(word for example in examples for word in _words(example) if word in holders)
    weights = {word: count * math.log((len(tokens) + 1) / holders[word]) for word, count in common.items()}
    words = sorted(weights, key=lambda word: (-weights[word], word))[:LABEL_WORDS]
    frequency = round(float(strongest.frequency[latent]), 6)
    return LatentLabel(latent, ", ".join(words) or "no words", frequency, examples)


def _words(text: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[^\W\d_]{3,}", text.replace("<<", "").replace(">>", ""))}


def excerpt(tokenizer: Any, ids: Sequence[int], token: int) -> str:
    """The text around a token, which stands between << and >>."""
    parts = ids[max(token - BEFORE, 0) : token], [ids[token]], ids[token + 1 : token + 1 + BEHIND]
    before, at, behind = (tokenizer.decode(list(part)) for part in parts)
    word = at.lstrip()
    return f"{before}{at[: len(at) - len(word)]}<<{word}>>{behind}".strip()


def name_latents(labels: Sequence[LatentLabel], namer: Asker, least: float = 0) -> list[LatentLabel]:
    """The latents with descriptions that a language model gives, and how concrete it finds these (0-100).

    Args:
        namer: who is asked; a latent that it cannot name is left out.
        least: descriptions that are less concrete are left out, too (the paper takes 65).

    Raises:
        InputError: if no label is left.
    """
    answers = namer.ask([_QUESTION.format(excerpts="\n".join(label.examples)) for label in labels], _named)
    named = [
        replace(label, description=answer.value[0], concreteness=answer.value[1])
        for label, answer in zip(labels, answers, strict=True)
        if answer.value and answer.value[1] >= least
    ]
    if not named:
        failed = sum(answer.value is None for answer in answers)
        raise InputError(
            f"no label is left: {failed} of {len(labels)} questions got no usable answer, the other labels are less "
            f"concrete than {least:g}",
            "--concreteness",
            "Take another namer, or ask for less.",
        )
    return named


def write_latent_labels(path: Path, labels: Iterable[LatentLabel]) -> int:
    """Write a file of labels for `sae.labels`, in rows as of a Neuronpedia export; how many there are."""
    rows = [{"index": str(label.latent), **asdict(label)} for label in labels]
    return write_jsonl(path, [{k: v for k, v in row.items() if k != "latent" and v is not None} for row in rows])


def _named(_: int, reply: str) -> tuple[str, float]:
    return read_reply(reply, _label)


def _label(values: dict[str, Any]) -> tuple[str, float]:
    label, concreteness = values.get("label"), values.get("concreteness")
    if not isinstance(label, str) or not any(map(str.isalpha, label)):
        raise ValueError("label must be a text with words in it")
    if isinstance(concreteness, bool) or not isinstance(concreteness, int | float) or not 0 <= concreteness <= 100:
        raise ValueError("concreteness must be a number from 0 to 100")
    return " ".join(label.split()), float(concreteness)
