"""`steer` around transformers' own `generate`: the engine's tokens and counts, padding, rows, and what is refused."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import esr_train
from esr_train.errors import InputError, RunError
from esr_train.models import decoder_layers
from esr_train.steering.direction_files import load_sae
from esr_train.steering.directions import Add
from esr_train.steering.engine import Request, Sampling
from esr_train.steering.interventions import Ablate, Clamp
from esr_train.steering.steer import generate, steer
from esr_train.steering.transformers_engine import TransformersEngine
from tests.conftest import Family
from tests.test_directions import save
from tests.test_transformers_engine import LAYER, PROMPTS, WIDTH, vector

NEW = 9
ADD = Add(LAYER, vector(6))


@pytest.fixture(scope="module")
def family(family: Family) -> Family:
    """As in the engine's tests, and ready for `generate`, with a tokenizer that pads on the left."""
    model, tokenizer = deepcopy(family.model), deepcopy(family.tokenizer)
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    for name, parameter in model.named_parameters():
        if "self_attn" in name or "mlp" in name:
            parameter.data.mul_(2.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "left"
    return Family(family.name, model, tokenizer)


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes")
    save(folder / "one", hook=f"blocks.{LAYER}.hook_resid_post")
    return load_sae(str(folder), "one")


def inputs(family, prompts=PROMPTS):
    chat = family.tokenizer.apply_chat_template
    texts = [chat([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True) for p in prompts]
    return family.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)


def replies(family, given, **options) -> list[list[int]]:
    """Greedy replies of transformers' own `generate`."""
    output = family.model.generate(**given, max_new_tokens=NEW, do_sample=False, **options)
    return output[:, given["input_ids"].shape[1] :].tolist()


def engine_completions(family, steerings):
    requests = [
        Request(str(n), prompt, interventions=each)
        for n, (prompt, each) in enumerate(zip(PROMPTS, steerings, strict=True))
    ]
    return TransformersEngine(family.model, family.tokenizer).generate(
        requests, Sampling(temperature=0, max_new_tokens=NEW)
    )


def hooks(family) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in family.model.modules())


def test_one_steering_for_all_rows_gives_the_engines_tokens_and_counts(family):
    wanted = engine_completions(family, [(ADD,)] * 5)
    assert {c.finish_reason for c in wanted} == {"length"}, "an ended row would be fed padding"
    with steer(family.model, ADD) as steered:
        found = replies(family, inputs(family))
    assert found == [list(c.token_ids) for c in wanted]
    assert found != replies(family, inputs(family)), "the steering must change replies for this test to say anything"
    assert steered.tokens == [c.steered_tokens for c in wanted]
    assert steered.by_layer == {LAYER: steered.tokens}


def test_a_row_that_has_ended_is_fed_padding_which_counts(family, monkeypatch):
    (ended, *_) = engine_completions(family, [(ADD,)] * 5)
    monkeypatch.setattr(family.model.generation_config, "eos_token_id", ended.token_ids[2])
    given = inputs(family)
    with steer(family.model, ADD) as steered:
        found = replies(family, given)
    assert found[0][3:] == [family.tokenizer.pad_token_id] * (len(found[0]) - 3)
    assert steered.tokens == [length + len(found[0]) - 1 for length in given["attention_mask"].sum(1).tolist()]


def test_a_list_steers_each_row_by_its_own_and_none_not_at_all(family, sae):
    steerings = [
        ADD,
        None,
        (Add(LAYER, vector(2)), Add(3, vector(3), "generated")),
        Clamp(sae, 5, 4.0),
        Ablate(sae, (1, 2, 3), "generated"),
    ]
    as_tuples = [() if s is None else s if isinstance(s, tuple) else (s,) for s in steerings]
    wanted = engine_completions(family, as_tuples)
    with steer(family.model, steerings) as steered:
        found = replies(family, inputs(family))
    assert found == [list(c.token_ids) for c in wanted]
    assert steered.tokens == [c.steered_tokens for c in wanted]
    assert steered.tokens[1] == 0
    assert steered.by_layer[3] == [0, 0, NEW - 1, 0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_steered_on_either_side(family, side):
    tokenizer = deepcopy(family.tokenizer)
    tokenizer.padding_side = side
    given = inputs(Family(family.name, family.model, tokenizer))
    with steer(family.model, ADD) as steered, torch.no_grad():
        after = family.model(**given, output_hidden_states=True).hidden_states[LAYER + 1]
    with torch.no_grad():
        before = family.model(**given, output_hidden_states=True).hidden_states[LAYER + 1]
    real = given["attention_mask"].bool()
    assert not real.all(), "rows must differ in length for this test to say anything"
    assert steered.tokens == real.sum(1).tolist()
    assert torch.equal(after[real], before[real] + ADD.vector)
    assert torch.equal(after[~real], before[~real])


def test_without_a_mask_every_token_is_steered_and_counted(family):
    ids = torch.randint(10, 100, (2, 6))
    with steer(family.model, ADD) as steered, torch.no_grad():
        family.model(ids)
        assert steered.tokens == [6, 6]
        family.model.model(ids[:, :4])
    assert steered.tokens == [4, 4], "a pass without a cache counts anew, whoever calls the decoder"


def test_embeddings_beams_samples_and_plain_passes_are_steered(family):
    given = inputs(family, PROMPTS[:2])
    lengths = given["attention_mask"].sum(1).tolist()
    for options, rows in (({"num_beams": 2}, 2), ({"num_return_sequences": 3, "do_sample": True}, 3)):
        with steer(family.model, ADD) as steered:
            family.model.generate(**given, max_new_tokens=4, min_new_tokens=4, **options)
        assert steered.tokens == [length + 3 for length in lengths for _ in range(rows)]
    embeddings = family.model.get_input_embeddings()(given["input_ids"])
    with steer(family.model, ADD) as steered, torch.no_grad():
        family.model(inputs_embeds=embeddings, attention_mask=given["attention_mask"])
    assert steered.tokens == lengths


def test_a_model_with_an_adapter_is_steered(family):
    tuned = get_peft_model(deepcopy(family.model), LoraConfig(r=2, target_modules=["q_proj"])).eval()
    given = inputs(family, PROMPTS[:2])
    with steer(tuned, ADD) as steered:
        found = tuned.generate(**given, max_new_tokens=NEW, do_sample=False)
    with steer(family.model, ADD):
        wanted = family.model.generate(**given, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, wanted)
    assert steered.tokens == [length + NEW - 1 for length in given["attention_mask"].sum(1).tolist()]


def test_gradients_flow_under_checkpointing_and_tokens_count_once(family):
    model = deepcopy(family.model).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(10, 100, (2, 6))
    with steer(model, ADD) as steered:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert steered.tokens == [6, 6]
    assert decoder_layers(model)[0].mlp.up_proj.weight.grad.ne(0).any()


@pytest.mark.parametrize(
    ("steering", "options", "message"),
    [
        ([ADD, None], {}, "2 steerings were given for a batch of 5 rows"),
        ([ADD] * 5, {"num_return_sequences": 2, "do_sample": True}, "5 steerings were given for a batch of 10 rows"),
        (ADD, {"cache_implementation": "static"}, "attention_mask: the attention mask does not say"),
        (Add(LAYER, vector(6), "generated"), {"use_cache": False}, "generated tokens cannot be told from the prompt"),
    ],
)
def test_what_would_be_steered_wrongly_is_refused_and_the_hooks_are_gone(family, steering, options, message):
    before = hooks(family)
    with pytest.raises(InputError, match=message), steer(family.model, steering):
        family.model.generate(**inputs(family), max_new_tokens=3, **options)
    assert hooks(family) == before


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        (Add(9, torch.zeros(WIDTH)), "there is no layer 9"),
        (Add(0, torch.zeros(32)), "64 wide"),
        (Add(0, torch.full((WIDTH,), float("nan"))), "not finite"),
        ([None, Add(0, torch.zeros(32))], "64 wide"),
        ("more", "str is no intervention. Give a strength"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(family, steering, message):
    with pytest.raises(InputError, match=message), steer(family.model, steering):
        pytest.fail("the block must not begin")


def test_a_direction_without_a_strength_is_answered_with_how_to_give_one(family, sae):
    with pytest.raises(InputError, match=r"Direction is no intervention.*direction\.add\(0\.9\)"):
        steer(family.model, sae.direction(5)).__enter__()


def test_hooks_are_gone_after_the_block_and_after_an_error(family):
    before = hooks(family)
    with steer(family.model, ADD) as steered:
        assert (steered.tokens, steered.by_layer) == ([], {})
    for error in (KeyError, KeyboardInterrupt):
        with pytest.raises(error), steer(family.model, ADD):
            failing(family, error)
    assert hooks(family) == before


def failing(family, error: type[BaseException]) -> None:
    family.model(torch.tensor([[5, 6]]))
    raise error


def test_a_layer_that_does_not_run_is_an_error(family, monkeypatch):
    monkeypatch.setattr("esr_train.steering.layer_edits.Layer.forward_hook", lambda self, _, __, output: output)
    with pytest.raises(RunError, match=r"layers \[1\] did not run"), steer(family.model, ADD):
        family.model(torch.tensor([[5, 6]]))


def test_generate_renders_prompts_steers_each_and_counts(family):
    wanted = engine_completions(family, [(ADD,), (), (ADD,), (), (ADD,)])
    greedy = Sampling(temperature=0, max_new_tokens=NEW)
    found = generate(family.model, family.tokenizer, PROMPTS, [ADD, None, ADD, None, ADD], sampling=greedy)
    assert found == wanted
    (one,) = generate(family.model, family.tokenizer, PROMPTS[0], ADD, sampling=greedy)
    assert one.token_ids == wanted[0].token_ids
    with pytest.raises(InputError, match="1 steerings were given for 5 prompts"):
        generate(family.model, family.tokenizer, PROMPTS, [ADD])


def test_public_names_are_there_documented_and_light(tmp_path):
    import subprocess
    import sys

    heavy = "{'torch', 'transformers', 'sae_lens', 'pydantic', 'yaml'} & set(sys.modules)"
    command = [sys.executable, "-c", f"import sys, esr_train; print(sorted({heavy}), len(dir(esr_train)))"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("[] ")
    for name in esr_train.__all__:
        assert getattr(esr_train, name).__doc__, name
        assert name in dir(esr_train)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = esr_train.nothing
