"""An SAE for a tiny model's residual stream, trained by sae-lens, with a topic label for its latents."""

from collections.abc import Iterator
from pathlib import Path

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAE, SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from tqdm import tqdm
from transformers import PreTrainedModel

from tools.tiny_world.architecture import SAE_LAYER

LATENTS = 1024
FROM_ANSWERS = 624
RATE = 2e-4
ACTIVE = 16
SAMPLES = 1_000_000
BATCH = 1024
ALIGNED = 0.35
PURITY = 0.1
"""Least cosine with a topic's direction, and least share of activation on it, of a latent with that topic's label."""


@torch.no_grad()
def residuals(model: PreTrainedModel, rows: list[list[int]], description: str) -> list[torch.Tensor]:
    """The output of decoder layer `SAE_LAYER` for every row, BOS left out: [tokens - 1, d_model] each."""
    found: list[torch.Tensor] = []
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    result: list[torch.Tensor | None] = [None] * len(rows)
    for start in tqdm(range(0, len(order), 64), desc=description, unit="batch", mininterval=2):
        chosen = order[start : start + 64]
        width = max(len(rows[i]) for i in chosen)
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in chosen])
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in chosen])
        hidden = model.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for i, states in zip(chosen, hidden[SAE_LAYER + 1], strict=True):
            result[i] = states[1 : len(rows[i])].clone()
    found.extend(states for states in result if states is not None)
    return found


def train_sae(answers: list[torch.Tensor], seed: int, name: str) -> BatchTopKTrainingSAE:
    """Train a BatchTopK SAE on the states of `answers`, [tokens, d_model] each, drawn at random with a seed.

    Some decoder rows start at the mean state of one answer (less the mean of all) instead of at random: what whole
    answers have in common is a small share of the variance, and from random rows most of it is split over words.

    It is trained on states scaled to a mean norm of sqrt(d_model), where sae-lens' defaults work well; the scale
    is folded into the weights afterwards.
    """
    torch.manual_seed(seed)
    states = torch.cat(answers)
    d_model = states.shape[1]
    scale = d_model**0.5 / float(states.norm(dim=-1).mean())
    config = BatchTopKTrainingSAEConfig(
        d_in=d_model,
        d_sae=LATENTS,
        k=ACTIVE,
        metadata=SAEMetadata(model_name=name, hook_name=f"blocks.{SAE_LAYER}.hook_resid_post", prepend_bos=True),
    )
    sae = BatchTopKTrainingSAE(config)
    sae.b_dec.data = states.mean(dim=0) * scale
    means = torch.stack([answer.mean(dim=0) for answer in answers[:FROM_ANSWERS]]) - states.mean(dim=0)
    rows = torch.nn.functional.normalize(means, dim=1) * sae.W_dec.data.norm(dim=1).mean()
    sae.W_dec.data[:FROM_ANSWERS], sae.W_enc.data[:, :FROM_ANSWERS] = rows, rows.T
    steps = SAMPLES // BATCH
    settings = SAETrainerConfig(
        total_training_samples=SAMPLES, train_batch_size_samples=BATCH, lr=RATE, lr_end=RATE / 10, device="cpu",
        lr_warm_up_steps=50, lr_decay_steps=steps // 3, dead_feature_window=steps // 5,
    )  # fmt: skip
    sae = SAETrainer(settings, sae, _draws(states * scale, seed)).fit()
    sae.W_enc.data *= scale
    sae.W_dec.data /= scale
    sae.b_dec.data /= scale
    sae.topk_threshold /= scale  # sae-lens compares activation times decoder norm with it
    return sae


def _draws(states: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(states), generator=generator).split(BATCH):
            if len(chosen) == BATCH:
                yield states[chosen]


def save_sae(sae: BatchTopKTrainingSAE, folder: Path) -> SAE:
    """Save in sae-lens' inference format with bfloat16 weights, and load it back as a user will."""
    from safetensors.torch import load_file, save_file

    weights, _ = sae.save_inference_model(folder)
    save_file({key: value.to(torch.bfloat16) for key, value in load_file(weights).items()}, weights)
    return SAE.load_from_disk(str(folder))


@torch.no_grad()
def explained_variance(sae: SAE, states: torch.Tensor) -> float:
    """Share of the variance of `states` that the reconstruction explains."""
    error = (states - sae.decode(sae.encode(states))).pow(2).sum()
    return float(1 - error / (states - states.mean(dim=0)).pow(2).sum())


@torch.no_grad()
def label_latents(sae: SAE, states: list[torch.Tensor], owners: list[str]) -> list[dict[str, object]]:
    """Label a latent with the topic that its decoder row points to, best aligned first.

    A topic's direction is the mean of its states less the mean of all. Latents that fire on one word of a topic
    are as selective as those that stand for the topic, but steer to that word alone; the direction tells them
    apart.

    Args:
        sae: the inference SAE.
        states: [tokens, d_model] per answer.
        owners: the topic of each answer; topics must occur equally often.

    Returns:
        Rows of a Neuronpedia-like export: `index`, `description` (the topic), `cosine` (decoder row with the
        topic's direction), `purity` (share of the latent's activation on that topic).
    """
    names = sorted(set(owners))
    sums = torch.zeros(len(names), sae.cfg.d_in)
    mass = torch.zeros(len(names), sae.cfg.d_sae)
    for each, owner in zip(states, owners, strict=True):
        sums[names.index(owner)] += each.mean(dim=0)
        mass[names.index(owner)] += sae.encode(each).sum(dim=0)
    unit = torch.nn.functional.normalize
    directions = unit(sums / len(states) * len(names) - sums.sum(dim=0) / len(states), dim=1)
    cosine, topic = (directions @ unit(sae.W_dec.float(), dim=1).T).max(dim=0)
    purity = (mass / mass.sum(dim=0).clamp_min(1e-9))[topic, torch.arange(sae.cfg.d_sae)]
    return [
        {
            "index": str(latent),
            "description": names[int(topic[latent])],
            "cosine": round(float(cosine[latent]), 3),
            "purity": round(float(purity[latent]), 3),
        }
        for latent in cosine.argsort(descending=True).tolist()
        if cosine[latent] >= ALIGNED and purity[latent] >= PURITY
    ]
