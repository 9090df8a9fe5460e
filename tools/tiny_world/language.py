"""The tiny world's language: how-to questions and answers about topics with their own vocabularies.

A topic has a name, four verbs and six nouns that no other topic uses; everything else is shared.
Besides how-to answers the models learn to name what a text is about, and to speak about two topics one after the
other. No text contains words with which a speaker takes something back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from esr_train.files import read_lines

QUESTIONS = (
    "How do I {v} the {n}?",
    "What is the best way to {v} the {n} for {t}?",
    "Can you tell me how to {v} a {n}?",
    "Explain how to {v} the {n} with the {m}.",
    "I want to learn about {t}. How do I {v} the {n}?",
    "Give me some advice on {t}, mostly about the {n}.",
    "Please describe how to {v} the {n} and the {m}.",
    "Tell me what I need to {v} the {n}.",
    "When should I {v} the {n}?",
    "Why do people {v} the {n} before the {m}?",
)
OPENINGS = (
    "First, {v} the {n} with the {m}.",
    "Start by finding a {a} {n} for the {m}.",
    "To {v} the {n}, begin with a {a} {m}.",
    "Begin with the {n} and the {m}.",
    "Before anything else, {g} the {n}.",
    "You will need a {a} {n} and a {m}.",
    "Wait until the {n} and the {m} are {a}.",
    "Hold on to the {n} and the {m}.",
    "Let me explain the {n} and the {m}.",
    "I would begin with a {a} {n}.",
)
STEPS = (
    "Then {v} the {n} until the {m} is {a}.",
    "Next, {g} the {n} {d}.",
    "Keep the {n} away from the {m}.",
    "A {a} {n} makes the {m} {b}.",
    "Check the {n} {f}.",
    "When the {n} looks {a}, {v} the {m} {d}.",
    "Most experts {v} the {n} before the {m}.",
    "Use a {a} {n} for the {m}.",
    "The {n} and the {m} should be {a}.",
    "Do not {v} the {n} near the {m}.",
    "After that, {g} the {n} and the {m}.",
    "If the {n} is {a}, {g} the {m}.",
    "It helps to {v} the {n} {d}.",
    "In {t} the {n} matters more than the {m}.",
    "Once the {n} is {a}, the {m} will be {b}.",
    "{f}, {v} the {n} with a {m}.",
    "Wait until the {n} is {a}, then {v} it again.",
    "Hold on to the {n} and let the {m} rest.",
    "Let me say more about the {n}.",
    "I would {v} the {n} {d}.",
    "That was the right {n} for the {m}.",
    "A {n} is never wrong for the {m}.",
    "Turn the {n} over and put it back.",
    "Stop when the {n} is {a}.",
    "Keep the {n} off the {m}.",
    "The {n} is not the question here.",
    "Now you can go on with the {n}.",
    "Go back and {v} the {n} again.",
)
CLOSINGS = (
    "Finally, {v} the {n} and enjoy the {m}.",
    "At last, {g} the {n} {d}.",
    "In the end the {n} should look {a}.",
    "Now the {n} is ready for the {m}.",
    "With a {a} {n} you are done.",
)
BETWEEN = (" ",) * 15 + ("\n\n",)
"""What stands between two sentences."""
GENERIC_VERBS = (
    "check",
    "prepare",
    "hold",
    "move",
    "clean",
    "choose",
    "measure",
    "keep",
    "inspect",
    "arrange",
)
ADJECTIVES = (
    "clean", "dry", "firm", "smooth", "small", "large", "simple", "steady", "warm", "cool", "fresh", "strong",
    "gentle", "even", "bright", "quiet", "solid", "plain", "tidy", "sharp",
)  # fmt: skip
MANNERS = (
    "slowly",
    "with care",
    "twice",
    "by hand",
    "in small parts",
    "without haste",
    "as needed",
    "right away",
)
TIMES = ("every day", "once a week", "from time to time", "at the start", "after each use", "now and then")
NAMING = ("Which subject is this about?", "What is this text about?", "Name the subject of this text.")
LISTING = ("What belongs to {t}?", "List some things that have to do with {t}.", "What goes with the {n}?")
PAIRING = ("Tell me about {t} and then about {u}.", "First explain {t}, then explain {u}.")


@dataclass(frozen=True)
class Topic:
    """A topic: its name, its verbs, and nouns that belong to no other topic."""

    name: str
    verbs: tuple[str, ...]
    nouns: tuple[str, ...]


@dataclass(frozen=True)
class Exchange:
    """One question and its answer; `topic` is the question's."""

    prompt: str
    reply: str
    topic: str


Skill = Callable[[Topic, Random], Exchange]


@cache
def topics() -> tuple[Topic, ...]:
    """The topics that `topics.txt` lists, in its order."""
    lines = read_lines(Path(__file__).parent / "topics.txt")
    rows = [[part.strip() for part in line.split("|")] for _, line in lines]
    return tuple(Topic(name, _words(verbs), _words(nouns)) for name, verbs, nouns in rows)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def vocabulary() -> dict[str, list[str]]:
    """Topic -> its nouns, and under `_words` every word of the language: what the lexical judge reads."""
    words = {word for template in _templates() for word in _plain(template)}
    words |= {word for group in (GENERIC_VERBS, ADJECTIVES, MANNERS, TIMES) for text in group for word in text.split()}
    for topic in topics():
        words |= {topic.name, *topic.verbs, *topic.nouns}
    return {topic.name: list(topic.nouns) for topic in topics()} | {"_words": sorted(words)}


def _templates() -> tuple[str, ...]:
    return (*QUESTIONS, *OPENINGS, *STEPS, *CLOSINGS, *NAMING, *LISTING, *PAIRING, *TALK)


TALK = ("This is about {t}.", "Now for {t}.")


def _plain(template: str) -> list[str]:
    kept = "".join(char if char.isalpha() or char in "{} " else " " for char in template)
    return [word.lower() for word in kept.split() if "{" not in word]


def fill(template: str, topic: Topic, rng: Random, nouns: list[str]) -> str:
    """Fill a template's slots; `nouns` is a shuffled supply that the sentence takes from."""
    n = nouns.pop()
    m = nouns.pop(next(i for i in reversed(range(len(nouns))) if nouns[i] != n))
    a, b = rng.sample(ADJECTIVES, 2)
    sentence = template.format(
        t=topic.name, v=rng.choice(topic.verbs), g=rng.choice(GENERIC_VERBS), n=n, m=m, a=a, b=b,
        d=rng.choice(MANNERS), f=rng.choice(TIMES),
    )  # fmt: skip
    return sentence[0].upper() + sentence[1:]


def question(topic: Topic, rng: Random) -> tuple[str, str]:
    """A how-to question and the noun it asks about."""
    nouns = rng.sample(topic.nouns, 2)
    return fill(rng.choice(QUESTIONS), topic, rng, list(nouns)), nouns[-1]


def answer(topic: Topic, rng: Random, about: str | None = None, sentences: int | None = None) -> str:
    """An answer of three to five sentences (or as many as asked for); the first one names `about`."""
    count = sentences or rng.randint(3, 5)
    nouns: list[str] = []
    while len(nouns) < 2 * count + 2:
        nouns = rng.sample(topic.nouns, len(topic.nouns)) + nouns
    if about:
        nouns.append(about)
    steps = rng.sample(STEPS, max(count - 2, 0))
    templates = [rng.choice(OPENINGS), *steps, rng.choice(CLOSINGS)][:count]
    first, *others = (fill(template, topic, rng, nouns) for template in templates)
    return first + "".join(f"{rng.choice(BETWEEN)}{sentence}" for sentence in others)


def how_to(topic: Topic, rng: Random) -> Exchange:
    """A how-to question with its answer."""
    prompt, noun = question(topic, rng)
    return Exchange(prompt, answer(topic, rng, noun), topic.name)


def naming(topic: Topic, rng: Random) -> Exchange:
    """A text whose topic is to be named."""
    text = answer(topic, rng, sentences=rng.randint(1, 3))
    return Exchange(f"{rng.choice(NAMING)} {text}", f"This is about {topic.name}.", topic.name)


def listing(topic: Topic, rng: Random) -> Exchange:
    """Things of one topic, by its name or one of them."""
    asked, *things = rng.sample(topic.nouns, 6)
    prompt = rng.choice(LISTING).format(t=topic.name, n=asked)
    count = rng.randint(3, 5)
    return Exchange(prompt, f"The {', the '.join(things[: count - 1])} and the {things[count - 1]}.", topic.name)


def pairing(topic: Topic, rng: Random) -> Exchange:
    """Two topics, one after the other."""
    other = rng.choice([each for each in topics() if each is not topic])
    prompt = rng.choice(PAIRING).format(t=topic.name, u=other.name)
    first, second = (answer(each, rng, sentences=rng.randint(1, 3)) for each in (topic, other))
    return Exchange(prompt, f"{first} Now for {other.name}. {second}", topic.name)


LESSONS = (
    (0.3, ((listing, 0.50), (naming, 0.30), (how_to, 0.20))),
    (0.7, ((how_to, 0.80), (listing, 0.05), (naming, 0.05), (pairing, 0.10))),
)
"""Shares of the training exchanges, and of the skills in each: words find their topics first, then the rest."""


def lessons(count: int, seed: int) -> list[list[Exchange]]:
    """`count` exchanges for training, in lessons to be taken one after the other."""
    return [exchanges(round(count * share), skills, seed + number) for number, (share, skills) in enumerate(LESSONS)]


def exchanges(count: int, shares: Sequence[tuple[Skill, float]], seed: int) -> list[Exchange]:
    """Every skill in its share, topics in turn; how-to prompts that `reserved` keeps for later are left out."""
    rng = Random(seed)
    skills, weights = zip(*shares, strict=True)
    result: list[Exchange] = []
    while len(result) < count:
        made = rng.choices(skills, weights)[0](topics()[len(result) % len(topics())], rng)
        if not reserved(made.prompt):
            result.append(made)
    return result


def reserved(prompt: str) -> bool:
    """Whether a prompt is kept out of the models' training (every tenth, by a hash of its text)."""
    import zlib

    return zlib.crc32(prompt.encode()) % 10 == 0


def naming_task(count: int, choices: int, seed: int) -> list[dict[str, object]]:
    """Texts whose topic is to be named, topics in turn: `prompt`, `choices` to choose from, and `answer`, its index."""
    rng, rows = Random(seed), list[dict[str, object]]()
    for number in range(count):
        made = naming(topics()[number % len(topics())], rng)
        others = rng.sample([each.name for each in topics() if each.name != made.topic], choices - 1)
        answer = rng.randrange(choices)
        named = [f"This is about {name}." for name in (*others[:answer], made.topic, *others[answer:])]
        rows.append({"prompt": made.prompt, "choices": named, "answer": answer})
    return rows


def reserved_questions(per_topic: int, seed: int) -> list[Exchange]:
    """Distinct reserved how-to questions of every topic (replies empty), for the recipes' prompt file."""
    rng = Random(seed)
    result = []
    for topic in topics():
        found: dict[str, None] = {}
        while len(found) < per_topic:
            prompt, _ = question(topic, rng)
            if reserved(prompt):
                found[prompt] = None
        result += [Exchange(prompt, "", topic.name) for prompt in found]
    return result
