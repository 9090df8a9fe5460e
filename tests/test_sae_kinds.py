"""SAEs of every architecture that sae-lens writes go the same way: labels, selection, a steered generation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.synthetic import FeatureDictionary, init_sae_to_match_feature_dict

from esr_train.files import read_json, write_json, write_jsonl
from esr_train.recipe import Recipe
from esr_train.steering.direction_files import load_sae
from esr_train.steering.engine import Request
from esr_train.steering.readout import active_latents, hidden_states, peaks
from esr_train.transcript import SaeRef
from recipes.experiment import Experiment
from recipes.resources import Resources
from recipes.stages.stage_cache import StageCache
from recipes.stages.steering_latents import choose_latents, latent_facts
from tests.conftest import Family

WIDTH, LATENTS, LAYER = 64, 48, 1
TOPICS = ("baking", "sailing", "folding", "chess", "owls", "kites")
SIZES: dict[str, Any] = {"d_in": WIDTH, "d_sae": LATENTS}
KINDS: dict[str, Callable[[], Any]] = {
    "standard": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(**SIZES)),
    "gated": lambda: GatedTrainingSAE(GatedTrainingSAEConfig(**SIZES)),
    "jumprelu": lambda: JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**SIZES)),
    "topk": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(**SIZES, k=1)),
    "batchtopk": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**SIZES, k=1)),
    "matryoshka": lambda: MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(**SIZES, k=1, matryoshka_widths=[LATENTS // 2, LATENTS])
    ),
}


def save_sae(kind: str, folder: Path, states: torch.Tensor) -> None:
    """A synthetic dictionary as an SAE of some kind, of which a state [d_model] activates about one latent."""
    torch.manual_seed(0)
    sae = KINDS[kind]()
    init_sae_to_match_feature_dict(sae, FeatureDictionary(LATENTS, WIDTH, seed=0))
    sae.b_dec.data = states.mean(dim=0)
    least = float(torch.quantile(((states - sae.b_dec) @ sae.W_enc).detach(), 0.98))
    sae.W_dec.data = sae.W_dec.data.contiguous()
    for name, parameter in sae.named_parameters():
        if name in ("b_enc", "b_gate"):
            parameter.data.fill_(-least)
        elif name == "log_threshold":
            parameter.data.fill_(1e-3).log_()
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(1e-3)
    sae.cfg.metadata.hook_name = f"blocks.{LAYER}.hook_resid_post"
    sae.save_inference_model(folder)


def prompts() -> list[str]:
    return [f"How do I go about {topic}? ({number})" for topic in TOPICS for number in range(4)]


def experiment(folder: Path, family: Family, kind: str) -> Experiment:
    """An experiment on a random model with all latents labelled in words that are no topic."""
    family.model.save_pretrained(folder / "model")
    family.tokenizer.save_pretrained(folder / "model")
    save_sae(kind, folder / "saes" / "one", states_of(family, prompts()))
    write_jsonl(folder / "labels.jsonl", ({"index": i, "description": f"thing {i}"} for i in range(LATENTS)))
    write_jsonl(folder / "prompts.jsonl", ({"prompt": p, "topic": TOPICS[i // 4]} for i, p in enumerate(prompts())))
    write_json(folder / "vocabulary.json", {topic: [f"{topic}tool"] for topic in TOPICS})
    recipe = Recipe.model_validate(
        {
            "name": "kinds",
            "model": {"path": "model", "dtype": "float32", "device": "cpu"},
            "sae": {"release": "saes", "id": "one", "labels": "labels.jsonl"},
            "latents": {"limit": 9},
            "judge": {"vocabulary": "vocabulary.json"},
            "prompts": {"path": "prompts.jsonl", "splits": {"validation": 0.2, "test": 0.3}},
            "sampling": {"max_new_tokens": 8},
        }
    )
    return Experiment(recipe, recipe.directory, Resources(recipe), StageCache(recipe.directory))


def states_of(family: Family, texts: list[str]) -> torch.Tensor:
    chat = family.tokenizer.apply_chat_template
    rendered = [chat([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True) for t in texts]
    return torch.cat(list(hidden_states(family.model, family.tokenizer, rendered, LAYER)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_of_every_kind_is_selected_from_and_steers(kind, tmp_path, llama, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = experiment(tmp_path, llama, kind)
    latents = choose_latents(made)
    chosen = [direction.latent for direction in latents.in_order()]
    funnel = read_json(made.directory / "latents.json")["funnel"]
    assert sum(funnel.values()) == LATENTS
    assert funnel["kept"] == len(chosen) == 9
    assert set(latents.splits) == {"train", "validation", "test"}
    assert all(latents.splits.values())
    found = made.resources.sae().encode(states_of(llama, prompts()))
    relevant = {latent for latent in range(LATENTS) if bool((found[:, latent] != 0).any())}
    assert funnel["active on a prompt"] == len(relevant) > 0
    assert not relevant & set(chosen)
    assert latent_facts(made.directory)[0].startswith(
        "9 of 48 labelled latents are in play (left out: active on a prompt: "
    )
    direction = latents.in_order()[0]
    steered, plain = made.resources.base().generate(
        [
            Request("steered", "How?", interventions=(direction.add(3.0, "all"),), seed=1),
            Request("plain", "How?", seed=1),
        ],
        made.resources.sampling(),
    )
    assert steered.steered_tokens > 0 == plain.steered_tokens
    assert steered.token_ids != plain.token_ids


def test_a_batch_of_texts_is_read_as_each_by_itself(family, tmp_path):
    texts = [*prompts(), "Knead.", "Raise the mast and trim the jib before the gale. " * 3]
    one, many = (list(hidden_states(family.model, family.tokenizer, texts, LAYER, rows)) for rows in (1, 5))
    assert [len(each) for each in one] == [len(each) for each in many]
    torch.testing.assert_close(torch.cat(one), torch.cat(many), atol=1e-3, rtol=1e-4)
    save_sae("jumprelu", tmp_path / "one", torch.cat(one))
    sae = load_sae(SaeRef(str(tmp_path), "one"))
    found = [active_latents(family.model, family.tokenizer, sae, texts, rows) for rows in (1, 5)]
    assert torch.equal(found[0], (sae.encode(torch.cat(one)) != 0).any(dim=0))
    assert torch.equal(found[0], found[1])


def test_peaks_are_the_strongest_tokens_of_the_texts_they_name(llama, tmp_path):
    texts = prompts()[:10]
    states = list(hidden_states(llama.model, llama.tokenizer, texts, LAYER))
    save_sae("jumprelu", tmp_path / "one", torch.cat(states))
    sae = load_sae(SaeRef(str(tmp_path), "one"))
    found = peaks(llama.model, llama.tokenizer, sae, texts, count=3, rows=4)
    acts = [sae.encode(each) for each in states]
    best = torch.stack([each.max(dim=0).values for each in acts]).sort(dim=0, descending=True).values[:3].T
    torch.testing.assert_close(found.values, best, atol=1e-3, rtol=1e-4)
    latent = int(found.values[:, 0].argmax())
    for value, text, token in zip(found.values[latent], found.text[latent], found.token[latent], strict=True):
        torch.testing.assert_close(value, acts[int(text)][int(token), latent], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.frequency, (torch.cat(acts) != 0).float().mean(dim=0), atol=1e-2, rtol=0.1)


def test_activations_in_sparse_tensors_are_read_like_others(tmp_path):
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=2))
    sae.W_enc.data = torch.randn_like(sae.W_enc)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(tmp_path / "one")
    loaded, hidden = load_sae(SaeRef(str(tmp_path), "one")), torch.randn(3, WIDTH)
    dense = loaded.encode(hidden)
    loaded.module.activation_fn.use_sparse_activations = True
    assert loaded.module.encode(hidden).is_sparse
    assert torch.equal(loaded.encode(hidden), dense)
