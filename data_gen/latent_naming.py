"""Labels for latents that nobody has labelled: words of the text on which they are most active, or a name for it."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from esr_train.errors import InputError
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

Row = dict[str, Any]


def label_latents(
    model: Any, tokenizer: Any, sae: LoadedSae, texts: Sequence[str], latents: int | None, seed: int, rows: int = 1
) -> list[Row]:
    """Label latents with what is said where they are most active, and seldom elsewhere.

    Of the words around a latent's peaks those are taken that are in most excerpts and in fewest texts (count times
    inverse document frequency); the very token of the peak is often an article.

    Args:
        model: in any wrapper.
        tokenizer: the model's.
        sae: of the model.
        texts: not the prompts that are to be steered: what is active on them is relevant to them.
        latents: so many of those that are ever active, drawn by `seed`; None: all.
        seed: of that draw.
        rows: texts of one forward pass.

    Returns:
        Rows as in a Neuronpedia export (`index`, `description`) with `frequency` (share of tokens) and `examples`
        (the token of a peak between << and >>, strongest first), by index.

    Raises:
        InputError: if there is no text, or no latent is active on any.
    """
    read = [short for text in texts if len(with_bos(tokenizer, short := " ".join(text.split()[:WORDS]))) > 1]
    if not read:
        raise InputError("there is no text to read", "--texts", "Name a file with some.")
    found = peaks(model, tokenizer, sae, read, EXAMPLES, rows)
    ever = found.values[:, 0].nonzero().flatten().tolist()
    if not ever:
        raise InputError("no latent is active on any of the texts", "--texts", "Is this SAE the model's own?")
    drawn = sorted(ever, key=lambda latent: derived_seed("label", seed, latent))[:latents]
    tokens = [with_bos(tokenizer, text)[1:] for text in read]
    spread = Counter(word for text in read for word in _words(text))
    return [_row(tokenizer, found, tokens, spread, latent) for latent in sorted(drawn)]


def _row(tokenizer: Any, found: Peaks, tokens: Sequence[Sequence[int]], spread: Mapping[str, int], latent: int) -> Row:
    count = int((found.values[latent] > 0).sum())
    places = zip(found.text[latent, :count].tolist(), found.token[latent, :count].tolist(), strict=True)
    examples = [_excerpt(tokenizer, tokens[text], token) for text, token in places]
    return {
        "index": str(latent),
        "description": _told_apart(examples, spread, len(tokens)) or "no words",
        "frequency": round(float(found.frequency[latent]), 6),
        "examples": examples,
    }


def _told_apart(examples: Sequence[str], spread: Mapping[str, int], texts: int) -> str:
    """The words that tell excerpts from other text; words cut by an excerpt's end are in no text."""
    common = Counter(word for example in examples for word in _words(example) if word in spread)
    weight = {word: count * math.log((texts + 1) / spread[word]) for word, count in common.items()}
    return ", ".join(sorted(weight, key=lambda word: (-weight[word], word))[:LABEL_WORDS])


def _words(text: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[^\W\d_]{3,}", text.replace("<<", "").replace(">>", ""))}


def _excerpt(tokenizer: Any, ids: Sequence[int], token: int) -> str:
    parts = ids[max(token - BEFORE, 0) : token], [ids[token]], ids[token + 1 : token + 1 + BEHIND]
    before, at, behind = (tokenizer.decode(list(part)) for part in parts)
    word = at.lstrip()
    return f"{before}{at[: len(at) - len(word)]}<<{word}>>{behind}".strip()


def name_latents(rows: Sequence[Row], namer: Asker, least: float = 0) -> list[Row]:
    """The rows with labels that a language model gives, and how concrete it finds them (0-100).

    Args:
        rows: of `label_latents`.
        namer: who is asked; a row that it cannot name is left out.
        least: labels that are less concrete are left out, too (the paper takes 65).

    Raises:
        InputError: if no row is left.
    """
    answers = namer.ask([_QUESTION.format(excerpts="\n".join(row["examples"])) for row in rows], _named)
    named = [
        {**row, "description": answer.value[0], "concreteness": answer.value[1]}
        for row, answer in zip(rows, answers, strict=True)
        if answer.value and answer.value[1] >= least
    ]
    if not named:
        failed = sum(answer.value is None for answer in answers)
        raise InputError(
            f"no label is left: {failed} of {len(rows)} questions got no usable answer, the other labels are less "
            f"concrete than {least:g}",
            "--concreteness",
            "Take another namer, or ask for less.",
        )
    return named


def _named(_: int, reply: str) -> tuple[str, float]:
    return read_reply(reply, _label)


def _label(values: dict[str, Any]) -> tuple[str, float]:
    label, concreteness = values.get("label"), values.get("concreteness")
    if not isinstance(label, str) or not any(map(str.isalpha, label)):
        raise ValueError("label must be a text with words in it")
    if isinstance(concreteness, bool) or not isinstance(concreteness, int | float) or not 0 <= concreteness <= 100:
        raise ValueError("concreteness must be a number from 0 to 100")
    return " ".join(label.split()), float(concreteness)
