"""Steering a transformers model by hand: around its own `generate` in a notebook, or a list of prompts at once."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from esr_train.errors import InputError, RunError
from esr_train.models import decoder_layers
from esr_train.steering.engine import Completion, Request, Sampling
from esr_train.steering.hook import SteeringHook
from esr_train.steering.interventions import Intervention
from esr_train.steering.transformers_engine import TransformersEngine

Steering = Intervention | tuple[Intervention, ...] | None
"""What steers one row: an intervention, several that follow one another, or nothing."""


GREEDY = Sampling(temperature=0.0, max_new_tokens=128)


@contextmanager
def steer(model: Any, steering: Steering | list[Steering]) -> Iterator["SteeredRows"]:
    """Steer every forward pass of a model while the block lasts, `model.generate(...)` with a KV cache included.

        with steer(model, sae.direction(1234).add(0.9)) as steered:
            output = model.generate(**inputs)
        print(steered.tokens)

    Every token that is fed is steered, BOS, too. Padding is not: `attention_mask` tells it, so batches need one (and to
    generate, `tokenizer.padding_side = "left"`). A row that has ended is fed padding until all have, which counts.
    An intervention on `generated` positions leaves the prompt alone: whatever is not fed one by one behind a cache.

    Args:
        model: a causal language model, in any wrapper.
        steering: such as `direction.add(0.9)`, `Clamp(sae, 1234, 4.0)` or `Ablate(sae, (7, 9))`; a tuple of them works
            in order. A list has one for each batch row, None where a row is not steered.

    Yields:
        how many tokens of every row have been steered.

    Raises:
        InputError: what does not fit the model; a list of another length than the batch; a mask that is not
            [rows, tokens].
        RunError: a steered layer that did not run in a forward pass of the model.
    """
    steered = SteeredRows(model, steering)
    layers = decoder_layers(model)
    decoder = next(module for module in model.modules() if getattr(module, "layers", None) is layers)
    handle = decoder.register_forward_pre_hook(steered.before_pass, with_kwargs=True)
    try:
        yield steered
        steered.check()
    finally:
        handle.remove()
        steered.close()


class SteeredRows:
    """What `steer` has steered; counted anew from every prompt on, that is from every pass without cached tokens."""

    def __init__(self, model: Any, steering: Steering | list[Steering]) -> None:
        self._model = model
        self._by_row = isinstance(steering, list)
        self._steerings = [_together(row) for row in (steering if isinstance(steering, list) else [steering])]
        # Refuses what does not fit before anything runs.
        self._hook = SteeringHook(model, self._steerings)
        self._rows = 0

    @property
    def by_layer(self) -> dict[int, list[int]]:
        """For each steered layer, how many tokens of each row were steered."""
        return self._hook.counts() if self._rows else {}

    @property
    def tokens(self) -> list[int]:
        """How many tokens of each row were steered, at the layer that steers most."""
        return [max(counts) for counts in zip(*self.by_layer.values(), strict=True)] or [0] * self._rows

    def before_pass(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read off the decoder's arguments to which row every token belongs."""
        given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        tokens = given["inputs_embeds"][..., 0] if ids is None else ids
        rows, positions = tokens.shape
        cached = 0 if cache is None else int(cache.get_seq_length())
        if given.get("use_cache") is False and any(i.positions == "generated" for row in self._steerings for i in row):
            raise InputError("without a cache generated tokens cannot be told from the prompt", "use_cache=False")
        if rows != self._rows or not cached:
            self._start(rows)
        index = torch.arange(rows, device=tokens.device)[:, None].expand(rows, positions)
        mask = given.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[1] < positions:
                raise InputError(
                    "the attention mask does not say which tokens are padding",
                    "attention_mask",
                    "Give a mask [rows, tokens], and no cache_implementation that makes another one.",
                )
            index = torch.where(mask[:, -positions:] != 0, index, -1)
        self._hook.set_rows(index, torch.full_like(index, bool(cached) and positions == 1, dtype=torch.bool))

    def _start(self, rows: int) -> None:
        if self._by_row and rows != len(self._steerings):
            raise InputError(
                f"{len(self._steerings)} steerings were given for a batch of {rows} rows",
                "steer",
                "Give one for each row, None where a row is not steered, or a single one that is not in a list.",
            )
        self.close()
        self._hook = SteeringHook(self._model, self._steerings if self._by_row else self._steerings * rows)
        self._hook.__enter__()
        self._rows = rows

    def check(self) -> None:
        """Refuse to go on as if steered where a layer did not run.

        Raises:
            RunError: naming the layers.
        """
        if self._rows and (silent := self._hook.not_run()):
            raise RunError(
                f"layers {silent} did not run in the model's last forward pass, so nothing was steered there."
            )

    def close(self) -> None:
        """Take the hooks out of the model."""
        self._hook.__exit__(None, None, None)


def _together(steering: Steering) -> tuple[Intervention, ...]:
    if steering is None:
        return ()
    return steering if isinstance(steering, tuple) else (steering,)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: str | Sequence[str],
    steering: Steering | list[Steering] = None,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[Completion]:
    """The model's replies to users' messages, rendered by its chat template, all in one batch.

    Args:
        model: a causal language model, in any wrapper.
        tokenizer: the model's.
        prompts: one message or several.
        steering: as in `steer`; a list has one for each prompt.
        sampling: how tokens are drawn; greedy unless said otherwise.
        seed: of the first prompt's sampling; the others' follow.

    Returns:
        for each prompt the reply's `text`, and how many tokens of prompt and reply were steered (`steered_tokens`).

    Raises:
        InputError: what does not fit the model, or a list of another length than the prompts.
        RunError: a row that was not steered at exactly the tokens it asked for, or whose logits are not finite.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    steerings = steering if isinstance(steering, list) else [steering] * len(prompts)
    if len(steerings) != len(prompts):
        raise InputError(f"{len(steerings)} steerings were given for {len(prompts)} prompts", "steering")
    requests = [
        Request(str(number), prompt, interventions=_together(row), seed=seed + number)
        for number, (prompt, row) in enumerate(zip(prompts, steerings, strict=True))
    ]
    return TransformersEngine(model, tokenizer).generate(requests, sampling)
