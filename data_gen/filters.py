"""What is thrown away after it was judged: detours that are no text, answers that repeat them, rows seen before."""

from collections import Counter, defaultdict

from data_gen.sources import Make, Outcome
from esr_train.transcript import SpanKind, Transcript
from eval.cells import fingerprint
from eval.judging.prose import TRIPLE, degenerate, grams, words

DEGENERATE = "detour degenerate"
PARROTING = 0.5
"""Most of a detour's word quadruples that its answer may say again."""
ALIKE = 0.9
"""Jaccard similarity of their sets of word triples from which two replies count as the same."""
QUADRUPLE = 4
"""Words in a row that an answer shares with a detour."""
Triple = tuple[str, ...]


def screened(make: Make) -> Make:
    """The same candidates without those whose text alone shows that they are of no use."""

    def screen(outcome: Outcome) -> Outcome:
        reason = fault(outcome.transcript) if outcome.transcript else None
        return Outcome(None, reason) if reason else outcome

    return lambda numbers: [screen(outcome) for outcome in make(numbers)]


def fault(row: Transcript) -> str | None:
    """Why a row is refused for its text; None if it is not."""
    detours = [span.text for span in row.spans if span.kind is SpanKind.OFF_TOPIC]
    if any(degenerate(text) for text in detours):
        return DEGENERATE
    answer = " ".join(span.text for span in row.spans if span.kind is SpanKind.ANSWER)
    if any(repeated(text, answer) > PARROTING for text in detours):
        return "answer parrots the detour"
    return None


def repeated(detour: str, answer: str) -> float:
    """Share of a detour's distinct word quadruples that its answer says, too, 0 to 1; a shorter detour has none."""
    said = set(grams(words(detour), QUADRUPLE))
    return len(said & set(grams(words(answer), QUADRUPLE))) / len(said) if said else 0.0


class Seen:
    """The replies of one file so far, to recognise one that comes again or nearly so.

    Cues do not count: they are phrasings of one kind.
    """

    def __init__(self) -> None:
        self._exact: set[str] = set()
        self._sizes: list[int] = []
        self._holders: defaultdict[Triple, list[int]] = defaultdict(list)

    def again(self, row: Transcript) -> str | None:
        """Why a row is refused as a repeat; one that is not is remembered."""
        exact = f"{fingerprint(row.prompt)} {fingerprint(row.content)}"
        if exact in self._exact:
            return "duplicate"
        said = words(" ".join(span.text for span in row.spans if span.kind is not SpanKind.CUE))
        triples = frozenset(grams(said, TRIPLE) or [tuple(said)])
        shared = Counter(index for triple in triples for index in self._holders.get(triple, ()))
        if any(both >= ALIKE * (len(triples) + self._sizes[index] - both) for index, both in shared.items()):
            return "near duplicate"
        self._exact.add(exact)
        for triple in triples:
            self._holders[triple].append(len(self._sizes))
        self._sizes.append(len(triples))
        return None
