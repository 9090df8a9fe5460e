"""How much memory and disk a recipe takes, from its model's configuration; nothing is loaded.

Weights and optimiser states are exact, what generation and training hold beside them is an estimate.
"""

from dataclasses import dataclass
from typing import Any

from esr_train.models import load_config
from esr_train.recipe import Recipe
from esr_train.steering.batch_size import key_value_heads
from esr_train.training.settings import ROWS_AT_ONCE, RolloutArguments, adapter_parameters, trainer_arguments

STATES = {"float32": 16, "8bit": 10, "none": 8}
"""Bytes of an adapter's parameter in training: itself and its gradient in float32, and what an optimiser keeps."""
NF4 = 0.56
"""Bytes of a weight in NF4, its scales included."""
ROWS = 64
"""Rows that are generated at once where the engine chooses that by itself: a guess."""
LIBRARIES = 1.2 * 2**30
"""Bytes that a process holds without any model: Python, torch and what they load; on an accelerator its context."""


@dataclass(frozen=True)
class ModelSize:
    """A model's measures.

    Args:
        name: its `model_type`.
        layers, width, inner, heads, vocabulary: decoder layers, residual stream, MLP, query heads, tokens.
        cached: numbers kept for a token in generation: keys and values of all layers.
        each: bytes of a weight.
    """

    name: str
    parameters: int
    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    cached: int
    each: int

    def __str__(self) -> str:
        return f"{self.name}, {self.parameters:,} parameters, {self.layers} layers, {self.width} wide"


def model_size(recipe: Recipe) -> ModelSize:
    """The recipe's model, measured by its configuration.

    Raises:
        InputError: if that cannot be read.
    """
    config: Any = load_config(recipe.model).get_text_config()
    groups, head = key_value_heads(config)
    return ModelSize(
        config.model_type,
        adapter_parameters(recipe.model_copy(update={"train": type(recipe.train)()}))[0],
        config.num_hidden_layers,
        config.hidden_size,
        getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        config.num_attention_heads,
        config.vocab_size,
        2 * config.num_hidden_layers * groups * head,
        4 if recipe.model.dtype == "float32" else 2,
    )


def generating_bytes(recipe: Recipe, size: ModelSize, prompt: float) -> float:
    """Memory that generation takes at its peak on one device; `prompt`: tokens of one."""
    shared = recipe.engine.tensor_parallel if recipe.engine.kind == "vllm" else 1
    rows = recipe.engine.batch_rows or ROWS
    cache = rows * (prompt + recipe.sampling.max_new_tokens) * size.cached * size.each
    logits = 3 * rows * size.vocabulary * 4
    return LIBRARIES + (size.parameters * size.each + cache) / shared + logits


def training_bytes(recipe: Recipe, size: ModelSize, row: float) -> float:
    """Memory that training an arm takes at its peak on one process; `row`: tokens of a row, its reply included."""
    args = trainer_arguments(recipe)
    weights = size.parameters * (NF4 if recipe.train.quantization else size.each)
    kind = "8bit" if "8bit" in (args.optim or "") else "none" if args.optim == "sgd" else "float32"
    tokens = args.per_device_train_batch_size * row * (2 if recipe.train.method == "dpo" else 1)
    # A layer's activations in the backward pass (Korthikanti et al. 2022, eq. 1, for a gated MLP), and the scores of
    # eager attention; with checkpointing one layer's, and every layer's input.
    scores = 2 * size.heads * row * size.each if recipe.model.attn_implementation == "eager" else 0
    layer = tokens * (size.each * (8 * size.width + 4 * size.inner) + scores)
    kept = size.layers * tokens * size.width * size.each
    activations = layer + kept if checkpoints_gradients(recipe) else size.layers * layer
    logits = 3 * tokens * size.vocabulary * 4
    if isinstance(args, RolloutArguments):  # Replies are written before any are learned from.
        cache = (recipe.engine.batch_rows or ROWS_AT_ONCE) * row * size.cached * size.each
        activations = max(activations, cache)
    return LIBRARIES + weights + adapter_parameters(recipe)[1] * STATES[kind] + activations + logits


def checkpoints_gradients(recipe: Recipe) -> bool:
    """Whether training computes activations twice to keep fewer of them."""
    asked = trainer_arguments(recipe).gradient_checkpointing
    return recipe.model.device != "cpu" if asked is None else asked


def disk_bytes(recipe: Recipe, size: ModelSize) -> float:
    """What a run writes: adapters and checkpoints of all arms and seeds, merged models, and rows."""
    seeds, total = len(recipe.seeds or (0,)), 50e6
    for arm in recipe.trained_arms:
        section = recipe.for_arm(arm)
        # A checkpoint holds the adapter and its optimiser's states; a new one is whole before an old one goes.
        checkpoints = 1 + trainer_arguments(section).save_total_limit
        total += seeds * adapter_parameters(section)[1] * (4 + 12 * checkpoints)
    merged = sum(arm.merged for arm in recipe.arms.values())
    return total + seeds * merged * size.parameters * size.each
