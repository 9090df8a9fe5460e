"""Labels for latents by what they steer to: the topic that makes steered text likelier than any other does."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from data_gen.latent_naming import LatentLabel
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
TOKENS = 24
"""Most tokens of a steered reply."""
AT_ONCE = 16
"""Latents that are steered together."""


@dataclass(frozen=True)
class Candidate:
    """A latent that may stand for a topic.

    Args:
        latent: its index.
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
        texts: the steered replies.
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
        model: in any wrapper.
        tokenizer: the model's.
        sae: of the model.
        texts: each with its topic.
        left_out: [n_latents] bool, latents that are no candidates.
        count: most candidates.
        rows: texts of one forward pass.

    Raises:
        InputError: if no latent is a candidate.
    """
    chosen: defaultdict[str, list[str]] = defaultdict(list)
    for text, topic in texts:
        if len(chosen[topic]) < PER_TOPIC and text.strip():
            chosen[topic].append(text)
    names = list(chosen)
    owners = torch.tensor([number for number, topic in enumerate(names) for _ in chosen[topic]])
    read = [text for topic in names for text in chosen[topic]]
    if not read:
        raise InputError("there is no text of a topic that is none of the prompts'", "--texts", "Give some.")
    states, frequency = _mean_states(model, tokenizer, sae, read, rows)
    by_topic = torch.zeros(len(names), states.shape[1]).index_add_(0, owners, states)
    by_topic /= owners.bincount(minlength=len(names))[:, None]
    towards = functional.normalize(by_topic - by_topic.mean(dim=0), dim=1)
    cosines = functional.normalize(sae.module.W_dec.detach().float().cpu(), dim=1) @ towards.T
    near = cosines.topk(min(SHORTLIST, len(names)), dim=1)
    order = near.values[:, 0].masked_fill(left_out, -torch.inf).argsort(descending=True)[:count].tolist()
    best = [latent for latent in order if not left_out[latent] and near.values[latent, 0] > 0]
    if not best:
        raise InputError("no latent points to one topic more than to others", "--texts", "Give more of a topic.")
    return [
        Candidate(
            k,
            tuple(names[i] for i in near.indices[k].tolist()),
            round(float(near.values[k, 0]), 4),
            round(float(frequency[k]), 6),
        )
        for k in best
    ]


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

    A reply is about the topic that adds most to its likelihood over a question about nothing (as the likelihood judge
    measures it), if that is at least 0.1 nats a token. A latent is labelled at the weakest strength at which four of
    five replies are about one topic. The others have no label.

    Args:
        engine: on the unsteered model; it must score texts, too.
        sae: of the model.
        norm: the layer's median residual norm.
        candidates: of `find_candidates`.
        prompts: to steer, not about the topics; the first of as many topics as are needed are taken.
        path: file of what was read off; what it has is not made again.
        made_by: JSON value that tells model and SAE from others.
        seed: of the sampling.

    Raises:
        InputError: if no latent can be labelled.
    """
    asked = _of_different_topics(prompts)
    sampling = Sampling(temperature=0.6, max_new_tokens=TOKENS)
    store = RowStore(path, lambda row: typed(Reading, row), _written)
    known = store.by_key()
    labels: dict[int, tuple[Candidate, Reading]] = {}
    for strength in STRENGTHS:
        left = [each for each in candidates if each.latent not in labels]
        key = _keys(made_by, strength, asked, sampling, seed)
        steer = _Steerer(engine, sae, norm, strength, asked, sampling, seed)
        with tqdm(total=len(left), desc=f"steer at {strength}", unit="latent", mininterval=1) as bar:
            for start in range(0, len(left), AT_ONCE):
                part = left[start : start + AT_ONCE]
                read = {each.key: each for each in steer([each for each in part if key(each) not in known], key)}
                store.append(read.items())
                known |= read
                labels |= {each.latent: (each, known[key(each)]) for each in part if known[key(each)].topic}
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


def _keys(
    made_by: Any, strength: float, asked: Sequence[Prompt], sampling: Sampling, seed: int
) -> Callable[[Candidate], str]:
    rest = [made_by, strength, [prompt.text for prompt in asked], asdict(sampling), seed]
    return lambda candidate: digest([candidate.latent, candidate.topics, rest])


@dataclass(frozen=True)
class _Steerer:
    """Steers candidates at one strength and reads off what the replies are about."""

    engine: Engine
    sae: LoadedSae
    norm: float
    strength: float
    asked: Sequence[Prompt]
    sampling: Sampling
    seed: int

    def __call__(self, candidates: Sequence[Candidate], key: Callable[[Candidate], str]) -> Iterator[Reading]:
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
            yield Reading(key(candidate), self.strength, tuple(texts), tuple(about), tuple(nats))

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
        texts = [done.text for done in self.engine.generate(requests, self.sampling)]
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
