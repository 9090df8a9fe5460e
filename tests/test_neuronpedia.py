"""Labels come from Neuronpedia's export by the id that sae-lens' table names: here from a server on this machine."""

import gzip
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from esr_train.errors import InputError, RunError
from esr_train.recipe import parse_recipe
from esr_train.steering.latent_labels import read_labels
from recipes.cli import main
from recipes.making.neuronpedia import export_of, fetch_labels, where_labels_are
from recipes.planning.preflight import check

SAE = ("qwen2.5-7b-instruct-andyrdt", "resid_post_layer_15_trainer_1")
NAME = "qwen2.5-7b-it/15-resid-post-aa"


def batch(folder: Path, number: int, *labels: tuple[int, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"index": str(index), "description": text}) for index, text in labels]
    (folder / f"batch-{number}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))


@pytest.fixture
def exports(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The folder of one SAE's explanations on a server, and the server's address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    root = tmp_path / "exports"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield root / NAME / "explanations", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_every_batch_is_downloaded_and_what_is_there_is_kept(exports, tmp_path):
    folder, host = exports
    batch(folder, 0, (3, "owls"))
    batch(folder, 1, (700, "rain"))
    out = tmp_path / "labels"
    assert fetch_labels(*SAE, out, host) == 2
    assert read_labels(out) == {3: "owls", 700: "rain"}
    (folder / "batch-0.jsonl.gz").unlink()
    batch(folder, 2, (900, "tea"))
    assert fetch_labels(*SAE, out, host) == 3
    assert sorted(path.name for path in out.iterdir()) == [f"batch-{number}.jsonl.gz" for number in range(3)]


def test_a_torn_answer_is_not_kept_and_the_address_to_fetch_by_hand_is_told(exports, tmp_path):
    folder, host = exports
    batch(folder, 0, (3, "owls"))
    torn = folder / "batch-1.jsonl.gz"
    torn.write_bytes((folder / "batch-0.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(RunError, match=rf"By hand: put every {host}/{NAME}/explanations/batch-N\.jsonl\.gz"):
        fetch_labels(*SAE, tmp_path / "labels", host)
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["batch-0.jsonl.gz"]
    with pytest.raises(RunError, match="By hand"):
        fetch_labels(*SAE, tmp_path / "nowhere", "http://127.0.0.1:9")


def test_an_sae_without_labels_is_told_apart_from_one_that_the_table_does_not_know(exports, tmp_path):
    with pytest.raises(InputError, match="Neuronpedia has no labels of this SAE"):
        fetch_labels(*SAE, tmp_path / "labels", exports[1])
    assert export_of("my/saes", "first") is None
    with pytest.raises(InputError, match=r"table names no labels of this SAE: make some with `esr data labels`"):
        fetch_labels("my/saes", "first", tmp_path / "labels")


def test_a_recipe_whose_sae_has_no_labels_is_told_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {
        "name": "t",
        "model": {"path": "./gone"},
        "sae": {"release": SAE[0], "id": SAE[1]},
        "prompts": {"path": "data_gen/prompts/how-to.jsonl"},
    }
    command = f"esr latents labels --release {SAE[0]} --id {SAE[1]}"
    with pytest.raises(InputError, match=rf"sae\.labels: .*{command}"):
        check(parse_recipe(values))
    assert command in where_labels_are(*SAE)


def test_the_command_prints_what_to_set(exports, tmp_path, monkeypatch, capsys):
    folder, host = exports
    batch(folder, 0, (3, "owls"))
    monkeypatch.setattr("recipes.making.neuronpedia.fetch_labels", partial(fetch_labels, host=host))
    words = ["latents", "labels", "--release", SAE[0], "--id", SAE[1], "--out", str(tmp_path / "labels")]
    assert main(words) == 0
    assert f"1 latents are labelled; set sae.labels={tmp_path / 'labels'}" in capsys.readouterr().out
