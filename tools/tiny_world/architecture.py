"""The two tiny models' shapes: one Llama, one Gemma-2, about two million parameters each."""

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SAE_LAYER = 3
"""The SAE reads and steers the output of this decoder layer (of six, counted from 0)."""


def build_model(
    family: str, tokenizer: PreTrainedTokenizerFast, *, width: int = 160, layers: int = 6
) -> LlamaForCausalLM | Gemma2ForCausalLM:
    """A model with random weights; seed torch before the call.

    Args:
        family: `llama` or `gemma` (Gemma-2: soft-capping, sliding window on every other layer).
        tokenizer: gives vocabulary size and special tokens.
        width: of the residual stream; a multiple of 32.
        layers: decoder layers.
    """
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": width * 5 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="eager"))  # type: ignore[call-arg]
    config = Gemma2Config(  # type: ignore[call-arg]
        **shape,
        query_pre_attn_scalar=32,
        sliding_window=64,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)
