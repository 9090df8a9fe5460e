"""A byte-level BPE tokenizer with the special tokens and chat template of either family."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = {
    "llama": {
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "pad": "<|finetune_right_pad_id|>",
        "more": ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
    },
    "gemma": {
        "bos": "<bos>",
        "eos": "<end_of_turn>",
        "pad": "<pad>",
        "more": ["<start_of_turn>", "<eos>", "<unk>"],
    },
}


def build_tokenizer(texts: Iterable[str], family: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the BPE on `texts`. Every byte is in the vocabulary, so any text can be encoded.

    The end-of-turn token is the `eos_token`, as in instruction-tuned checkpoints; padding has a token of its own.
    """
    special = SPECIAL[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[special["pad"], special["bos"], special["eos"], *special["more"]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special["bos"],
        eos_token=special["eos"],
        pad_token=special["pad"],
        additional_special_tokens=special["more"],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = (Path(__file__).parent / "templates" / f"{family}.jinja").read_text()
    return fast
