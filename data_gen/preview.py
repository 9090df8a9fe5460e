"""Transcripts and their loss masks, shown to a person: in the terminal, or as a page."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from esr_train.mask_preview import counted, token_texts, visible
from esr_train.masking import Labelled, Policy, label
from esr_train.transcript import SpanKind, Transcript
from eval.report.template import render

STYLES = {SpanKind.OFF_TOPIC: "red", SpanKind.CUE: "bold yellow", SpanKind.ANSWER: "green"}
TRAINED, MASKED = "green", "dim"


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
        console.print(Text(visible(transcript.prompt), "cyan"))
        pieces = [(visible(span.text), STYLES[span.kind]) for span in transcript.spans]
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


def _print_legend(console: Console) -> None:
    pieces = [(f"{kind}  ", STYLES[kind]) for kind in SpanKind]
    console.print(Text.assemble(*pieces, "(with a tokenizer: ", ("trained", TRAINED), " ", ("masked", MASKED), ")"))


def _print_mask(console: Console, labelled: Labelled) -> None:
    pieces = [(visible(text), TRAINED if trained else MASKED) for text, trained, _ in token_texts(labelled)]
    console.print(Text(counted(labelled), "bold"))
    console.print(Text.assemble(*pieces))


def _row(transcript: Transcript, tokenizer: PreTrainedTokenizerBase | None, policy: Policy) -> dict[str, object]:
    labelled = None if tokenizer is None else label(tokenizer, transcript, policy)
    return {
        "heading": _heading(transcript),
        "system": transcript.system,
        "prompt": transcript.prompt,
        "spans": [(str(span.kind), span.text) for span in transcript.spans],
        "counts": labelled and counted(labelled),
        "tokens": None if labelled is None else list(token_texts(labelled)),
    }
