"""An attack that knows the model: directions optimised by gradient so that it writes given off-topic replies.

The strongest attack within a norm is not a vector that somebody found but the one that works best against this very
model. Each direction is moved on the sphere so that texts, such as what another model wrote under steering, become
likely, which also makes a restart in them unlikely; and others, such as real answers, unlikely.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from esr_train.errors import RunError
from esr_train.models import decoder_layers
from esr_train.steering.sampling import filled_up

TOKENS_AT_ONCE = 1024
"""Tokens of one forward and backward pass."""
UNLIKELY = 8.0
"""Nats a token at which a text counts as unlikely enough: nothing is gained beyond."""


@dataclass(frozen=True)
class Target:
    """A text that a direction is to make likely, or unlikely.

    Args:
        ids: tokens of the rendered prompt and the reply.
        reply: index of the reply's first token.
        steered: index of the first token that is steered.
        wanted: whether it is to become likely.
    """

    direction: int
    ids: tuple[int, ...]
    reply: int
    steered: int = 0
    wanted: bool = True


@dataclass(frozen=True, eq=False)
class Optimised:
    """What came of it.

    Args:
        units: [directions, d_model] of norm 1, the best of all steps.
        losses: [steps + 1, directions], the mean of each direction's targets, before and after every step: nats a
            token, of unwanted ones less than nothing.
    """

    units: torch.Tensor
    losses: torch.Tensor


def optimise(
    model: Any, layer: int, targets: Sequence[Target], units: torch.Tensor, length: torch.Tensor, *,
    steps: int = 30, rate: float = 0.03,
) -> Optimised:  # fmt: skip
    """Move directions on the sphere by Adam, so that their targets become likely, or unlikely.

    Args:
        model: of transformers, in any wrapper; its weights are left alone.
        layer: the decoder layer whose output is steered.
        targets: at least one for every direction, each of at least one reply token.
        units: [directions, d_model] float32 of norm 1, where to start.
        length: [directions], what is added, in residual units.
        rate: its learning rate; a direction has norm 1.

    Raises:
        RunError: if a loss is not finite.
    """
    device = next(model.parameters()).device
    moved = units.to(device).clone().requires_grad_(True)
    length, adam = length.to(device), torch.optim.Adam([moved], lr=rate)
    batches, losses = _batches(targets), []
    best, lowest = moved.detach().clone(), torch.full((len(units),), torch.inf, device=device)
    with _frozen(model), tqdm(total=steps, desc="optimise directions", unit="step", mininterval=1) as bar:
        for step in range(steps + 1):
            adam.zero_grad()
            loss = _losses(model, layer, batches, moved, length, backward=step < steps)
            if not bool(loss.isfinite().all()):
                raise RunError("the loss of an optimised direction is not finite.")
            losses.append(loss)
            better = loss < lowest
            lowest, best = torch.where(better, loss, lowest), torch.where(better[:, None], moved.detach(), best)
            if step < steps:
                adam.step()
                with torch.no_grad():
                    moved /= moved.norm(dim=1, keepdim=True)
                bar.update(1)
                bar.set_postfix_str(f"loss {float(loss.mean()):.3f}")
    return Optimised(best.cpu(), torch.stack(losses).cpu())


def _batches(targets: Sequence[Target]) -> list[list[Target]]:
    """Targets of like lengths together."""
    found: list[list[Target]] = []
    for target in sorted(targets, key=lambda each: len(each.ids)):
        if not found or (len(found[-1]) + 1) * len(target.ids) > TOKENS_AT_ONCE:
            found.append([])
        found[-1].append(target)
    return found


def _losses(
    model: Any,
    layer: int,
    batches: Sequence[Sequence[Target]],
    units: torch.Tensor,
    length: torch.Tensor,
    backward: bool,
) -> torch.Tensor:
    """What `Optimised.losses` holds of one step, [directions]; its gradients are added to `units` if wanted."""
    total, count = torch.zeros_like(length), torch.zeros_like(length)
    for batch in batches:
        number = torch.tensor([each.direction for each in batch], device=units.device)
        with torch.set_grad_enabled(backward):
            nats = _batch_losses(model, layer, batch, (units * length[:, None])[number])
            wanted = torch.tensor([each.wanted for each in batch], device=units.device)
            values = torch.where(wanted, nats, -nats.clamp(max=UNLIKELY))
        if backward:
            values.sum().backward()  # Adam takes no notice of how many targets a direction has
        total.index_add_(0, number, values.detach())
        count.index_add_(0, number, torch.ones_like(values.detach()))
    return total / count


def _batch_losses(model: Any, layer: int, batch: Sequence[Target], vectors: torch.Tensor) -> torch.Tensor:
    """Mean nats a reply token, [targets]; `vectors` [targets, d_model] are added at the steered tokens."""
    device = vectors.device
    ids = filled_up([each.ids for each in batch], device)
    column = torch.arange(ids.shape[1], device=device)
    places = torch.tensor([[len(each.ids), each.reply, each.steered] for each in batch], device=device)
    ends, replies, starts = places.T[:, :, None]
    steered = ((column >= starts) & (column < ends))[:, :, None]

    def add(_module: Any, _args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        states = states + (vectors[:, None] * steered).to(states.dtype)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = decoder_layers(model)[layer].register_forward_hook(add)
    try:
        logits = model(input_ids=ids, attention_mask=(column < ends).long(), use_cache=False).logits
    finally:
        handle.remove()
    asked = (column >= replies) & (column < ends)
    nats = functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return (nats * asked[:, 1:]).sum(1) / asked[:, 1:].sum(1)


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No gradients of weights, and no dropout."""
    training, learning = model.training, [each for each in model.parameters() if each.requires_grad]
    model.eval()
    for each in learning:
        each.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for each in learning:
            each.requires_grad_(True)
