"""Chat templates of several kinds, each with a small tokenizer that knows its tokens."""

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import TEXTS


@dataclass(frozen=True)
class Kind:
    """A kind of template.

    Args:
        each: Jinja for one message `m`.
        special: the special tokens that the vocabulary has beside Llama's.
        ends: Jinja behind the messages where no reply is asked for.
        begins: Jinja behind the messages where a reply is asked for.
        starts: Jinja before the messages.
        declared: the tokenizer's bos, eos and pad token.
        plain: added tokens that are not special.
    """

    each: str
    special: tuple[str | AddedToken, ...]
    ends: str = ""
    begins: str = ""
    starts: str = ""
    declared: tuple[str | None, str | None, str | None] = (None, None, None)
    plain: tuple[str, ...] = ()

    @property
    def template(self) -> str:
        """The whole template."""
        asked = f"{{% if add_generation_prompt %}}{self.begins}{{% else %}}{self.ends}{{% endif %}}"
        return f"{self.starts}{{% for m in messages %}}{self.each}{{% endfor %}}{asked}"


CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
THINK = "<think>\n\n</think>\n\n"
EMPTY = CHATML.replace("{{ m.content", f"{{{{ {THINK!r} if m.role == 'assistant' }}}}{{{{ m.content")
NO_SYSTEM = "{{ raise_exception('System role not supported') if m.role == 'system' }}"
INSTRUCT = NO_SYSTEM + "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}"
ROWS = "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")

KINDS = {
    "ChatML": Kind(CHATML, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), "", "<|im_start|>assistant\n"),
    "ChatML as it comes out of GGUF": Kind(
        CHATML,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        begins="<|im_start|>assistant\n",
        starts=SYSTEM,
        declared=("<|im_start|>", "<|im_end|>", "<|im_end|>"),
    ),
    "ChatML with Llama 3's end of turn in the vocabulary": Kind(
        CHATML,
        ("<|im_start|>", "<|im_end|>", "<|eot_id|>"),
        begins="<|im_start|>assistant\n",
        declared=(None, "<|eot_id|>", None),
    ),
    "ChatML whose tokens are not special": Kind(
        CHATML, ("<|endoftext|>",), begins="<|im_start|>assistant\n", plain=("<|im_start|>", "<|im_end|>")
    ),
    "ChatML that leaves reasoning out": Kind(
        "<|im_start|>{{ m.role }}\n"
        f"{{{{ {THINK!r} if m.role == 'assistant' and loop.last }}}}"
        "{{ m.content }}<|im_end|>\n",
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        begins=f"<|im_start|>assistant\n{{{{ {THINK!r} if enable_thinking is defined and not enable_thinking }}}}",
        plain=("<think>", "</think>"),
        declared=(None, "<|im_end|>", "<|endoftext|>"),
    ),
    "ChatML that leaves reasoning empty only in training": Kind(
        EMPTY,
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        begins="<|im_start|>assistant\n",
        plain=("<think>", "</think>"),
    ),
    "ChatML that begins reasoning and leaves it empty in training": Kind(
        EMPTY,
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        begins="<|im_start|>assistant\n<think>\n",
        plain=("<think>", "</think>"),
    ),
    "instructions in brackets": Kind(
        INSTRUCT,
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        starts="{{ bos_token }}",
        declared=("<s>", "</s>", None),
    ),
    "instructions with a space before the end": Kind(
        "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content | trim }} </s>{% endif %}",
        ("<unk>", "<s>", "</s>"),
        declared=("<s>", "</s>", None),
    ),
    "a system message in the prompt's turn": Kind(
        "{% if m.role == 'system' %}{% set ns.said = m.content + '\n\n' %}"
        "{% elif m.role == 'user' %}[INST] {{ ns.said }}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}",
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        starts="{{ bos_token }}{% set ns = namespace(said='') %}",
        declared=("<s>", "</s>", "</s>"),
    ),
    "a system message that training leaves out": Kind(
        "{% if m.role == 'user' %}[INST] {{ messages[0].content + '\n\n' if loop.last and loop.length == 2 }}"
        "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}",
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        starts="{{ bos_token }}",
        declared=("<s>", "</s>", None),
    ),
    "a space before the reply only under a system message": Kind(
        "{{ m.role }}:{{ ' ' if messages[0].role == 'system' and m.role == 'assistant' }}{{ m.content }}</s>",
        ("</s>", "<pad>"),
        begins="assistant:",
    ),
    "a token for every role": Kind(
        ROWS,
        ("<|endoftext|>", *(AddedToken(f"<|{name}|>", rstrip=True) for name in ("system", "user", "assistant", "end"))),
        begins="<|assistant|>\n",
        ends="{{ eos_token }}",
        declared=("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    ),
    "one token that ends turns and is declared as BOS": Kind(
        "<|{{ m.role }}|>\n{{ m.content }}<|endoftext|>\n",
        ("<|endoftext|>", "<|pad|>"),
        begins="<|assistant|>\n",
        declared=("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    ),
    "one token that begins conversations and ends turns": Kind(
        "<|{{ m.role }}|>\n{{ m.content }}<|endoftext|>\n",
        ("<|endoftext|>", "<|pad|>"),
        begins="<|assistant|>\n",
        starts="{{ bos_token }}",
        declared=("<|endoftext|>", "<|endoftext|>", None),
    ),
    "roles in words": Kind(
        "{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}",
        ("<s>", "</s>", "<pad>"),
        starts="{{ bos_token }}",
        begins="assistant:",
        declared=("<s>", "</s>", "<pad>"),
    ),
    "the date": Kind(
        HEADER,
        (*LLAMA, "<|end_of_text|>", "<|finetune_right_pad_id|>"),
        starts="{{ bos_token }}{% set now = strftime_now('%d %b %Y') %}{% set s = messages[0].role == 'system' %}"
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: {{ now }}\n\n"
        "{{ messages[0].content | trim if s }}<|eot_id|>{% set messages = messages[1:] if s else messages %}",
        begins="<|start_header_id|>assistant<|end_header_id|>\n\n",
        declared=("<|begin_of_text|>", "<|eot_id|>", None),
    ),
}
"""Templates under which a model can be trained and asked."""

BEGIN_CHATML, BEGIN_HEADER = "<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"
BOS = ("<|begin_of_text|>", None, None)
IM = ("<|im_start|>", "<|im_end|>")

UNUSABLE = {
    "no end-of-turn token": (Kind("<|im_start|>{{ m.content }}\n", IM, begins="<|im_start|>"), "never learn to stop"),
    "an end of turn that is not in the vocabulary": (Kind("{{ m.content }}[over]", ("<s>",)), "ends a reply with"),
    "text before the end of turn": (Kind("{{ m.content }} Over.</s>", ("</s>",)), "ends a reply with"),
    "no way to ask for a reply": (Kind(CHATML, IM), "begins a reply with"),
    "a space before the reply": (
        Kind("{{ m.role }}: {{ m.content }}</s>", ("</s>",), begins="assistant: "),
        "last space becomes one token",
    ),
    "reasoning that only generation begins": (
        Kind(CHATML, IM, begins=BEGIN_CHATML + "<think>\n"),
        r"begins a reply with .* in training and with .*<think>",
    ),
    "reasoning that only training begins": (
        Kind(CHATML.replace("{{", f"{{{{ {THINK!r} if m.role == 'assistant' }}}}{{{{", 2), IM, begins=BEGIN_CHATML),
        "begins a reply with",
    ),
    "two BOS": (Kind(HEADER, LLAMA, "", BEGIN_HEADER, "{{ bos_token * 2 }}", BOS), "2 BOS tokens instead of one"),
    "a BOS before each header": (
        Kind("{{ bos_token }}" + HEADER, LLAMA, "", "{{ bos_token }}" + BEGIN_HEADER, "", BOS),
        "2 BOS tokens instead of one",
    ),
    "a BOS behind other text": (
        Kind(HEADER, LLAMA, "", BEGIN_HEADER, "\n{{ bos_token }}", BOS),
        "1 BOS tokens instead of one at the start",
    ),
    "messages in capitals": (Kind("{{ m.content | upper }}<|im_end|>", IM), "rewrites messages"),
    "each message twice": (Kind("{{ m.content * 2 }}<|im_end|>", IM), "rewrites messages"),
    "the last message only": (
        Kind("{% if loop.last %}{{ m.content }}<|im_end|>{% endif %}", IM),
        "rewrites messages",
    ),
    "a mistake in its Jinja": (Kind("{{ m.content", IM), "refuses this conversation"),
    "an error when it is used": (Kind("{{ m.content + 1 }}", IM), "refuses this conversation"),
}
"""Templates that must be refused, and words of the reason."""


def make_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the kind's tokens, as a released one would declare them."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    pieces.train_from_iterator(TEXTS, trainer)
    pieces.add_special_tokens(list(kind.special))
    pieces.add_tokens(list(kind.plain))
    bos, eos, pad = kind.declared
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = kind.template
    return tokenizer
