"""What the trainer or LoRA would ignore, or fail over, is refused by its key; what may be set does what it says."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from training_world import recipe, write_world
from trl import SFTConfig

from esr_train.__main__ import main
from esr_train.errors import InputError
from esr_train.recipe import dump_recipe
from esr_train.training.settings import LoraArguments, TrainerArguments, check_settings, lora_config, trainer_config
from esr_train.training.trainer import train

FIELDS, LORA_FIELDS = set(TrainerArguments.model_fields), set(LoraArguments.model_fields)


@pytest.fixture
def world(tmp_path, llama, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, llama)
    return tmp_path


@pytest.mark.parametrize("key", sorted(set(inspect.signature(SFTConfig).parameters) - FIELDS))
def test_every_other_field_of_the_installed_trainer_is_refused(tmp_path, key):
    default = inspect.signature(SFTConfig).parameters[key].default
    with pytest.raises(InputError, match=rf"^train\.args\.{key}: this is not set here") as error:
        trainer_config(recipe(args={key: default}), tmp_path)
    assert error.value.fix


@pytest.mark.parametrize("key", sorted(set(inspect.signature(LoraConfig).parameters) - LORA_FIELDS))
def test_every_other_field_of_the_installed_lora_is_refused(key):
    with pytest.raises(InputError, match=rf"^train\.lora\.{key}: this is not set here"):
        lora_config(recipe(lora={key: None}))


def test_what_may_be_set_are_fields_of_the_installed_libraries():
    assert set(inspect.signature(SFTConfig).parameters) >= FIELDS
    assert set(inspect.signature(LoraConfig).parameters) >= LORA_FIELDS


WRONG_ARGS = {
    "learning_rate": [-1.0, "fast", "1e-3x"],
    "lr_scheduler_type": ["cosin", "cosine_with_min_lr", "reduce_lr_on_plateau"],
    "lr_scheduler_kwargs": [{"num_cycle": 2}, 3],
    "warmup_steps": [-1],
    "optim": ["adamw", "adamw_apex_fused", "lomo", "galore_adamw"],
    "optim_args": ["nonsense"],
    "weight_decay": [-0.1],
    "adam_beta1": [1.5],
    "adam_epsilon": [-1e-8],
    "per_device_train_batch_size": [0, -2, 1.5, "four"],
    "per_device_eval_batch_size": [0],
    "gradient_accumulation_steps": [0],
    "num_train_epochs": ["all", 0, -1],
    "max_steps": ["all", 0],
    "max_grad_norm": [-1.0],
    "logging_steps": [0],
    "save_steps": [0],
    "save_strategy": ["sometimes", "best"],
    "save_total_limit": [0],
    "eval_strategy": ["sometimes"],
    "eval_steps": [0],
    "load_best_model_at_end": [True],
    "metric_for_best_model": ["eval_accuracy"],
    "loss_type": ["ntk"],
    "packing_strategy": ["wrapped"],
    "train_sampling_strategy": ["shuffled"],
    "dataloader_num_workers": [-1],
    "dataloader_prefetch_factor": [2],
    "gradient_checkpointing_kwargs": [{"use_reentrant": "maybe"}, {"every": 2}],
    "neftune_noise_alpha": ["loud", -5],
    "report_to": ["mlflov", "mlflow"],
    "tf32": ["yes"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG_ARGS.items() for value in values])
def test_a_value_that_the_trainer_cannot_use_is_refused_before_a_model_is_loaded(tmp_path, key, value):
    more = {"packing": True} if key == "packing_strategy" else {}
    with pytest.raises(InputError, match=r"^train\.args") as error:
        trainer_config(recipe(args={key: value, **more}), tmp_path)
    assert "\n" not in str(error.value)


WRONG_LORA = {
    "r": [0, -1, 1.5, "eight", True, None],
    "lora_alpha": [0, "much", float("inf"), None],
    "lora_dropout": [1.0, -0.1, True],
    "target_modules": [["q_prj"], ["q_proj", "k_prj"], "nothing_like_it", ["lm_head"], [], 3],
    "exclude_modules": [["q_prj"]],
    "layers_to_transform": [[9], 4, [-1], "all"],
    "rank_pattern": [{"q_prj": 8}, {"q_proj": 0}, {"q_proj": "eight"}, 3],
    "alpha_pattern": [{"lm_head": 8}],
    "init_lora_weights": [False, "pissa", "pissa_niter_4", "olora", "eva", "corda", "loftq", "lora_ga", "nonsense"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG_LORA.items() for value in values])
def test_a_value_that_lora_cannot_use_on_this_model_is_refused_before_it_is_loaded(world, key, value):
    section = recipe(lora={key: value})
    with pytest.raises(InputError, match=r"^train\.lora") as error:
        check_settings(section, world)
    assert "\n" not in str(error.value)


def test_the_command_says_so_in_one_paragraph(world, capsys):
    (world / "r.yaml").write_text(dump_recipe(recipe(args={"chat_template_path": "t.jinja"})))
    assert main(["r.yaml", "--dry-run"]) == 2
    assert "train.args.chat_template_path: this is not set here." in capsys.readouterr().err
    (world / "r.yaml").write_text(dump_recipe(recipe(lora={"target_modules": ["q_proj", "k_prj"]})))
    assert main(["r.yaml", "--dry-run"]) == 2
    assert "train.lora.target_modules: the model has no module 'k_prj' that can be trained" in capsys.readouterr().err


def trained(name: str, args=None, lora=None) -> dict[str, torch.Tensor]:
    """Train a copy of the run under another name; the adapter's weights."""
    section = recipe(args={"num_train_epochs": 1, **(args or {})}, lora={"r": 4, "lora_dropout": 0.0, **(lora or {})})
    data = Path("runs") / name / "data" / "tuned.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text(Path("runs/t/data/tuned.jsonl").read_text())
    folder = train(section, "tuned", Path("runs") / name)
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    shapes = [{name: weight.shape for name, weight in weights.items()} for weights in (one, other)]
    return shapes[0] == shapes[1] and all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


CHANGING = [
    {"learning_rate": 1e-3},
    {"lr_scheduler_type": "constant"},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}},
    {"warmup_steps": 2},
    {"optim": "adafactor"},
    {"optim": "sgd", "optim_args": "momentum=0.9"},
    {"weight_decay": 10.0},
    {"adam_beta1": 0.5},
    {"adam_beta2": 0.5},
    {"adam_epsilon": 1.0},
    {"max_steps": 2},
    {"num_train_epochs": 2},
    {"per_device_train_batch_size": 3},
    {"gradient_accumulation_steps": 2},
    {"neftune_noise_alpha": 50.0},
    {"loss_type": "dft"},
    {"train_sampling_strategy": "sequential"},
    {"packing": True},
    {"per_device_train_batch_size": 5, "dataloader_drop_last": True},
]
KEEPING = [
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2},
    {"dataloader_pin_memory": False, "torch_empty_cache_steps": 1},
    {"logging_strategy": "epoch", "logging_first_step": True, "save_strategy": "no"},
]


def test_every_setting_that_changes_training_changes_the_adapter(world):
    plain = trained("plain")
    silent = [args for number, args in enumerate(CHANGING) if same(plain, trained(f"changed-{number}", args))]
    assert silent == []


def test_every_setting_that_only_spares_or_tells_keeps_the_adapter(world):
    plain = trained("plain")
    changing = [args for number, args in enumerate(KEEPING) if not same(plain, trained(f"kept-{number}", args))]
    assert changing == []


def test_every_setting_of_lora_changes_the_adapter(world):
    plain = trained("plain")
    changed = [
        {"r": 2},
        {"lora_alpha": 64},
        {"lora_dropout": 0.5},
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1]},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 64}},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "gaussian"},
    ]
    silent = [lora for number, lora in enumerate(changed) if same(plain, trained(f"lora-{number}", lora=lora))]
    assert silent == []


def test_steps_of_evaluation_and_of_checkpoints_are_kept(world):
    args = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "save_strategy": "steps", "save_steps": 2}
    trained("steps", {**args, "save_total_limit": 5, "per_device_eval_batch_size": 1})
    folder = Path("runs/steps/adapter/tuned")
    log = json.loads((folder / "training_log.json").read_text())
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, 1, 2, 3]
    assert sorted(path.name for path in (folder / "checkpoints").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]
