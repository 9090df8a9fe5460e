"""Which latents notice: replies of the base model, read by an SAE in two contrasts, searched and reported."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray

from data_gen.latents.latent_naming import excerpt
from data_gen.sources import SteerableLatent
from esr_train.errors import InputError
from esr_train.recipe import Recipe
from esr_train.steering.directions import LoadedSae
from esr_train.steering.engine import Request
from esr_train.steering.token_reading import Activations, Reader, peak_activations
from eval.cells import Prompt, derived_seed
from eval.detectors import Classes, Detectors, DetectorSet, Dictionary, find, read_detectors, write_detectors
from eval.report.detector_figures import search_figure, search_table
from eval.report.drawing import save_figures
from recipes.experiment import Experiment, base_inputs, open_experiment, read_inputs
from recipes.planning.preflight import check
from recipes.stages.base_replies import kept_replies
from recipes.stages.stage_cache import Stage
from recipes.stages.steering_latents import Calibrated, Latents, calibrate_base, choose_latents

FOLDER = "detectors"
"""In a run directory."""
FOUND = f"{FOLDER}/detectors.json"
SEARCHED, HELD_OUT = 200, 100
"""Prompts of training topics on which latents are chosen, and of test topics on which they are reported, at most."""


@dataclass(frozen=True)
class Case:
    """A reply that is read behind its own prompt, behind one of another topic, and under steering.

    Args:
        own, other: unsteered requests for the two prompts.
        reply: token ids of the own one's.
        steering: at its threshold; None where the recipe steers with nothing.
    """

    own: Request
    other: Request
    reply: tuple[int, ...]
    steering: SteerableLatent | None


def search(recipe: Recipe) -> list[str]:
    """Search, or take what was found before; returns the lines of the table.

    Raises:
        InputError: for a recipe that cannot work, or replies that are too few.
    """
    if recipe.vectors or (recipe.sae and recipe.sae.labels):
        check(recipe)  # without directions to steer with there is still the first contrast, but no whole experiment
    with open_experiment(recipe) as experiment:
        latents = choose_latents(experiment)
        steers = bool(latents.in_order())
        calibrated = calibrate_base(experiment, latents) if steers else None
        found = find_detectors(experiment, latents, calibrated)
        return [*search_table(found), f"{experiment.directory / FOLDER}: detectors.json, detectors.csv, detectors.svg"]


def find_detectors(experiment: Experiment, latents: Latents, calibrated: Calibrated | None) -> Detectors:
    """The detectors of both contrasts; the second needs thresholds to steer at."""
    path = experiment.directory / FOUND
    inputs = {
        "base": base_inputs(experiment),
        "read": read_inputs(experiment),
        "calibration": calibrated.fingerprint if calibrated else None,
        "latents": latents.fingerprint,
        "splits": experiment.resources.prompt_section().splits.model_dump(),
        "prompts": [SEARCHED, HELD_OUT],
        "seed": experiment.recipe.seed,
    }

    def work() -> None:
        found = _found(experiment, calibrated)
        save_figures(path.parent, [search_figure(found)])
        write_detectors(path, found)

    modules = ("recipes.noticing.latent_search", "eval.detectors", "esr_train.steering.token_reading")
    experiment.cache.do(Stage(FOLDER, inputs, (FOLDER, FOUND), modules), work)
    return read_detectors(path)


def known_detectors(experiment: Experiment) -> Detectors | None:
    """The detectors that a search has found in this run; None before it."""
    path = experiment.directory / FOUND
    return read_detectors(path) if path.is_file() else None


def _found(experiment: Experiment, calibrated: Calibrated | None) -> Detectors:
    pools, sae = experiment.resources.prompts(), experiment.resources.read_sae()
    steerable = calibrated.steerable if calibrated else {"train": (), "test": ()}
    searched = _cases(experiment, pools.train, SEARCHED, steerable["train"])
    held = _cases(experiment, pools.test, HELD_OUT, steerable["test"])
    cases, border = [*searched, *held], len(searched)
    kinds = ["own", "other", *(["steered"] if all(case.steering for case in cases) else [])]
    with _matrix(experiment.directory / FOLDER, (len(kinds), len(cases), sae.n_latents)) as peaks:
        frequencies = [_read(experiment, cases, kind, sae, peaks[number]) for number, kind in enumerate(kinds)]
        dictionary = Dictionary(frequencies[0], sae.decoder_norms().double().numpy(), partial(_decoder_rows, sae))
        sets = []
        for number, contrast in enumerate(("off_topic", "steered")[: len(kinds) - 1], start=1):
            chosen_on = Classes(peaks[0, :border], peaks[number, :border])
            held_out = Classes(peaks[0, border:], peaks[number, border:])
            found = find(contrast, chosen_on, held_out, dictionary, experiment.recipe.seed)
            sets.append(_named(experiment, found, searched, kinds[number], peaks[number, :border]))
    return Detectors(sae.ref.release, sae.ref.id, sae.layer, tuple(sets))


def _decoder_rows(sae: LoadedSae, latents: Sequence[int]) -> NDArray[np.float64]:
    return torch.stack([sae.row(latent) for latent in latents]).double().cpu().numpy()


def pairs(prompts: Sequence[Prompt], most: int, seed: int) -> list[tuple[Prompt, Prompt]]:
    """At most `most` prompts, drawn by the seed, each with another one of another topic; every one is used once.

    Raises:
        InputError: if one topic has more than half of the prompts, so that not all can be paired.
    """
    drawn = Random(seed).sample(list(prompts), min(most, len(prompts)))
    drawn.sort(key=lambda prompt: prompt.topic)
    topics = [prompt.topic for prompt in drawn]
    step = max((topics.count(topic) for topic in set(topics)), default=0)
    if 2 * step > len(drawn):
        raise InputError(
            f"{len(drawn)} prompts of {len(set(topics))} topics cannot be paired with prompts of other topics",
            "prompts",
            "Give prompts of more topics, or a larger prompts.splits.test.",
        )
    return [(prompt, drawn[(place + step) % len(drawn)]) for place, prompt in enumerate(drawn)]


def _cases(
    experiment: Experiment, prompts: Sequence[Prompt], most: int, steerable: Sequence[SteerableLatent]
) -> list[Case]:
    """Replies with what each is read behind and under; an empty one is left out."""
    seed = experiment.recipe.seed
    paired = pairs(prompts, most, seed)
    asked = {
        prompt.text: Request(prompt.text, prompt.text, seed=derived_seed("own", seed, prompt.text))
        for prompt, _ in paired
    }
    replies = kept_replies(experiment, experiment.directory / FOLDER / "replies.jsonl", asked)
    cases = []
    for place, (prompt, other) in enumerate(paired):
        others = [latent for latent in steerable if latent.direction.label != prompt.topic]
        steering = others[derived_seed("steers", seed, place) % len(others)] if others else None
        own, behind = Request(prompt.text, prompt.text), Request(other.text, other.text)
        cases += [Case(own, behind, replies[prompt.text], steering)] if replies[prompt.text] else []
    # Replies of like lengths are read together.
    return sorted(cases, key=lambda case: len(case.reply))


@contextmanager
def _matrix(folder: Path, shape: tuple[int, int, int]) -> Iterator[NDArray[np.float32]]:
    """Room for the peaks of every latent, on disk: of a wide SAE it would fill the memory. Gone when the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        yield np.memmap(file, np.float32, "w+", shape=shape)


def _read(
    experiment: Experiment, cases: Sequence[Case], kind: str, sae: LoadedSae, peaks: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Fill in the peaks of one kind of reading; returns how often each latent is active."""
    replies = [case.reply for case in cases]
    asked = _asked(experiment, cases, kind)
    return peak_activations(_reader(experiment), asked, replies, sae, peaks, f"{kind} replies")


def _asked(experiment: Experiment, cases: Sequence[Case], kind: str) -> list[Request]:
    """What replies are read behind: the own prompt, another one, or the own one under steering."""
    if kind != "steered":
        return [case.other if kind == "other" else case.own for case in cases]
    positions = experiment.recipe.engine.positions
    adds = [case.steering.direction.add(case.steering.threshold, positions) for case in cases if case.steering]
    return [replace(case.own, interventions=(add,)) for case, add in zip(cases, adds, strict=True)]


def _reader(experiment: Experiment) -> Reader:
    engine = experiment.resources.base()
    assert isinstance(engine, Reader)
    return engine


def _named(
    experiment: Experiment, found: DetectorSet, cases: Sequence[Case], kind: str, peaks: NDArray[np.float32]
) -> DetectorSet:
    """With names: a latent's label, or where it is most active in the reply that it is most active on."""
    labels, sae = experiment.resources.read_labels(), experiment.resources.read_sae()
    unnamed = [latent for latent in found.chosen if latent not in labels]
    top = [cases[int(peaks[:, latent].argmax())] for latent in unnamed]
    asked, replies = _asked(experiment, top, kind), [case.reply for case in top]
    read = _reader(experiment).read(asked, replies, [Activations(sae, tuple(unnamed))])
    names = dict(labels)
    for number, ((activations,), reply) in enumerate(zip(read, replies, strict=True)):
        token = int(activations[:, number].argmax())
        names[unnamed[number]] = " ".join(excerpt(experiment.resources.tokenizer(), reply, token).split())
    detectors = tuple(replace(detector, name=names[detector.latent]) for detector in found.detectors)
    return replace(found, detectors=detectors)
