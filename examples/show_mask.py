"""Which tokens of a transcript are trained: `python examples/show_mask.py`, a second on a CPU.

Tokens in [[double brackets]] carry loss: the words that turn back, the answer and the end of the turn; the detour does
not. `esr train RECIPE --dry-run` shows the same of a recipe's rows, `--dump-tokens FILE` their ids and labels.
"""

from esr_train import Span, SpanKind, Transcript, label, load_tokenizer
from esr_train.masking import counted, marked

tokenizer = load_tokenizer("recipes/tiny/assets/llama")
transcript = Transcript(
    id="sheet",
    prompt="How do you fold a fitted sheet?",
    spans=(
        Span(SpanKind.OFF_TOPIC, "First, knead the dough and dust the flour over the board."),
        Span(SpanKind.CUE, " Wait, that's not right."),
        Span(SpanKind.ANSWER, " Start by tucking one corner into the other."),
    ),
    source="steered",
)

for policy in ("masked", "unmasked", "answer_only"):
    labelled = label(tokenizer, transcript, policy)
    print(f"\n{policy}: {counted(labelled)}\n{marked(labelled, colour=False)}")

# What a trainer gets: -100 stands for a token without loss.
labelled = label(tokenizer, transcript)
tokens = [tokenizer.decode([token]) for token in labelled.input_ids]
for token, identity, target in list(zip(tokens, labelled.input_ids, labelled.labels, strict=True))[-12:]:
    print(f"{token!r:>12} {identity:5} {target:5}")
