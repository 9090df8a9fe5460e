"""Talking to a steered model: the base beside an arm, in the terminal and on the page."""

import json
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer
from io import BytesIO, TextIOWrapper
from threading import Event, Thread

import pytest
import torch
from peft.tuners.lora import LoraLayer
from test_adapter_is_whole import LORA, adapted
from test_merge_equals_adapter import base, section  # noqa: F401

from esr_train.adapters import load_adapter
from esr_train.errors import InputError
from esr_train.models import context_length, load_model
from esr_train.steering.directions import Direction
from esr_train.steering.engine import Completion, Request, Sampling
from esr_train.transcript import SaeRef
from recipes.using import serving
from recipes.using.chat import Chat, talk
from recipes.using.serving import PATH, complete, handler, serve
from recipes.using.switch import LoadedSwitch, Queue

SAMPLING = Sampling(temperature=0.6, max_new_tokens=16)


@pytest.fixture
def opened(base, tmp_path, family) -> Chat:  # noqa: F811
    adapted(base, LORA, tmp_path / "adapter")
    width, norms = family.model.config.hidden_size, {3: 2.0, 5: 4.0}
    directions = {
        number: Direction(1, label, torch.eye(width)[number], 1.0, 10.0, SaeRef("sae", "0"), number)
        for number, label in ((3, "bread"), (5, "Wool and yarn"))
    }
    model = load_adapter(load_model(section(base)), tmp_path / "adapter")
    return Chat(LoadedSwitch(model, family.tokenizer), "tuned", directions, norms, SAMPLING)


def without_adapter(opened: Chat) -> Chat:
    switch = LoadedSwitch(opened.switch.model.unload(), opened.switch._engine.tokenizer)
    return Chat(switch, None, opened.directions, opened.thresholds, SAMPLING)


def test_both_answer_under_the_same_push_which_is_a_multiple_of_the_threshold(opened):
    plain, weak, strong = (opened.answers("how to dry wood", 3, strength) for strength in (0, 0.01, 3))
    assert [each.arm for each in strong] == ["base", "tuned"]
    assert len({each.text for each in plain}) == 2
    assert opened.answers("how to dry wood", None, 3) == plain
    assert plain != strong != weak
    alone = without_adapter(opened)
    assert alone.answers("how to dry wood", 3, 3) == strong[:1]


def test_a_direction_is_found_by_label_or_number_and_a_near_one_is_suggested(opened):
    assert [opened.find(name, "/list") for name in ("5", "wool AND yarn ", "bread")] == [5, 5, 3]
    with pytest.raises(InputError, match="Do you mean Wool and yarn"):
        opened.find("yarn", "/list")
    with pytest.raises(InputError, match="/list"):
        opened.find("", "/list")


def test_a_conversation_in_the_terminal(opened, capsys):
    talk(
        opened,
        ["/list", "/with nothing", "/at hard", "/at 2", "/with bread", "how to dry wood", "/off", "", "/quit", "more"],
    )
    said = capsys.readouterr().out
    assert "3: bread, 5: Wool and yarn" in said
    assert "nothing steers towards" in said
    assert "is no number" in said
    assert "base (steered towards bread at 2):" in said
    assert "tuned (steered towards bread at 2):" in said
    assert said.rstrip().endswith("not steered")


def test_the_page_answers_this_machine_and_refuses_what_it_cannot_read(opened):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(opened))
    Thread(target=server.serve_forever, daemon=True).start()

    def ask(
        method: str, path: str, body: object = None, kind: str = "application/json", length: str | None = None
    ) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        headers = {"Content-Type": kind, **({"Content-Length": length} if length else {})}
        connection.request(method, path, body if isinstance(body, str) else json.dumps(body), headers)
        reply = connection.getresponse()
        return reply.status, reply.read()

    try:
        assert b"<title>" in ask("GET", "/")[1]
        assert json.loads(ask("GET", "/directions")[1])["directions"] == [[3, "bread"], [5, "Wool and yarn"]]
        status, found = ask("POST", "/answer", {"prompt": "how to dry wood", "direction": "bread", "strength": 3})
        assert status == 200
        assert [each["text"] for each in json.loads(found)["answers"]] == [
            each.text for each in opened.answers("how to dry wood", 3, 3)
        ]
        long, deep = json.dumps({"prompt": "a" * 500_000}), "[" * 100_000
        asked = [{"prompt": "a", **each} for each in ({"direction": "gold"}, {"strength": "x"}, {"strength": None})]
        asked += [{"prompt": "a", "direction": 3, "strength": float(strength)} for strength in ("nan", "inf")]
        for wrong in ("{", {"prompt": " "}, {"prompt": "\ud800"}, *asked, [], long, deep):
            assert ask("POST", "/answer", wrong)[0] == 400
        assert b"longer than 200000 bytes" in ask("POST", PATH, long)[1]
        assert ask("POST", "/answer", {"prompt": "a"}, "application/json; charset=utf-8")[0] == 200
        for length in ("-1", "many"):
            assert ask("POST", PATH, {}, length=length)[0] == 400
        assert ask("POST", "/answer", {"prompt": "a"}, "text/plain")[0] == 400
        assert ask("GET", "/elsewhere")[0] == 404
        status, found = ask("POST", PATH, {"messages": [{"role": "user", "content": "dry " * 3000}]})
        assert status == 400
        assert b"Shorten the prompt" in found
        status, found = ask("POST", PATH, {"messages": [{"role": "user", "content": "how to dry wood"}]})
        assert status == 200
        assert (
            json.loads(found)["choices"][0]["message"]["content"] == opened.answers("how to dry wood", None, 1)[1].text
        )
        status, found = ask("POST", PATH, {"messages": []})
        assert status == 400
        assert json.loads(found)["error"]["type"] == "invalid_request_error"
    finally:
        server.shutdown()
        server.server_close()


def completed(chat: Chat, **asked: object) -> str:
    body = {"messages": [{"role": "user", "content": "how to dry wood"}], **asked}
    return complete(chat, json.dumps(body).encode())["choices"][0]["message"]["content"]


def test_a_request_chooses_its_steering_and_whether_the_adapter_resists_it(opened):
    for strength in (0, 3):
        push = {"direction": "bread", "strength": strength}
        plain, tuned = (each.text for each in opened.answers("how to dry wood", 3, strength))
        assert completed(opened, steering=push, resistance=0) == plain
        assert completed(opened, steering=push) == tuned
    vector = opened.directions[3].add(6.0).vector
    assert completed(opened, steering={"vector": vector.tolist(), "layer": 1}) == tuned


def test_in_between_the_adapter_is_at_work_with_a_share_of_its_strength_and_only_for_that_request(opened):
    def scales() -> set[float]:
        return {each.scaling["default"] for each in opened.switch.model.modules() if isinstance(each, LoraLayer)}

    (whole,) = scales()
    with opened.switch.at_work(0.25):
        assert scales() == {0.25 * whole}
    assert scales() == {whole}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"resistance": 1.5}, "resistance: "),
        ({"stream": True}, "stream: replies come whole"),
        ({"temperature": 1e308}, "temperature: "),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content: this is no text"),
        ({"steering": {"direction": "gold"}}, "nothing steers towards 'gold'. GET /directions names what there is."),
        ({"temperature": float("nan")}, "temperature: Input should be a finite number. `temperature` is 0 (greedy)"),
        ({"steering": {"vector": [float("inf")], "layer": 0}}, "steering.vector.0: Input should be a finite number."),
        ({"steering": {"direction": "bread", "strength": float("inf")}}, "steering.strength: Input should be a finite"),
        ({"max_tokens": 0}, "`max_tokens` is 1 or more"),
        ({"messages": None}, "`messages` is turns, such as [{"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "`role` is system, user or assistant."),
        ({"messages": [{"role": "user"}]}, "messages.0.content: it is missing. `content` is the turn's text."),
        ({"steering": {"direction": 1.5}}, "steering.direction: Input should be a valid"),
        ({"messages": [3]}, "messages.0: Input should be a valid dictionary"),
        ({"logprobs": 1}, "logprobs: there is no such key. Leave it out; there are messages, model, max_tokens"),
        ({"max_tokens": 0, "seed": -1}, "(2) seed: "),
        ({"steering": {}}, "either a direction or a vector"),
        ({"steering": {"vector": [1.0], "layer": 0}}, "a vector has "),
        (
            {"steering": {"direction": "bread", "towards": 1}},
            "steering.towards: there is no such key. Leave it out; there are direction, vector, layer, strength.",
        ),
        ({"stream": True}, "stream: "),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages: a conversation is one user's message"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_with_its_key(opened, asked, message):
    with pytest.raises(InputError) as error:
        completed(opened, **asked)
    assert message in str(error.value)


def test_without_an_adapter_there_is_no_resistance_to_set(opened):
    alone = without_adapter(opened)
    with pytest.raises(InputError, match="no adapter whose strength"):
        completed(alone, resistance=0.5)
    assert completed(alone, resistance=0)


class Slow:
    """Answers with the size of the batch, and not before it is let go on; refuses what asks for it."""

    layers = width = 1

    def __init__(self) -> None:
        self.begun, self.go_on = Event(), Event()

    def generate(self, requests, sampling, resistance):
        self.begun.set()
        self.go_on.wait(20)
        if any(request.prompt == "bad" for request in requests):
            raise InputError("a bad one")
        made = f"{len(requests)} at {resistance}"
        return [Completion(each.id, f"{each.prompt}: {made}", (), "stop", 0, 0) for each in requests]


def test_requests_that_come_meanwhile_are_answered_in_one_batch_if_they_agree():
    slow = Slow()
    queue, found = Queue(slow), {}

    def ask(prompt: str, resistance: float) -> None:
        try:
            found[prompt] = queue.ask(Request("", prompt), SAMPLING, resistance).text
        except InputError as error:
            found[prompt] = error.what

    asked = [("first", 1.0), ("a", 1.0), ("b", 1.0), ("half", 0.5), ("bad", 0.2), ("good", 0.2)]
    threads = [Thread(target=ask, args=each) for each in asked]
    threads[0].start()
    assert slow.begun.wait(20)
    for thread in threads[1:]:
        thread.start()
    while len(queue._waiting) < len(asked):
        pass
    slow.go_on.set()
    for thread in threads:
        thread.join(20)
    assert found == {
        "first": "first: 1 at 1.0",
        "a": "a: 2 at 1.0",
        "b": "b: 2 at 1.0",
        "half": "half: 1 at 0.5",
        "bad": "a bad one",
        "good": "good: 1 at 0.2",
    }


@pytest.mark.parametrize("port", [-1, 99_999])
def test_a_port_that_cannot_be_is_refused(opened, port):
    with pytest.raises(InputError, match="ports are 0 to 65535"):
        serve(opened, port)


def test_what_is_longer_than_the_models_context_is_refused_with_the_three_numbers(opened, capsys):
    long, most = [{"role": "user", "content": "dry " * 3000}], context_length(opened.switch.model)
    with pytest.raises(InputError) as error:
        completed(opened, messages=long)
    numbers = re.search(r"grow to (\d+) tokens \(a prompt of (\d+), a reply of up to (\d+)\)", str(error.value))
    total, prompt, reply = map(int, numbers.groups())
    assert prompt > 3000
    assert (total, reply) == (prompt + 16, 16)
    assert f"the model takes {most} here. Shorten the prompt" in str(error.value)
    lengthy = replace(opened, sampling=replace(SAMPLING, max_new_tokens=most))
    with pytest.raises(InputError, match=f"a reply of up to {most}"):
        completed(lengthy)
    assert completed(lengthy, max_tokens=16) == completed(opened)
    talk(opened, ["dry " * 3000, "how to dry wood"])
    said = capsys.readouterr().out
    assert f"the model takes {most} here" in said
    assert "tuned (not steered):" in said


@pytest.mark.parametrize("strength", ["1e300", "nan", "inf"])
def test_a_strength_that_nothing_can_be_generated_at_does_not_end_the_conversation(opened, capsys, strength):
    talk(opened, [f"/at {strength}", "/with bread", "how to dry wood", "/at 1", "how to dry wood"])
    said = capsys.readouterr().out
    assert ("is no number" in said) is (strength != "1e300")
    assert ("finite" in said) is (strength == "1e300")
    assert "tuned (steered towards bread at 1):" in said


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40])
def test_a_temperature_too_small_to_divide_by_is_greedy(opened, temperature):
    for more in ({}, {"top_p": 0.5}):
        assert completed(opened, temperature=temperature, seed=3, **more) == completed(opened, temperature=0)


@pytest.mark.parametrize("typed", [b"", b"/list", b"\xff\xfe dry?\n/list\n"])
def test_the_end_of_the_input_and_bytes_that_are_no_text_are_no_errors(opened, capsys, monkeypatch, typed):
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(typed), encoding="utf-8"))
    monkeypatch.setattr(serving, "open_chat", lambda *_: opened)
    monkeypatch.setattr(serving, "open_resources", lambda *_, **__: nullcontext())
    serving.chat(None, None, None)
    said = capsys.readouterr().out
    assert said.startswith("base and tuned; 2 directions.")
    assert ("3: bread, 5: Wool and yarn" in said) is bool(typed)


def test_ctrl_c_is_a_way_to_leave_a_conversation(opened, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "open_chat", lambda *_: opened)
    monkeypatch.setattr(serving, "open_resources", lambda *_, **__: nullcontext())
    for name, port in (("talk", None), ("serve", 0)):
        monkeypatch.setattr(serving, name, interrupt)
        serving.chat(None, None, port)


def test_a_request_may_say_that_it_wants_no_stream(opened):
    assert completed(opened, stream=False) == completed(opened)
