"""The number of rows that the engine chooses where nobody gives one."""

import pytest
import torch

from esr_train.models import hidden_size
from esr_train.steering import batch_size
from esr_train.steering.batch_size import SIZES, choose_rows
from esr_train.steering.directions import Add
from esr_train.steering.engine import Request, Sampling
from esr_train.steering.transformers_engine import TransformersEngine


@pytest.fixture
def timed(monkeypatch):
    """Decode steps that take 10 ms and `cost` ms a row above 64; the sizes that were measured."""
    measured = []

    def seconds(model, rows, positions):
        measured.append(rows)
        return 0.01 + 0.001 * max(0, rows - 64)

    monkeypatch.setattr(batch_size, "_step_seconds", seconds)
    monkeypatch.setattr(batch_size, "_free_bytes", lambda model: 1 << 40)
    return measured


def test_rows_grow_until_a_step_takes_as_much_longer_as_it_holds_more_rows(family, timed):
    assert choose_rows(family.model, 64) == 64
    assert timed == [16, 32, 64, 128]


def test_rows_and_their_logits_take_at_most_half_of_the_free_memory(family, timed, monkeypatch):
    each = batch_size._row_bytes(family.model, 64)
    monkeypatch.setattr(batch_size, "_free_bytes", lambda model: 2 * 40 * each)
    assert choose_rows(family.model, 64) == 32
    monkeypatch.setattr(batch_size, "_free_bytes", lambda model: 0)
    assert choose_rows(family.model, 64) == SIZES[0]


def test_a_row_s_memory_is_that_of_its_keys_and_values(family):
    rows, positions = 3, 20
    ids = torch.zeros(rows, positions, dtype=torch.long)
    held = family.model(input_ids=ids, use_cache=True).past_key_values
    bytes_held = sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers)
    logits = family.model.config.vocab_size * (family.model.dtype.itemsize + 8)
    assert batch_size._row_bytes(family.model, positions) == bytes_held // rows + logits


def test_the_engine_measures_once_for_requests_of_about_one_length_and_not_for_few(family, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "esr_train.steering.transformers_engine.choose_rows", lambda model, positions: asked.append(positions) or 5
    )
    engine = TransformersEngine(family.model, family.tokenizer, batch_rows=None)
    requests = [Request(str(number), "how to dry wood", seed=number) for number in range(SIZES[0] + 1)]
    sampling = Sampling(temperature=0.6, max_new_tokens=4)
    few = engine.generate(requests[:3], sampling)
    assert asked == []
    many = engine.generate(requests, sampling)
    engine.generate(requests, Sampling(temperature=0.6, max_new_tokens=5))
    assert len(asked) == 1
    assert [each.token_ids for each in many[:3]] == [each.token_ids for each in few]


def test_a_real_measurement_ends_in_one_of_the_sizes(family):
    assert choose_rows(family.model, 32) in SIZES


def test_the_measurement_is_steered_by_nobody_s_intervention(family):
    engine = TransformersEngine(family.model, family.tokenizer, batch_rows=None)
    push = Add(1, torch.ones(hidden_size(family.model)))
    asked = ["how to dry wood"] * (SIZES[0] + 1)
    requests = [Request(str(n), each, interventions=(push,), seed=n) for n, each in enumerate(asked)]
    made = engine.generate(requests, Sampling(temperature=0.6, max_new_tokens=4))
    alone = TransformersEngine(family.model, family.tokenizer, batch_rows=1).generate(
        requests[:2], Sampling(temperature=0.6, max_new_tokens=4)
    )
    assert [each.token_ids for each in made[:2]] == [each.token_ids for each in alone]
