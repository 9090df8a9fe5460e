"""What is refused before anything is generated: every mistake, all at once, and no model is loaded."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from llm_stub import Faults, LlmStub

from esr_train.errors import InputError, Mistakes
from esr_train.transcript import SaeRef
from recipes.cli import main
from recipes.experiment import read_recipe
from recipes.planning import machine, preflight
from recipes.planning.preflight import Scope, check, looked, whole

STUBBED = "judge={kind: model, model: openai-api/stub/oracle}"


@pytest.fixture(autouse=True)
def no_model(monkeypatch, tmp_path):
    monkeypatch.setattr("recipes.resources.load_model", lambda *_: pytest.fail("a model was loaded"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "STUB_API_KEY", "STUB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    yield
    if "wandb" in sys.modules:  # It reads the environment once.
        sys.modules["wandb"].teardown()


def recipe(tmp_path: Path, *overrides: str):
    return read_recipe("tiny/quickstart", [f"runs={tmp_path / 'runs'}", *overrides])


def refused(made, scope: Scope | None = None) -> str:
    with pytest.raises(InputError) as error:
        check(made, scope or whole(made))
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.args.learnin_rate=1", "train.args.learnin_rate: SFTConfig has no field of this name. Did you mean le"),
        ("train.args.optim=adamw_trch", "train.args.optim: the trainer has no optimiser 'adamw_trch'. Did you mean ad"),
        ("train.args.report_to=wandb", "train.args.report_to: wandb has no login. Run `wandb login`"),
        ("train.args.report_to=trackio", "train.args.report_to: trackio is not installed. `pip install trackio`"),
        ("train.lora.rank=3", "train.lora.rank: LoraConfig has no field of this name. See the"),
        ("train.data=none.jsonl", "train.data=none.jsonl: the training file does not exist"),
        ("arms={given: {adapter: some/lora}}", "some/lora: this is neither a folder nor an adapter that the hub gives"),
        ("arms={given: {adapter: ./none}}", "arms.given.adapter=./none: there is no finished adapter here"),
        ("sae.id=llama-sea", "no sae-lens release"),
        ("sae.labels=none.jsonl", "none.jsonl"),
        ("prompts.splits.test=0", "prompts.splits: there is no prompt to evaluate on"),
        ("arms={cut: {of: base, edit: {ablate: [4096]}}}", "arms.cut.edit: there is no latent 4096: the SAE has 1024"),
        ("data.steered.rows=0 data.normal.rows=0", "the arm 'tuned' asks for no rows"),
        (STUBBED, "STUB_API_KEY"),
    ],
)
def test_a_mistake_is_refused_and_said_where_it_stands(tmp_path, override, message):
    words = [override] if "{" in override else override.split()
    assert message in refused(recipe(tmp_path, *words))


@pytest.mark.parametrize("name", ["quickstart", "comparison", "evaluation", "gemma", "preferences", "reinforcement"])
def test_the_shipped_recipes_pass(tmp_path, name):
    made = read_recipe(f"tiny/{name}", [f"runs={tmp_path / 'runs'}"])
    check(made, whole(made))


def test_all_mistakes_are_told_at_once_each_once(tmp_path):
    words = ["train.args.learnin_rate=1", "train.args.warmup_step=2", "train.lora.rr=3", "eval.restart_phrases=no.txt"]
    text = refused(recipe(tmp_path, *words))
    assert text.startswith("4 mistakes: (1) ")
    assert all(text.count(name) == 1 for name in ("learnin_rate", "warmup_step:", "train.lora.rr", "no.txt"))


def test_several_mistakes_survive_the_way_between_processes():
    import pickle

    both = Mistakes([InputError("one"), InputError("two", "here")])
    assert str(pickle.loads(pickle.dumps(both))) == str(both) == "2 mistakes: (1) one. (2) here: two."


def test_wandb_needs_no_login_where_it_stays_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    check(recipe(tmp_path, "train.args.report_to=wandb"), whole(recipe(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_in": 32}, "W_dec is [1024, 160] in sae_weights.safetensors and [1024, 32] in cfg.json"),
        ({"hook": "blocks.40.hook_resid_post"}, "there is no layer 40: the model has 6"),
        ({"hook": "blocks.3.hook_mlp_out"}, "must read and write the output of a decoder layer"),
        ({"normalize_activations": "expected_average_only_in"}, "trained on rescaled activations"),
    ],
)
def test_an_sae_is_held_against_the_model_by_its_configuration_alone(assets, tmp_path, changes, message):
    shutil.copytree(assets / "llama-sae", tmp_path / "own" / "sae")
    file = tmp_path / "own" / "sae" / "cfg.json"
    config = json.loads(file.read_text())
    if hook := changes.pop("hook", None):
        config["metadata"]["hook_name"] = hook
    file.write_text(json.dumps({**config, **changes}))
    assert message in refused(recipe(tmp_path, f"sae.release={tmp_path / 'own'}", "sae.id=sae"))


def test_an_sae_is_outlined_as_it_is_loaded(assets):
    from esr_train.steering.direction_files import load_sae, outline_sae

    ref = SaeRef(str(assets), "llama-sae")
    outline, sae = outline_sae(ref), load_sae(ref)
    assert (outline.layer, outline.d_model, outline.n_latents) == (sae.layer, sae.d_model, sae.n_latents)
    assert outline.module.W_dec.device.type == "meta"


def test_a_published_sae_is_held_against_the_model_by_what_sae_lens_knows_of_it(tmp_path, monkeypatch):
    from sae_lens.loading import pretrained_sae_loaders as loaders

    release = ("sae.release=gemma-scope-9b-it-res-canonical", "sae.labels=recipes/tiny/assets/llama-sae/labels.jsonl")
    known = recipe(tmp_path, *release, "sae.id=layer_20/width_16k/canonical")
    assert "is 3584 wide, the model's residual stream 160" in refused(known)
    unknown = recipe(tmp_path, *release, "sae.id=layer_20/width_17k/canonical")
    assert "layer_20/width_16k/canonical" in refused(unknown).partition("Near matches: ")[2]
    monkeypatch.setattr(loaders, "load_sae_config_from_huggingface", lambda *_: (_ for _ in ()).throw(OSError()))
    assert "cannot be fetched now" in str(dict(looked(known, whole(known)))["sae"]), "out of reach is no mistake"


def test_another_prefix_in_training_than_in_generation_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "encode_prompt", lambda *_: ([1, 2, 3], 3))
    assert "replies are trained behind" in refused(recipe(tmp_path))


@pytest.mark.parametrize(
    ("started", "message"),
    [("1", "4 GPUs seen, 1 is used: launch with"), ("2", "4 GPUs seen, 2 are used"), ("4", "4 GPUs seen, 4 used")],
)
def test_idle_devices_are_told(monkeypatch, started, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", started)
    assert message in machine.check_processes()


def test_more_processes_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match="8 processes were launched on a machine with 4 GPUs"):
        machine.check_processes()


def test_a_full_disk_is_refused_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    assert "the run writes about 0.1 GiB of 0 GiB free" in refused(recipe(tmp_path))


def test_weights_larger_than_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "device_here", lambda _: machine.Device("a watch", 2**20))
    assert "the model's weights take 0 GiB, and a watch has 0 GiB" in refused(recipe(tmp_path))


def test_what_is_only_trained_needs_no_judge_and_what_is_only_generated_no_evaluation(tmp_path):
    check(recipe(tmp_path, STUBBED), Scope(("tuned",), generates=False, evaluates=False))
    check(recipe(tmp_path, "eval.restart_phrases=no.txt"), Scope(("tuned",), evaluates=False))


def test_the_judge_and_the_writer_get_one_test_question_each(tmp_path, monkeypatch):
    made = recipe(tmp_path, STUBBED, "data.prompted={rows: 5, writer: openai-api/stub/writer}")
    with LlmStub(lambda _: "yes") as stub:
        for name, value in stub.environment().items():
            monkeypatch.setenv(name, value)
        check(made, whole(made))
        assert [body["model"] for body in stub.bodies] == ["oracle", "writer"]
        check(made, whole(made, speaks=False))
        assert len(stub.bodies) == 2, "of several processes one asks"


def test_a_busy_model_is_asked_once_and_passes_and_a_wrong_key_does_not(tmp_path, monkeypatch):
    made = recipe(tmp_path, STUBBED)
    with LlmStub(lambda _: "yes", Faults(script=["429"] * 9)) as stub:
        for name, value in stub.environment().items():
            monkeypatch.setenv(name, value)
        check(made, whole(made))
        assert len(stub.requests) == 1
        monkeypatch.setenv("STUB_API_KEY", "sk-wrong")
        assert "the key is refused" in refused(made)


def test_a_limit_that_is_reached_is_told_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_API_KEY", "sk-any")
    monkeypatch.setenv("STUB_BASE_URL", "http://127.0.0.1:9/v1")
    words = [STUBBED, "llm={limit_dollars: 2, prices: {openai-api/stub/oracle: [1, 1]}}"]
    made = recipe(tmp_path, *words)
    file = made.directory / "requests" / "judge-1.requests.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"asked": 3, "dollars": 2.5}))
    assert "llm.limit_dollars: the run has spent $2.50 of $2" in refused(made)


def test_validate_takes_overrides_behind_a_recipe_as_every_command_does(capsys):
    assert main(["recipes", "validate", "tiny/quickstart", "eval.trials=8"]) == 0
    assert main(["recipes", "validate", "tiny/quickstart", "eval.trial=8"]) == 2
    assert "did you mean eval.trials?" in capsys.readouterr().err


def test_a_mistyped_name_hides_no_other_mistake_in_the_training_arguments(tmp_path):
    wrong = ("train.args.learnin_rate=1", "train.args.optim=adamx", "train.args.report_to=trackio", "train.lora.rr=1")
    said = refused(recipe(tmp_path, *wrong))
    for mistake in ("Did you mean learning_rate?", "no optimiser 'adamx'", "trackio is not installed", "train.lora.rr"):
        assert mistake in said


def test_labels_that_are_not_there_are_refused_with_the_command_that_makes_them(tmp_path):
    said = refused(recipe(tmp_path, "sae.labels=my/none.jsonl"))
    assert "my/none.jsonl: there are no labels here" in said
    assert "make some with `esr data labels`" in said


def test_validate_deep_prints_each_thing_and_what_is_wrong_with_it(tmp_path, capsys):
    assert main(["recipes", "validate", "--deep", "tiny/quickstart"]) == 0
    out = capsys.readouterr().out
    assert "ok      model: llama, 2,013,120 parameters, 6 layers, 160 wide" in out
    assert "ok      sae: 1024 latents, 160 wide, layer 3, 418 labelled" in out
    file = tmp_path / "wrong.yaml"
    main(["recipes", "copy", "tiny/quickstart", str(file)])
    file.write_text(file.read_text().replace("learning_rate:", "learnin_rate:"))
    capsys.readouterr()
    assert main(["recipes", "validate", "--deep", str(file)]) == 2
    said = capsys.readouterr()
    *right, wrong = said.out.splitlines()
    assert wrong.startswith("MISTAKE training of tuned: train.args.learnin_rate: SFTConfig has no field")
    assert len(right) > 10
    assert all(line.startswith("ok      ") for line in right)
    assert f"{file}: 1 mistake in {len(right) + 1} things looked at" in said.err


def test_validate_deep_says_once_that_a_model_is_missing_and_goes_on_to_the_next_recipe(tmp_path, capsys):
    overrides = ("model.path=nobody/nothing", "arms={tuned: {}}")
    assert main(["recipes", "validate", "--deep", "tiny/quickstart", "tiny/comparison", *overrides]) == 2
    said = capsys.readouterr()
    mistakes = [line for line in said.out.splitlines() if "'nobody/nothing' cannot be loaded" in line]
    looks = "model, tokenizer and chat template, training of tuned, sae"
    assert [line.partition(": ")[0] for line in mistakes] == [f"MISTAKE {looks}"] * 2
    assert all(name in said.err for name in ("tiny/quickstart: ", "tiny/comparison: "))
