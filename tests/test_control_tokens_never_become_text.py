"""What a chat template writes is no part of what is said: stripped at the end of a reply, refused inside a message."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_gen.__main__ import main as data
from esr_train.errors import InputError
from esr_train.interchange import export_file, import_file, read_training_file
from esr_train.masking import IGNORED, label
from tests.conftest import Family

LLAMA = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow?<|eot_id|>"
LLAMA += "<|start_header_id|>assistant<|end_header_id|>\n\n"
GEMMA = "<bos><start_of_turn>user\nHow?<end_of_turn>\n<start_of_turn>model\n"
HEADS = {"llama": LLAMA, "gemma": GEMMA}

LLAMA_ENDS = [
    "<|eot_id|>",
    "<|eot_id|>\n",
    "<|eot_id|><|end_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|><|eot_id|>",
    "<|eot_id|><|finetune_right_pad_id|><|finetune_right_pad_id|>",
    "<|eot_id|>\n\n<|end_of_text|>\n",
    " <|eot_id|> ",
    "\n<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|reserved_special_token_0|>",
    "<|im_end|>\n",
    "<|im_end|>\n<|endoftext|>",
    "<|eot_id|></s>",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>",
    "<|eot_id|>" + "<|end_of_text|>" * 500,
    "<|eot_id|>" + "\n" * 500,
]
GEMMA_ENDS = [
    "<end_of_turn>",
    "<end_of_turn>\n",
    "<end_of_turn>\n<eos>",
    "<eos>",
    "<eos>\n",
    "<end_of_turn> ",
    "<end_of_turn>\n<end_of_turn>\n",
    "<end_of_turn><pad><pad><pad>",
    "<end_of_turn>\n<bos>",
    "<unused99>",
    "\n\n<end_of_turn>\n",
    "<|im_end|>",
]
ENDS = [*(("llama", end) for end in LLAMA_ENDS), *(("gemma", end) for end in GEMMA_ENDS)]
TOKENS = [
    *("<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>", "<|python_tag|>", "<|finetune_right_pad_id|>"),
    *("<|reserved_special_token_17|>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<unk>", "<unused3>"),
    *("<start_of_image>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<｜User｜>", "[/INST]", "</s>"),
]
ORDINARY = [
    "List.map f <| xs |> g",
    "x <|y|> z",
    "a <| b",
    "<||> and <|>",
    "if a<|b|>c then",
    "<| name |>",
    "<b>bold</b> and <i>it</i>",
    "<s>old</s> new",
    "<s>struck to the end</s>",
    "<start> of it",
    "a < bos > b",
    "[INSTALL] it",
    "<turn> left",
    "eot_id and end_of_turn",
    "<head>, <body>",
    "<!-- eos -->",
]


def write(path: Path, *pieces: tuple[bool, str]) -> Path:
    path.write_text(json.dumps({"segments": [{"label": label, "text": text} for label, text in pieces]}) + "\n")
    return path


@pytest.mark.parametrize("read", [lambda path: import_file(path, "segments")[0], read_training_file])
@pytest.mark.parametrize(("family", "end"), ENDS)
def test_a_run_of_control_tokens_and_white_space_ends_the_reply(tmp_path: Path, read: Any, family: str, end: str):
    path = write(tmp_path / "x.jsonl", (False, HEADS[family]), (True, f"Spiders.{end}"))
    (transcript,) = read(path)
    assert transcript.content == "Spiders."


@pytest.mark.parametrize(("family", "end"), ENDS)
def test_the_row_goes_out_again_with_its_own_end(tmp_path: Path, family: str, end: str):
    path = write(tmp_path / "x.jsonl", (False, HEADS[family] + "Webs. "), (True, f"Wait, no. Spiders.{end}"))
    export_file(tmp_path / "y.jsonl", import_file(path, "segments")[0], "segments")
    assert (tmp_path / "y.jsonl").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("end", ["<|eot_id|>\n", "<|end_of_text|>", "<|eot_id|><|eot_id|>", " <|eot_id|>"])
def test_one_real_end_of_turn_is_trained_and_nothing_that_is_spelled_out(tmp_path: Path, llama: Family, end: str):
    path = write(tmp_path / "x.jsonl", (False, LLAMA), (True, f"Smooth it.{end}"))
    (transcript,) = read_training_file(path)
    labels = [token for token in label(llama.tokenizer, transcript).labels if token != IGNORED]
    assert llama.tokenizer.decode(labels) == "Smooth it.<|eot_id|>"
    assert labels[-1] == llama.tokenizer.convert_tokens_to_ids("<|eot_id|>")


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("where", ["reply", "start of the reply", "detour", "prompt", "system", "split"])
def test_a_control_token_inside_a_message_is_refused_with_its_line(tmp_path: Path, token: str, where: str):
    head = LLAMA
    detour, reply = "The jib. ", "Wait, no. Smooth it."
    if where == "reply":
        reply = f"Wait, no.{token} Smooth it."
    elif where == "start of the reply":
        detour = f"{token}The jib. "
    elif where == "detour":
        detour = f"The {token} jib. "
    elif where == "prompt":
        head = LLAMA.replace("How?", f"How {token}?")
    elif where == "system":
        head = LLAMA.replace(
            "<|begin_of_text|>",
            f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe {token} brief.<|eot_id|>",
        )
    else:
        detour, reply = f"The jib. {token[:3]}", f"{token[3:]} Wait, no. Smooth it."
    path = write(tmp_path / "x.jsonl", (False, head + detour), (True, f"{reply}<|eot_id|>"))
    for read in (lambda: import_file(path, "segments"), lambda: read_training_file(path)):
        with pytest.raises(InputError, match=r"x\.jsonl:1: "):
            read()


@pytest.mark.parametrize("text", ORDINARY)
def test_text_that_looks_a_little_like_a_control_token_is_text(tmp_path: Path, text: str):
    path = write(tmp_path / "x.jsonl", (False, LLAMA.replace("How?", text)), (True, f"{text}<|eot_id|>"))
    (transcript,), report = import_file(path, "segments")
    assert (transcript.prompt, transcript.content, report.problems) == (text, text, {})


def test_a_reply_of_control_tokens_alone_is_empty(tmp_path: Path):
    path = write(tmp_path / "x.jsonl", (False, LLAMA), (True, " <|eot_id|>\n<|end_of_text|>"))
    with pytest.raises(InputError, match=r"x\.jsonl:1: the reply is empty"):
        import_file(path, "segments")


@pytest.mark.parametrize("format", ["messages", "normal"])
@pytest.mark.parametrize("token", ["<|eot_id|>", "<end_of_turn>", "<|im_end|>", "<eos>", "[/INST]"])
def test_control_tokens_in_chat_messages_are_reported(tmp_path: Path, format: Any, token: str):
    said = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": f"So.{token}"}]
    plain = {"messages": [said[0], {"role": "assistant", "content": "So."}]}
    rows = [plain, {"messages": said}]
    path = tmp_path / "x"
    path.write_text(json.dumps(rows) if format == "normal" else "\n".join(map(json.dumps, rows)))
    _, report = import_file(path, format)
    assert report.problems == {"control tokens in a message; they are taken for text, and trained as text": [2]}


def test_the_commands_say_it_in_a_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "x.jsonl", (False, LLAMA), (True, "Spiders.<|eot_id|> Wait"))
    assert data(["import", str(path), "--format", "segments", "--out", str(tmp_path / "out.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "x.jsonl:1: the control token <|eot_id|> stands inside a message" in said
    assert not (tmp_path / "out.jsonl").exists()
