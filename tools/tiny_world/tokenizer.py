"""A byte-level BPE tokenizer with the special tokens and chat template of either family."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL: dict[str, dict[str, Any]] = {
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

ROLES = ("user", "assistant", "model", "system")
"""Words of the templates."""


def build_tokenizer(texts: Iterable[str], family: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer in which every word of `texts` is one token, and any other text is spelled by BPE.

    As in Llama 3's tokenizer, a word that is in the vocabulary as a whole is taken as it is (`ignore_merges`).
    Every byte is in the vocabulary, so any text can be encoded.

    Raises:
        ValueError: if the words alone need more than `vocab_size`.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts = Counter(word for text in (*texts, *ROLES) for word, _ in split.pre_tokenize_str(text))
    pieces = train_pieces((word for word, _ in counts.most_common()), family, vocab_size - len(counts))
    learned = json.loads(pieces.to_str())["model"]
    words = [word for word, _ in counts.most_common() if word not in learned["vocab"]]
    if len(learned["vocab"]) + len(words) > vocab_size:
        raise ValueError(f"{len(words)} words and {len(learned['vocab'])} pieces are more than {vocab_size} tokens")
    vocab = learned["vocab"] | {word: len(learned["vocab"]) + at for at, word in enumerate(words)}
    pieces.model = models.BPE(vocab=vocab, merges=[tuple(merge) for merge in learned["merges"]], ignore_merges=True)
    return finished(pieces, family)


def train_pieces(texts: Iterable[str], family: str, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on `texts`, the family's special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_special(family),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def finished(tokenizer: Tokenizer, family: str) -> PreTrainedTokenizerFast:
    """With the family's special tokens and chat template.

    The end-of-turn token is the `eos_token`, as in instruction-tuned checkpoints; padding has a token of its own.
    """
    special = SPECIAL[family]
    tokenizer.add_special_tokens(_special(family))
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


def _special(family: str) -> list[str]:
    special = SPECIAL[family]
    return [special["pad"], special["bos"], special["eos"], *special["more"]]
