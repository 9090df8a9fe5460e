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
from training_world import probed, recipe, transcripts, write_world

from esr_train.__main__ import main
from esr_train.recipe import dump_recipe
from esr_train.transcript import write_transcripts
from tests.conftest import make_family

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "recipes"

LAUNCHED = """
import os
import sys
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from esr_train.__main__ import main
from esr_train.training import trainer

made, stage = trainer.build_trainer, int(sys.argv[1])


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
for recipe in sys.argv[2:]:
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
        (folder / "zero.json").write_text(json.dumps(settings))
        shipped["deepspeed_config"]["deepspeed_config_file"] = str(folder / "zero.json")
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(shipped))


def write_run(name: str, family: str, batch: int, **options) -> str:
    """A recipe and its data in the current directory; `packing` and `quantization` are options."""
    packing = options.pop("packing", False)
    args = {"per_device_train_batch_size": batch, "gradient_checkpointing": True, "num_train_epochs": 1}
    section = recipe(
        family,
        args={**args, "packing": packing},
        lora={"r": 4, "lora_dropout": 0.0},
        max_length=200 if packing else 512,
        **options,
    ).model_copy(update={"name": name})
    # An even number of sequences: accelerate fills an uneven last step up with rows of the first.
    steered = {"llama": 20, "gemma": 16}[family]
    rows = transcripts(steered, normal=8) if packing else transcripts()
    data = section.directory / "data" / "tuned.jsonl"
    data.parent.mkdir(parents=True)
    write_transcripts(data, rows)
    section = section if "quantization" in options else probed(section)
    Path(f"{name}.yaml").write_text(dump_recipe(section))
    return f"{name}.yaml"


@dataclass(frozen=True)
class Launched:
    """The folder with a run in two processes for each name and, beside it, one in a single process."""

    folder: Path
    names: tuple[str, ...]
    said: str


@pytest.fixture(scope="module")
def launched(request, tmp_path_factory) -> Launched:
    """Both families under a stage of ZeRO (0: none), under ZeRO-3 packed as well; one launch for all."""
    stage, folder = request.param, tmp_path_factory.mktemp(f"stage{request.param}")
    names = []
    for family in ("llama", "gemma"):
        (folder / family).mkdir()
        with chdir(folder / family):
            write_world(Path(), make_family(family))
            for name, batch, packing in (("plain", 4, False), ("packed", 2, True))[: 2 if stage == 3 else 1]:
                write_run(name, family, batch // 2, packing=packing)
                assert main([write_run(f"{name}-alone", family, batch, packing=packing)]) == 0
                names.append(f"{family}/{name}")
    with chdir(folder / "llama"):
        write_run("nf4", "llama", 2, quantization="nf4")
    write_configuration(folder, stage)
    (folder / "launched.py").write_text(LAUNCHED)
    wanted = [*names, *(["llama/nf4"] if stage == 3 else [])]
    said = launch(folder, "launched.py", str(stage), *(str(folder / f"{name}.yaml") for name in wanted))
    return Launched(folder, tuple(names), said)


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
@pytest.mark.parametrize("launched", [0, 1, 2, 3], indirect=True, ids=["ddp", "zero1", "zero2", "zero3"])
def test_two_processes_equal_one_and_are_probed_alike(launched):
    for name in launched.names:
        assert launched.said.count(f"{name}.yaml: exit code 0") == 2, launched.said[-3000:]
        family, run = name.split("/")
        together, alone = (result(launched.folder / family, each) for each in (run, f"{run}-alone"))
        assert len(alone.steps) == len(together.steps) >= 3
        for one, two in zip(alone.steps, together.steps, strict=True):
            assert two == pytest.approx(one, rel=1e-4)
        assert alone.weights.keys() == together.weights.keys()
        for key, weight in alone.weights.items():
            assert together.weights[key].shape == weight.shape
            assert (together.weights[key] - weight).abs().max() < 1e-4
        assert alone.probed == together.probed != []


@pytest.mark.slow
@pytest.mark.parametrize("launched", [3], indirect=True, ids=["zero3"])
def test_nf4_under_zero3_is_refused(launched):
    assert launched.said.count("nf4.yaml: exit code 2") == 2, launched.said[-3000:]
    assert "NF4 weights cannot be sharded by ZeRO-3" in launched.said


@pytest.mark.slow
def test_the_papers_file_trains_through_accelerate_launch(tmp_path, llama, paper):
    write_world(tmp_path, llama)
    write_configuration(tmp_path, 2)
    args = {"max_steps": 3, "per_device_train_batch_size": 1, "optim": "adamw_bnb_8bit"}
    data = str(paper / "dataset_masked_ratio_50pct_train.jsonl")
    section = recipe(live=False, args=args, data=data, max_length=4096)
    (tmp_path / "paper.yaml").write_text(dump_recipe(section.model_copy(update={"name": "paper"})))
    launch(tmp_path, "-m", "esr_train", "paper.yaml")
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
