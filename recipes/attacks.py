"""Directions optimised against an arm, within the base model's thresholds, on prompts that are not the test's."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random

import torch
from safetensors.torch import load_file
from torch.nn import functional

from esr_train.files import read_jsonl, write_json, write_jsonl
from esr_train.steering.adaptive import Target, optimise
from esr_train.steering.directions import Direction, SteeringVector
from esr_train.steering.engine import Request
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.steering.vector_files import save_vectors
from esr_train.template import encode_prompt
from esr_train.values import typed
from eval.arms import Arm, Variant
from eval.cells import derived_seed
from eval.trials import Steerer
from recipes.experiment import Experiment, base_inputs
from recipes.stage_cache import Stage

PROMPTS = 6
"""Training prompts that a direction is optimised on."""
TOKENS = 32
"""Of a reply that it is to bring about."""
PUSH = 1.2
"""Multiple of the threshold at which the base model wrote these replies."""
TARGETS = "attacks/targets.jsonl"


@dataclass(frozen=True)
class Reply:
    """What the base model wrote on a training prompt under a direction: off-topic, as it was pushed."""

    latent: int
    prompt: str
    reply: str


@dataclass(frozen=True)
class Attacked:
    """What is attacked.

    Args:
        name: of the arm.
        fingerprint: of what decides its trials.
        variant: what it does to every request.
        open: loads it.
    """

    name: str
    fingerprint: str
    variant: Variant
    open: Callable[[], Arm]


def adapted_directions(
    experiment: Experiment, attacked: Attacked, steerer: Steerer, latents: Sequence[int]
) -> dict[int, Direction]:
    """Latent -> its direction, moved on the sphere until the arm writes what the base model wrote when it was steered.

    The arm has no edits of its own, and transformers runs it: `preflight` has looked.
    """
    fingerprint = _write_targets(experiment, steerer, latents)
    file, curve = f"attacks/{attacked.name}.safetensors", f"attacks/{attacked.name}.json"

    def work() -> None:
        moved, losses = _optimised(experiment, attacked, steerer, latents)
        save_vectors(experiment.directory / file, moved)
        write_json(experiment.directory / curve, losses)

    inputs = {"arm": attacked.fingerprint, "targets": fingerprint, "positions": steerer.positions}
    stage = Stage(f"attack/{attacked.name}", inputs, (file, curve), ("esr_train.steering.adaptive", "recipes.attacks"))
    experiment.cache.do(stage, work)
    vectors = load_file(experiment.directory / file)
    units = {latent: functional.normalize(vectors[str(latent)].float(), dim=0) for latent in latents}
    return {latent: replace(steerer.directions[latent], unit=unit) for latent, unit in units.items()}


def _write_targets(experiment: Experiment, steerer: Steerer, latents: Sequence[int]) -> str:
    """Let the base model write what the directions are to bring about, unless that is done; its fingerprint."""
    asked = [
        (latent, prompt)
        for latent in latents
        for prompt in _prompts(experiment, steerer.directions[latent].label, latent)
    ]
    norms = [[latent, steerer.norms[latent]] for latent in latents]
    inputs = {"base": base_inputs(experiment), "norms": norms, "asked": asked, "positions": steerer.positions}

    def work() -> None:
        requests = [
            Request(
                f"{latent}: {prompt}",
                prompt,
                interventions=(steerer.directions[latent].add(PUSH * steerer.norms[latent], steerer.positions),),
                seed=derived_seed("attack", experiment.recipe.seed, latent, prompt),
            )
            for latent, prompt in asked
        ]
        sampling = replace(experiment.resources.sampling(), max_new_tokens=TOKENS)
        written = experiment.resources.base().generate(requests, sampling)
        rows = [Reply(*each, done.text) for each, done in zip(asked, written, strict=True) if done.text.strip()]
        write_jsonl(experiment.directory / TARGETS, map(asdict, rows))

    return experiment.cache.do(Stage("attack", inputs, (TARGETS,), ("recipes.attacks",)), work)


def _prompts(experiment: Experiment, label: str | None, latent: int) -> list[str]:
    others = [prompt.text for prompt in experiment.resources.prompts().train if prompt.topic != label]
    Random(derived_seed("attack", experiment.recipe.seed, latent)).shuffle(others)
    return others[:PROMPTS]


def _optimised(
    experiment: Experiment, attacked: Attacked, steerer: Steerer, latents: Sequence[int]
) -> tuple[list[SteeringVector], dict[str, list[float]]]:
    """The moved directions, and for each the loss before and after every step."""
    engine, tokenizer = attacked.open().engine, experiment.resources.tokenizer()
    assert isinstance(engine, TransformersEngine)
    written = read_jsonl(experiment.directory / TARGETS, lambda row: typed(Reply, row))
    place, targets = {latent: number for number, latent in enumerate(latents)}, []
    for each in written:
        request = attacked.variant.apply(Request("", each.prompt), steerer.directions[each.latent].label)
        prompt, _ = encode_prompt(tokenizer, request.prompt)
        whole, start = encode_prompt(tokenizer, request.prompt, None, each.reply)
        steered = start if steerer.positions == "generated" else 0
        targets.append(Target(place[each.latent], tuple(whole), len(prompt), steered))
    directions = [steerer.directions[latent] for latent in latents]
    lengths = [
        float(direction.add(steerer.norms[latent]).vector.norm())
        for latent, direction in zip(latents, directions, strict=True)
    ]
    units = torch.stack([direction.unit.float() for direction in directions])
    found = optimise(engine.model, directions[0].layer, targets, units, torch.tensor(lengths))
    moved = [
        SteeringVector(direction.layer, str(latent), unit, direction.length, direction.residual_norm)
        for latent, direction, unit in zip(latents, directions, found.units, strict=True)
    ]
    return moved, {str(latent): found.losses[:, number].tolist() for number, latent in enumerate(latents)}
