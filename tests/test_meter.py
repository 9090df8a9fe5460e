"""Speed, share of trained tokens and use of the hardware, from counted tokens and a clock."""

import pytest

from esr_train.training import callbacks
from esr_train.training.callbacks import Meter, flops_per_token, peak_flops


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, to be set by the test."""
    now = [0.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    return now


def test_mfu_is_four_operations_for_a_parameter_and_token_over_the_peak_of_one_device(clock, monkeypatch):
    monkeypatch.setattr(callbacks, "peak_flops", lambda: 1e15)
    monkeypatch.setattr(callbacks, "peak_memory_gib", lambda on_cpu: 7.0)
    meter = Meter(parameters=8_000_000_000, world_size=2, on_cpu=False)
    for _ in range(4):
        meter.count(tokens=8_000, trained=2_000)
    clock[0] = 2.0
    # 32,000 tokens of this process in two seconds, 3.2e10 operations each.
    assert meter.read() == {
        "tokens_per_second": 32_000.0,
        "trained_token_share": 0.25,
        "trained_tokens": 16_000,
        "peak_memory_gib": 7.0,
        "mfu": 0.512,
    }
    assert flops_per_token(8_000_000_000) == 3.2e10


def test_every_reading_begins_anew_and_one_without_tokens_says_nothing(clock):
    meter = Meter(parameters=10, world_size=1, on_cpu=True)
    assert meter.read() == {}
    meter.count(100, 50)
    clock[0] = 1.0
    assert meter.read()["tokens_per_second"] == 100
    assert meter.read() == {}
    meter.count(30, 30)
    meter.count_generated(20)
    clock[0] = 2.0
    figures = meter.read()
    assert (figures["tokens_per_second"], figures["trained_token_share"]) == (30, 1.0)
    assert (figures["trained_tokens"], figures["generated_tokens"]) == (30, 20)


def test_no_mfu_is_made_up_where_the_peak_is_not_known(clock):
    meter = Meter(parameters=10, world_size=1, on_cpu=True)
    meter.count(100, 50)
    clock[0] = 1.0
    assert "mfu" not in meter.read()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("Some other device", None),
    ],
)
def test_the_peak_belongs_to_the_device(monkeypatch, name, peak):
    monkeypatch.setattr(callbacks.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(callbacks.torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops() == peak
