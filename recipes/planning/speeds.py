"""How fast a recipe's work goes: as its stages have recorded it, a small trial run shows, or a device's figures say."""

import math
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data_gen.collect import KEPT, TRIMMED
from esr_train.files import read_json, write_json
from esr_train.models import load_model
from esr_train.provenance import digest
from esr_train.recipe import Recipe
from esr_train.steering.engine import Request
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.training.settings import decoder_only, lora_config, trainer_arguments
from recipes.planning.machine import Device
from recipes.planning.sizes import ROWS, ModelSize, checkpoints_gradients
from recipes.resources import Resources
from recipes.stages.stage_cache import StageCache

FILE = "speeds.json"
"""In the folder of runs: what trial runs have shown, by what decides it."""
LONGEST = 60.0
"""Seconds that a trial run may generate; where whole replies would take longer, it writes a few tokens of each."""
FEW = 8
"""Tokens of the replies with which a trial run begins."""
ROW = 128
"""Tokens of the rows on which a trial run trains."""
USED = {"read": 0.29, "rows": 0.19, "packed": 0.29}
"""Share of its peak that a device reaches: reading texts, training on rows of like length, on packed ones. Measured at
the shape of Llama-3.1-8B on an H200 (benchmarks/results/gpu.md); reading is taken to be like packed training."""
DECODING = {"transformers": (0.25, 0.7e-3), "vllm": (0.4, 0.05e-3)}
"""The same share while rows generate, all that grows with them included, and seconds that a decoder layer takes for one
more token however few they are: kernels are launched. Ours is measured there with 32 to 512 rows, vLLM's a guess."""


@dataclass(frozen=True)
class Pace:
    """What stages of one kind have recorded: tokens of a response, and seconds for one, judging included."""

    tokens: float
    seconds: float


@dataclass(frozen=True)
class Speeds:
    """Seconds a token.

    Args:
        source: where they come from, in words.
        generate, read, train: seconds a token.
        reply: tokens of a reply that nobody steers.
        paces: of kinds of responses that stages have recorded; they go before `generate`.
        kept: share of candidates that were kept, by source.
    """

    source: str
    generate: float
    read: float
    train: float
    reply: float
    paces: Mapping[str, Pace] = field(default_factory=dict)
    kept: Mapping[str, float] = field(default_factory=dict)

    def pace(self, kind: str) -> Pace | None:
        """The pace of a kind, or of others that are like it."""
        group = kind.partition("/")[0]
        alike = [pace for name, pace in self.paces.items() if name.partition("/")[0] == group]
        return self.paces.get(kind) or (alike[-1] if group == "trials" and alike else None)


def recorded(recipe: Recipe, otherwise: Speeds) -> Speeds:
    """What the run's own stages have recorded, in place of other speeds."""
    folders = [recipe.directory, *(recipe.directory / f"seed-{seed}" for seed in recipe.seeds or ())]
    paces = _paces([folder for folder in folders if folder.is_dir()])
    train = list(_training_speeds(folders))
    if not paces and not train:
        return otherwise
    seconds = statistics.median(pace.seconds for pace in paces.values()) if paces else otherwise.generate
    unsteered = paces.get("trials/unsteered") or paces.get("data/normal")
    return replace(
        otherwise,
        source=f"recorded by this run's stages; of others, {otherwise.source}",
        generate=seconds,
        train=1 / statistics.median(train) if train else otherwise.train,
        reply=unsteered.tokens if unsteered else otherwise.reply,
        paces=paces,
        kept=_kept(recipe.directory),
    )


def _paces(folders: Iterable[Path]) -> dict[str, Pace]:
    sums: dict[str, list[float]] = {}
    for folder in folders:
        for name, record in StageCache(folder).records().items():
            made = record.get("made", {})
            told = made.get("generated", {})
            if told.get("tokens"):
                new = (told["requests"], told["tokens"], made["seconds"])
                sums[_kind(name)] = [a + b for a, b in zip(sums.get(_kind(name), [0, 0, 0]), new, strict=True)]
    return {kind: Pace(tokens / requests, seconds / tokens) for kind, (requests, tokens, seconds) in sums.items()}


def _kind(stage: str) -> str:
    """`data/sources/steered-1a2b` -> `data/steered`, `trials/tuned/boost_x2` -> `trials/boost_x2`."""
    first, _, rest = stage.partition("/")
    if first == "data":
        return f"data/{rest.removeprefix('sources/').rpartition('-')[0]}"
    return f"trials/{rest.rpartition('/')[2]}" if first == "trials" else first


def _training_speeds(folders: Iterable[Path]) -> Iterable[float]:
    for folder in folders:
        for file in folder.glob("adapter/*/training_log.json"):
            yield from (entry["tokens_per_second"] for entry in read_json(file) if entry.get("tokens_per_second"))


def _kept(folder: Path) -> dict[str, float]:
    shares = {}
    for file in folder.glob("data/sources/*.funnel.json"):
        funnel: dict[str, int] = read_json(file)
        kept = funnel.get(KEPT, 0) + funnel.get(TRIMMED, 0)
        if kept:
            shares[file.name.rpartition("-")[0]] = kept / sum(funnel.values())
    return shares


def tried(resources: Resources, device: Device) -> Speeds:
    """What a small trial run on this machine shows, or showed when the same was tried before."""
    recipe = resources.recipe
    args = trainer_arguments(recipe)
    decides = [recipe.model.model_dump(), recipe.engine.batch_rows, recipe.sampling.model_dump(), recipe.train.lora]
    key = digest([*decides, device.name, args.per_device_train_batch_size, checkpoints_gradients(recipe)])
    file = Path(recipe.runs) / FILE
    known: dict[str, Any] = read_json(file) if file.is_file() else {}
    if key not in known:
        found = asdict(_try_out(resources))
        known[key] = {name: found[name] for name in ("generate", "read", "train", "reply")}
        write_json(file, known)
        return Speeds(f"a trial run of {recipe.engine.batch_rows or ROWS} replies just now", **known[key])
    return Speeds(f"an earlier trial run on this machine ({file})", **known[key])


def _try_out(resources: Resources) -> Speeds:
    recipe, rows = resources.recipe, resources.recipe.engine.batch_rows or ROWS
    with torch.random.fork_rng():
        model, tokenizer = load_model(recipe.model), resources.tokenizer()
        engine = TransformersEngine(model, tokenizer, batch_rows=recipe.engine.batch_rows)
        pool = resources.prompts().normal if recipe.prompts else ()
        texts = [prompt.text for prompt in pool] or ["How do you fold a fitted sheet?"]
        requests = [Request(str(number), texts[number % len(texts)], seed=number) for number in range(rows)]
        sampling, most = resources.sampling(), recipe.sampling.max_new_tokens
        made, seconds = _timed(lambda: engine.generate(requests, replace(sampling, max_new_tokens=min(FEW, most))))
        is_whole = seconds * most / FEW < LONGEST
        if is_whole:
            made, seconds = _timed(lambda: engine.generate(requests, sampling))
        tokens = sum(len(each.token_ids) for each in made)
        _, reading = _timed(lambda: engine.log_probabilities(requests, [each.text or "yes" for each in made]))
        training = _try_training(recipe, model) if recipe.trained_arms else 0.0
    return Speeds("", seconds / tokens, reading / tokens, training, tokens / rows if is_whole else float(most))


def _timed(work: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def _try_training(recipe: Recipe, model: Any) -> float:
    """Seconds a token of a forward and a backward pass through the model with an adapter; the model is used up."""
    from peft import get_peft_model

    section = recipe.for_arm(recipe.trained_arms[0])
    if checkpoints_gradients(section):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    tuned = get_peft_model(model, decoder_only(lora_config(section), model)).train()
    rows = trainer_arguments(section).per_device_train_batch_size
    ids = torch.randint(min(1000, model.config.get_text_config().vocab_size), (rows, ROW), device=model.device)

    def step() -> None:
        tuned(input_ids=ids, labels=ids).loss.backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    step()
    return _timed(step)[1] / ids.numel()


def by_figures(recipe: Recipe, size: ModelSize, device: Device, prompt: float) -> Speeds:
    """By a device's operations and bandwidth; estimates, for machines on which nothing was tried.

    A step of generation reads all weights and every row's keys and values once; reading a token takes two operations a
    parameter, training LoRA four, and two more with gradient checkpointing (Kaplan et al. 2020, section 2.1).
    """
    assert device.flops is not None
    assert device.bandwidth is not None
    rows, engine = recipe.engine.batch_rows or ROWS, recipe.engine
    shared = engine.tensor_parallel if engine.kind == "vllm" else 1
    used, launch = DECODING[engine.kind]
    context = prompt + recipe.sampling.max_new_tokens / 2
    moved = (size.parameters + rows * context * size.cached) * size.each / device.bandwidth / shared
    computed = 2 * size.parameters * rows / (used * device.flops) / shared
    step = max(moved, computed) + launch * size.layers
    apart = max(1, math.floor(device.count / shared))
    read = 2 * size.parameters / (USED["read"] * device.flops)
    source = f"estimated from the figures of {device.count} × {device.name}, nothing was tried"
    most = float(recipe.sampling.max_new_tokens)
    return Speeds(source, step / rows / apart, read / apart / shared, _training_by_figures(recipe, size, device), most)


def _training_by_figures(recipe: Recipe, size: ModelSize, device: Device) -> float:
    if not recipe.trained_arms:
        return 0.0
    assert device.flops is not None
    arm = recipe.for_arm(recipe.trained_arms[0])
    operations = (6 if checkpoints_gradients(arm) else 4) * size.parameters
    used = USED["packed" if getattr(trainer_arguments(arm), "packing", False) else "rows"]
    return operations / (used * device.flops) / device.count
