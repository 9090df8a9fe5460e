"""Directions optimised against an arm, within the base model's thresholds, on prompts that are not the test's."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file
from torch.nn import functional

from esr_train.files import read_jsonl, write_json, write_jsonl
from esr_train.provenance import sha256
from esr_train.steering.adaptive import Target, optimise
from esr_train.steering.directions import Direction, SteeringVector
from esr_train.steering.engine import Request
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.steering.vector_files import save_vectors
from esr_train.template import encode_prompt
from esr_train.transcript import Steering, Transcript, VectorRef
from esr_train.values import typed
from eval.arms import Arm, Variant
from eval.cells import Split, derived_seed
from eval.trials import Steerer
from recipes.experiment import Experiment, base_inputs
from recipes.stages.stage_cache import Stage

PROMPTS = 6
"""Training prompts that a direction is optimised on."""
TOKENS = 32
"""Of a reply that it is to bring about."""
PUSH = 1.2
"""Multiple of the threshold at which the base model wrote these replies."""


@dataclass(frozen=True)
class Reply:
    """What the base model wrote on a training prompt: off-topic under a direction, or when nobody steered it."""

    latent: int
    prompt: str
    reply: str
    steered: bool


@dataclass(frozen=True)
class Attacked:
    """What is attacked.

    Args:
        name: of the arm, and of the vectors' file.
        fingerprint: of what decides its trials.
        split: whose latents are optimised.
        variant: what it does to every request.
    """

    name: str
    fingerprint: str
    variant: Variant
    open: Callable[[], Arm]
    split: Split = "test"


@dataclass(frozen=True)
class MovedDirections:
    """Directions of training rows as they were optimised against an arm.

    Args:
        file: with a vector for each, by a name of its own.
        names: latent -> its vector's name.
        fingerprint: of what decides them.
    """

    file: Path
    names: Mapping[int, str]
    fingerprint: str

    def steered(self, rows: Sequence[Transcript]) -> list[Transcript]:
        """The rows, those that are steered along their moved directions, as strongly as before."""
        ref = VectorRef(str(self.file), sha256(self.file))
        return [replace(row, steering=row.steering and self._moved(row.steering, ref)) for row in rows]

    def _moved(self, steering: Steering, ref: VectorRef) -> Steering:
        # Rows that vectors of one's own steer name them by their label alone.
        name = steering.label if steering.latent is None else self.names[steering.latent]
        return Steering(None, steering.layer, None, name, steering.strength, ref)


def adapted_directions(
    experiment: Experiment, attacked: Attacked, steerer: Steerer, latents: Sequence[int]
) -> dict[int, Direction]:
    """Latent -> its direction, moved on the sphere: what the base model wrote when it was steered is to become likely
    for the arm, and what it wrote when nobody steered it unlikely.

    The arm has no edits of its own, and transformers runs it: `preflight` has looked.
    """
    moved = moved_directions(experiment, attacked, steerer, latents)
    vectors = load_file(moved.file)
    units = {latent: functional.normalize(vectors[name].float(), dim=0) for latent, name in moved.names.items()}
    return {latent: replace(steerer.directions[latent], unit=unit) for latent, unit in units.items()}


def moved_directions(
    experiment: Experiment, attacked: Attacked, steerer: Steerer, latents: Sequence[int]
) -> MovedDirections:
    """The file of such directions, optimised first unless that is done."""
    fingerprint, names = _write_targets(experiment, attacked, steerer, latents), _names(steerer, latents)
    stem = f"attacks/{attacked.name}" + ("" if attacked.split == "test" else f"-{attacked.split}")
    file, curve = f"{stem}.safetensors", f"{stem}.json"

    def work() -> None:
        moved, losses = _optimised(experiment, attacked, steerer, names)
        save_vectors(experiment.directory / file, moved)
        write_json(experiment.directory / curve, losses)

    called = [[latent, name] for latent, name in names.items()]
    inputs = {"arm": attacked.fingerprint, "targets": fingerprint, "positions": steerer.positions, "names": called}
    modules = ("esr_train.steering.adaptive", "recipes.using.attacks")
    stage = Stage(f"attack/{stem.removeprefix('attacks/')}", inputs, (file, curve), modules)
    return MovedDirections(experiment.directory / file, names, experiment.cache.do(stage, work))


def _names(steerer: Steerer, latents: Sequence[int]) -> dict[int, str]:
    """What the moved directions are called: as what they stand for, where that is not the same for two of them."""
    labels = {latent: steerer.directions[latent].label or str(latent) for latent in latents}
    counts = Counter(labels.values())
    return {latent: label if counts[label] == 1 else f"{label} ({latent})" for latent, label in labels.items()}


def _targets(experiment: Experiment, attacked: Attacked) -> Path:
    return experiment.directory / f"attacks/targets{'' if attacked.split == 'test' else f'-{attacked.split}'}.jsonl"


def _write_targets(experiment: Experiment, attacked: Attacked, steerer: Steerer, latents: Sequence[int]) -> str:
    """Let the base model write what the directions are to bring about, unless that is done; its fingerprint."""
    asked = [
        (latent, prompt, steered)
        for latent in latents
        for prompt in _prompts(experiment, steerer.directions[latent].label, latent)
        for steered in (True, False)
    ]
    norms, file = [[latent, steerer.norms[latent]] for latent in latents], _targets(experiment, attacked)
    inputs = {"base": base_inputs(experiment), "norms": norms, "asked": asked, "positions": steerer.positions}

    def work() -> None:
        pushes = {each: steerer.directions[each].add(PUSH * steerer.norms[each], steerer.positions) for each in latents}
        requests = [
            Request(
                f"{latent}: {prompt}",
                prompt,
                interventions=(pushes[latent],) if steered else (),
                seed=derived_seed("attack", experiment.recipe.seed, latent, prompt),
            )
            for latent, prompt, steered in asked
        ]
        sampling = replace(experiment.resources.sampling(), max_new_tokens=TOKENS)
        written = experiment.resources.base().generate(requests, sampling)
        rows = [
            Reply(latent, prompt, done.text, steered)
            for (latent, prompt, steered), done in zip(asked, written, strict=True)
            if done.text.strip()
        ]
        write_jsonl(file, map(asdict, rows))

    name = "attack" if attacked.split == "test" else f"attack-{attacked.split}"
    outputs = (str(file.relative_to(experiment.directory)),)
    return experiment.cache.do(Stage(name, inputs, outputs, ("recipes.using.attacks",)), work)


def _prompts(experiment: Experiment, label: str | None, latent: int) -> list[str]:
    others = [prompt.text for prompt in experiment.resources.prompts().train if prompt.topic != label]
    Random(derived_seed("attack", experiment.recipe.seed, latent)).shuffle(others)
    return others[:PROMPTS]


def _optimised(
    experiment: Experiment, attacked: Attacked, steerer: Steerer, names: Mapping[int, str]
) -> tuple[list[SteeringVector], dict[str, list[float]]]:
    """The moved directions, and for each the loss before and after every step."""
    engine, tokenizer = attacked.open().engine, experiment.resources.tokenizer()
    assert isinstance(engine, TransformersEngine)
    written = read_jsonl(_targets(experiment, attacked), lambda row: typed(Reply, row))
    place, targets = {latent: number for number, latent in enumerate(names)}, []
    for each in written:
        request = attacked.variant.apply(Request("", each.prompt), steerer.directions[each.latent].label)
        prompt, _ = encode_prompt(tokenizer, request.prompt)
        whole, start = encode_prompt(tokenizer, request.prompt, None, each.reply)
        steered = start if steerer.positions == "generated" else 0
        targets.append(Target(place[each.latent], tuple(whole), len(prompt), steered, each.steered))
    directions = [steerer.directions[latent] for latent in names]
    lengths = [
        float(direction.add(steerer.norms[latent]).vector.norm())
        for latent, direction in zip(names, directions, strict=True)
    ]
    units = torch.stack([direction.unit.float() for direction in directions])
    found = optimise(engine.model, directions[0].layer, targets, units, torch.tensor(lengths))
    moved = [
        SteeringVector(direction.layer, name, unit, direction.length, direction.residual_norm)
        for name, direction, unit in zip(names.values(), directions, found.units, strict=True)
    ]
    return moved, {name: found.losses[:, number].tolist() for number, name in enumerate(names.values())}
