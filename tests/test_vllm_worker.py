"""The worker's bookkeeping on a runner that does what vLLM's does: packed tokens, chunks, preemption, reuse of rows.

No vLLM is needed; `test_vllm_engine.py` holds the real one against the transformers engine.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from torch import nn

from esr_train.errors import RunError
from esr_train.steering.direction_files import load_sae
from esr_train.steering.directions import Add, Positions
from esr_train.steering.interventions import Ablate, Intervention
from esr_train.steering.token_reading import Activations, Projections
from esr_train.steering.vllm.vllm_engine import VllmEngine
from esr_train.steering.vllm.vllm_worker import SUPPORTED, SteeringExtension, Wanted, _Steps, packed, unsupported

WIDTH = 4


class DecoderLayer(nn.Module):
    """As in vLLM: the block's output and the residual come apart."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, torch.ones_like(hidden)


class Runner:
    """The parts of vLLM's model runner that the extension reads."""

    def __init__(self, slots: int = 2) -> None:
        self.device = torch.device("cpu")
        self.scheduler_config = SimpleNamespace(max_num_seqs=slots)
        self.requests: dict[str, Any] = {}
        self.input_batch = SimpleNamespace(req_ids=[], num_computed_tokens_cpu=np.zeros(8, dtype=np.int32))
        self.query_start_loc = SimpleNamespace(np=np.zeros(9, dtype=np.int32))
        self.model = SimpleNamespace(model=SimpleNamespace(layers=nn.ModuleList([DecoderLayer(), DecoderLayer()])))
        self.broken: set[str] = set()
        self.steps: Any = None

    def get_model(self) -> Any:
        return self.model

    def _model_forward(self, input_ids: Any, positions: torch.Tensor) -> list[torch.Tensor]:
        return [layer(torch.zeros(len(positions), WIDTH))[0] for layer in self.model.model.layers]

    def _sample(self, logits: torch.Tensor) -> None:
        pass

    def add(self, name: str, *interventions: Intervention, reply_start: int = 2, probes: Any = ()) -> None:
        self.requests[name] = SimpleNamespace(sampling_params=SimpleNamespace(extra_args={"esr": {"key": name}}))
        if interventions or probes:
            self.steps.expected[name] = Wanted(reply_start, interventions, probes)

    def step(self, padding: int = 0, **scheduled: tuple[int, int]) -> list[list[float]]:
        """Run requests, each from a position on for some tokens; what each layer added to each token."""
        self.input_batch.req_ids = list(scheduled)
        for row, (start, count) in enumerate(scheduled.values()):
            self.input_batch.num_computed_tokens_cpu[row] = start
            self.query_start_loc.np[row + 1] = self.query_start_loc.np[row] + count
        total = int(self.query_start_loc.np[len(scheduled)]) + padding
        states = [states[:, 0].tolist() for states in self._model_forward(None, positions=torch.zeros(total))]
        self._sample(torch.tensor([[float("nan") if name in self.broken else 1.0, 0.0] for name in scheduled]))
        return states


def add(size: float = 1.0, layer: int = 0, positions: Positions = "all") -> Add:
    return Add(layer, torch.full((WIDTH,), size), positions)


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def worker(runner) -> SteeringExtension:
    return extension(runner)


def extension(runner: Runner) -> SteeringExtension:
    made = SteeringExtension()
    made.model_runner, made.esr = runner, _Steps(runner)
    runner.steps = made.esr
    return made


def test_packed_tokens_get_their_own_requests_vectors(runner, worker):
    runner.add("a", add(2.0))
    runner.add("b")
    runner.add("c", add(5.0, positions="generated"), add(7.0, layer=1))
    first, second = runner.step(a=(0, 2), b=(0, 1), c=(0, 3), padding=1)
    assert first == [2, 2, 0, 0, 0, 5, 0]
    assert second == [0, 0, 0, 7, 7, 7, 0]
    assert runner.step(c=(3, 1), a=(2, 1), b=(1, 1)) == [[5, 2, 0], [7, 0, 0]]
    assert runner.step(c=(4, 1), a=(3, 1), b=(2, 1)) == [[5, 2, 0], [7, 0, 0]]
    assert worker.esr_take(["a", "b", "c"]) == [("a", [(0, 4)], None, []), ("c", [(0, 3), (1, 5)], None, [])]


def test_chunks_count_once_and_a_preempted_request_counts_from_the_start(runner, worker):
    runner.add("a", add())
    runner.add("b", add(3.0))
    runner.step(a=(0, 2))
    assert runner.step(b=(0, 2), a=(2, 2))[0] == [3, 3, 1, 1]
    runner.step(b=(2, 1))
    assert runner.step(a=(0, 5), b=(3, 1))[0] == [1, 1, 1, 1, 1, 3]
    assert worker.esr_take(["a", "b"]) == [("a", [(0, 5)], None, []), ("b", [(0, 4)], None, [])]


def test_slots_are_used_again_and_their_old_vectors_are_gone(runner, worker):
    for number in range(6):
        runner.add(f"r{number}", add(number + 1.0, positions="generated"))
        assert runner.step(**{f"r{number}": (0, 3)})[0] == [0, 0, number + 1]
        del runner.requests[f"r{number}"]
    found = worker.esr_take([f"r{number}" for number in range(6)])
    assert [report[1] for report in found] == [[(0, 1)]] * 6


def test_a_request_that_skips_tokens_fails(runner, worker):
    """As it would if a cached prefix were taken from another request."""
    runner.add("a", add())
    runner.add("b", add())
    runner.step(a=(16, 2), b=(0, 2))
    (_, _, error, _), (_, _, fine, _) = worker.esr_take(["a", "b"])
    assert "went on at token 16" in error
    assert fine is None


def test_an_unknown_layer_fails_its_request_alone(runner, worker):
    runner.add("a", add(layer=9))
    assert runner.step(a=(0, 2)) == [[0] * 2, [0] * 2]
    del runner.requests["a"]
    runner.add("b", add())
    runner.step(b=(0, 1))
    errors = [report[2] for report in worker.esr_take(["a", "b"])]
    assert "could not be set up: IndexError" in errors[0]
    assert errors[1] is None


def test_logits_that_are_not_finite_fail_their_request_steered_or_not(runner, worker):
    for name, interventions in (("a", [add()]), ("b", []), ("c", []), ("d", [add()])):
        runner.add(name, *interventions)
    runner.step(a=(0, 2), b=(0, 1))
    runner.broken = {"a", "b"}
    runner.step(a=(2, 1), b=(1, 1), c=(0, 3))
    runner.step(d=(0, 1))
    found = {key: error for key, _, error, _ in worker.esr_take(["a", "b", "c", "d"])}
    assert found == {"a": "got logits that are not finite", "b": "got logits that are not finite", "d": None}
    runner.step(d=(1, 1))
    assert worker.esr_take(["a", "b", "c"]) == []


def test_what_is_wanted_passes_between_processes_with_saes_by_name(runner, worker, tmp_path):
    saved = JumpReLUSAE(JumpReLUSAEConfig(d_in=WIDTH, d_sae=6))
    saved.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    saved.save_model(tmp_path / "one")
    sae = load_sae(str(tmp_path), "one")
    table = torch.arange(3.0 * WIDTH).reshape(3, WIDTH)
    message = packed(
        {"a": Wanted(2, (Add(0, table[1]), Ablate(sae, (3, 5)))), "b": Wanted(1, (), (Activations(sae, (4,)),))}
    )
    assert len(message) < 2000
    assert worker.esr_expect(message) is None
    found = worker.esr.expected
    assert torch.equal(found["a"].interventions[0].vector, table[1])
    assert found["a"].interventions[1].latents == (3, 5)
    assert found["a"].interventions[1].sae is found["b"].probes[0].sae
    assert torch.equal(found["b"].probes[0].sae.row(4), sae.row(4))
    JumpReLUSAE(saved.cfg).save_model(tmp_path / "one")
    assert "is not the one that was asked for" in extension(Runner()).esr_expect(message)


def test_a_layer_that_returns_something_else_fails_the_request(runner, worker, monkeypatch):
    monkeypatch.setattr(DecoderLayer, "forward", lambda self, hidden: (hidden, hidden, hidden))
    runner.add("a", add())
    runner.step(a=(0, 2))
    ((_, counts, error, _),) = worker.esr_take(["a"])
    assert counts == [(0, 0)]
    assert "layer 0: ValueError" in error


def test_probes_read_behind_the_steering_and_from_the_start_after_a_preemption(runner, worker):
    encode = lambda hidden: hidden * torch.tensor([1.0, 10, 100, 1000])  # noqa: E731
    sae = SimpleNamespace(layer=0, encode=encode, check_use=lambda *_: None)
    directions = torch.tensor([[1.0, 1, 1, 1]])
    runner.add("a", add(2.0, positions="generated"), probes=(Activations(sae, (2, 0)), Projections(1, directions)))
    runner.add("b", add())
    runner.step(b=(0, 1), a=(0, 2))
    runner.step(a=(0, 3), b=(1, 1))
    runner.step(a=(3, 1), b=(2, 1))
    runner.step(a=(4, 1), b=(3, 1))
    (_, counts, error, read), (_, _, _, nothing) = worker.esr_take(["a", "b"])
    assert (counts, error, nothing) == ([(0, 3)], None, [])
    latents, projected = (torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape) for shape, data in read)
    assert latents.tolist() == [[100, 1], [100, 1], [300, 3], [300, 3], [300, 3]]
    assert projected.tolist() == [[4]] * 5


def test_a_step_without_a_placement_is_left_alone(runner, worker):
    """vLLM's own dummy runs call the model directly."""
    runner.add("a", add())
    runner.step(a=(0, 2))
    hidden, _ = runner.model.model.layers[0](torch.zeros(5, WIDTH))
    assert not hidden.any()


def supported(**changes: Any) -> Any:
    """What `unsupported` reads of vLLM's runner, as it is when everything fits."""
    first = type("GPUModelRunner", (), {"__module__": "vllm.v1.worker.gpu_model_runner"})
    runner = type("CPUModelRunner", (first,), {})()
    model = type("LlamaForCausalLM", (), {})()
    runner.get_model = lambda: changes.get("model", model)
    runner.vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=changes.get("prefix", False)),
        model_config=SimpleNamespace(enforce_eager=changes.get("eager", True)),
        speculative_config=changes.get("speculative"),
        scheduler_config=SimpleNamespace(async_scheduling=changes.get("asynchronous", False)),
        parallel_config=SimpleNamespace(pipeline_parallel_size=changes.get("pipeline", 1)),
    )
    return runner


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": object()}, "object cannot be steered, only LlamaForCausalLM and Gemma2ForCausalLM"),
        ({"prefix": True}, "prefix caching must be off"),
        ({"eager": False}, "enforce_eager must be on"),
        ({"speculative": object()}, "speculative decoding and asynchronous scheduling must be off"),
        ({"asynchronous": True}, "speculative decoding and asynchronous scheduling must be off"),
        ({"pipeline": 2}, "pipeline parallelism is not supported"),
    ],
)
def test_what_would_be_steered_wrongly_is_refused(changes, message):
    assert unsupported(supported()) is None
    assert message in (unsupported(supported(**changes)) or "")


def test_a_runner_that_is_not_known_is_refused_with_the_releases_that_are():
    runner = type("Second", (), {"vllm_config": None})()
    message = unsupported(runner) or ""
    assert "the model runner Second" in message
    assert f"vLLM {SUPPORTED}: set VLLM_USE_V2_MODEL_RUNNER=0" in message


class Ranks:
    """A server whose model is shared by workers that are all in this process."""

    def __init__(self, *workers: SteeringExtension) -> None:
        self.workers, self.llm = workers, self

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(worker, method)(*args) for worker in self.workers]


def test_the_ranks_of_one_model_must_steer_the_same_tokens():
    """Every rank holds the whole residual stream and its own copy of the vectors."""
    runners = [Runner(), Runner()]
    server = Ranks(*map(extension, runners))
    engine = VllmEngine(server, None)  # type: ignore[arg-type]
    for runner in runners:
        runner.add("a", add(2.0), reply_start=1)
        assert runner.step(a=(0, 3))[0] == [2, 2, 2]
    assert engine._reports(["a"])["a"][:3] == ("a", [(0, 3)], None)
    for count, runner in enumerate(runners, 1):
        runner.add("b", add())
        runner.step(b=(0, count))
    with pytest.raises(RunError, match="the ranks of the tensor-parallel model did not steer the same tokens"):
        engine._reports(["b"])


def test_an_error_on_any_rank_fails_the_request():
    runners = [Runner(), Runner()]
    server = Ranks(*map(extension, runners))
    for layer, runner in enumerate(runners):
        runner.add("a", add(layer=5 * layer))
        runner.step(a=(0, 3))
    (report,) = VllmEngine(server, None)._reports(["a"]).values()  # type: ignore[arg-type]
    assert "could not be set up: IndexError" in (report[2] or "")
