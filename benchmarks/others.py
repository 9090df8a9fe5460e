"""Other libraries generating under steering, for `generate.py`: each as its documentation has it.

Libraries that can add a tensor of their caller's to a batch get one vector per row, as we do. steering-vectors has one
vector for a whole batch, so that rows with directions of their own come one after the other.

TransformerLens comes with sae-lens. The others belong in an environment of their own on top of the project's:

    pip install --no-deps nnsight greenlet websocket-client steering-vectors scikit-learn threadpoolctl joblib

steering-vectors asks for transformers before 5, but runs with 5.19 as well.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

Run = Callable[[], list[list[int]]]
"""Generates; returns every row's new tokens."""


class Batch:
    """Prompts padded on the left, and the vector of every row.

    Args:
        tokenizer: the model's.
        requests: with one additive intervention each, all at one layer.
        dtype: of the model, and so of the vectors.
    """

    def __init__(self, tokenizer: Any, requests: Sequence[Any], dtype: torch.dtype) -> None:
        from esr_train.template import encode_prompt

        rows = [encode_prompt(tokenizer, request.prompt, None, "")[0] for request in requests]
        width = max(map(len, rows))
        padded = [[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
        self.ids = torch.tensor(padded)
        self.mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        self.vectors = torch.stack([request.interventions[0].vector for request in requests]).to(dtype)
        self.layer = requests[0].interventions[0].layer
        self.width = width


def transformer_lens(path: str, model: Any, tokenizer: Any, batch: Batch, tokens: int) -> Run:
    """TransformerLens' bridge: a hook on `hook_out` of the block, one vector per row."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(path, tokenizer=tokenizer, dtype=model.dtype, device="cpu")
    bridge.eval()
    vectors = batch.vectors[:, None]

    def steer(states: torch.Tensor, hook: Any) -> torch.Tensor:
        return states + vectors

    def run() -> list[list[int]]:
        with torch.no_grad(), bridge.hooks(fwd_hooks=[(f"blocks.{batch.layer}.hook_out", steer)]):
            made = bridge.generate(
                batch.ids,
                attention_mask=batch.mask,
                padding_side="left",
                max_new_tokens=tokens,
                stop_at_eos=False,
                do_sample=False,
                verbose=False,
                return_type="tokens",
            )
        return made[:, batch.width :].tolist()

    return run


def nnsight(path: str, model: Any, tokenizer: Any, batch: Batch, tokens: int) -> Run:
    """nnsight: the layer's output is replaced at every step of a trace, one vector per row."""
    from nnsight import TransformersModel

    wrapped = TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    vectors, layer = batch.vectors[:, None], batch.layer
    fed = {"input_ids": batch.ids, "attention_mask": batch.mask}

    def run() -> list[list[int]]:
        with wrapped.generate(fed, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False) as tracer:
            for _ in tracer.iter[:tokens]:
                wrapped.model.layers[layer].output = wrapped.model.layers[layer].output + vectors
            made = tracer.result.save()
        return made[:, batch.width :].tolist()

    return run


def steering_vectors(path: str, model: Any, tokenizer: Any, batch: Batch, tokens: int) -> Run:
    """steering-vectors: a context around `model.generate`, one row after the other."""
    from steering_vectors import SteeringVector

    def run() -> list[list[int]]:
        made = []
        for ids, mask, vector in zip(batch.ids, batch.mask, batch.vectors, strict=True):
            alone = ids[mask.bool()][None]
            with SteeringVector({batch.layer: vector}, "decoder_block").apply(model):
                out = model.generate(
                    alone,
                    attention_mask=torch.ones_like(alone),
                    do_sample=False,
                    min_new_tokens=tokens,
                    max_new_tokens=tokens,
                )
            made.append(out[0, alone.shape[1] :].tolist())
        return made

    return run


LIBRARIES = {
    "transformer-lens": ("TransformerLens bridge, a vector per row", transformer_lens, True),
    "nnsight": ("nnsight, a vector per row", nnsight, True),
    "steering-vectors": ("steering-vectors, one row at a time", steering_vectors, False),
}
"""Package -> name of the variant, what makes it, and whether all rows go in one batch."""
