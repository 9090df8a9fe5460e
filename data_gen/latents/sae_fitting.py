"""An SAE is trained with sae-lens' trainer, measured on held-out text, and saved as sae-lens saves it."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from data_gen.latents.sae_data import States, Text
from esr_train.models import decoder_layers
from esr_train.steering.directions import ENCODED_AT_ONCE, LoadedSae
from esr_train.steering.readout import hidden_states, with_bos

PASSES = 8
"""How often every state is drawn, on average."""
BATCH = 1024
"""States of one step."""
RATE = 4e-4
FROM_TEXTS = 0.25
"""Share of the decoder rows that begin at the mean state of a text instead of at random."""
SPLICED = 64
"""Held-out texts in which the layer's output is replaced by its reconstruction."""
COUNTED = 100_000
"""Training states on which dead latents are counted."""


@dataclass(frozen=True)
class SaeSettings:
    """What is trained.

    Args:
        layer: the decoder layer whose output is reconstructed, from 0.
        width: latents of the dictionary.
        active: latents that are active on a token, on average.
        model: name of the model, for the SAE's config.
    """

    layer: int
    width: int
    active: int
    seed: int
    model: str


def fit(states: States, settings: SaeSettings, device: str) -> Any:
    """A BatchTopK SAE (Bussmann et al. 2024) of the states; sae-lens saves it as a JumpReLU one.

    Some decoder rows start at the mean state of a text, less the mean of all: what a whole text has in common is a
    small share of the variance, and from random rows most of it is split over single words.
    """
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(settings.seed)
    hook = f"blocks.{settings.layer}.hook_resid_post"
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=states.values.shape[1],
            d_sae=settings.width,
            k=settings.active,
            normalize_activations="expected_average_only_in",
            metadata=SAEMetadata(model_name=settings.model, hook_name=hook, prepend_bos=True),
        )
    )
    scale = _scale(states.values)
    mean = _mean(states.values)
    chosen = torch.randperm(len(states.means))[: int(FROM_TEXTS * settings.width)]
    rows = normalize(states.means[chosen] - mean, dim=1) * sae.W_dec.data.norm(dim=1).mean()
    sae.W_dec.data[: len(rows)], sae.W_enc.data[:, : len(rows)] = rows, rows.T
    sae.b_dec.data = mean * scale
    return _trainer(sae.to(device), states.values, settings.seed, scale, device).fit()


def _trainer(sae: Any, values: torch.Tensor, seed: int, scale: float, device: str) -> Any:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    batch = min(BATCH, len(values))
    steps = max(PASSES * len(values) // batch, 1)
    config = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=RATE,
        lr_end=RATE / 10,
        lr_warm_up_steps=min(100, steps // 10),
        lr_decay_steps=steps // 3,
        dead_feature_window=max(min(steps // 5, 500), 1),
        device=device,
    )
    trainer = SAETrainer(config, sae, _draws(values, batch, seed))
    # Known already; the trainer folds it into the weights when it is done.
    trainer.activation_scaler.scaling_factor = scale
    return trainer


def _draws(values: torch.Tensor, batch: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(values), generator=generator).split(batch):
            if len(chosen) == batch:
                yield values[chosen].float()


def _scale(values: torch.Tensor) -> float:
    """The factor that makes the mean norm sqrt(d_model), as sae-lens does."""
    norms = torch.cat([part.float().norm(dim=-1) for part in values.split(ENCODED_AT_ONCE)])
    return float(values.shape[1] ** 0.5 / norms.mean())


def _mean(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.float().sum(dim=0) for part in values.split(ENCODED_AT_ONCE)]).sum(dim=0) / len(values)


@contextmanager
def saved_aside(sae: Any, folder: Path) -> Iterator[Path]:
    """The SAE in sae-lens' format with bfloat16 weights, beside its place, which it takes when the block ends well."""
    from safetensors.torch import load_file, save_file

    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        weights, _ = sae.save_inference_model(aside)
        save_file({key: value.to(torch.bfloat16) for key, value in load_file(weights).items()}, weights)
        yield aside
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class Quality:
    """How good an SAE is, on texts that it was not trained on.

    Args:
        variance_explained: share of the states' variance, 0 to 1.
        l0: latents active on a token, on average.
        dead: latents that are active on none of the held-out states and of 100,000 training ones.
        loss_clean, loss_spliced, loss_zeroed: cross-entropy (nats a token) of the model as it is, with the layer's
            output replaced by its reconstruction, and by zeros.
        tokens: held-out tokens that were read.
    """

    variance_explained: float
    l0: float
    dead: int
    loss_clean: float
    loss_spliced: float
    loss_zeroed: float
    tokens: int

    @property
    def loss_recovered(self) -> float:
        """Share of the loss that zeros cost and the reconstruction does not."""
        return (self.loss_zeroed - self.loss_spliced) / (self.loss_zeroed - self.loss_clean)


@torch.no_grad()
def measure(model: Any, tokenizer: Any, sae: LoadedSae, texts: Sequence[Text], trained: torch.Tensor) -> Quality:
    """Measure an SAE as it was loaded from its folder.

    Args:
        model: in any wrapper.
        texts: those that are held out are read.
        trained: [tokens, d_model] states that it was trained on, for dead latents.
    """
    held = [text for text in texts if text.held_out]
    every = hidden_states(model, tokenizer, [text.text for text in held], sae.layer)
    states = torch.cat([each[text.start :].float().cpu() for text, each in zip(held, every, strict=True)])
    explained, l0, fired = _reconstruction(sae, states)
    for part in trained[:COUNTED].split(ENCODED_AT_ONCE):
        fired |= (sae.encode(part.float()) != 0).any(dim=0)
    losses = _losses(model, tokenizer, sae, held[:SPLICED])
    return Quality(explained, l0, int((~fired).sum()), *losses, tokens=len(states))


def _reconstruction(sae: LoadedSae, states: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """Share of variance explained, active latents a token, and which latents were active, [n_latents] bool."""
    error, active = 0.0, 0
    fired = torch.zeros(sae.n_latents, dtype=torch.bool)
    for part in states.split(ENCODED_AT_ONCE):
        activations = sae.encode(part)
        error += float((part - sae.module.decode(activations)).pow(2).sum())
        active += int((activations != 0).sum())
        fired |= (activations != 0).any(dim=0).cpu()
    variance = float((states - states.mean(dim=0)).pow(2).sum())
    return 1 - error / variance, active / len(states), fired


@torch.no_grad()
def _losses(model: Any, tokenizer: Any, sae: LoadedSae, texts: Sequence[Text]) -> tuple[float, float, float]:
    """Cross-entropy of the tokens behind each text's start: clean, spliced, zeroed."""
    sums, tokens = [0.0, 0.0, 0.0], 0
    ways = (None, lambda hidden: sae.module.decode(sae.encode(hidden.float())), torch.zeros_like)
    for text in tqdm(texts, desc="splice in", unit="text", mininterval=1):
        ids = torch.tensor([with_bos(tokenizer, text.text)], device=model.device)
        behind = ids[0, text.start + 2 :]
        if not len(behind):
            continue
        tokens += len(behind)
        for number, way in enumerate(ways):
            with _replaced(model, sae.layer, way):
                logits = model(input_ids=ids, use_cache=False).logits[0, text.start + 1 : -1].float()
            sums[number] += float(cross_entropy(logits, behind, reduction="sum"))
    clean, spliced, zeroed = (value / tokens for value in sums)
    return clean, spliced, zeroed


@contextmanager
def _replaced(model: Any, layer: int, way: Any) -> Iterator[None]:
    """The layer's output at every token but the first is what `way` makes of it; None: it stays as it is."""

    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        new = torch.cat([hidden[:, :1], way(hidden[:, 1:]).to(hidden.dtype)], dim=1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = decoder_layers(model)[layer].register_forward_hook(replace) if way else None
    try:
        yield
    finally:
        if handle:
            handle.remove()
