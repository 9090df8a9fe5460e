"""Reading hidden states: how long they are, and on what an SAE's latents are active."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from esr_train.errors import InputError
from esr_train.models import check_layer
from esr_train.steering.directions import ENCODED_AT_ONCE, LoadedSae
from esr_train.steering.token_reading import kept_outputs
from esr_train.template import bos_id, prompt_text

QUESTIONS = (
    "How do I fold a fitted sheet?",
    "Explain how a bicycle stays upright.",
    "What should I check before I buy a used car?",
    "Give me three ideas for a rainy afternoon.",
    "Why is the sky blue?",
    "Write a short letter to a landlord about a broken heater.",
    "How does a bank make money?",
    "What is the difference between a frog and a toad?",
)
"""What a layer's residual norm is measured on unless other texts are given."""


def with_bos(tokenizer: Any, text: str) -> list[int]:
    """A text's token ids with exactly one BOS in front, if the tokenizer has one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = bos_id(tokenizer)
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def hidden_states(
    model: Any, tokenizer: Any, texts: Sequence[str], layer: int, rows: int = 1
) -> Iterator[torch.Tensor]:
    """The output of decoder layer `layer` for every text in turn, [tokens, d_model], without BOS and empty texts.

    Where a tokenizer has no BOS the first token, whose states are as extreme, is left out in its stead.

    Args:
        model: in any wrapper; its training mode is left as it is found.
        tokenizer: its BOS is put in front of texts that do not begin with it.
        texts: plain or rendered.
        layer: counted from 0.
        rows: texts of one forward pass.

    Raises:
        InputError: if the layer does not exist.
    """
    check_layer(model, layer, "layer")
    training = model.training
    model.eval()
    try:
        with kept_outputs(model, [layer]) as kept:
            tokens = [ids for text in texts if len(ids := with_bos(tokenizer, text)) > 1]
            for start in range(0, len(tokens), rows):
                batch = tokens[start : start + rows]
                with torch.no_grad():
                    model(**_padded(batch, model.device), use_cache=False, logits_to_keep=1)
                yield from (states[1 : len(ids)] for states, ids in zip(kept.pop(layer), batch, strict=True))
    finally:
        model.train(training)


def _padded(batch: Sequence[Sequence[int]], device: Any) -> dict[str, torch.Tensor]:
    """Token ids padded on the right; no token before the padding sees it."""
    width = max(map(len, batch))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=device)
    if len(batch) == 1:
        return {"input_ids": ids}
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def measure_residual_norm(model: Any, tokenizer: Any, layer: int, texts: Sequence[str] = ()) -> float:
    """Median over tokens of ||h|| at the output of decoder layer `layer`; BOS and padding are left out.

    Args:
        model: in any wrapper; its training mode is left as it is found.
        tokenizer: its BOS is put in front of texts that do not begin with it.
        layer: counted from 0.
        texts: plain or rendered; none: eight short questions as the chat template renders them.

    Raises:
        InputError: if the layer does not exist, or there is no token besides BOS.
    """
    if not texts:
        texts = [prompt_text(tokenizer, text) for text in QUESTIONS] if tokenizer.chat_template else QUESTIONS
    norms = [hidden.float().norm(dim=-1).cpu() for hidden in hidden_states(model, tokenizer, texts, layer)]
    if not norms:
        raise InputError("there is no text to measure the residual norm on")
    return float(torch.cat(norms).median())


def active_latents(
    model: Any, tokenizer: Any, sae: LoadedSae, texts: Sequence[str], rows: int = 1, what: str = "prompts"
) -> torch.Tensor:
    """Which latents are active on any token of any text, [n_latents] bool on the CPU; BOS and padding do not count.

    Args:
        model: in any wrapper.
        texts: rendered conversations, or plain texts.
        rows: texts of one forward pass.
        what: the texts are, shown with the progress.

    Raises:
        InputError: if the SAE's activations cannot be computed.
    """
    active = torch.zeros(sae.n_latents, dtype=torch.bool)
    for pieces in _activations(model, tokenizer, sae, texts, rows, what):
        for piece in pieces:
            active |= (piece != 0).any(dim=0).cpu()
    return active


def activation_frequency(model: Any, tokenizer: Any, sae: LoadedSae, texts: Sequence[str]) -> NDArray[np.float64]:
    """The share of tokens (without BOS) at which each latent of an SAE is active, [n_latents].

    Args:
        model: in any wrapper.
        texts: rendered conversations, such as the model's own unsteered answers.

    Raises:
        InputError: if there is no token, or the SAE's activations cannot be computed.
    """
    active, tokens = torch.zeros(sae.n_latents, dtype=torch.long), 0
    for pieces in _activations(model, tokenizer, sae, texts, 1, "answers"):
        for piece in pieces:
            active += (piece > 0).sum(dim=0).cpu()
            tokens += len(piece)
    if not tokens:
        raise InputError("there is no text to measure activation frequencies on")
    return (active.double() / tokens).numpy()


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
        texts: none of them empty.
        count: texts per latent.
        rows: texts of one forward pass.

    Raises:
        InputError: if the SAE's activations cannot be computed.
    """
    values = torch.zeros(sae.n_latents, count)
    where = torch.zeros(sae.n_latents, count, 2, dtype=torch.long)
    active, tokens = torch.zeros(sae.n_latents), 0
    for number, pieces in enumerate(_activations(model, tokenizer, sae, texts, rows, "texts")):
        activations = torch.cat([piece.cpu() for piece in pieces])
        active, tokens = active + (activations != 0).sum(dim=0), tokens + len(activations)
        peak, token = activations.max(dim=0)
        here = torch.stack([torch.full_like(token, number), token], dim=-1)
        values, best = torch.cat([values, peak[:, None]], dim=1).topk(count, dim=1)
        where = torch.cat([where, here[:, None]], dim=1).gather(1, best[:, :, None].expand(-1, -1, 2))
    return Peaks(values, where[:, :, 0], where[:, :, 1], active / max(tokens, 1))


def _activations(
    model: Any, tokenizer: Any, sae: LoadedSae, texts: Sequence[str], rows: int, what: str
) -> Iterator[Iterator[torch.Tensor]]:
    """For every text the activations of all latents, in pieces [tokens of the piece, n_latents]."""
    states = hidden_states(model, tokenizer, texts, sae.layer, rows)
    for hidden in tqdm(states, total=len(texts), desc=f"read {what}", unit="text", mininterval=1):
        yield map(sae.encode, hidden.split(ENCODED_AT_ONCE))
