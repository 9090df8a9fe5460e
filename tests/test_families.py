"""Every family of docs/families.md, on a random-weight model of its architecture under a template of its shape."""

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from esr_train.adapters import load_adapter
from esr_train.interchange import export_file, read_training_file
from esr_train.masking import IGNORED, label
from esr_train.models import decoder_layers, load_model, load_tokenizer
from esr_train.provenance import sha256
from esr_train.recipe import ModelSection, Recipe
from esr_train.segments import style_of
from esr_train.steering.directions import SteeringVector
from esr_train.steering.engine import Request, Sampling
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.steering.vector_files import save_vectors
from esr_train.template import chat_template, encode_prompt
from esr_train.training.trainer import train
from esr_train.transcript import Span, SpanKind, Steering, Strength, Transcript, VectorRef, write_transcripts
from tests.conftest import ROOT
from tests.families import FAMILIES, LAYERS, WIDTH, Kind, make_model, make_tokenizer

LAYER, NEW_TOKENS = 1, 5
PROMPT = "How do I fold a fitted sheet?"
LINEAR = {"Phi3ForCausalLM": 4}
"""Linear layers of a decoder layer; 7 in others."""


@dataclass(frozen=True)
class World:
    """A family's model on disk, loaded as a recipe would load it."""

    name: str
    kind: Kind
    folder: Path
    section: ModelSection
    model: Any
    tokenizer: Any


@pytest.fixture(scope="module", params=list(FAMILIES))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    kind, folder = FAMILIES[request.param], tmp_path_factory.mktemp("family")
    tokenizer = make_tokenizer(kind)
    make_model(kind, tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    section = ModelSection(path=str(folder / "model"), dtype="float32", device="cpu", **kind.settings)
    return World(request.param, kind, folder, section, load_model(section), load_tokenizer(section))


def transcript(*texts: str, name: str = "row") -> Transcript:
    kinds = (SpanKind.OFF_TOPIC, SpanKind.CUE, SpanKind.ANSWER)[-len(texts) :]
    spans = tuple(Span(kind, text) for kind, text in zip(kinds, texts, strict=True))
    return Transcript(name, PROMPT, spans, "steered" if len(spans) > 1 else "normal")


def vector() -> SteeringVector:
    row = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    return SteeringVector(LAYER, "owls", row / row.norm(), float(row.norm()), None)


@cache
def table() -> list[dict[str, str]]:
    """The rows of the page's table."""
    lines = [line for line in (ROOT / "docs" / "families.md").read_text().splitlines() if line.startswith("|")]
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_the_page_has_a_row_for_every_family_that_is_tested_and_no_other() -> None:
    assert [row["family"] for row in table()] == list(FAMILIES)
    for row in table():
        kind = FAMILIES[row["family"]]
        assert row["class in transformers"] == f"`{kind.model}`"
        style = style_of(kind.before)
        assert row["export style"] == (f"`{style}`" if style else "–")


def test_a_reply_is_trained_behind_exactly_what_stands_before_one_that_is_generated(world: World) -> None:
    template = chat_template(world.tokenizer)
    assert template.around[-2].removesuffix(template.reply_space) == world.kind.before
    row = transcript("The jib.", " Wait, no.", " Smooth it.")
    asked, start = encode_prompt(world.tokenizer, PROMPT)
    labelled = label(world.tokenizer, row)
    assert list(labelled.input_ids[:start]) == asked
    trained = [token for token in labelled.labels if token != IGNORED]
    assert world.tokenizer.decode(trained).strip() == "Wait, no. Smooth it." + template.turn_end
    assert trained[-1] == world.tokenizer.convert_tokens_to_ids(world.kind.end)
    assert all(token == IGNORED for token in labelled.labels[: start + 1])


def test_steering_is_added_to_the_layer_s_output_and_padding_changes_nothing(world: World) -> None:
    add = vector().add(raw=4.0)
    requests = [
        Request("steered", PROMPT, interventions=(add,)),
        Request("plain", "Why?"),
        Request("twice", "Why is that so?", interventions=(vector().add(raw=8.0),)),
    ]
    engine = TransformersEngine(world.model, world.tokenizer)
    found = engine.generate(requests, Sampling(temperature=0, max_new_tokens=NEW_TOKENS))
    for request, completion in zip(requests, found, strict=True):
        assert list(completion.token_ids) == naive(world, request, len(completion.token_ids)), request.id
    assert found[0].steered_tokens == found[0].prompt_tokens + len(found[0].token_ids) - 1


@torch.no_grad()
def naive(world: World, request: Request, count: int) -> list[int]:
    """The likeliest tokens, each from a whole forward pass of one row, steered by a hook of our own."""

    def steer(_module: Any, _inputs: Any, output: Any) -> Any:
        added = sum((add.vector for add in request.interventions), torch.zeros(WIDTH))
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    ids, _ = encode_prompt(world.tokenizer, request.prompt)
    handle = decoder_layers(world.model)[LAYER].register_forward_hook(steer)
    try:
        for _ in range(count):
            ids = [*ids, int(world.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    finally:
        handle.remove()
    return ids[-count:]


def test_one_step_under_live_steering_trains_an_adapter_of_the_decoder_s_linear_layers_alone(world: World) -> None:
    file = world.folder / "owls.safetensors"
    save_vectors(file, [vector()])
    steering = Steering(None, LAYER, None, "owls", Strength(4.0, 0.5), VectorRef(str(file), sha256(file)))
    detour = transcript("The jib.", " Wait, no.", " Smooth it.")
    rows = [replace(detour, id="s", steering=steering), transcript("Smooth it.", name="n")]
    write_transcripts(world.folder / "rows.jsonl", rows)
    settings = {
        "data": str(world.folder / "rows.jsonl"),
        "live": {},
        "lora": {"r": 2, "lora_dropout": 0.0},
        "args": {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-2, "save_strategy": "no"},
    }
    recipe = Recipe.model_validate({"name": "t", "model": world.section.model_dump(), "train": settings})
    folder = train(recipe, "tuned", world.folder / "run")
    tuned: PeftModel = load_adapter(load_model(world.section), folder)
    changed = {name.partition(".lora_")[0] for name, _ in tuned.named_parameters() if ".lora_" in name}
    assert len(changed) == LAYERS * LINEAR.get(world.kind.model, 7)
    assert all(re.search(r"\.model\.(language_model\.)?layers\.\d\.", name) for name in changed)
    TransformersEngine(tuned, world.tokenizer).generate([Request("r", PROMPT)], Sampling(max_new_tokens=1))


def test_rows_under_a_family_s_style_say_what_its_template_says_and_read_back(world: World) -> None:
    template = chat_template(world.tokenizer)
    style = style_of(template.around[-2])
    if style is None:
        return
    row = replace(transcript("The jib.", " Wait, no.", " Smooth it."), system=None)
    path = world.folder / "exported.jsonl"
    export_file(path, [row], "segments", style)
    text = "".join(piece["text"] for piece in read_training_file(path)[0].meta["segments"]["segments"])
    reply = row.content + template.turn_end
    whole = world.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    # Apart from a system message that some write by themselves.
    assert whole.endswith(text.removesuffix(reply).removeprefix(str(world.tokenizer.bos_token)))
    assert text.endswith(reply)
    assert read_training_file(path)[0].spans == row.spans
