"""How likely a restart is at sentence ends, from an engine that says how likely texts are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from esr_train.errors import InputError
from esr_train.steering.engine import Request
from eval.judging.restart_likelihood import MOST_ENDS, read_phrases, restart_reader


@dataclass
class FakeScorer:
    """ " Wait." has probability 0.2 after "dough.", else 0.01; every other text 0.1."""

    asked: list[tuple[Request, str]] = field(default_factory=list)

    def log_probabilities(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[tuple[float, ...]]:
        self.asked += zip(requests, continuations, strict=True)
        return [
            (math.log(0.5), math.log(0.2 if text != " Wait." else 0.4 if request.prefix.endswith("dough.") else 0.02))
            for request, text in zip(requests, continuations, strict=True)
        ]


def test_the_chance_of_any_phrase_is_read_at_every_sentence_end():
    scorer = FakeScorer()
    requests = [Request("a", "How?", seed=3), Request("b", "Why?")]
    found = restart_reader(scorer, ["Wait.", "Sorry."])(requests, ["Knead the dough. Fold it.", "Fold it"])
    assert [[end for end, _ in each] for each in found] == [[16, 25], [7]]
    values = [value for each in found for _, value in each]
    assert values == pytest.approx([math.log(0.5), math.log(0.31), math.log(0.31)], abs=1e-4)
    assert [request.prefix for request, _ in scorer.asked[::4]] == [
        "Knead the dough.",
        "Knead the dough. Fold it.",
        "Fold it",
    ]
    assert [text for _, text in scorer.asked[:4]] == [" Wait.", " Sorry.", "\n\nWait.", "\n\nSorry."]
    assert {request.prompt for request, _ in scorer.asked} == {"How?", "Why?"}


def test_an_empty_response_has_no_sentence_end_and_a_long_one_is_read_at_its_beginning():
    found = restart_reader(FakeScorer(), ["Wait."])([Request("a", "How?")] * 2, ["", "Fold it. " * 20])
    assert [len(each) for each in found] == [0, MOST_ENDS]


def test_phrases_are_read_once_each_and_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "phrases.txt"
    path.write_text("# own\n[plain]\nWait.\n\nSorry.\nWait.\n")
    assert read_phrases(path) == ("Wait.", "Sorry.")
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no phrase"):
        read_phrases(path)
