"""On what an SAE's latents are active."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from esr_train.steering.directions import LoadedSae, hidden_states
from esr_train.steering.layer_edits import ENCODED_AT_ONCE


def active_latents(
    model: Any, tokenizer: Any, sae: LoadedSae, texts: Sequence[str], rows: int = 1, what: str = "prompts"
) -> torch.Tensor:
    """Which latents are active on any token of any text, [n_latents] bool on the CPU; BOS and padding do not count.

    Args:
        model: in any wrapper.
        tokenizer: the model's.
        sae: of the model.
        texts: rendered conversations, or plain texts.
        rows: texts of one forward pass.
        what: the texts are, shown with the progress.
    """
    found = torch.zeros(sae.n_latents, dtype=torch.bool)
    for hidden in watched(hidden_states(model, tokenizer, texts, sae.layer, rows), len(texts), what):
        for piece in activations(sae, hidden):
            found |= (piece != 0).any(dim=0).cpu()
    return found


@dataclass(frozen=True)
class Peaks:
    """Where each latent is most active.

    Args:
        values: [n_latents, count] its strongest activations, at most one from each text, falling; 0 where none is.
        text, token: [n_latents, count] long; the number of the text, and of the token in it without BOS.
        frequency: [n_latents] share of all tokens at which it is active.
    """

    values: torch.Tensor
    text: torch.Tensor
    token: torch.Tensor
    frequency: torch.Tensor


def peaks(model: Any, tokenizer: Any, sae: LoadedSae, texts: Sequence[str], count: int, rows: int = 1) -> Peaks:
    """The texts on which each latent is most active, and where in them.

    Args:
        model: in any wrapper.
        tokenizer: the model's.
        sae: of the model.
        texts: none of them empty.
        count: texts per latent.
        rows: texts of one forward pass.
    """
    values = torch.zeros(sae.n_latents, count)
    where = torch.zeros(sae.n_latents, count, 2, dtype=torch.long)
    active, tokens = torch.zeros(sae.n_latents), 0
    states = watched(hidden_states(model, tokenizer, texts, sae.layer, rows), len(texts), "texts")
    for number, hidden in enumerate(states):
        found = torch.cat([piece.cpu() for piece in activations(sae, hidden)])
        active, tokens = active + (found != 0).sum(dim=0), tokens + len(found)
        peak, token = found.max(dim=0)
        here = torch.stack([torch.full_like(token, number), token], dim=-1)
        values, best = torch.cat([values, peak[:, None]], dim=1).topk(count, dim=1)
        where = torch.cat([where, here[:, None]], dim=1).gather(1, best[:, :, None].expand(-1, -1, 2))
    return Peaks(values, where[:, :, 0], where[:, :, 1], active / max(tokens, 1))


def activations(sae: LoadedSae, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """The latents' activations on hidden states [tokens, d_model], in pieces [tokens of the piece, n_latents]."""
    for piece in hidden.float().split(ENCODED_AT_ONCE):
        with torch.no_grad():
            yield sae.encode(piece)


def watched(states: Iterator[torch.Tensor], count: int, what: str) -> Iterator[torch.Tensor]:
    """The same states, with a progress bar over `count` texts."""
    yield from tqdm(states, total=count, desc=f"read {what}", unit="text", mininterval=1)
