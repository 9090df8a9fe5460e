"""The faster head: loss, gradients and logged figures are those of full logits, with and without live injection."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from test_trainer import log_of
from training_world import LAYER, read_six, recipe, with_adapter, write_world

from esr_train.models import bare_model
from esr_train.recipe import LiveSection
from esr_train.training import live_trainers, lm_head
from esr_train.training.batches import Collator
from esr_train.training.dataset import singly, table, to_dataset
from esr_train.training.injection import LiveInjection

LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy")
SHARES = {"injected": 1.0, "plain": 0.0}


@pytest.fixture
def world(tmp_path, family, monkeypatch):
    """(model with LoRA and the faster head, its micro-batches of three rows, their number of trained tokens)."""
    # A tile that is smaller than a micro-batch, as in real ones.
    monkeypatch.setattr(lm_head, "TILE", 7)
    rows = read_six(tmp_path, family)
    sequences = list(to_dataset(singly(rows), table(rows)))
    collate = Collator(family.tokenizer.pad_token_id)
    batches = [collate(sequences[::2]), collate(sequences[1::2])]
    model = with_adapter(family)
    lm_head.score_trained_tokens(bare_model(model), with_mean=True)
    return model, batches, sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def accumulated(model, batches, live, token_loss):
    """Sum of the losses and of their gradients over the micro-batches, as an optimiser step accumulates them."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        inputs = dict(batch)
        with live.steering(model, inputs, epoch=0):
            loss = token_loss(inputs)
            loss.backward()
        total += loss.item()
    return total, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", ["nll", "dft"])
@pytest.mark.parametrize("share", SHARES)
def test_loss_and_gradients_of_an_accumulated_step_are_those_of_full_logits(world, share, kind):
    model, batches, trained = world
    vectors = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    live = LiveInjection(LiveSection(share=SHARES[share]), vectors, LAYER, seed=5)

    def weigh(log_probs):
        factor = log_probs.exp().detach() if kind == "dft" else 1.0
        return -(log_probs * factor).sum() / trained

    def of_full_logits(inputs):
        labels = inputs.pop("labels")[:, 1:]
        logs = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        return weigh(logs[labels != -100].gather(1, labels[labels != -100, None]))

    def of_trained_tokens(inputs):
        return weigh(model(**inputs, fused_lm_head=True).log_probs)

    wanted, plain = accumulated(model, batches, live, of_full_logits)
    loss, gradients = accumulated(model, batches, live, of_trained_tokens)
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert gradients.keys() == plain.keys()
    assert sum(bool(gradient.any()) for gradient in plain.values()) == len(plain) > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_entropy_and_accuracy_are_those_of_full_logits(world):
    model, (batch, _), _ = world
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = model(**inputs, labels=batch["labels"], fused_lm_head=True)
        logits, labels = model(**inputs).logits[:, :-1].float(), batch["labels"][:, 1:]
    trained = labels != -100
    assert torch.equal(found.label_mask, trained)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(found.entropy, entropy * trained)
    assert torch.equal(found.is_top1, (logits.argmax(-1) == labels) & trained)
    torch.testing.assert_close(found.mean_logits, logits.mean(-1) * trained)
    torch.testing.assert_close(found.loss, F.cross_entropy(logits[trained], labels[trained]))


def test_a_token_that_an_earlier_one_equals_is_not_the_likeliest():
    hidden, targets = torch.ones(1, 2), torch.tensor([1])
    weight = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    assert lm_head.TokenScores.apply(hidden, weight, None, targets, None, False)[2].tolist() == [True]
    assert lm_head.TokenScores.apply(hidden, weight, None, targets + 1, None, False)[2].tolist() == [False]


def test_the_factor_of_a_tokens_loss_is_not_rounded_to_the_models_dtype():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8).bfloat16().requires_grad_(), torch.randn(11, 8).bfloat16()
    gradients = []
    for factor in (1.0, 1 / 129):
        log_probs = lm_head.TokenScores.apply(hidden, weight, None, torch.arange(5), None, False)[0]
        gradients.append(torch.autograd.grad(log_probs.sum() * factor, hidden)[0])
    assert torch.equal((gradients[0].float() / 129).bfloat16(), gradients[1])


def test_inputs_of_adapters_that_are_not_cast_change_nothing_in_bfloat16(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, llama)
    section = recipe(args={"num_train_epochs": 1}, lora={"r": 4, "lora_dropout": 0.0})
    section = section.model_copy(update={"model": section.model.model_copy(update={"dtype": "bfloat16"})})
    ours, wanted = log_of(section, "runs/ours"), []

    def casting(model, active):
        wanted.append(active)
        return nullcontext()

    monkeypatch.setattr(live_trainers, "disable_input_dtype_casting", casting)
    cast = log_of(section, "runs/cast")
    assert set(wanted) == {True}
    assert len(ours) == len(cast) > 1
    for one, other in zip(ours[:-1], cast[:-1], strict=True):
        assert {name: one[name] for name in LOGGED} == {name: other[name] for name in LOGGED}


def test_training_goes_as_with_trls_head(tmp_path, family, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_world(tmp_path, family)
    packing = family.name == "gemma"
    args = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "packing": packing,
    }
    section = recipe(family.name, args=args, lora={"r": 4, "lora_dropout": 0.0})
    scored = []
    score = lm_head.TokenScores.apply
    monkeypatch.setattr(lm_head.TokenScores, "apply", lambda *given: scored.append(len(given[0])) or score(*given))
    ours = log_of(section, "runs/ours")
    assert scored
    count = len(scored)
    monkeypatch.setattr(live_trainers, "score_trained_tokens", lambda *_: None)
    theirs = log_of(section, "runs/theirs")
    assert len(scored) == count
    # Behind the steps comes a summary.
    assert len(ours) == len(theirs) > 1
    for one, other in zip(ours[:-1], theirs[:-1], strict=True):
        for name in LOGGED:
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_a_head_that_is_trained_keeps_trls_way(world):
    model, (batch, _), _ = world
    head = bare_model(model).get_output_embeddings()
    head.weight.requires_grad_(True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    model(**inputs, fused_lm_head=True).loss.backward()
    assert head.weight.grad.any()
