"""The transformers engine against a decoder written naively: one row, no cache, one hook."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from esr_train.errors import RunError
from esr_train.models import decoder_layers
from esr_train.steering import decoding
from esr_train.steering.directions import Add
from esr_train.steering.engine import Completion, Request, Sampling
from esr_train.steering.hook import SteeringHook
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.template import encode_prompt
from tests.conftest import Family

WIDTH, LAYER = 64, 1
GREEDY = Sampling(temperature=0, max_new_tokens=12)
PROMPTS = [
    "How do I fold a fitted sheet?",
    "Wait.",
    "First, knead the dough and dust the flour over the board. Smooth it. " * 4,
    "Raise the mast",
    "Trim the jib before the gale?",
]


def vector(seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def family(family: Family) -> Family:
    """The family made livelier: with tied and small random weights it would only ever repeat one token."""
    model = deepcopy(family.model)
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    for name, parameter in model.named_parameters():
        if "self_attn" in name or "mlp" in name:
            parameter.data.mul_(2.5)
    return Family(family.name, model, family.tokenizer)


def steered_requests() -> list[Request]:
    """Every kind in one batch: none, all, generated, a prefix, two vectors at two layers."""
    steerings = [
        (Add(LAYER, vector(0)),),
        (),
        (Add(LAYER, vector(1), "generated"),),
        (Add(LAYER, vector(2)), Add(3, vector(3), "generated")),
        (Add(LAYER, vector(4)), Add(LAYER, vector(5))),
    ]
    prefixes = ["", "", "Start by", "", "Then"]
    return [
        Request(f"r{number}", prompt, prefix=prefix, interventions=steering, seed=number)
        for number, (prompt, prefix, steering) in enumerate(zip(PROMPTS, prefixes, steerings, strict=True))
    ]


def naive(family, request: Request, stops: frozenset[int], new_tokens: int, start: int | None = None) -> list[int]:
    """Greedy decoding that recomputes the whole sequence at every step; `start`: of what `generated` steers."""
    ids, reply = encode_prompt(family.tokenizer, request.prompt, request.system, request.prefix)
    start = reply if start is None else start

    def hooked(add: Add):
        def hook(_, __, output):
            first = 0 if add.positions == "all" else start
            output = output.clone()
            output[:, first:] += add.vector
            return output

        return decoder_layers(family.model)[add.layer].register_forward_hook(hook)

    handles = [hooked(add) for add in request.interventions]
    generated: list[int] = []
    with torch.no_grad():
        while len(generated) < new_tokens and not (generated and generated[-1] in stops):
            generated.append(int(family.model(torch.tensor([ids + generated])).logits[0, -1].argmax()))
    for handle in handles:
        handle.remove()
    return generated


@pytest.fixture
def early_stops(family, monkeypatch):
    """Stop tokens that end the replies of `steered_requests` at different steps."""
    completions = TransformersEngine(family.model, family.tokenizer).generate(steered_requests(), GREEDY)
    stops = [completions[row].token_ids[step] for row, step in ((0, 2), (2, 5), (4, 9))]
    monkeypatch.setattr(family.model.generation_config, "eos_token_id", stops)
    return frozenset([*stops, family.tokenizer.eos_token_id])


def test_batched_rows_equal_naive_decoding_token_for_token(family):
    requests = steered_requests()
    completions = TransformersEngine(family.model, family.tokenizer).generate(requests, GREEDY)
    stops = frozenset([family.tokenizer.eos_token_id])
    assert [c.id for c in completions] == [r.id for r in requests]
    found = [list(c.token_ids) for c in completions]
    assert found == [naive(family, request, stops, 12) for request in requests]
    unsteered = [naive(family, Request("", r.prompt, prefix=r.prefix), stops, 12) for r in requests]
    assert [a == b for a, b in zip(found, unsteered, strict=True)] == [False, True, False, False, False]


@pytest.mark.parametrize("unsteered", ["", "Start", "Start by"])
def test_of_a_prefix_what_is_to_be_left_alone_is_not_steered(family, unsteered):
    add = Add(LAYER, vector(1), "generated")
    request = Request("r", PROMPTS[2], prefix="Start by", interventions=(add,), unsteered=len(unsteered))
    (completion,) = TransformersEngine(family.model, family.tokenizer).generate([request], GREEDY)
    given, _ = encode_prompt(family.tokenizer, PROMPTS[2], None, unsteered)
    whole, _ = encode_prompt(family.tokenizer, PROMPTS[2], None, "Start by")
    start = next((i for i, (a, b) in enumerate(zip(given, whole, strict=False)) if a != b), len(given))
    assert completion.steered_tokens == len(whole) + len(completion.token_ids) - 1 - start
    stops = frozenset([family.tokenizer.eos_token_id])
    assert list(completion.token_ids) == naive(family, request, stops, 12, start)


def test_a_reply_that_ends_at_once_behind_what_is_left_alone_has_no_token_to_steer():
    add = Add(LAYER, vector(1), "generated")
    ended, longer = (Completion("r", "", ids, "stop", 9, 0) for ids in ((2,), (5, 2)))
    late = Request("r", "How?", prefix="Start", interventions=(add,), unsteered=5)
    assert not late.steers(ended)
    assert late.steers(longer)
    assert replace(late, unsteered=0).steers(ended)
    assert replace(late, interventions=(Add(LAYER, vector(1)),)).steers(ended)
    assert not Request("r", "How?").steers(longer)


def test_rows_that_end_early_leave_the_others_alone_and_are_counted_exactly(family, early_stops):
    requests = steered_requests()
    sampling = Sampling(temperature=0, max_new_tokens=40)
    completions = TransformersEngine(family.model, family.tokenizer).generate(requests, sampling)
    lengths = [len(c.token_ids) for c in completions]
    assert len(set(lengths)) > 1, "the rows must end at different steps for this test to say anything"
    for request, completion in zip(requests, completions, strict=True):
        assert list(completion.token_ids) == naive(family, request, early_stops, 40)
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] in early_stops else "length")
    fed = [c.prompt_tokens + len(c.token_ids) - 1 for c in completions]
    ids, start = encode_prompt(family.tokenizer, PROMPTS[2], None, "Start by")
    assert start < len(ids)
    assert [c.steered_tokens for c in completions] == [fed[0], 0, fed[2] - start, fed[3], fed[4]]


def test_the_text_has_no_end_of_turn_and_a_stop_is_told_from_the_length(family, early_stops):
    requests = [Request("a", PROMPTS[0]), Request("b", PROMPTS[2])]
    for completion in TransformersEngine(family.model, family.tokenizer).generate(requests, GREEDY):
        ids = completion.token_ids
        kept = ids[:-1] if completion.finish_reason == "stop" else ids
        assert completion.text == family.tokenizer.decode(kept, skip_special_tokens=True)


@pytest.mark.parametrize("batch_rows", [1, 2])
def test_small_batches_give_the_same_completions_in_the_same_order(family, batch_rows):
    requests = steered_requests()
    sampling = Sampling(temperature=0.8, max_new_tokens=10, repetition_penalty=1.2, top_p=0.95)
    together = TransformersEngine(family.model, family.tokenizer).generate(requests, sampling)
    told: list[tuple[int, int]] = []
    apart = TransformersEngine(family.model, family.tokenizer, batch_rows=batch_rows).generate(
        requests, sampling, lambda rows, tokens: told.append((rows, tokens))
    )
    assert apart == together
    assert sum(rows for rows, _ in told) == 5
    assert sum(tokens for _, tokens in told) == sum(len(c.token_ids) for c in together)


@pytest.mark.parametrize("batch_rows", [3, 20])
def test_rows_that_take_the_places_of_others_generate_what_they_would_alone(
    family, early_stops, monkeypatch, batch_rows
):
    """Memory for keys and values grows on the way, and is used again."""
    monkeypatch.setattr(decoding, "ROOM", 3)
    requests = [replace(request, id=f"{n}-{request.id}") for n in range(6) for request in steered_requests()]
    sampling = Sampling(temperature=0, max_new_tokens=30)
    engine = TransformersEngine(family.model, family.tokenizer, batch_rows=batch_rows)
    together = engine.generate(requests, sampling)
    alone = TransformersEngine(family.model, family.tokenizer, batch_rows=1).generate(steered_requests(), sampling)
    assert {len(c.token_ids) for c in alone} > {30}, "some rows must end before others for this test to say anything"
    assert [replace(c, id=c.id[2:]) for c in together] == alone * 6


def widen_window(family, monkeypatch) -> None:
    """Gemma's own one is shorter than the prompts: there its own attention goes on."""
    if family.name == "gemma":
        monkeypatch.setattr(family.model.config, "sliding_window", 4096)


def test_grouped_attention_gives_the_tokens_of_the_models_own(family, monkeypatch):
    engine, sampling = TransformersEngine(family.model, family.tokenizer), Sampling(temperature=0, max_new_tokens=40)
    calls = []
    widen_window(family, monkeypatch)
    grouped = ALL_ATTENTION_FUNCTIONS["esr_grouped"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, "esr_grouped", lambda *a, **b: (calls.append(1), grouped(*a, **b))[1]
    )
    found = engine.generate(steered_requests(), sampling)
    assert calls
    monkeypatch.setattr(decoding, "_FAMILIES", ())
    calls.clear()
    assert engine.generate(steered_requests(), sampling) == found
    assert not calls
    assert family.model.config._attn_implementation == "eager"


def test_a_reply_longer_than_a_sliding_window_is_that_of_naive_decoding(family, monkeypatch):
    if family.name != "gemma":
        pytest.skip("has no sliding window")
    prompts = [len(encode_prompt(family.tokenizer, r.prompt, None, r.prefix)[0]) for r in steered_requests()]
    monkeypatch.setattr(family.model.config, "sliding_window", max(prompts) + 10)
    requests = steered_requests()
    completions = TransformersEngine(family.model, family.tokenizer).generate(requests, Sampling(0, max_new_tokens=30))
    stops = frozenset([family.tokenizer.eos_token_id])
    assert [list(c.token_ids) for c in completions] == [naive(family, request, stops, 30) for request in requests]


def test_a_failing_step_leaves_the_models_own_attention(family, monkeypatch):
    widen_window(family, monkeypatch)

    def broken(*_):
        if family.model.config._attn_implementation != "eager":
            raise RuntimeError("on purpose")

    with family.model.lm_head.register_forward_hook(broken), pytest.raises(RuntimeError, match="on purpose"):
        TransformersEngine(family.model, family.tokenizer).generate(steered_requests(), GREEDY)
    assert family.model.config._attn_implementation == "eager"


def test_seeds_decide_what_is_drawn(family):
    engine = TransformersEngine(family.model, family.tokenizer)
    requests = [Request(str(n), PROMPTS[0], seed=seed) for n, seed in enumerate([1, 2, 1])]
    hot = Sampling(temperature=20, max_new_tokens=8)
    first, second, third = (c.token_ids for c in engine.generate(requests, hot))
    assert first == third != second
    assert [c.token_ids for c in engine.generate(requests, hot)] == [first, second, third]


def test_sampled_rows_that_end_early_do_not_change_what_the_others_draw(family, early_stops):
    requests = [Request(str(n), prompt, seed=n) for n, prompt in enumerate(PROMPTS * 2)]
    hot = Sampling(temperature=20.0, max_new_tokens=40)
    together = TransformersEngine(family.model, family.tokenizer).generate(requests, hot)
    assert len({len(c.token_ids) for c in together if c.finish_reason == "stop"}) > 1
    alone = TransformersEngine(family.model, family.tokenizer, batch_rows=1).generate(requests, hot)
    assert alone == together


def test_strength_zero_generates_what_no_steering_generates(family):
    engine = TransformersEngine(family.model, family.tokenizer)
    zero = [Request("a", PROMPTS[0], interventions=(Add(LAYER, torch.zeros(WIDTH)),))]
    (steered,), (plain,) = engine.generate(zero, GREEDY), engine.generate([Request("a", PROMPTS[0])], GREEDY)
    assert steered.token_ids == plain.token_ids
    assert (steered.steered_tokens, plain.steered_tokens) == (plain.prompt_tokens + 11, 0)


def test_a_row_that_was_not_steered_is_an_error_that_names_the_request(family, monkeypatch):
    """The hook is broken on purpose: after the prompt it no longer steers the second row."""
    set_rows = SteeringHook.set_rows

    def broken(self, index, reply=None):
        set_rows(self, torch.where(index == 1, -1, index) if index.shape[1] == 1 else index, reply)

    monkeypatch.setattr(SteeringHook, "set_rows", broken)
    requests = [Request(f"row-{n}", prompt, interventions=(Add(LAYER, vector(n)),)) for n, prompt in enumerate(PROMPTS)]
    with pytest.raises(RunError, match=r"'row-\d'.*layer 1 steered \d+ tokens where \d+ were asked for"):
        TransformersEngine(family.model, family.tokenizer).generate(requests, GREEDY)


def test_hooks_that_never_run_are_an_error(family, monkeypatch):
    monkeypatch.setattr(SteeringHook, "__enter__", lambda self: self)
    with pytest.raises(RunError, match="steered 0 tokens"):
        TransformersEngine(family.model, family.tokenizer).generate(steered_requests(), GREEDY)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_that_names_the_request(family, value):
    """Whatever is drawn from them: a NaN would win or lose every comparison in silence."""
    steps = []

    def broken(_, __, output):
        steps.append(len(output.logits))
        if len(steps) > 1:
            output.logits[1, :, 7] = value

    # Batches run the longest prompts first.
    lengths = [(-len(encode_prompt(family.tokenizer, r.prompt, None, r.prefix)[0]), r.id) for r in steered_requests()]
    (_, second), engine = sorted(lengths)[1], TransformersEngine(family.model, family.tokenizer)
    for sampling in (GREEDY, Sampling(temperature=0.7, top_p=0.9, max_new_tokens=12)):
        steps.clear()
        with (
            family.model.register_forward_hook(broken),
            pytest.raises(RunError, match=f"'{second}': the model's logits are not finite behind 1 generated"),
        ):
            engine.generate(steered_requests(), sampling)
    with family.model.register_forward_hook(broken), pytest.raises(RunError, match="the model's logits are not finite"):
        engine.log_probabilities(steered_requests(), [" Knead"] * 5)


def test_a_token_that_the_model_rules_out_is_no_error(family):
    def ruling_out(_, __, logits):
        logits[..., 7] = -torch.inf
        return logits

    with family.model.lm_head.register_forward_hook(ruling_out):
        made = TransformersEngine(family.model, family.tokenizer).generate(steered_requests(), GREEDY)
    assert all(7 not in completion.token_ids for completion in made)


def test_the_training_mode_is_put_back(family):
    family.model.train()
    try:
        TransformersEngine(family.model, family.tokenizer).generate([Request("a", "Wait.")], GREEDY)
        assert family.model.training
    finally:
        family.model.eval()


def test_no_requests_give_no_completions(family):
    assert TransformersEngine(family.model, family.tokenizer).generate([], GREEDY) == []


def test_log_probabilities_are_those_of_the_naive_forward_pass_under_each_rows_steering(family):
    engine = TransformersEngine(family.model, family.tokenizer, batch_rows=3)
    texts = [" Wait, the mast.", " Then dust it.", " Knead", " Start", " Smooth the board."]
    found = engine.log_probabilities(steered_requests(), texts)
    for request, text, value in zip(steered_requests(), texts, found, strict=True):
        ids, start = encode_prompt(family.tokenizer, request.prompt, None, request.prefix)
        whole, _ = encode_prompt(family.tokenizer, request.prompt, None, request.prefix + text)
        assert whole[: len(ids)] == ids
        logits = forward(family, request, whole, start)
        tail = torch.tensor(whole[len(ids) :])
        wanted = logits[len(ids) - 1 : -1].log_softmax(-1).gather(1, tail[:, None])[:, 0]
        assert value == pytest.approx(wanted.tolist(), abs=1e-3)


def test_texts_share_a_beginning_only_where_as_much_of_it_is_steered(family):
    engine, steered = TransformersEngine(family.model, family.tokenizer), steered_requests()[2]
    requests = [steered, replace(steered, unsteered=len(steered.prefix))]
    both = engine.log_probabilities(requests, [" Knead the dough."] * 2)
    ids, _ = encode_prompt(family.tokenizer, steered.prompt, None, steered.prefix)
    whole, _ = encode_prompt(family.tokenizer, steered.prompt, None, steered.prefix + " Knead the dough.")
    logits = forward(family, steered, whole, len(ids))
    tail = torch.tensor(whole[len(ids) :])
    wanted = logits[len(ids) - 1 : -1].log_softmax(-1).gather(1, tail[:, None])[:, 0]
    assert both[1] == pytest.approx(wanted.tolist(), abs=1e-3)
    assert both[0] != pytest.approx(both[1], abs=1e-2)


def test_a_beginning_that_texts_share_is_read_once(family):
    fed: list[tuple[int, int]] = []
    engine = TransformersEngine(family.model, family.tokenizer, batch_rows=4)
    requests = [request for request in steered_requests()[:3] for _ in range(3)]
    texts = [" Knead", " Wait, the mast. Raise the jib.", " Then dust it."] * 3
    with family.model.get_input_embeddings().register_forward_hook(lambda _, __, out: fed.append(tuple(out.shape[:2]))):
        together = engine.log_probabilities(requests, texts)
    assert fed[0][0] == 3, "three beginnings, each once"
    assert sum(rows for rows, _ in fed[1:]) == 9
    alone = [engine.log_probabilities([r], [t])[0] for r, t in zip(requests, texts, strict=True)]
    for values, wanted in zip(together, alone, strict=True):
        assert values == pytest.approx(wanted, abs=1e-4)


def test_the_first_tokens_log_probability_is_that_of_sampling_it(family):
    """Greedy decoding's first token is the likeliest of all one-token continuations."""
    engine = TransformersEngine(family.model, family.tokenizer)
    request = steered_requests()[0]
    (made,) = engine.generate([request], GREEDY)
    first = family.tokenizer.decode(made.token_ids[:1])
    others = ["Wait", " the", " mast"]
    values = [sum(each) for each in engine.log_probabilities([request] * 4, [first, *others])]
    assert values[0] >= max(values[1:])
    assert all(value <= 0 for value in values)


def forward(family, request: Request, ids: list[int], reply_start: int) -> torch.Tensor:
    """Logits [positions, vocabulary] of one row, steered by plain hooks."""

    def hooked(add: Add):
        def hook(_, __, output):
            output = output.clone()
            output[:, 0 if add.positions == "all" else reply_start :] += add.vector
            return output

        return decoder_layers(family.model)[add.layer].register_forward_hook(hook)

    handles = [hooked(add) for add in request.interventions]
    with torch.no_grad():
        logits = family.model(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    return logits
