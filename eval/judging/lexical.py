"""A judge that counts topic words: exact and free, for worlds whose topics have their own vocabularies."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from esr_train.errors import InputError
from esr_train.files import read_json
from esr_train.recipe import LexicalJudgeSection
from esr_train.restarts import sentences
from eval.judging.judge import Attempt, JudgeContext, JudgeItem, Judgement, register_judge
from eval.judging.prose import bodies, grams, recovers

EVERY_WORD = "_words"
"""Key of the vocabulary file under which every word of the language may stand."""
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_FINISHED = re.compile(r"[.!?…][\"')\]”’*_]*$")
_UNKNOWN_SHARE = 0.2
_GRAM = 4
_LONG_SENTENCE = 6


class LexicalJudge:
    """Scores an attempt by the share of its topic words that belong to the prompt's topic.

    The prompt's topic is the one that it names most (the first named of several). An attempt's score is
    100 x the mean, over its sentences, of (words of the prompt's topic) / (words of any topic). Sentences
    without topic words, cue sentences and a trailing unfinished sentence (unless it is the only one) are left
    out; an attempt with nothing left scores 0. A degenerate attempt's score is multiplied by the share of its
    sentences that are well-formed, so that a repeated or garbled answer cannot score like a whole one.

    *Degenerate*: some four words in a row occur three times or more, a word occurs three times in a row, a
    sentence of six words or more is repeated, or more than a fifth of the words are unknown (known words are
    those under `_words`; without that key no word is unknown). *Well-formed*: a sentence that begins with a
    capital, repeats no earlier one, has at most a fifth of unknown words, no word twice in a row, and none of
    the four-word runs that occur three times, unless it is the first to have it.

    Args:
        vocabulary: topic -> the words that belong to it alone. The topic's own name and plurals in -s count.

    Raises:
        InputError: if there is no topic, or two topics claim the same word.
    """

    def __init__(self, vocabulary: Mapping[str, Sequence[str]]) -> None:
        topics = {topic: words for topic, words in vocabulary.items() if topic != EVERY_WORD}
        if not topics:
            raise InputError("the judge's vocabulary has no topic", fix="Give a JSON object, topic -> words.")
        self._topics = frozenset(topics)
        self._terms = _terms(topics)
        self._longest = max(map(len, self._terms))
        self._known = _known(vocabulary.get(EVERY_WORD), self._terms)
        digest = hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()
        self.name = f"lexical-{digest[:8]}"

    @classmethod
    def from_file(cls, path: Path | str) -> "LexicalJudge":
        """Read the vocabulary from a JSON file.

        Raises:
            InputError: for a file that is not an object of word lists.
        """
        value = read_json(path)
        if not isinstance(value, dict) or not all(_is_words(words) for words in value.values()):
            raise InputError("a vocabulary is a JSON object, topic -> list of words", str(path))
        try:
            return cls(value)
        except InputError as error:
            raise InputError(error.what, str(path), error.fix) from None

    def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """One judgement an item; a prompt that names no topic is an error."""
        return [self._judge(item) for item in items]

    def topic_of(self, text: str) -> str | None:
        """The topic most named in a text, or None."""
        named = Counter(self._named(_words(text)))
        return named.most_common(1)[0][0] if named else None

    def _judge(self, item: JudgeItem) -> Judgement:
        topic = self.topic_of(item.prompt)
        if topic is None:
            return Judgement((), self.name, error="the prompt names no topic of the vocabulary")
        parts = bodies(item.response)
        read = [self._read(part.text, topic) for part in parts]
        flags = {
            "degenerate": any(each.degenerate for each in read),
            "silent_recovery": recovers([each.shares for each in read]),
        }
        if item.label in self._topics:
            flags["hijacked"] = read[-1].named[item.label] > read[-1].named.total() / 2
        scored = tuple(Attempt(*part.range, each.score) for part, each in zip(parts, read, strict=True))
        raw = json.dumps({"topic": topic, "sentences": [each.shares for each in read]})
        return Judgement(scored, self.name, raw, flags)

    def _read(self, body: str, topic: str) -> "_Reading":
        """Read an attempt without the cue that it begins with."""
        found = [body[first:last] for first, last in sentences(body)]
        if len(found) > 1 and not _FINISHED.search(found[-1]):
            found.pop()
        named = [Counter(self._named(_words(sentence))) for sentence in found]
        shares = tuple(round(100 * each[topic] / each.total(), 2) for each in named if each)
        degenerate, sound = self._form(found)
        mean = sum(shares) / len(shares) if shares else 0.0
        score = round(mean * sound if degenerate else mean, 2)
        return _Reading(score, shares, sum(named, Counter()), degenerate)

    def _form(self, found: list[str]) -> tuple[bool, float]:
        """Whether an attempt is degenerate, and the share of its sentences that are well-formed."""
        words = [_words(sentence) for sentence in found]
        stream = [word for sentence in words for word in sentence]
        if not stream:
            return False, 1.0
        repeated = {gram for gram, count in Counter(grams(stream, _GRAM)).items() if count >= 3}
        seen = Counter(tuple(sentence) for sentence in words)
        degenerate = (
            bool(repeated)
            or any(len(set(gram)) == 1 for gram in grams(stream, 3))
            or any(count > 1 and len(sentence) >= _LONG_SENTENCE for sentence, count in seen.items())
            or self._unknown(stream) > _UNKNOWN_SHARE
        )
        sound, used = 0, set[tuple[str, ...]]()
        for number, sentence in enumerate(words):
            runs = grams(sentence, _GRAM)
            sound += (
                found[number].lstrip("*_\"'([“-# ")[:1].isupper()
                and sentence not in words[:number]
                and self._unknown(sentence) <= _UNKNOWN_SHARE
                and all(first != second for first, second in grams(sentence, 2))
                and used.isdisjoint(runs)
                and len(set(runs)) == len(runs)
            )
            used |= repeated & set(runs)
        return degenerate, sound / len(words)

    def _unknown(self, words: Sequence[str]) -> float:
        if self._known is None or not words:
            return 0.0
        return sum(word not in self._known for word in words) / len(words)

    def _named(self, words: Sequence[str]) -> list[str]:
        """The topic of every term in a text, in order; the longest term that fits wins."""
        found, at = [], 0
        while at < len(words):
            for length in range(min(self._longest, len(words) - at), 0, -1):
                topic = self._terms.get(tuple(words[at : at + length]))
                if topic is not None:
                    found.append(topic)
                    break
            else:
                length = 1
            at += length
        return found


@register_judge("lexical", LexicalJudgeSection)
def _open_lexical(section: LexicalJudgeSection, context: JudgeContext) -> LexicalJudge:
    if section.vocabulary is None:
        raise InputError(
            "this key is missing from the recipe", f"{context.key}.vocabulary", "Add it; see `esr recipes show`."
        )
    return LexicalJudge.from_file(context.locate(section.vocabulary))


@dataclass(frozen=True)
class _Reading:
    """What was read in one attempt; `shares` are the on-topic shares of its sentences, 0-100."""

    score: float
    shares: tuple[float, ...]
    named: Counter[str]
    degenerate: bool


def _terms(topics: Mapping[str, Sequence[str]]) -> dict[tuple[str, ...], str]:
    terms: dict[tuple[str, ...], str] = {}
    for topic, words in topics.items():
        for term in {tuple(_words(text)): text for text in (topic, *words)}:
            if not term:
                raise InputError(f"the topic {topic!r} has a word without letters", fix="Remove it.")
            if terms.setdefault(term, topic) != topic:
                raise InputError(
                    f"{' '.join(term)!r} belongs to both {terms[term]!r} and {topic!r}",
                    fix="Leave it to one topic.",
                )
    for term, topic in list(terms.items()):
        terms.setdefault((*term[:-1], _plural(term[-1])), topic)
    return terms


def _known(words: Sequence[str] | None, terms: Mapping[tuple[str, ...], str]) -> frozenset[str] | None:
    if words is None:
        return None
    listed = {word for text in words for word in _words(text)}
    return frozenset(listed | {_plural(word) for word in listed} | {word for term in terms for word in term})


def _words(text: str) -> list[str]:
    return _WORD.findall(text.replace("’", "'").lower())


def _plural(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    return word[:-1] + "ies" if re.search("[^aeiou]y$", word) else word + "s"


def _is_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)
