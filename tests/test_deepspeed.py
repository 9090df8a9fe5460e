"""DeepSpeed with two CPU processes trains as one process does: live injection, masks, gradient checkpointing on."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from training_world import recipe, transcripts, write_world

from esr_train.recipe import dump_recipe

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "recipes"

ASSERTING = """
import sys
from accelerate.utils import DistributedType
from esr_train.training import trainer

made = trainer.build_trainer


def build_trainer(*arguments, **named):
    built = made(*arguments, **named)
    assert built.accelerator.distributed_type == DistributedType.DEEPSPEED
    assert built.accelerator.num_processes == 2
    assert built.accelerator.deepspeed_plugin.zero_stage == {stage}
    return built


trainer.build_trainer = build_trainer
from esr_train.__main__ import main

sys.exit(main(sys.argv[1:]))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": path,
        "CUDA_VISIBLE_DEVICES": "",
    }


def launch(folder: Path, name: str, stage: int, batch: int, **options) -> subprocess.CompletedProcess[str]:
    """Train run `name` under DeepSpeed with two processes, with the shipped configuration."""
    shipped = yaml.safe_load((SHIPPED / "accelerate" / f"zero{stage}.yaml").read_text())
    settings = json.loads((SHIPPED / "deepspeed" / f"zero{stage}.json").read_text())
    if stage == 3:
        # By default the tiny LoRA matrices are kept whole, and nothing would have to be gathered.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero.json").write_text(json.dumps(settings))
    shipped["deepspeed_config"]["deepspeed_config_file"] = str(folder / "zero.json")
    (folder / "accelerate.yaml").write_text(yaml.safe_dump({**shipped, "use_cpu": False}))
    (folder / "asserting.py").write_text(ASSERTING.format(stage=stage))
    write_recipe(folder, name, batch, **options)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml"]
    command += ["--main_process_port", str(free_port()), "asserting.py", f"{name}.yaml"]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=540)


def write_recipe(folder: Path, name: str, batch: int, **options) -> None:
    args = {"per_device_train_batch_size": batch, "gradient_checkpointing": True, "num_train_epochs": 1}
    args["packing"] = options.pop("packing", False)
    section = recipe(options.pop("family", "llama"), args=args, lora={"r": 4, "lora_dropout": 0.0}, **options)
    data = folder / "runs" / name / "data" / "tuned.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text((folder / "runs/t/data/tuned.jsonl").read_text())
    (folder / f"{name}.yaml").write_text(dump_recipe(section.model_copy(update={"name": name})))


def result(folder: Path, name: str) -> tuple[list[tuple[float, float]], dict]:
    adapter = folder / "runs" / name / "adapter" / "tuned"
    log = json.loads((adapter / "training_log.json").read_text())
    steps = [(entry["loss"], entry["grad_norm"]) for entry in log if "grad_norm" in entry]
    return steps, load_file(str(adapter / "adapter_model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "packing"), [(2, False), (3, False), (3, True)])
def test_two_processes_equal_one(tmp_path, family, stage, packing):
    options = {"family": family.name, "packing": packing, "max_length": 200 if packing else 512}
    rows = 2 if packing else 4
    # An even number of sequences: accelerate fills an uneven last step up with rows of the first.
    steered = {"llama": 20, "gemma": 16}[family.name]
    write_world(tmp_path, family, transcripts(steered, normal=8) if packing else None)
    write_recipe(tmp_path, "single", batch=rows, **options)
    command = [sys.executable, "-m", "esr_train", "single.yaml"]
    subprocess.run(command, cwd=tmp_path, env=environment(), check=True, capture_output=True)
    launched = launch(tmp_path, "sharded", stage, batch=rows // 2, **options)
    assert launched.returncode == 0, launched.stderr[-3000:]
    (one, weights), (two, sharded) = result(tmp_path, "single"), result(tmp_path, "sharded")
    assert len(one) == len(two) >= 3
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, rel=1e-4)
    assert weights.keys() == sharded.keys()
    for name, weight in weights.items():
        assert sharded[name].shape == weight.shape
        assert (sharded[name] - weight).abs().max() < 1e-4


@pytest.mark.slow
def test_nf4_under_zero3_is_refused(tmp_path, llama):
    write_world(tmp_path, llama)
    launched = launch(tmp_path, "nf4", 3, batch=2, quantization="nf4")
    assert launched.returncode != 0
    assert "NF4 weights cannot be sharded by ZeRO-3" in launched.stderr


@pytest.mark.slow
def test_the_papers_file_trains_through_accelerate_launch(tmp_path, llama, paper):
    write_world(tmp_path, llama)
    shipped = yaml.safe_load((SHIPPED / "accelerate" / "zero2.yaml").read_text())
    shipped["deepspeed_config"]["deepspeed_config_file"] = str(SHIPPED / "deepspeed" / "zero2.json")
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(shipped))
    args = {"max_steps": 3, "per_device_train_batch_size": 1, "optim": "adamw_bnb_8bit"}
    data = str(paper / "dataset_masked_ratio_50pct_train.jsonl")
    section = recipe(live=False, args=args, data=data, format="segments", max_length=4096)
    (tmp_path / "paper.yaml").write_text(dump_recipe(section.model_copy(update={"name": "paper"})))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml"]
    command += ["--main_process_port", str(free_port()), "-m", "esr_train", "paper.yaml"]
    launched = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=540)
    assert launched.returncode == 0, launched.stderr[-3000:]
    steps, weights = result(tmp_path, "paper")
    assert len(steps) == 3
    assert all(0 < loss < 20 and grad_norm > 0 for loss, grad_norm in steps)
    assert any("lora_B" in name and bool(weight.any()) for name, weight in weights.items())
    record = json.loads((tmp_path / "runs/paper/adapter/tuned/provenance.json").read_text())
    assert (record["world_size"], record["data"]["rows"]) == (2, 918)


def test_the_shipped_configurations_are_complete():
    files = sorted(path.name for path in (SHIPPED / "accelerate").glob("*.yaml"))
    assert files == ["ddp.yaml", "zero1.yaml", "zero2.yaml", "zero3-multinode.yaml", "zero3.yaml"]
    for path in (SHIPPED / "accelerate").glob("zero*.yaml"):
        settings = yaml.safe_load(path.read_text())
        assert settings["distributed_type"] == "DEEPSPEED"
        assert "mixed_precision" not in settings
        named = ROOT / settings["deepspeed_config"]["deepspeed_config_file"]
        stage = json.loads(named.read_text())["zero_optimization"]["stage"]
        assert settings["deepspeed_config"]["zero3_init_flag"] == (stage == 3)
    for path in (SHIPPED / "deepspeed").glob("*.json"):
        assert json.loads(path.read_text())["fp16"] == {"enabled": False}
    assert len(list((SHIPPED / "deepspeed").glob("*.json"))) == 5
