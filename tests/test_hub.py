"""A finished adapter goes to a hub that listens on this machine, with our card and without what is private."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from training_world import recipe, write_world

from esr_train.errors import InputError, RunError
from esr_train.training.settings import trainer_config
from esr_train.training.trainer import train

PUSH = {"num_train_epochs": 1, "push_to_hub": True, "hub_model_id": "me/adapter", "hub_private_repo": True}


@dataclass
class Hub:
    """What was created and uploaded; `refuses` is the start of a path that is answered with an error."""

    created: list[dict] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    refuses: str = "nothing"


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.startswith(hub.refuses):
                self._answer({"error": "not allowed"}, 403)
            elif self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                self._answer({"url": "https://huggingface.co/me/adapter"})
            elif self.path.endswith("/preupload/main"):
                asked = json.loads(body)["files"]
                self._answer({"files": [{**each, "uploadMode": "regular", "shouldIgnore": False} for each in asked]})
            else:
                entries = [json.loads(line) for line in body.splitlines()]
                sent = [entry["value"] for entry in entries if entry.get("key") == "file"]
                hub.files.update({each["path"]: base64.b64decode(each["content"]) for each in sent})
                self._answer({"commitOid": "0" * 40, "commitUrl": "https://huggingface.co/me/adapter/commit/0"})

        def _answer(self, value: dict, status: int = 200) -> None:
            said = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub(tmp_path, llama, monkeypatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, llama)
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    yield found
    server.shutdown()
    server.server_close()


def test_the_finished_adapter_is_uploaded_with_our_card_and_nothing_private(hub):
    section = recipe(args={**PUSH, "save_total_limit": 1})
    folder = train(section, "tuned", section.directory)
    assert [(each["organization"], each["name"], each["visibility"]) for each in hub.created] == [
        ("me", "adapter", "private")
    ]
    assert (folder / "checkpoints").is_dir()
    local = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert hub.files == local
    assert {"adapter_model.safetensors", "adapter_config.json", "provenance.json", "README.md"} <= hub.files.keys()
    card = hub.files["README.md"].decode()
    assert "trained to notice activation steering" in card
    assert "hf_none" not in b"".join(hub.files.values()).decode(errors="ignore")


def test_an_upload_that_failed_is_tried_again_and_nothing_is_trained_twice(hub):
    section = recipe(args=PUSH)
    hub.refuses = "/api/models"
    with pytest.raises(RunError, match=r"adapter is finished, but was not uploaded to 'me/adapter' .*403.*tries again"):
        train(section, "tuned", section.directory)
    weights = section.directory / "adapter" / "tuned" / "adapter_model.safetensors"
    written = weights.stat().st_mtime_ns
    hub.refuses = "nothing"
    train(section, "tuned", section.directory)
    assert hub.files["adapter_model.safetensors"] == weights.read_bytes()
    assert weights.stat().st_mtime_ns == written


def test_a_hub_that_does_not_let_us_in_is_found_out_before_training(hub):
    hub.refuses = "/api/repos"
    section = recipe(args=PUSH)
    with pytest.raises(InputError, match=r"train.args.push_to_hub: the hub does not take 'me/adapter' .*hf auth login"):
        train(section, "tuned", section.directory)
    assert not (section.directory / "adapter" / "tuned" / "adapter_config.json").exists()


def test_a_finished_adapter_may_be_uploaded_later(hub):
    section = recipe(args={"num_train_epochs": 1})
    train(section, "tuned", section.directory)
    assert hub.files == {}
    train(recipe(args=PUSH), "tuned", section.directory)
    assert "README.md" in hub.files


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"push_to_hub": True}, "train.args.hub_model_id: the repository has no name"),
        ({"hub_token": "hf_none"}, "train.args.hub_token.*hf auth login"),
        ({"hub_strategy": "every_save"}, "train.args.hub_strategy.*finished adapter alone"),
    ],
)
def test_what_would_publish_too_much_or_nowhere_is_refused(hub, args, message):
    section = recipe(args=args)
    with pytest.raises(InputError, match=message):
        train(section, "tuned", section.directory)
    assert trainer_config(recipe(args=PUSH), section.directory).push_to_hub is False
