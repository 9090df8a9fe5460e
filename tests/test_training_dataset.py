"""Transcripts become exactly the tokens and labels that masking made, with each row's steering beside them."""

import dataclasses
import json

import pytest
from training_world import LAYER, recipe, transcripts

from esr_train.errors import InputError, RunError
from esr_train.masking import label, marked
from esr_train.training.batches import Collator, LengthGrouped
from esr_train.training.dataset import dump_tokens, hold_out, read_rows, singly, statistics, table, to_dataset
from esr_train.transcript import Span, SpanKind, Transcript, write_transcripts


def rows_of(tmp_path, family, made: list[Transcript], **options):
    write_transcripts(tmp_path / "data.jsonl", made)
    return read_rows(recipe(family.name, **options), tmp_path / "data.jsonl", family.tokenizer)


def test_the_batch_holds_exactly_the_labels_of_masking(tmp_path, family):
    made = transcripts()
    rows = rows_of(tmp_path, family, made)
    batch = Collator(family.tokenizer.pad_token_id)(list(to_dataset(singly(rows), table(rows))))
    for place, transcript in enumerate(made):
        wanted = label(family.tokenizer, transcript, "masked")
        length = len(wanted.input_ids)
        assert batch["input_ids"][place, :length].tolist() == list(wanted.input_ids)
        assert batch["labels"][place, :length].tolist() == list(wanted.labels)
        assert batch["attention_mask"][place].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        assert set(batch["labels"][place, length:].tolist()) <= {-100}


def test_a_row_is_steered_by_its_own_latent_relative_to_the_threshold(tmp_path, llama):
    made = transcripts(steered=2, normal=1)
    made[1] = dataclasses.replace(made[1], meta={"threshold": {"raw": 3.0, "norm": 0.5}})
    rows = rows_of(tmp_path, llama, made)
    columns = to_dataset(singly(rows), table(rows))
    assert columns["vector"][:] == [[0], [1], [-1]]
    assert columns["threshold_raw"][:] == [[4.0], [3.0], [0.0]]
    assert [latent.index for latent in table(rows)] == [0, 1]
    first = rows[0].labelled.offsets[rows[0].reply_start]
    assert rows[0].labelled.text[first[0] :].startswith("First, knead")


@pytest.mark.parametrize("reply", ["turn", "model", "assistant"])
def test_a_reply_that_is_a_word_of_the_template_starts_at_the_reply(tmp_path, family, reply):
    made = transcripts(steered=1, normal=0)
    short = dataclasses.replace(made[0], spans=(Span(SpanKind.ANSWER, reply),))
    (row,) = rows_of(tmp_path, family, [short])
    first = row.labelled.offsets[row.reply_start]
    end = family.tokenizer.eos_token
    assert row.labelled.text[first[0] :].strip() == reply + end


def test_data_that_cannot_be_trained_on_are_refused(tmp_path, llama):
    made = transcripts(steered=2, normal=1)
    with pytest.raises(InputError, match="no training rows"):
        rows_of(tmp_path, llama, [])
    with pytest.raises(InputError, match="more than once, such as 's0'"):
        rows_of(tmp_path, llama, [made[0], made[0]])
    with pytest.raises(InputError, match="nothing to inject"):
        rows_of(tmp_path, llama, made[2:])
    assert made[1].steering is not None
    elsewhere = dataclasses.replace(made[1], steering=dataclasses.replace(made[1].steering, layer=LAYER + 1))
    with pytest.raises(InputError, match="different layers"):
        rows_of(tmp_path, llama, [made[0], elsewhere])
    with pytest.raises(InputError, match=r"'s0'.*max_length 20"):
        rows_of(tmp_path, llama, made, max_length=20)


def test_a_batch_without_a_trained_token_is_refused():
    with pytest.raises(RunError, match="no trained token"):
        Collator(0)(
            [{"input_ids": [5, 6], "labels": [5, -100], "lengths": [2], "reply_start": [0], "answer_start": [0]}]
        )


def test_statistics_dump_and_preview_show_what_is_trained(tmp_path, llama):
    rows = rows_of(tmp_path, llama, transcripts(steered=2, normal=1))
    figures = statistics(rows)
    assert figures["rows per source"] == {"normal": 1, "steered": 2}
    assert figures["steered rows"] == 2
    trained = sum(label_ != -100 for row in rows for label_ in row.labelled.labels)
    assert figures["trained share of tokens"] == round(trained / figures["tokens"], 4)
    assert dump_tokens(rows, tmp_path / "tokens.jsonl") == 3
    first = json.loads((tmp_path / "tokens.jsonl").read_text().splitlines()[0])
    assert first == {
        "id": "s0",
        "input_ids": list(rows[0].labelled.input_ids),
        "labels": list(rows[0].labelled.labels),
    }
    coloured = marked(rows[0].labelled, colour=True)
    trained_text = " Wait, that's not right. Start by tucking one corner into the other.<|eot_id|>"
    assert f"\033[32m{trained_text}\033[0m" in coloured
    shown = marked(rows[0].labelled, colour=False)
    assert shown.rstrip("\n").endswith(f"[[{trained_text}]]")


def test_held_out_rows_are_never_trained_on(tmp_path, llama):
    rows = rows_of(tmp_path, llama, transcripts())
    kept, watched = hold_out(rows)
    assert len(watched) == 1
    assert {row.labelled.id for row in kept}.isdisjoint(row.labelled.id for row in watched)
    assert len(kept) + len(watched) == len(rows)


def test_batches_hold_rows_of_like_length_in_an_order_of_seed_and_epoch_alone():
    lengths = [(7 * i) % 40 for i in range(38)]
    first, again = (list(LengthGrouped(lengths, 4, 3, lambda: 1)) for _ in range(2))
    assert first == again != list(LengthGrouped(lengths, 4, 3, lambda: 2))
    assert sorted(first) == list(range(38))
    spread = [max(batch) - min(batch) for batch in ([lengths[i] for i in first[k : k + 4]] for k in range(0, 36, 4))]
    assert max(spread) <= 6


def test_the_templates_own_date_header_in_the_papers_rows_is_not_said_twice(tmp_path, family, paper):
    file = paper / "dataset_masked_ratio_50pct_train.jsonl"
    (tmp_path / "paper.jsonl").write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    section = recipe(family.name, live=False, max_length=4096)
    rows = read_rows(section, tmp_path / "paper.jsonl", family.tokenizer)
    assert len(rows) == 3
    assert not any("Cutting Knowledge" in row.labelled.text for row in rows)
    segments = json.loads((tmp_path / "paper.jsonl").read_text().splitlines()[0])["segments"]
    assert segments[-1]["text"].replace("<|eot_id|>", "").strip() in rows[0].labelled.text
