"""Small models of both families with random weights; everything runs on the CPU without a network."""

import os
import signal
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from esr_train.recipe import JUDGE_SECTIONS
from eval.judging import judge as judging
from tools.tiny_world.architecture import build_model
from tools.tiny_world.tokenizer import finished, train_pieces

# A shell that runs the tests in the background has them, and every process they start, ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
PAPER = ROOT.parent / "shared" / "data" / "paper"
ASSETS = ROOT / "recipes" / "tiny" / "assets"
TEXTS = [
    "First, knead the dough and dust the flour over the board. Then shape the loaf near the oven.",
    "Wait, that's not right. The question was about sailing. Raise the mast and trim the jib before the gale.",
    "How do I fold a fitted sheet? Start by tucking one corner into the other, because it holds.\n\n1. Smooth it.",
] * 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of several workers, none is to begin the longest one last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@dataclass
class Family:
    """A model of one family with random weights (float32, four layers) and its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def make_family(name: str) -> Family:
    torch.manual_seed(0)
    tokenizer = finished(train_pieces(TEXTS, name, vocab_size=400), name)
    model = build_model(name, tokenizer, width=64, layers=4).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    return Family(name, model, tokenizer)


@pytest.fixture(scope="session", params=["llama", "gemma"])
def family(request: pytest.FixtureRequest) -> Family:
    """Both families in turn. Do not change the model's weights."""
    return make_family(request.param)


@pytest.fixture(scope="session")
def llama() -> Family:
    return make_family("llama")


@pytest.fixture(scope="session")
def paper() -> Path:
    """The folder with the paper's released data; the test is skipped where it is absent."""
    if not PAPER.is_dir():
        pytest.skip("the paper's released data are not here")
    return PAPER


@pytest.fixture(scope="session")
def assets() -> Path:
    """The tiny world's shipped models, SAEs, prompts and vocabulary; only an absent folder is a reason to skip."""
    if not ASSETS.is_dir():
        pytest.skip("recipes/tiny/assets is MISSING: nothing was tested on it (python -m tools.tiny_world.build)")
    return ASSETS


@pytest.fixture
def registered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges and plug-ins that a test registers are forgotten at its end."""
    monkeypatch.setattr(judging, "_FACTORIES", dict(judging._FACTORIES))
    kinds, modules = dict(JUDGE_SECTIONS), set(sys.modules)
    yield
    JUDGE_SECTIONS.clear()
    JUDGE_SECTIONS.update(kinds)
    for name in set(sys.modules) - modules:
        if name.startswith("esr_plugin_"):
            del sys.modules[name]
