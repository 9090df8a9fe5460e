"""On a CPU: log-probabilities of the trained tokens alone, and their gradient in the same pass over the vocabulary."""

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from esr_train.masking import IGNORED

TILE = 128
"""Tokens whose logits exist at once: few enough for the processor's cache, enough for a fast matrix product."""

SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""Fields of a config that scale the logits; models that have one keep TRL's head."""


def score_trained_tokens(model: Any, with_mean: bool = False, temperature: float = 1.0) -> None:
    """Give a model that has TRL's fused head one that is faster on a CPU, for calls with `fused_lm_head=True`.

    TRL's scores every position, trained or not, runs the head's product again in the backward pass and multiplies in
    float32; only its Triton kernels leave positions out. Here the head is frozen (LoRA never trains it), so a token's
    gradient is known with its log-probability, up to a factor that the loss decides. What is asked of TRL's head
    beyond that, it still does: other devices, a head that is trained, scaled logits, experts' auxiliary loss.

    Args:
        model: inside PEFT, after one of TRL's trainers has patched it.
        with_mean: whether the trainer logs the mean of each token's logits, too.
        temperature: what the logits are divided by.
    """
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False) or any(getattr(config, name, None) for name in SCALES):
        return
    fused = model.forward
    softcap = getattr(config, "final_logit_softcapping", None)

    @functools.wraps(type(model).forward)
    def forward(self: Any, *arguments: Any, fused_lm_head: bool = False, **options: Any) -> Any:
        head = self.get_output_embeddings()
        if not fused_lm_head or head.weight.device.type != "cpu" or head.weight.requires_grad:
            return fused(*arguments, fused_lm_head=fused_lm_head, **options)
        labels, options["use_cache"] = options.pop("labels")[:, 1:], False
        hidden = self.base_model(*arguments, **options).last_hidden_state[:, :-1]
        return _output(hidden, head, labels, (softcap, with_mean, temperature))

    model.forward = types.MethodType(forward, model)


def _output(
    hidden: torch.Tensor, head: Any, labels: torch.Tensor, settings: tuple[float | None, bool, float]
) -> FusedCausalLMOutput:
    """What the trainer reads, [rows, positions] each and zero where there is no label.

    Args:
        hidden: [rows, positions, d_model].
        labels: [rows, positions].
        settings: the last arguments of `TokenScores`.
    """
    trained = labels != IGNORED
    with maybe_gather_lm_head_ctx(head.weight, head.bias):
        scores = TokenScores.apply(hidden[trained], head.weight, head.bias, labels[trained], *settings)
    # Scattered, the output hangs on the model even where nothing is trained.
    spread = [score.new_zeros(trained.shape).masked_scatter(trained, score) for score in scores]
    log_probs, entropy, is_top1, mean = spread
    loss = -log_probs.sum() / trained.sum().clamp(min=1)
    return FusedCausalLMOutput(
        loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1, mean_logits=mean, label_mask=trained
    )


class TokenScores(torch.autograd.Function):
    """Log-probability of each token, entropy of its distribution, whether it is the likeliest, and its mean logit.

    Arguments: hidden states [tokens, d_model], a frozen head's weight [vocabulary, d_model] and bias or None, token
    ids [tokens], the bound of the logits' tanh or None, whether the mean logit is wanted (0 otherwise), and what the
    logits are divided by. Returns float32 but for one bool, [tokens] each; only the log-probabilities have a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
        with_mean: bool,
        temperature: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        log_probs, entropy, mean = (torch.zeros(len(hidden)) for _ in range(3))
        is_top1 = torch.empty(len(hidden), dtype=torch.bool)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), TILE):
            tile = slice(start, start + TILE)
            logits = F.linear(hidden[tile].to(weight.dtype), weight, bias).float()
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            scaled = logits if temperature == 1 else logits / temperature
            if with_mean:
                mean[tile] = scaled.mean(dim=-1)
            logs = torch.log_softmax(scaled, dim=-1)
            target = targets[tile, None]
            log_probs[tile] = logs.gather(1, target).squeeze(1)
            # The first of several that are equally likely, of which bfloat16 has many.
            is_top1[tile] = logs.argmax(dim=-1) == targets[tile]
            probs = logs.exp()
            entropy[tile] = -torch.linalg.vecdot(probs, logs)
            if gradient is not None:
                slope = probs.neg_().scatter_add_(1, target, probs.new_ones(target.shape))
                if temperature != 1:
                    slope /= temperature
                if softcap is not None:
                    slope *= 1 - (logits / softcap) ** 2
                gradient[tile] = slope.to(weight.dtype) @ weight
        ctx.mark_non_differentiable(entropy, is_top1, mean)
        ctx.save_for_backward(gradient)
        return log_probs, entropy, is_top1, mean

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0].unsqueeze(1)).to(gradient.dtype), None, None, None, None, None, None
