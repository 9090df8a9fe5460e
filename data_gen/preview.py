"""Transcripts and their loss masks, shown to a person: in the terminal, or as a page."""

import re
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from esr_train.masking import IGNORED, Labelled, Policy, label
from esr_train.transcript import SpanKind, Transcript
from eval.report.template import render

STYLES = {SpanKind.OFF_TOPIC: "red", SpanKind.CUE: "bold yellow", SpanKind.ANSWER: "green"}
TRAINED, MASKED = "green", "dim"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show(
    transcripts: Sequence[Transcript],
    n: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    policy: Policy = "masked",
    console: Console | None = None,
) -> None:
    """Print the first `n` transcripts, each span in its colour.

    Args:
        transcripts: the rows.
        n: how many to print.
        tokenizer: if given, each row is printed a second time as the model reads it: trained tokens green,
            masked ones dim.
        policy: of the mask.
        console: where to print; None is standard output.

    Raises:
        InputError: naming the row, if it cannot be labelled.
    """
    console = console or Console(highlight=False)
    _print_legend(console)
    for transcript in transcripts[:n]:
        console.print()
        console.print(Text(_heading(transcript), "bold"))
        console.print(Text(_visible(transcript.prompt), "cyan"))
        pieces = [(_visible(span.text), STYLES[span.kind]) for span in transcript.spans]
        console.print(Text.assemble(*pieces))
        if tokenizer is not None:
            _print_mask(console, label(tokenizer, transcript, policy))


def page(
    transcripts: Sequence[Transcript],
    n: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    policy: Policy = "masked",
) -> str:
    """One HTML file that needs nothing else: the first `n` transcripts and, with a tokenizer, their tokens and masks.

    Raises:
        InputError: naming the row, if it cannot be labelled.
    """
    return render(
        "data_gen",
        "preview.html",
        colours=(),
        kinds=[str(kind) for kind in SpanKind],
        masks=tokenizer is not None,
        rows=[_row(transcript, tokenizer, policy) for transcript in transcripts[:n]],
        total=len(transcripts),
    )


def _heading(transcript: Transcript) -> str:
    steering = transcript.steering
    if steering is None:
        return f"{transcript.id} ({transcript.source})"
    name = f" {steering.label!r}" if steering.label else ""
    return (
        f"{transcript.id} ({transcript.source}; latent {steering.latent}{name}, strength {steering.strength.norm:.2f})"
    )


def _counts(labelled: Labelled) -> str:
    return f"{labelled.trained} of {len(labelled.labels)} tokens trained, {labelled.straddling} straddling"


def _visible(text: str) -> str:
    # A reply may hold terminal escapes; shown, they must not act.
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _print_legend(console: Console) -> None:
    pieces = [(f"{kind}  ", STYLES[kind]) for kind in SpanKind]
    console.print(Text.assemble(*pieces, "(with a tokenizer: ", ("trained", TRAINED), " ", ("masked", MASKED), ")"))


def _print_mask(console: Console, labelled: Labelled) -> None:
    pieces = [(_visible(text), TRAINED if trained else MASKED) for text, trained, _ in _tokens(labelled)]
    console.print(Text(_counts(labelled), "bold"))
    console.print(Text.assemble(*pieces))


def _tokens(labelled: Labelled) -> Iterator[tuple[str, bool, int]]:
    """Each token's text, whether it is trained, and its id.

    Of several tokens that cut up one character, the first has it as text and the others have none.
    """
    position = 0
    rows = zip(labelled.offsets, labelled.labels, labelled.input_ids, strict=True)
    for (start, end), value, token in rows:
        yield labelled.text[max(start, position) : end], value != IGNORED, token
        position = max(position, end)


def _row(transcript: Transcript, tokenizer: PreTrainedTokenizerBase | None, policy: Policy) -> dict[str, object]:
    labelled = None if tokenizer is None else label(tokenizer, transcript, policy)
    return {
        "heading": _heading(transcript),
        "system": transcript.system,
        "prompt": transcript.prompt,
        "spans": [(str(span.kind), span.text) for span in transcript.spans],
        "counts": labelled and _counts(labelled),
        "tokens": None if labelled is None else list(_tokens(labelled)),
    }
