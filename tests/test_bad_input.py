"""Bad input ends in one paragraph that names place and remedy, with exit code 2 and nothing half-written."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from training_world import transcripts

from esr_train.errors import InputError
from esr_train.files import write_json, write_jsonl
from esr_train.recipe import load_recipe
from esr_train.template import encode_prompt
from esr_train.transcript import Span, SpanKind, Transcript, read_transcripts, write_transcripts
from recipes.cli import main
from tests.conftest import Family

TOPICS = ("baking", "sailing", "folding", "chess", "knitting", "skiing")
LAYERS, WIDTH = 4, 64


@pytest.fixture
def world(tmp_path: Path, llama: Family, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that an experiment needs: model, SAE, labels, prompts, vocabulary, recipe."""
    monkeypatch.chdir(tmp_path)
    llama.model.save_pretrained("model")
    llama.tokenizer.save_pretrained("model")
    save_sae(Path("saes/first"), WIDTH, layer=1)
    write_jsonl("labels.jsonl", ({"index": i, "description": topic} for i, topic in enumerate(TOPICS)))
    write_jsonl("prompts.jsonl", ({"prompt": f"{t}: {i}", "topic": t} for t in TOPICS for i in range(4)))
    write_json("vocabulary.json", {topic: [f"{topic}tool"] for topic in TOPICS})
    values = {
        "name": "t",
        "model": {"path": "model", "dtype": "float32", "device": "cpu"},
        "sae": {"release": "saes", "id": "first", "labels": "labels.jsonl"},
        "judge": {"vocabulary": "vocabulary.json"},
        "prompts": {"path": "prompts.jsonl"},
        "sampling": {"max_new_tokens": 2},
        "calibration": {"rounds": 1, "prompts": 1, "verify": 0, "max_new_tokens": 2},
        "data": {"normal": {"rows": 2}},
        "eval": {"trials": 2, "bootstrap": 10},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def save_sae(folder: Path, width: int, layer: int) -> None:
    torch.manual_seed(1)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=width, d_sae=len(TOPICS)))
    sae.W_dec.data = torch.randn_like(sae.W_dec)
    sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    sae.save_model(folder)


def paragraph(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must end as bad input; its one paragraph."""
    capsys.readouterr()
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    # Progress bars end in a line break and libraries warn; the error itself is the last line.
    last = said.rstrip("\n").split("\n")[-1]
    assert last.startswith("error: ")
    assert last.endswith((".", "?"))
    return last


def assert_nothing_half_written(folder: Path) -> None:
    assert not [path for path in folder.rglob("*") if path.name.endswith(".partial")]
    made = {path.name for path in (folder / "runs").rglob("*") if path.is_file()}
    assert made <= {".lock", "recipe.yaml", "provenance.json", "stages.json"}
    for path in (folder / "runs").rglob("*.json"):
        json.loads(path.read_text())


def replaced(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def other_sae(width: int, layer: int) -> Callable[[Path], None]:
    return lambda folder: save_sae(folder / "saes" / "first", width, layer)


BROKEN: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no prompts file": (removed("prompts.jsonl"), ["prompts.jsonl: the file does not exist"]),
    "empty prompts file": (replaced("prompts.jsonl", "\n"), ["prompts.jsonl: there is no prompt in the file"]),
    "prompts cut off": (replaced("prompts.jsonl", '{"prompt": "a", "topic": "b"}\n{"pro'), ["prompts.jsonl:2"]),
    "prompt of a wrong type": (replaced("prompts.jsonl", '{"prompt": 3, "topic": "b"}'), ["prompts.jsonl:1"]),
    "too few topics": (replaced("prompts.jsonl", '{"prompt": "a", "topic": "b"}'), ["prompts.splits", "too few"]),
    "no vocabulary": (removed("vocabulary.json"), ["vocabulary.json: the file does not exist"]),
    "vocabulary of a wrong type": (replaced("vocabulary.json", '{"baking": 3}'), ["vocabulary.json: a vocabulary is"]),
    "no labels": (removed("labels.jsonl"), ["labels.jsonl: there are no labels here", "esr data labels"]),
    "labels cut off": (replaced("labels.jsonl", '{"index": 1, "descr'), ["labels.jsonl:1"]),
    "no SAE": (removed("saes/first/cfg.json"), ["saes/first", "not an SAE"]),
    "an SAE of another width": (other_sae(WIDTH // 2, 1), [f"{WIDTH // 2} wide", f"residual stream {WIDTH}"]),
    "an SAE for a layer that is not there": (other_sae(WIDTH, LAYERS), [f"no layer {LAYERS}", f"has {LAYERS}"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_do_not_fit_are_named_before_anything_is_computed(world, capsys, name):
    damage, named = BROKEN[name]
    damage(world)
    said = paragraph(capsys, "run", "recipe.yaml")
    assert all(part in said for part in named), said
    assert_nothing_half_written(world)


def test_every_mistake_in_a_recipe_is_named_at_once(world, capsys):
    said = paragraph(capsys, "run", "recipe.yaml", "modell.path=x", "eval.trials=many", "sampling.top_p=3")
    assert "3 mistakes" in said
    assert all(part in said for part in ("modell: unknown key", "eval.trials: ", "sampling.top_p: "))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("model.path=nowhere", "nowhere"),
        ("model.device=cuda:9", "cuda:9"),
        ("judge={kind: likelihood, model: ./nowhere}", "judge.model: the folder './nowhere' does not exist"),
    ],
)
def test_a_model_or_device_that_is_not_there(world, capsys, key, named):
    assert named in paragraph(capsys, "run", "recipe.yaml", key)
    assert_nothing_half_written(world)


def test_live_injection_without_rows_that_are_steered_is_refused_before_any_are_made(world, capsys):
    asked = ("data={normal: {rows: 4}}", "train.live={}")
    assert "error: train.live: no source" in paragraph(capsys, "data", "generate", "recipe.yaml", *asked)
    assert not Path("runs").exists()


def test_sections_that_a_stage_needs_are_asked_for_by_their_key(world, capsys):
    for key in ("prompts", "sae"):
        assert f"error: {key}: " in paragraph(capsys, "run", "recipe.yaml", f"{key}=null")
    assert "error: sae.labels: " in paragraph(capsys, "run", "recipe.yaml", "sae.labels=null")
    assert "error: judge.vocabulary: " in paragraph(capsys, "run", "recipe.yaml", "judge.vocabulary=null")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no training rows"),
        ("[1]\n", "data.jsonl:1: a transcript is a JSON object"),
        ("{", "data.jsonl:1: not valid"),
    ],
)
def test_training_data_that_are_none(world, capsys, content, named):
    Path("data.jsonl").write_text(content)
    assert named in paragraph(capsys, "train", "recipe.yaml", "train.data=data.jsonl", "--dump-tokens", "tokens.jsonl")
    assert not Path("tokens.jsonl").exists()


def test_unknown_training_settings_are_refused_before_training(world, capsys):
    write_transcripts("data.jsonl", transcripts(steered=0, normal=2))
    for key in ("train.args.learning_rat=1", "train.lora.rank=4"):
        said = paragraph(capsys, "train", "recipe.yaml", "train.data=data.jsonl", key)
        assert key.partition("=")[0].rpartition(".")[2] in said
    assert not list(Path().rglob("adapter_model*"))


@pytest.mark.parametrize("typed", ["<|eot_id|>", "<end_of_turn>", "<bos>", "<|begin_of_text|><|start_header_id|>"])
def test_control_words_in_a_prompt_are_plain_text(family, typed):
    prompt = f"What does {typed} do?"
    ids, _ = encode_prompt(family.tokenizer, prompt)
    plain, _ = encode_prompt(family.tokenizer, "What does it do?")
    special = set(family.tokenizer.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert prompt in family.tokenizer.decode(ids)


def test_data_of_one_s_own_that_hold_an_evaluation_prompt_are_refused(world):
    from eval.cells import make_pools, read_prompts
    from recipes.experiment import open_experiment
    from recipes.pipeline import prepare
    from recipes.stages.rows import mix_rows

    recipe = load_recipe("recipe.yaml", ["train.data=data.jsonl"])
    assert recipe.prompts is not None
    held_out = make_pools(read_prompts("prompts.jsonl"), recipe.prompts.splits).test[0]
    with open_experiment(recipe) as experiment:
        shared = prepare(experiment, evaluates=False)
        write_transcripts("data.jsonl", [normal("about something else")])
        mix_rows(experiment, "tuned", {}, shared)
        write_transcripts("data.jsonl", [normal("about something else"), normal(held_out.text.upper())])
        with pytest.raises(InputError, match=f"training and evaluation share 1 prompt .*{held_out.text}"):
            mix_rows(experiment, "tuned", {}, shared)


def normal(prompt: str) -> Transcript:
    return Transcript(prompt, prompt, (Span(SpanKind.ANSWER, "Yes."),), "normal")


def test_an_error_from_another_process_reads_the_same():
    error = InputError("it is wrong", "here:3", "Change it.")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "here:3: it is wrong. Change it."


def test_a_failed_import_leaves_the_file_that_was_there(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    write_transcripts(out, [normal("kept")])
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "alone"}]}\n')
    said = paragraph(capsys, "data", "import", str(tmp_path / "bad.jsonl"), "--format", "messages", "--out", str(out))
    assert "bad.jsonl:1: " in said
    assert [row.id for row in read_transcripts(out)] == ["kept"]
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "bad.jsonl"}


@pytest.mark.parametrize("command", [["data", "stats"], ["data", "preview"], ["data", "mix", "--out", "x"]])
def test_an_empty_file_is_refused_by_every_command(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    said = paragraph(capsys, *command[:2], "empty.jsonl", *command[2:])
    assert "empty.jsonl: there is no row in the file" in said
