"""Before the first step: the injection reaches its layer exactly, and gradients the adapters below it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esr_train.errors import RunError
from esr_train.models import bare_model, decoder_layers, without_dropout
from esr_train.steering.directions import Add
from esr_train.steering.hook import SteeringHook
from esr_train.training.injection import COLUMNS, LiveInjection, hook_rows

LEAK = 1e-3
"""Relative change of a logit that bfloat16 kernels may show without any leak."""


@dataclass
class Recording:
    """What a forward and backward pass did at the steered layer.

    Args:
        before, after: the layer's output without and with the injection, [rows, positions, d_model].
        adapters: matrices up to that layer.
        with_gradient: how many of them received some.
    """

    before: torch.Tensor | None = None
    after: torch.Tensor | None = None
    adapters: int = 0
    with_gradient: int = 0

    def verify(self, delta: torch.Tensor) -> None:
        """Compare with what was asked for.

        Args:
            delta: [rows, positions, d_model], what each token was to get.

        Raises:
            RunError: if a token got something else, or an adapter at or below the layer got no gradient.
        """
        if self.before is None or self.after is None:
            raise RunError("live injection: the steered layer was never run.")
        wanted = self.before + delta.to(device=self.before.device, dtype=self.before.dtype)
        wrong = (wanted != self.after).any(dim=-1).sum().item()
        if wrong:
            raise RunError(f"live injection: {wrong} tokens did not get the steering they were to get.")
        if self.with_gradient < self.adapters:
            raise RunError(
                f"live injection: {self.with_gradient} of {self.adapters} adapter matrices up to the steered layer "
                "received gradient, so the model cannot learn from what it is given there."
            )


@contextmanager
def recorded(model: Any, layer: int) -> Iterator[Recording]:
    """Record the passes of a block; enter it inside the steering, so that the last hook runs after the steering's.

    Args:
        model: with LoRA, in any wrapper.
        layer: the steered decoder layer.
    """
    recording = Recording()
    module = decoder_layers(model)[layer]

    def keep_before(_: nn.Module, __: Any, output: Any) -> None:
        # Only the first pass: under gradient checkpointing there is a second in the backward pass.
        if recording.before is None:
            recording.before = _hidden(output).detach().clone()

    def keep_after(_: nn.Module, __: Any, output: Any) -> None:
        if recording.after is None:
            recording.after = _hidden(output).detach().clone()

    def count(gradient: torch.Tensor) -> None:
        recording.with_gradient += bool(gradient.ne(0).any())

    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    adapters = [weight for name, weight in trained if "lora_B" in name and _layer_of(name) <= layer]
    recording.adapters = len(adapters)
    handles = [module.register_forward_hook(keep_before, prepend=True), module.register_forward_hook(keep_after)]
    handles += [weight.register_hook(count) for weight in adapters]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def verified(model: Any, layer: int, delta: torch.Tensor) -> Iterator[None]:
    """Record the passes of a block and compare them with `delta` (see `Recording.verify`) when it ends."""
    with recorded(model, layer) as recording:
        yield
    recording.verify(delta)


def check_flow(model: Any, batch: dict[str, torch.Tensor], live: LiveInjection) -> None:
    """Run one small batch forward and backward and check it; weights and random state stay as they were.

    Args:
        model: with LoRA and TRL's fused loss, not yet wrapped for distributed training.
        batch: collated rows, at least one of them steered, on the model's device.

    Raises:
        RunError: naming what does not hold: Δh exact, gradient below the layer, strength 0 changes nothing.
    """
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    columns = {name: batch[name] for name in COLUMNS}
    inputs = {name: value for name, value in batch.items() if name not in COLUMNS}
    added = live.interventions(columns, epoch=0)
    try:
        with without_dropout(model):
            with SteeringHook(model, added) as hook, verified(model, live.layer, live.delta(added, columns)):
                hook.set_rows(hook_rows(columns), columns["reply"])
                _loss(model, inputs).backward()
            zero = [tuple(Add(add.layer, add.vector * 0.0) for add in adds) for adds in added]
            with torch.no_grad(), SteeringHook(model, zero) as hook:
                hook.set_rows(hook_rows(columns))
                steered = _loss(model, inputs)
            with torch.no_grad():
                plain = _loss(model, inputs)
    finally:
        model.zero_grad(set_to_none=True)
        torch.set_rng_state(states[0])
        if states[1]:
            torch.cuda.set_rng_state_all(states[1])
    if not torch.equal(plain, steered):
        raise RunError(f"live injection: strength 0 changes the loss ({plain.item()} -> {steered.item()}).")


@torch.no_grad()
def check_packing(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Refuse packing where a row sees the rows before it in the sequence.

    Args:
        model: not yet wrapped for distributed training.
        batch: collated, at least two packed rows in the first sequence, on the model's device.

    Raises:
        RunError: if other tokens in the first row change what the model says at the end of the last one.
    """
    row, ids = batch["row"][:1], batch["input_ids"][:1]
    positions = batch["position_ids"][:1]
    length = int((row[0] >= 0).sum())
    other = torch.where(row == row[0, 0], (ids + 1) % bare_model(model).config.get_text_config().vocab_size, ids)
    with without_dropout(model):
        logits, changed = (
            model(input_ids=tokens[:, :length], position_ids=positions[:, :length], use_cache=False).logits[0, -1]
            for tokens in (ids, other)
        )
    if (logits - changed).abs().max() > LEAK * logits.abs().max():
        raise RunError(
            "packing: a row sees the rows that are packed before it. Leave out train.args.packing, or take another "
            "model.attn_implementation."
        )


def _loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs, use_cache=False, fused_lm_head=True).loss


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _layer_of(name: str) -> int:
    number = re.search(r"\.layers\.(\d+)\.", name)
    return int(number[1]) if number else -1
