"""Labels for latents by what they steer to: the topic that makes steered text likelier than any other does."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from data_gen.latents.latent_naming import LatentLabel
from esr_train.errors import InputError
from esr_train.provenance import digest
from esr_train.steering.directions import ENCODED_AT_ONCE, LoadedSae
from esr_train.steering.engine import Engine, Request, Sampling
from esr_train.steering.readout import hidden_states
from esr_train.values import typed
from eval.cells import Prompt, derived_seed
from eval.judging.likelihood import ABOUT, NEUTRAL, log_probabilities
from eval.store import RowStore

PER_TOPIC = 8
"""Texts of a topic that are read."""
SHORTLIST = 6
"""Topics that are compared: those to whose texts a latent's direction points most."""
STRENGTHS = (0.25, 0.4, 0.6)
"""In residual norms, weakest first: the thresholds of most directions lie among them."""
PROMPTS = 5
AGREEING = 4
"""So many of the steered replies must be about the same topic; by chance 2 % of latents would reach that."""
LEAST = 0.1
"""Nats a token that a topic must add to be what a text is about; replies to a question have 0.45 to 1."""
SAMPLING = Sampling(temperature=0.6, max_new_tokens=24)
"""Of the steered replies."""
AT_ONCE = 16
"""Latents that are steered together."""


@dataclass(frozen=True)
class Candidate:
    """A latent that may stand for a topic.

    Args:
        topics: those that its decoder row points to most, nearest first.
        cosine: of the decoder row to the first of them: to the mean state of the topic's texts less that of all topics.
        frequency: share of all tokens on which it is active.
    """

    latent: int
    topics: tuple[str, ...]
    cosine: float
    frequency: float


@dataclass(frozen=True)
class Reading:
    """What replies under one latent at one strength are about.

    Args:
        key: unique; from all that decides them.
        strength: in residual norms.
        about: the topic of each; None where no topic makes it likelier.
        nats: a token, that the topic adds to each.
    """

    key: str
    strength: float
    texts: tuple[str, ...]
    about: tuple[str | None, ...]
    nats: tuple[float, ...]

    @property
    def topic(self) -> str | None:
        """What most of the texts are about, if enough are."""
        counts = Counter(topic for topic in self.about if topic)
        topic, count = counts.most_common(1)[0] if counts else (None, 0)
        return topic if count >= AGREEING else None


def find_candidates(
    model: Any,
    tokenizer: Any,
    sae: LoadedSae,
    texts: Sequence[tuple[str, str]],
    left_out: torch.Tensor,
    count: int,
    rows: int = 1,
) -> list[Candidate]:
    """The latents that point most to the texts of one topic, nearest first.

    What a latent reads says little about where it steers: on SmolLM2, of 150 latents that are active on one topic's
    texts more than on others', none led replies to a topic that could be named.

    Args:
        texts: each with its topic.
        left_out: [n_latents] bool, latents that are no candidates.
        rows: texts of one forward pass.

    Raises:
        InputError: if no latent is a candidate.
    """
    chosen: defaultdict[str, list[str]] = defaultdict(list)
    for text, topic in texts:
        if len(chosen[topic]) < PER_TOPIC and text.strip():
            chosen[topic].append(text)
    if not chosen:
        raise InputError("there is no text of a topic that is none of the prompts'", "--texts", "Give some.")
    towards, frequency = _topic_directions(model, tokenizer, sae, list(chosen.values()), rows)
    cosines = functional.normalize(sae.module.W_dec.detach().float().cpu(), dim=1) @ towards.T
    near = cosines.topk(min(SHORTLIST, len(chosen)), dim=1)
    order = near.values[:, 0].masked_fill(left_out, -torch.inf).argsort(descending=True)[:count].tolist()
    best = [latent for latent in order if not left_out[latent] and near.values[latent, 0] > 0]
    if not best:
        raise InputError("no latent points to one topic more than to others", "--texts", "Give more of a topic.")
    topics = [tuple(list(chosen)[i] for i in near.indices[latent].tolist()) for latent in best]
    values = [(round(float(near.values[latent, 0]), 4), round(float(frequency[latent]), 6)) for latent in best]
    return [Candidate(*each) for each in zip(best, topics, *zip(*values, strict=True), strict=True)]


def _topic_directions(
    model: Any, tokenizer: Any, sae: LoadedSae, texts: Sequence[Sequence[str]], rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each topic's mean state lies from that of all topics, [topics, d_model], and the latents' frequency."""
    states, frequency = _mean_states(model, tokenizer, sae, [text for of_topic in texts for text in of_topic], rows)
    by_topic = torch.stack([of_topic.mean(dim=0) for of_topic in states.split([len(each) for each in texts])])
    return functional.normalize(by_topic - by_topic.mean(dim=0), dim=1), frequency


def _mean_states(
    model: Any, tokenizer: Any, sae: LoadedSae, texts: Sequence[str], rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean state of each text, [texts, d_model], and the share of tokens that each latent is active on."""
    means, active, tokens = [], torch.zeros(sae.n_latents), 0
    states = hidden_states(model, tokenizer, texts, sae.layer, rows)
    for hidden in tqdm(states, total=len(texts), desc="read texts", unit="text", mininterval=1):
        for part in hidden.split(ENCODED_AT_ONCE):
            active += (sae.encode(part).cpu() != 0).sum(dim=0)
        means.append(hidden.float().mean(dim=0).cpu())
        tokens += len(hidden)
    return torch.stack(means), active / max(tokens, 1)


def label_by_steering(
    engine: Engine,
    sae: LoadedSae,
    norm: float,
    candidates: Sequence[Candidate],
    prompts: Sequence[Prompt],
    path: Path,
    made_by: Any,
    seed: int,
) -> list[LatentLabel]:
    """Steer each candidate on a few prompts and label it with what the replies are about; surest first.

    A reply is about the topic that adds most to its likelihood over a question about nothing, if that is at least 0.1
    nats a token. A latent is labelled at the weakest strength at which four of five replies are about one topic.

    Args:
        engine: on the unsteered model; it must score texts, too.
        norm: the layer's median residual norm.
        prompts: to steer, not about the topics; the first of as many topics as are needed are taken.
        path: file of what was read off; what it has is not made again.
        made_by: JSON value that tells model and SAE from others.

    Raises:
        InputError: if no latent can be labelled.
    """
    store = RowStore(path, lambda row: typed(Reading, row), _written)
    labels: dict[int, tuple[Candidate, Reading]] = {}
    for strength in STRENGTHS:
        left = [each for each in candidates if each.latent not in labels]
        steer = _Steerer(engine, sae, norm, strength, _of_different_topics(prompts), made_by, seed)
        with tqdm(total=len(left), desc=f"steer at {strength}", unit="latent", mininterval=1) as bar:
            for start in range(0, len(left), AT_ONCE):
                part = left[start : start + AT_ONCE]
                read = zip(part, steer.readings(part, store), strict=True)
                labels |= {each.latent: (each, reading) for each, reading in read if reading.topic}
                bar.update(len(part))
                bar.set_postfix_str(f"{len(labels)} labelled")
    if not labels:
        raise InputError("no latent steers to a topic of the texts", "--texts", "Is this SAE the model's own?")
    return [_label(*each) for each in sorted(labels.values(), key=lambda each: -sum(each[1].nats))]


def _of_different_topics(prompts: Sequence[Prompt]) -> list[Prompt]:
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.topic, prompt)
    return list(first.values())[:PROMPTS]


@dataclass(frozen=True)
class _Steerer:
    """Steers candidates at one strength and reads off what the replies are about."""

    engine: Engine
    sae: LoadedSae
    norm: float
    strength: float
    asked: Sequence[Prompt]
    made_by: Any
    seed: int

    def readings(self, candidates: Sequence[Candidate], store: RowStore[Reading]) -> list[Reading]:
        """One of each candidate, in order: the store's, and for those it lacks new ones, which it then has."""
        known = store.by_key()
        new = self._new([each for each in candidates if self._key(each) not in known])
        read = {reading.key: reading for reading in new}
        store.append(read.items())
        return [(known | read)[self._key(each)] for each in candidates]

    def _key(self, candidate: Candidate) -> str:
        asked = [prompt.text for prompt in self.asked]
        rest = [self.made_by, self.strength, asked, asdict(SAMPLING), self.seed]
        return digest([candidate.latent, candidate.topics, rest])

    def _new(self, candidates: Sequence[Candidate]) -> Iterator[Reading]:
        if not candidates:
            return
        replies = self._replies(candidates)
        added = self._information(candidates, replies)
        for candidate, texts in zip(candidates, replies, strict=True):
            about: list[str | None] = []
            nats = []
            for text in texts:
                best = max(candidate.topics, key=lambda topic: added.get((topic, text), 0.0))
                value = added.get((best, text), 0.0)
                about.append(best if value >= LEAST else None)
                nats.append(round(value, 4))
            yield Reading(self._key(candidate), self.strength, tuple(texts), tuple(about), tuple(nats))

    def _replies(self, candidates: Sequence[Candidate]) -> list[list[str]]:
        requests = [
            Request(
                f"{candidate.latent}/{number}",
                prompt.text,
                interventions=(self.sae.direction(candidate.latent, self.norm).add(self.strength),),
                seed=derived_seed(self.seed, candidate.latent, number),
            )
            for candidate in candidates
            for number, prompt in enumerate(self.asked)
        ]
        texts = [done.text for done in self.engine.generate(requests, SAMPLING)]
        return [texts[start : start + len(self.asked)] for start in range(0, len(texts), len(self.asked))]

    def _information(
        self, candidates: Sequence[Candidate], replies: Sequence[Sequence[str]]
    ) -> dict[tuple[str, str], float]:
        """(Topic, reply) -> nats a token that a question about the topic adds to the reply."""
        pairs = [
            (topic, text)
            for candidate, texts in zip(candidates, replies, strict=True)
            for text in texts
            if text.strip()
            for topic in candidate.topics
        ]
        asked = [(ABOUT.format(label=t), text) for t, text in pairs] + [(NEUTRAL, text) for _, text in pairs]
        found = log_probabilities(self.engine, asked)
        mean = {pair: sum(values) / len(values) for pair, values in found.items()}
        return {(t, text): mean[ABOUT.format(label=t), text] - mean[NEUTRAL, text] for t, text in pairs}


def _label(candidate: Candidate, reading: Reading) -> LatentLabel:
    topic = reading.topic
    assert topic is not None
    examples = tuple(text for text, about in zip(reading.texts, reading.about, strict=True) if about == topic)
    return LatentLabel(candidate.latent, topic, candidate.frequency, examples, strength=reading.strength)


def _written(reading: Reading) -> dict[str, Any]:
    return {name: value for name, value in asdict(reading).items() if name != "key"}
