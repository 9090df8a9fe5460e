"""Two CPU processes train as one does, under DDP and every stage of ZeRO: live injection, masks, checkpointing on."""

import json
import os
import socket
import subprocess
import sys
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_world import preferences, probed, recipe, transcripts, write_world

from esr_train.__main__ import main
from esr_train.recipe import dump_recipe
from esr_train.transcript import write_transcripts
from tests.conftest import make_family

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "recipes"

LAUNCHED = """
import os
import sys
from importlib import import_module
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from esr_train.__main__ import main
from esr_train.training import trainer

made, here = trainer.build_trainer, os.getcwd()


def build_trainer(*arguments, **named):
    built = made(*arguments, **named)
    accelerator = built.accelerator
    assert accelerator.distributed_type == ("DEEPSPEED" if stage else "MULTI_CPU"), accelerator.distributed_type
    assert accelerator.num_processes == 2
    assert not stage or accelerator.state.deepspeed_plugin.zero_stage == stage
    return built


trainer.build_trainer = build_trainer
# One launch trains several recipes, because starting takes longer than training: the group must outlive the first.
Accelerator.end_training = lambda self: self.wait_for_everyone()
for word in sys.argv[1:]:
    stage, recipe = int(word[0]), word[2:]
    if stage:
        # What `accelerate launch` hands on of a configuration of DeepSpeed.
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = f"{here}/zero{stage}.json"
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "true" if stage == 3 else "false"
        # Gloo alone: an extension for memory that processes share would be compiled, which takes a minute.
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    folder, name = os.path.split(recipe)
    os.chdir(folder)
    print(f"{recipe}: exit code {main([name])}", flush=True)
    AcceleratorState._reset_state(reset_partial_state=True)
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


def launch(folder: Path, *words: str) -> str:
    """`accelerate launch` with the configuration in `folder`; what was printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate.yaml"]
    command += ["--main_process_port", str(free_port()), *words]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def write_configuration(folder: Path, stage: int) -> None:
    """The shipped configuration for a stage of ZeRO (0: plain data parallelism)."""
    name = f"zero{stage}" if stage else "ddp"
    shipped = yaml.safe_load((SHIPPED / "accelerate" / f"{name}.yaml").read_text())
    if stage:
        settings = json.loads((SHIPPED / "deepspeed" / f"{name}.json").read_text())
        if stage == 3:
            # By default the tiny LoRA matrices are kept whole, and nothing would have to be gathered.
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (folder / f"{name}.json").write_text(json.dumps(settings))
        shipped["deepspeed_config"]["deepspeed_config_file"] = str(folder / f"{name}.json")
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(shipped))


def write_run(name: str, family: str, batch: int, **options) -> str:
    """A recipe and its data in the current directory; `packing`, `method` and `quantization` are options."""
    packing = options.pop("packing", False)
    args = {"per_device_train_batch_size": batch, "gradient_checkpointing": True, "num_train_epochs": 1}
    more = REPLIES if options.get("method") == "grpo" else {}
    section = recipe(
        family,
        args={**args, "learning_rate": 2e-4, **({"packing": True} if packing else {}), **more},
        lora={"r": 4, "lora_dropout": 0.0},
        max_length=200 if packing else 512,
        **options,
    ).model_copy(update={"name": name})
    # An even number of sequences: accelerate fills an uneven last step up with rows of the first.
    steered = {"llama": 20, "gemma": 16}[family]
    rows = transcripts(steered, normal=8) if packing else transcripts()
    rows = preferences() if "method" in options else rows
    data = section.directory / "data" / "tuned.jsonl"
    data.parent.mkdir(parents=True)
    write_transcripts(data, rows)
    section = section if "quantization" in options else probed(section)
    Path(f"{name}.yaml").write_text(dump_recipe(section))
    return f"{name}.yaml"


RUNS = {0: ("plain", "dpo", "grpo"), 1: ("plain",), 2: ("plain",), 3: ("plain", "packed")}
"""What is trained under a stage of ZeRO (0: plain data parallelism), by both families."""
OPTIONS: dict[str, dict] = {
    "plain": {},
    "packed": {"packing": True},
    "dpo": {"method": "dpo"},
    "grpo": {"method": "grpo"},
}
REPLIES = {"num_generations": 2, "max_completion_length": 24, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, str]:
    """A folder with the runs of every stage in two processes, beside them those of a single one; what was printed."""
    folder = tmp_path_factory.mktemp("launched")
    words = []
    for family in ("llama", "gemma"):
        (folder / family).mkdir()
        with chdir(folder / family):
            write_world(Path(), make_family(family))
            for kind, options in OPTIONS.items():
                assert main([write_run(f"{kind}-alone", family, 2 if kind == "packed" else 4, **options)]) == 0
            for stage, kind in ((stage, kind) for stage, kinds in RUNS.items() for kind in kinds):
                file = write_run(f"{kind}{stage}", family, 1 if kind == "packed" else 2, **OPTIONS[kind])
                words.append(f"{stage}:{folder / family / file}")
    with chdir(folder / "llama"):
        words.append(f"3:{folder / 'llama' / write_run('nf4', 'llama', 2, quantization='nf4')}")
    (folder / "launched.py").write_text(LAUNCHED)
    said = ""
    for stages in ("0", "123"):
        for stage in stages:
            write_configuration(folder, int(stage))
        said += launch(folder, "launched.py", *sorted(word for word in words if word[0] in stages))
    return folder, said


@dataclass(frozen=True)
class Result:
    """Loss and gradient norm of each step, the adapter's weights, and the steps at which it was probed."""

    steps: list[tuple[float, float]]
    weights: dict[str, torch.Tensor]
    probed: list[int]


def result(folder: Path, name: str) -> Result:
    adapter = folder / "runs" / name / "adapter" / "tuned"
    log = json.loads((adapter / "training_log.json").read_text())
    steps = [(entry["loss"], entry["grad_norm"]) for entry in log if "grad_norm" in entry]
    probed_at = [entry["step"] for entry in log if "probe_restarts_steered" in entry]
    return Result(steps, load_file(str(adapter / "adapter_model.safetensors")), probed_at)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("stage", RUNS, ids=["ddp", "zero1", "zero2", "zero3"])
def test_two_processes_equal_one_and_are_probed_alike(launched, stage, family):
    folder, said = launched
    for kind in RUNS[stage]:
        assert said.count(f"{family}/{kind}{stage}.yaml: exit code 0") == 2, said[-3000:]
        together, alone = (result(folder / family, name) for name in (f"{kind}{stage}", f"{kind}-alone"))
        assert len(alone.steps) == len(together.steps) >= 3
        for one, two in zip(alone.steps, together.steps, strict=True):
            # A group's advantages add up to nothing, and so does the first loss of GRPO.
            assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
        assert alone.weights.keys() == together.weights.keys()
        for key, weight in alone.weights.items():
            assert together.weights[key].shape == weight.shape
            assert (together.weights[key] - weight).abs().max() < 1e-4
        assert alone.probed == together.probed != []


@pytest.mark.slow
def test_nf4_under_zero3_is_refused(launched):
    said = launched[1]
    assert said.count("nf4.yaml: exit code 2") == 2, said[-3000:]
    assert "NF4 weights cannot be sharded by ZeRO-3" in said


@pytest.mark.slow
def test_the_papers_file_trains_through_accelerate_launch(tmp_path, llama, paper):
    write_world(tmp_path, llama)
    write_configuration(tmp_path, 2)
    args = {"max_steps": 3, "per_device_train_batch_size": 1, "optim": "adamw_bnb_8bit"}
    data = str(paper / "dataset_masked_ratio_50pct_train.jsonl")
    section = recipe(live=False, args=args, data=data, max_length=4096)
    (tmp_path / "paper.yaml").write_text(dump_recipe(section.model_copy(update={"name": "paper"})))
    (tmp_path / "launched.py").write_text(LAUNCHED)
    launch(tmp_path, "launched.py", f"2:{tmp_path / 'paper.yaml'}")
    found = result(tmp_path, "paper")
    assert len(found.steps) == 3
    assert all(0 < loss < 20 and grad_norm > 0 for loss, grad_norm in found.steps)
    assert any("lora_B" in name and bool(weight.any()) for name, weight in found.weights.items())
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
