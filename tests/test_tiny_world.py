"""The tiny world: its language, and the models and SAEs that are shipped for it."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch

from esr_train.errors import InputError
from esr_train.files import read_json
from esr_train.models import load_model, load_tokenizer
from esr_train.recipe import ModelSection
from esr_train.restarts import find_cues
from esr_train.steering.direction_files import check_fits, load_sae
from esr_train.steering.engine import Request, Sampling
from esr_train.steering.latent_labels import read_labels
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.template import encode_prompt
from esr_train.transcript import SaeRef
from eval.cells import read_prompts
from eval.judging.judge import JudgeItem
from eval.judging.lexical import EVERY_WORD, LexicalJudge
from tools.tiny_world import language as world
from tools.tiny_world.build import PROMPTS_PER_TOPIC
from tools.tiny_world.language import Exchange, how_to, lessons, reserved, reserved_questions, topics, vocabulary

FAMILIES = ("llama", "gemma")
MEBIBYTE = 2**20
QUESTIONS = 240
LEAST_SCORE = 95.0


def made(count: int, seed: int = 0) -> list[Exchange]:
    return [exchange for lesson in lessons(count, seed) for exchange in lesson]


def section(assets: Path, family: str) -> ModelSection:
    return ModelSection.model_validate({"path": str(assets / family), "dtype": "float32", "device": "cpu"})


def shared_words() -> set[str]:
    """Words of the language that stand in texts about any topic."""
    every = set(vocabulary()[EVERY_WORD])
    return every - {word for topic in topics() for word in (topic.name, *topic.verbs, *topic.nouns)}


def test_there_are_two_hundred_topics_with_four_verbs_and_six_nouns():
    names = [topic.name for topic in topics()]
    assert len(set(names)) == len(names) >= 200
    assert all(len(set(topic.verbs)) >= 4 and len(set(topic.nouns)) >= 6 for topic in topics())


def test_a_noun_belongs_to_one_topic_and_is_no_shared_word():
    nouns = [noun for topic in topics() for noun in topic.nouns]
    assert len(set(nouns)) == len(nouns)
    assert len(shared_words()) > 100
    assert not set(nouns) & shared_words()
    assert not set(nouns) & {verb for topic in topics() for verb in topic.verbs}


def test_there_are_tens_of_thousands_of_distinct_answers():
    rng = Random(1)
    answers = {how_to(topics()[number % len(topics())], rng).reply for number in range(20_000)}
    assert len(answers) > 19_000


def test_no_text_takes_anything_back():
    exchanges = made(5_000)
    assert len(exchanges) == 5_000
    assert [each for each in exchanges if find_cues(each.reply) or find_cues(each.prompt)] == []


def test_reserved_prompts_are_in_no_lesson():
    taught = {exchange.prompt for exchange in made(15_000)}
    kept = {exchange.prompt for exchange in reserved_questions(PROMPTS_PER_TOPIC, 0)}
    assert len(kept) == PROMPTS_PER_TOPIC * len(topics())
    assert not taught & kept
    assert not [prompt for prompt in taught if reserved(prompt)]
    assert all(map(reserved, kept))


def test_the_same_seed_makes_the_same_texts_and_another_others():
    assert made(300, 7) == made(300, 7)
    assert made(300, 7) != made(300, 8)
    assert reserved_questions(2, 7) == reserved_questions(2, 7)


def test_every_topic_is_taught_about_equally():
    counts = [0] * len(topics())
    place = {topic.name: i for i, topic in enumerate(topics())}
    for exchange in made(10 * len(topics())):
        counts[place[exchange.topic]] += 1
    assert min(counts) >= 7
    assert max(counts) <= 13


def test_an_answer_by_the_grammar_is_perfect_to_the_judge_and_one_about_another_topic_worthless():
    judge, rng = LexicalJudge(vocabulary()), Random(2)
    for topic, other in pairwise(topics()):
        asked, elsewhere = how_to(topic, rng), how_to(other, rng)
        right, wrong = judge.judge([JudgeItem(asked.prompt, each.reply) for each in (asked, elsewhere)])
        assert [attempt.score for attempt in right.attempts] == [100.0]
        assert [attempt.score for attempt in wrong.attempts] == [0.0]
        assert not right.flags["degenerate"]


def test_questions_name_their_topic_to_the_judge():
    judge = LexicalJudge(vocabulary())
    assert [each for each in reserved_questions(2, 3) if judge.topic_of(each.prompt) != each.topic] == []


def test_templates_take_no_slot_that_is_not_filled():
    topic, rng = topics()[0], Random(0)
    for template in (*world.QUESTIONS, *world.OPENINGS, *world.STEPS, *world.CLOSINGS):
        text = world.fill(template, topic, rng, list(topic.nouns))
        assert text[0].isupper()
        assert "{" not in text


def test_the_assets_are_whole_and_small(assets):
    for family in FAMILIES:
        assert (assets / family / "model.safetensors").is_file()
        assert (assets / f"{family}-sae" / "sae_weights.safetensors").is_file()
        assert (assets / f"{family}-sae" / "labels.jsonl").is_file()
    assert sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) <= 12 * MEBIBYTE


def test_shipped_prompts_and_vocabulary_are_those_of_the_language(assets):
    prompts = read_prompts(assets / "prompts.jsonl")
    assert [(each.text, each.topic) for each in prompts] == [
        (each.prompt, each.topic) for each in reserved_questions(PROMPTS_PER_TOPIC, 0)
    ]
    assert read_json(assets / "vocabulary.json") == vocabulary()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shipped_model_is_of_its_family_with_its_template(assets, family):
    model, tokenizer = load_model(section(assets, family)), load_tokenizer(section(assets, family))
    config = model.config
    assert config.architectures == {"llama": ["LlamaForCausalLM"], "gemma": ["Gemma2ForCausalLM"]}[family]
    assert len(tokenizer) == config.vocab_size
    said = tokenizer.decode(encode_prompt(tokenizer, "How?")[0])
    assert said.endswith({"llama": "assistant<|end_header_id|>\n\n", "gemma": "<start_of_turn>model\n"}[family])
    if family == "gemma":
        assert config.attn_logit_softcapping > 0
        assert config.final_logit_softcapping > 0
        assert config.sliding_window > 0
        assert set(config.layer_types) == {"sliding_attention", "full_attention"}
        with pytest.raises(InputError, match="system"):
            encode_prompt(tokenizer, "How?", system="Be brief.")
    else:
        assert "Be brief." in tokenizer.decode(encode_prompt(tokenizer, "How?", system="Be brief.")[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shipped_sae_fits_its_model_at_sixty_percent_of_its_depth(assets, family):
    model = load_model(section(assets, family))
    sae = load_sae(SaeRef(str(assets), f"{family}-sae"))
    check_fits(sae, model)
    assert 0.5 <= (sae.layer + 1) / model.config.num_hidden_layers <= 0.7
    assert bool(torch.isfinite(sae.module.W_dec).all())
    labels = read_labels(assets / f"{family}-sae" / "labels.jsonl")
    assert max(labels) < sae.n_latents
    assert set(labels.values()) <= {topic.name for topic in topics()}
    assert len(set(labels.values())) >= 60
    assert float(sae.decoder_norms()[list(labels)].min()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unsteered_model_answers_on_topic_and_never_restarts(assets, family):
    judge = LexicalJudge.from_file(assets / "vocabulary.json")
    rows = [json.loads(line) for line in (assets / "prompts.jsonl").read_text().splitlines()]
    prompts = Random(5).sample([row["prompt"] for row in rows], QUESTIONS)
    model, tokenizer = load_model(section(assets, family)), load_tokenizer(section(assets, family))
    engine = TransformersEngine(model, tokenizer, batch_rows=QUESTIONS // 2)
    requests = [Request(str(i), prompt, seed=i) for i, prompt in enumerate(prompts)]
    completions = engine.generate(requests, Sampling(temperature=0.6, max_new_tokens=160))
    judged = judge.judge([JudgeItem(p, each.text) for p, each in zip(prompts, completions, strict=True)])
    scores = [attempt.score or 0.0 for each in judged for attempt in each.attempts]
    assert len(scores) == QUESTIONS
    assert sum(scores) / QUESTIONS >= LEAST_SCORE
    assert {each.finish_reason for each in completions} == {"stop"}
