"""Small models of many families: the true architecture with random weights, a tokenizer and template of their kind.

The templates are our own, in the shape of the families' released ones: the same tokens, white space and switches.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.conftest import TEXTS

WIDTH, LAYERS = 32, 3


@dataclass(frozen=True)
class Kind:
    """A family.

    Args:
        model: class of its models in transformers; `<that>Config` unless `config` says otherwise.
        template: its chat template.
        special: the special tokens of its vocabulary that are no BOS, EOS or padding.
        declared: the tokenizer's BOS, EOS and padding token.
        pieces: how text is split: bytes, or sentencepiece's spaces (Gemma's, or Mistral's with one in front).
        plain: added tokens that are not special.
        config: what its configuration has beside the common sizes.
        settings: of the recipe's `model`.
        end: what ends a reply.
        before: what stands between the prompt and a reply that is generated.
    """

    model: str
    template: str
    declared: tuple[str | None, str, str | None]
    end: str
    before: str
    special: tuple[str | AddedToken, ...] = ()
    pieces: Literal["bytes", "gemma", "mistral"] = "bytes"
    plain: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


NOT_SYSTEM = "{{ raise_exception('there is no system role') if messages[0].role == 'system' }}"
IM = ("<|im_start|>", "<|im_end|>")
BESIDE = "<|im_end|>\n<|im_start|>assistant\n"
THINK = "<think>\n\n</think>\n\n"

LLAMA3 = (
    "{{ bos_token }}{%- if messages[0].role == 'system' %}{%- set said = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set said = '' %}{%- endif %}"
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}"
    "{{- 'Today Date: ' + date_string + '\n\n' + said + '<|eot_id|>' }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def chatml(default: str | None = None) -> str:
    """ChatML, with a system message where the conversation has none."""
    first = (
        "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\n" + default + "<|im_end|>\n' }}{% endif %}"
        if default
        else ""
    )
    return (
        "{% for m in messages %}" + first + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


SMOLLM3 = (
    "{%- if messages[0].role == 'system' %}{%- set said = messages[0].content %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set said = 'You are a small model.' %}{%- endif %}"
    "{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}"
    "{%- set empty = '' if enable_thinking else '<think>\n\n</think>\n' %}"
    "{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' }}"
    "{{- ('/think' if enable_thinking else '/no_think') + '\n\n## Custom Instructions\n\n' + said + '<|im_end|>\n' }}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- else %}{%- generation %}{{- '<|im_start|>assistant\n' + empty + m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{%- endgeneration %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' + empty }}{%- endif %}"
)
QWEN3 = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif %}{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' %}{%- set content = m.content %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') }}{%- else %}{{- content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set said = messages[0].content + '\n\n' %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set said = '' %}{%- endif %}{{- bos_token }}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST] ' + said + m.content + '[/INST]' }}"
    "{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA_TURN = (
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ said if loop.first }}{{ m.content | trim + '<end_of_turn>\n' }}"
)
GEMMA_END = "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
GEMMA2 = "{{ bos_token }}" + NOT_SYSTEM + "{% set said = '' %}{% for m in messages %}" + GEMMA_TURN + GEMMA_END
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set said = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}{% for m in messages %}"
    + GEMMA_TURN
    + GEMMA_END
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') }}"
    "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

EAGER = {"attn_implementation": "eager"}
WINDOW = {"sliding_window": 16}
GEMMA = {
    "declared": ("<bos>", "<eos>", "<pad>"),
    "end": "<end_of_turn>",
    "before": "<end_of_turn>\n<start_of_turn>model\n",
    "special": ("<unk>", "<start_of_turn>", "<end_of_turn>"),
    "pieces": "gemma",
}
SMOL = {"declared": ("<|im_start|>", "<|im_end|>", "<|im_end|>"), "end": "<|im_end|>", "special": ("<|endoftext|>",)}
QWEN = {"declared": (None, "<|im_end|>", "<|endoftext|>"), "end": "<|im_end|>", "special": ("<|im_start|>",)}
THINKS = {"template_kwargs": {"enable_thinking": True}}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

FAMILIES: dict[str, Kind] = {
    "Llama 3.x": Kind(
        "LlamaForCausalLM",
        LLAMA3,
        ("<|begin_of_text|>", "<|eot_id|>", None),
        "<|eot_id|>",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
    ),
    "SmolLM2": Kind("LlamaForCausalLM", chatml("You are a small model."), before=BESIDE, **SMOL),
    "SmolLM3": Kind(
        "SmolLM3ForCausalLM",
        SMOLLM3,
        ("<|begin_of_text|>", "<|im_end|>", "<|im_end|>"),
        "<|im_end|>",
        BESIDE + "<think>\n\n</think>\n",
        ("<|im_start|>", "<|end_of_text|>"),
        plain=("<think>", "</think>"),
        config={"no_rope_layers": [1, 1, 0]},
    ),
    "Mistral": Kind(
        "MistralForCausalLM",
        MISTRAL,
        ("<s>", "</s>", None),
        "</s>",
        "[/INST]",
        ("<unk>", "[INST]", "[/INST]"),
        "mistral",
        config=WINDOW,
    ),
    "Qwen2.5": Kind("Qwen2ForCausalLM", chatml("You are a large model."), before=BESIDE, **QWEN),
    "Qwen3, thinking off": Kind(
        "Qwen3ForCausalLM", QWEN3, before=BESIDE + THINK, plain=("<think>", "</think>"), **QWEN
    ),
    "Qwen3, thinking on": Kind(
        "Qwen3ForCausalLM", QWEN3, before=BESIDE, plain=("<think>", "</think>"), settings=THINKS, **QWEN
    ),
    "Gemma-2": Kind("Gemma2ForCausalLM", GEMMA2, config=WINDOW, settings=EAGER, **GEMMA),
    "Gemma-3": Kind("Gemma3ForCausalLM", GEMMA3, config=WINDOW, **GEMMA),
    "Gemma-3, multimodal": Kind("Gemma3ForConditionalGeneration", GEMMA3, config=WINDOW, **GEMMA),
    "OLMo-2": Kind(
        "Olmo2ForCausalLM",
        OLMO2,
        ("<|endoftext|>", "<|endoftext|>", "<|pad|>"),
        "<|endoftext|>",
        "\n<|assistant|>\n",
    ),
    "Phi-4": Kind(
        "Phi3ForCausalLM",
        PHI4,
        ("<|endoftext|>", "<|im_end|>", "<|dummy_85|>"),
        "<|im_end|>",
        "<|im_end|><|im_start|>assistant<|im_sep|>",
        tuple(AddedToken(name, lstrip=True, rstrip=True) for name in (*IM, "<|im_sep|>")),
    ),
}
"""Every family of `docs/families.md`."""


def make_model(kind: Kind, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model with random weights, large enough that each token matters, as its family's class makes it."""
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **kind.config,
    }
    torch.manual_seed(0)
    name = kind.model.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    make: Callable[..., Any] = getattr(transformers, f"{name}Config")
    if "Conditional" in kind.model:
        text = transformers.Gemma3TextConfig(**sizes)
        config = make(text_config=text.to_dict(), vision_config=VISION, mm_tokens_per_image=1)
    else:
        config = getattr(transformers, f"{name}TextConfig", make)(**sizes)
    model: PreTrainedModel = getattr(transformers, kind.model)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    return model


def make_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """A tokenizer with the family's tokens, declared as in a release."""
    pieces = Tokenizer(models.BPE())
    _split(pieces, kind)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind.pieces == "bytes" else []
    trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    pieces.train_from_iterator(TEXTS, trainer)
    if kind.pieces != "bytes":
        learned = json.loads(pieces.to_str())["model"]
        spelled = [f"<0x{byte:02X}>" for byte in range(256)]
        vocabulary = {piece: number for number, piece in enumerate(spelled)}
        vocabulary |= {piece: 256 + number for piece, number in learned["vocab"].items()}
        pieces.model = models.BPE(vocabulary, [tuple(merge) for merge in learned["merges"]], byte_fallback=True)
    bos, eos, pad = kind.declared
    pieces.add_special_tokens(list(kind.special))
    pieces.add_special_tokens([name for name in dict.fromkeys(kind.declared) if name])
    pieces.add_tokens(list(kind.plain))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = kind.template
    return tokenizer


def _split(pieces: Tokenizer, kind: Kind) -> None:
    if kind.pieces == "bytes":
        pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pieces.decoder = decoders.ByteLevel()
        return
    strip = [decoders.Strip(" ", 1, 0)] if kind.pieces == "mistral" else []
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if kind.pieces == "gemma":
        pieces.normalizer = normalizers.Replace(" ", "▁")
        pieces.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    else:
        pieces.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
