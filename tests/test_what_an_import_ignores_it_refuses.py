"""What a chat says of training or tools is refused where a transcript cannot hold it; remarks are reported."""

import json
from pathlib import Path
from typing import Any

import pytest

from esr_train.errors import InputError
from esr_train.interchange import import_file

USER, REPLY = {"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be brief."}


def read(folder: Path, format: Any, row: dict[str, Any]):
    good = {"messages": [USER, REPLY]}
    path = folder / "x"
    path.write_text(json.dumps([good, row]) if format == "normal" else f"{json.dumps(good)}\n{json.dumps(row)}\n")
    return import_file(path, format)


both = pytest.mark.parametrize("format", ["messages", "normal"])
CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
REFUSED: dict[str, dict[str, Any]] = {
    **{
        f"{key}={value} of the reply": {"messages": [USER, REPLY | {key: value}]}
        for key, value in [
            ("weight", 0),
            ("weight", 0.0),
            ("weight", 0.5),
            ("weight", False),
            ("weight", "1"),
            ("train", False),
            ("training", False),
            ("trainable", 0),
            ("train", "no"),
            ("weight", 2),
        ]
    },
    **{f"{key} of the prompt": {"messages": [USER | {key: 1}, REPLY]} for key in ("weight", "train", "training")},
    "weight of the system message": {"messages": [SYSTEM | {"weight": 1}, USER, REPLY]},
    "a tool call": {"messages": [USER, REPLY | {"tool_calls": CALL}]},
    "a tool call without text": {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALL}]},
    "a function call": {"messages": [USER, REPLY | {"function_call": {"name": "f"}}]},
    "a tool's answer": {"messages": [USER, REPLY, {"role": "tool", "content": "4", "tool_call_id": "1"}, REPLY]},
    "tools of the row": {"messages": [USER, REPLY], "tools": [{"type": "function"}]},
    "functions of the row": {"messages": [USER, REPLY], "functions": [{"name": "f"}]},
    "weight of the row": {"messages": [USER, REPLY], "weight": 0.1},
    "train of the row": {"messages": [USER, REPLY], "train": False},
    "loss mask of the row": {"messages": [USER, REPLY], "loss_mask": [0, 1]},
    "mask of a message": {"messages": [USER, REPLY | {"mask": True}]},
    "details of what is trained": {
        "messages": [USER, REPLY | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}]
    },
    "reasoning": {"messages": [USER, REPLY | {"reasoning_content": "Hm."}]},
    "thinking": {"messages": [USER, REPLY | {"thinking": "Hm."}]},
    "a refusal": {"messages": [USER, REPLY | {"refusal": "No."}]},
    "an image": {"messages": [USER | {"images": ["a.png"]}, REPLY]},
    "audio": {"messages": [USER, REPLY | {"audio": {"id": "1"}}]},
    "parts": {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "So."}]}]},
    "a developer's message": {"messages": [{"role": "developer", "content": "Be brief."}, USER, REPLY]},
    "a second round": {"messages": [USER, REPLY, USER, REPLY]},
    "a role that is none": {"messages": [USER, REPLY | {"role": ["assistant"]}]},
}


@both
@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_training_is_refused_with_its_place(tmp_path: Path, format: Any, name: str):
    where = "x, row 2 of the list: " if format == "normal" else "x:2: "
    with pytest.raises(InputError, match=where):
        read(tmp_path, format, REFUSED[name])


HONOURED: dict[str, dict[str, Any]] = {
    "the reply's weight 1": {"messages": [USER, REPLY | {"weight": 1}]},
    "the reply is trained": {"messages": [USER, REPLY | {"train": True, "training": True}]},
    "the prompt is not": {"messages": [SYSTEM | {"train": False}, USER | {"weight": 0}, REPLY]},
    "columns without a value": {
        "messages": [
            USER | {"name": None},
            REPLY | {"tool_calls": None, "weight": None, "refusal": None, "audio": None},
        ],
        "tools": [],
        "functions": None,
    },
}


@both
@pytest.mark.parametrize("name", HONOURED)
def test_what_says_the_same_is_read(tmp_path: Path, format: Any, name: str):
    (_, transcript), _ = read(tmp_path, format, HONOURED[name])
    assert (transcript.prompt, transcript.content) == ("How?", "So.")


@both
def test_remarks_are_left_out_and_reported_with_their_lines(tmp_path: Path, format: Any):
    row = {"messages": [USER | {"name": "Ann"}, REPLY], "score": 3, "dataset": "d"}
    _, report = read(tmp_path, format, row)
    assert report.problems == {
        "'name' of the user's message is left out": [2],
        "'score' of a row is left out": [2],
        "'dataset' of a row is left out": [2],
    }


def test_what_is_meant_is_said_how_to_say(tmp_path: Path):
    with pytest.raises(InputError, match=r"weight of the assistant is 0: all of a reply is trained and nothing else"):
        read(tmp_path, "messages", REFUSED["weight=0 of the reply"])
    with pytest.raises(InputError, match=r"the assistant's message has 'tool_calls', which a transcript cannot hold"):
        read(tmp_path, "messages", REFUSED["a tool call"])
