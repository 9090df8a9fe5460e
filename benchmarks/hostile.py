"""Damaged files: every reader gives the right rows or one InputError, never another exception or a silent change.

    python benchmarks/hostile.py                       2,000 damaged copies of a file of each format, as a table
    python benchmarks/hostile.py --damaged 200 --only recipe.yaml labels.csv

What is right is read off the damaged file by a second, independent reader of a few lines (`json` with plain hooks, a
YAML loader that takes every scalar for text, `str.split`): whatever it cannot read has to be refused, and what a reader
of the project accepts has to be what the second one says.
"""

import argparse
import contextlib
import csv
import gzip
import io
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.damage import TOKENS, cut, damaged, flipped
from data_gen.prompted import read_subjects
from data_gen.sources import read_cues
from esr_train.errors import InputError
from esr_train.interchange import import_file, read_training_file
from esr_train.recipe import load_recipe
from esr_train.segments import to_segments
from esr_train.steering.latent_labels import read_labels
from esr_train.transcript import SpanKind, Transcript, read_transcripts, to_json
from eval.calibration import load_thresholds
from eval.cells import read_prompts
from eval.judging.lexical import LexicalJudge
from eval.judging.restart_likelihood import read_phrases
from eval.paper_results import read_results
from eval.store import read_trials, trial_to_json

LLAMA = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
LLAMA += "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHow do I fold?"
LLAMA += "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
GEMMA = "<bos><start_of_turn>user\nHow do I bake?<end_of_turn>\n<start_of_turn>model\n"


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys come once."""
    assert len({key for key, _ in pairs}) == len(pairs), "a key comes twice"
    return dict(pairs)


def finite(text: str) -> float:
    """A float that is finite."""
    assert abs(float(text)) < float("inf"), "not finite"
    return float(text)


def value_of(text: str) -> Any:
    """A JSON value."""
    return json.loads(text, object_pairs_hook=once, parse_float=finite, parse_constant=finite)


def text_of(data: bytes) -> str:
    """UTF-8 text without its byte order mark."""
    return data.decode("utf-8-sig")


def lines_of(data: bytes) -> list[str]:
    """The lines that are not blank."""
    return [line.strip() for line in text_of(data).split("\n") if line.strip()]


def rows_of(data: bytes) -> list[Any]:
    """The values of a JSONL file."""
    return [value_of(line) for line in lines_of(data)]


def transcripts_say(data: bytes) -> Any:
    """Transcripts with what may be left out."""
    rows = []
    for row in rows_of(data):
        steering = row.get("steering") and {"label": None, **row["steering"]}
        rows.append({"system": None, **row, "steering": steering, "meta": row.get("meta") or {}})
    return rows


def segments_say(data: bytes) -> Any:
    """Rows of segments, what is said in them, and which letters of the reply are trained."""
    return [_segments(row) for row in rows_of(data)]


def _segments(row: Any) -> Any:
    assert all(type(part["label"]) is bool and part.keys() == {"label", "text"} for part in row["segments"])
    text = "".join(part["text"] for part in row["segments"])
    trained = "".join("01"[part["label"]] * len(part["text"]) for part in row["segments"])
    is_llama = text.startswith(("<|begin", "<|start"))
    user, end, model = (
        (
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        )
        if is_llama
        else ("<start_of_turn>user\n", "<end_of_turn>\n", "<start_of_turn>model\n")
    )
    before, rest = text.split(user, 1)
    prompt, rest = rest.split(end, 1)
    nothing, reply = rest.split(model, 1)
    start = len(text) - len(reply)
    while (shorter := _without_token(reply.rstrip())) != reply:
        reply = shorter
    system = None
    if "<|start_header_id|>system" in before:
        system = before.split("<|end_header_id|>\n\n", 1)[1].removesuffix("<|eot_id|>")
        system = re.sub("^Cutting Knowledge Date: .*\nToday Date: .*\n*", "", system).strip() or None
    said = f"{system} {prompt} {reply}"
    assert not nothing
    assert not any(token in said for token in TOKENS), "a control token in the text"
    return {"row": row, "said": [prompt, system, reply], "trained": trained[start : start + len(reply)]}


def _without_token(text: str) -> str:
    for token in TOKENS:
        text = text.removesuffix(token)
    return text


def _segments_read(transcripts: Sequence[Transcript]) -> Any:
    return [
        {
            "row": to_segments(row),
            "said": [row.prompt, row.system, row.content],
            "trained": "".join("10"[span.kind is SpanKind.OFF_TOPIC] * len(span.text) for span in row.spans),
        }
        for row in transcripts
    ]


def messages_say(data: bytes) -> Any:
    """Chats, as a list or one a line."""
    rows = value_of(text_of(data)) if text_of(data).lstrip().startswith("[") else rows_of(data)
    return [_messages(row) for row in rows]


def _messages(row: Any) -> Any:
    assert not row.keys() & {"weight", "tools", "train"}
    for message in row["messages"]:
        for key in {"weight", "train", "tool_calls"} & message.keys():
            assert message[key] is None or message[key] == (key != "tool_calls" and message["role"] == "assistant")
    *system, user, assistant = row["messages"]
    assert [message["role"] for message in (*system, user, assistant)][-2:] == ["user", "assistant"]
    reply = assistant["content"]
    spans = row.get("spans") or [{"kind": "answer", "start": 0, "end": len(reply)}]
    assert all(type(span[end]) is int for span in spans for end in ("start", "end"))
    meta = dict(row.get("meta") or {}) | ({"metadata": row["metadata"]} if "metadata" in row else {})
    return {
        "said": [system[0]["content"] if system else None, user["content"], reply],
        "spans": [[span["kind"], reply[span["start"] : span["end"]]] for span in spans],
        "meta": meta,
    }


def _messages_read(transcripts: Sequence[Transcript]) -> Any:
    return [
        {
            "said": [row.system, row.prompt, row.content],
            "spans": [[str(span.kind), span.text] for span in row.spans],
            "meta": row.meta,
        }
        for row in transcripts
    ]


def _labels(rows: Iterator[tuple[Any, Any]] | Sequence[tuple[Any, Any]]) -> Any:
    labels: dict[str, str] = {}
    for index, label in rows:
        while isinstance(label, list | dict) and label:
            label = label[0] if isinstance(label, list) else label["description"]
        assert label is None or label == [] or isinstance(label, str)
        assert (
            type(index) is int or (type(index) is float and index.is_integer()) or re.fullmatch("[0-9]+", index.strip())
        )
        if label and label.strip():
            labels.setdefault(str(int(index)), label.strip())
    return labels


def pairs_say(value: Any) -> Any:
    """Labels in any of the shapes of the base files."""
    if isinstance(value, dict):
        return _labels(list(value.items()))
    if all(row is None or isinstance(row, str) for row in value):
        return _labels(list(enumerate(value)))
    assert all(len(row) == 2 for row in value if not isinstance(row, dict))
    return _labels([(row["index"], row["description"]) if isinstance(row, dict) else tuple(row) for row in value])


def table_of(data: bytes) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    header, *rows = [row for row in csv.reader(io.StringIO(text_of(data), newline=""), strict=True) if row]
    assert len(set(header)) == len(header)
    return [dict(zip(header, row, strict=True)) for row in rows]


def prompts_say(rows: Sequence[Any]) -> Any:
    """Prompts and their topics."""
    texts = [(row["prompt"], row.get("topic")) if isinstance(row, dict) else (row, None) for row in rows]
    return [[text.strip(), (topic or "").strip() or text.strip()] for text, topic in texts]


def columns_say(data: bytes) -> Any:
    """Labels in columns."""
    return _labels([(row["index"], row["label"]) for row in table_of(data)])


def cues_say(data: bytes) -> Any:
    """Cues under their headings."""
    registers: dict[str, list[str]] = {}
    register = "cues"
    for line in lines_of(data):
        if re.fullmatch(r"\[[\w -]+\]", line):
            register = line[1:-1]
        else:
            registers.setdefault(register, []).append(line)
    return registers


def phrases_say(data: bytes) -> Any:
    """Phrases, each once, without headings and remarks."""
    return list(dict.fromkeys(line for line in lines_of(data) if line[0] not in "[#"))


def trials_say(data: bytes) -> Any:
    """Trials with what may be left out, but for a torn last line, which is made again."""
    whole = data[: data.rfind(b"\n") + 1]
    rows = [value_of(line) for line in whole.decode().split("\n") if line.strip()]
    missing = {"variant": None, "prefix": 0, "restart_token": None, "restart_logprobs": []}
    sampling = {"temperature": 0.6, "top_p": 1.0, "max_new_tokens": 512, "repetition_penalty": 1.0}
    return [{**missing, **row, "sampling": row["sampling"] and {**sampling, **row["sampling"]}} for row in rows]


def results_say(data: bytes) -> Any:
    """Latent (none without a strength), prompt, response and seed of each trial."""
    return [
        [
            feature["feature_index_in_sae"] if trial.get("threshold", feature.get("threshold")) else None,
            trial["prompt"],
            trial["response"],
            trial.get("seed") or 0,
        ]
        for feature in value_of(text_of(data))["results_by_feature"]
        for trial in feature.get("trials") or []
    ]


def thresholds_say(data: bytes) -> Any:
    """Frozen thresholds with what may be left out."""
    rows = value_of(text_of(data))["thresholds"]
    return [{"verified": None, "verified_n": 0, **row} for row in rows]


def recipe_agrees(read: Any, data: bytes) -> bool:
    """Whether every scalar of the file, taken for text, is the recipe's value under its key."""
    text = text_of(data)
    _check_keys(yaml.compose(text, yaml.SafeLoader))
    return _agrees(yaml.load(text, yaml.BaseLoader), read)


def _check_keys(node: Any) -> None:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        assert len(set(map(str, keys))) == len(keys), "a key comes twice"
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for part in child if isinstance(child, tuple) else (child,):
            _check_keys(part)


def _numbers(said: str) -> list[float]:
    return [float(said), *([int(said)] if re.fullmatch("[-+]?[0-9_]+", said) else [])]


def _agrees(said: Any, read: Any) -> bool:
    if isinstance(said, dict) and isinstance(read, dict):
        return all(key in read and _agrees(value, read[key]) for key, value in said.items())
    if isinstance(said, list) and isinstance(read, list):
        return len(said) == len(read) and all(map(_agrees, said, read))
    if read is None or isinstance(read, bool):
        words = {None: ("", "~", "null"), True: ("true", "yes", "on"), False: ("false", "no", "off")}[read]
        return isinstance(said, str) and said.lower() in words
    with contextlib.suppress(ValueError):
        return said == read or (not isinstance(read, str | dict | list) and read in _numbers(said))
    return False


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        name: the file's.
        sound: what a sound one holds.
        read: the project's reader, and what it has read as a JSON value.
        agrees: whether that is what the file says; an exception means that the file should have been refused.
    """

    name: str
    sound: bytes
    read: Callable[[Path], Any]
    agrees: Callable[[Any, bytes], bool]


def _format(name: str, sound: Any, read: Callable[[Path], Any], say: Callable[[bytes], Any]) -> Format:
    text = sound if isinstance(sound, str) else json.dumps(sound, ensure_ascii=False)
    if isinstance(sound, list) and name.partition(".")[2] in ("jsonl", "jsonl.gz"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sound)
    return Format(name, text.encode(), read, lambda got, data: _same(got, say(data)))


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


STRENGTH = {"raw": 210.0, "norm": 0.9}
STEERING = {"sae": {"release": "r", "id": "i"}, "layer": 26, "latent": 1234, "label": "sails", "strength": STRENGTH}
OWN = {"vector": {"file": "v.pt", "sha256": "00ff"}, "layer": 3, "label": None, "strength": {"raw": 2, "norm": 0.5}}
SPANS = [
    {"kind": "off_topic", "text": "Trim it."},
    {"kind": "cue", "text": " Wait, no."},
    {"kind": "answer", "text": " So."},
]
TRANSCRIPTS = [
    {"id": "s1", "prompt": "How?", "system": None, "spans": SPANS, "steering": STEERING, "source": "steered",
     "meta": {"seed": 7, "threshold": {"raw": 200.5, "norm": 0.8}, "scores": {"off_topic": 4, "answer": 92}}},
    {"id": "s2", "prompt": "Why é?", "system": "Be brief.", "spans": SPANS, "steering": OWN, "source": "steered"},
    {"id": "n1", "prompt": "How?", "spans": [{"kind": "answer", "text": "So.\n"}], "source": "normal"},
]  # fmt: skip
SEGMENTS = [
    {"segments": [{"label": False, "text": f"{LLAMA}Trim it. "}, {"label": True, "text": "Wait, no. So.<|eot_id|>"}]},
    {"segments": [{"label": False, "text": GEMMA}, {"label": True, "text": "Knead it.<end_of_turn>\n"}], "note": 5},
]
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}
REPLY = {"role": "assistant", "content": "Trim it. Wait, no. So.", "weight": 1, "tool_calls": None}
RANGES = [{"kind": "off_topic", "start": 0, "end": 8}, {"kind": "cue", "start": 8, "end": 18}]
RANGES += [{"kind": "answer", "start": 18, "end": 22}]
MESSAGES = [
    {"messages": [SYSTEM, USER, REPLY], "spans": RANGES, "id": "a", "steering": None, "meta": {"seed": 7}},
    {"messages": [USER | {"train": False}, {"role": "assistant", "content": "So."}], "metadata": {"score": 0.5}},
]
ROWS = [{"index": "7", "description": "spiders", "score": 0.5}, {"index": 12, "description": "baking é", "score": 2}]
LABELS = {
    "rows": ROWS,
    "pairs": [[7, "spiders"], ["12", "baking"]],
    "texts": {"7": "spiders", "12": "baking"},
    "objects": {"7": {"description": "spiders"}, "12": {"description": None}},
    "lists": {"7": ["spiders", "webs"], "12": [{"description": "baking"}]},
    "list": ["baking", None, "sails", ""],
}
PROMPTS = [{"prompt": "How?", "topic": "t"}, {"prompt": "Why?", "topic": None}, "When?"]
TRIAL = {
    "key": "a", "arm": "base", "condition": "steered", "seed": 0,
    "cell": {"prompt": "How?", "topic": "t", "latent": 7, "label": "sails", "strength": STRENGTH, "seed": 3},
    "variant": None, "engine": "e",
    "sampling": {"temperature": 0.6, "top_p": 1.0, "max_new_tokens": 64, "repetition_penalty": 1.0},
    "prefix": 0, "response": "Trim it. Wait, no. So.", "finish_reason": "stop", "tokens": 9, "steered_tokens": 30,
    "attempts": [{"start": 0, "end": 9, "score": 10.5}, {"start": 9, "end": 22, "score": None}], "cue": True,
    "restart_token": 3, "restart_logprobs": [[8, -1.5]], "judge": "lexical", "judge_raw": "{}",
    "flags": {"degenerate": False}, "error": None,
}  # fmt: skip
TRIALS = [TRIAL, TRIAL | {"key": "b", "sampling": {}}]
THRESHOLDS: dict[str, Any] = {
    "key": {"model": "m", "layer": 3},
    "thresholds": [
        {"latent": 7, "label": "sails", "norm": 0.5, "raw": 4.5, "low": 0.4, "high": 0.6, "n": 12, "bound": None,
         "verified": 30.5, "verified_n": 4},
        {"latent": 9, "label": None, "norm": 2.0, "raw": 18.0, "low": 1.9, "high": 2.0, "n": 8, "bound": "high",
         "verified": None, "verified_n": 0},
    ],
}  # fmt: skip
RESULTS = {
    "experiment_config": {"judge_model_name": "j", "seed": 1},
    "results_by_feature": [
        {"feature_index_in_sae": 7, "feature_label": "sails", "threshold": 4.5, "error": None,
         "trials": [{"prompt": "How?", "response": "Trim it. So.", "seed": 3, "score": None, "threshold": 4.5}]}
    ],
}  # fmt: skip
RECIPE = """# One experiment.
name: small
seed: 7
model: {path: some/model, dtype: float32}
sae:
  release: saes
  id: "first"
  labels: labels.jsonl
prompts:
  path: prompts.jsonl
  splits: {validation: 0.1, test: 0.3}
calibration:
  target: 30.0
  bounds: [0.1, 2.5]
  rounds: 4
sampling: {temperature: 0.6, max_new_tokens: 64}
data:
  steered: {rows: 12, strength: [0.8, 1.5]}
  normal: {rows: 4}
train:
  args: {learning_rate: 2e-4, bf16: false, optim: adamw_torch}
  live: {share: 0.5}
arms:
  tuned: {}
  half:
    data: {steered: {rows: 6}}
"""
CUES = "[blunt]\nWait, that's not right.\nNo, that was about {label}.\n\n[soft]\nHm, I got lost.\n"
TEXTS = "How do I bake?\nWhy is é so?\n\n  How do I sail?  \n"
TABLE = 'prompt,topic\n"How, then, do I bake?",baking\n"Why ""so""?",\nHow do I sail?,sails\n'


def formats() -> dict[str, Format]:
    """Every format by its file's name."""
    made = [
        Format("recipe.yaml", RECIPE.encode(), _recipe_read, recipe_agrees),
        _format(
            "transcripts.jsonl", TRANSCRIPTS, lambda path: [*map(to_json, read_transcripts(path))], transcripts_say
        ),
        _format("training.jsonl", SEGMENTS, lambda path: _segments_read(read_training_file(path)), segments_say),
        _format("segments.jsonl", SEGMENTS, lambda path: _segments_read(_imported(path, "segments")), segments_say),
        _format("messages.jsonl", MESSAGES, lambda path: _messages_read(_imported(path, "messages")), messages_say),
        _format("normal.json", MESSAGES, lambda path: _messages_read(_imported(path, "normal")), messages_say),
        *_label_formats(),
        _format("prompts.txt", TEXTS, _prompts_read, lambda data: prompts_say(lines_of(data))),
        _format("prompts.jsonl", PROMPTS, _prompts_read, lambda data: prompts_say(rows_of(data))),
        _format("prompts.csv", TABLE, _prompts_read, lambda data: prompts_say(table_of(data))),
        _format("subjects.txt", TEXTS, lambda path: read_subjects(str(path)), lines_of),
        _format("cues.txt", CUES, _cues_read, cues_say),
        _format("phrases.txt", TEXTS, lambda path: list(read_phrases(path)), phrases_say),
        _format("trials.jsonl", TRIALS, lambda path: [*map(trial_to_json, read_trials(path))], trials_say),
        _format("thresholds.json", THRESHOLDS, _thresholds_read, thresholds_say),
        _format("results.json", RESULTS, _results_read, results_say),
        _format("vocabulary.json", {"t": ["a", "b"], "u": ["c"]}, _vocabulary_read, lambda data: None),
    ]
    return {format.name: format for format in made}


def _label_formats() -> list[Format]:
    plain = [
        _format("labels.jsonl", ROWS, _labels_read, lambda data: pairs_say(rows_of(data))),
        _format("labels.csv", 'index,label\n7,spiders\n12,"baking, é"\n', _labels_read, columns_say),
        *(
            _format(f"labels-{shape}.json", value, _labels_read, lambda data: pairs_say(value_of(text_of(data))))
            for shape, value in LABELS.items()
        ),
    ]
    zipped = [
        Format(f"{format.name}.gz", gzip.compress(format.sound, mtime=0), format.read, _unzipping(format.agrees))
        for format in plain[:3]
    ]
    return plain + zipped


def _unzipping(agrees: Callable[[Any, bytes], bool]) -> Callable[[Any, bytes], bool]:
    return lambda read, data: agrees(read, gzip.decompress(data))


def _imported(path: Path, format: Any) -> list[Transcript]:
    return import_file(path, format)[0]


def _recipe_read(path: Path) -> Any:
    return load_recipe(path).model_dump(mode="json")


def _labels_read(path: Path) -> Any:
    return {str(index): label for index, label in read_labels(path).items()}


def _prompts_read(path: Path) -> Any:
    return [[prompt.text, prompt.topic] for prompt in read_prompts(path)]


def _cues_read(path: Path) -> Any:
    return {register: list(cues) for register, cues in read_cues(str(path)).registers.items()}


def _thresholds_read(path: Path) -> Any:
    return [asdict(threshold) for threshold in load_thresholds(path, THRESHOLDS["key"])]


def _results_read(path: Path) -> Any:
    trials = read_results(path, "base").trials
    return [[trial.cell.latent, trial.cell.prompt, trial.response, trial.cell.seed] for trial in trials]


def _vocabulary_read(path: Path) -> None:
    LexicalJudge.from_file(path)


MOST_LETTERS = 4000
"""A paragraph may have so many: a recipe's mistakes are all named at once."""


def outcome(format: Format, data: bytes, folder: Path) -> str:
    """What reading these bytes comes to: `right rows`, `refused`, or what is wrong with it."""
    path = folder / format.name
    path.write_bytes(data)
    try:
        got = format.read(path)
    except InputError as error:
        said = str(error)
        is_paragraph = "\n" not in said and len(said) < MOST_LETTERS and format.name in said
        return "refused" if is_paragraph else f"no paragraph: {said[:200]!r}"
    except Exception as error:
        return f"another exception: {type(error).__name__}: {str(error)[:200]}"
    try:
        return "right rows" if format.agrees(got, data) else f"a silent change: {str(got)[:200]}"
    except Exception as error:
        return f"a silent change: not refused ({type(error).__name__}: {str(error)[:100]})"


def damaged_file(format: Format, rng: Random, long_lines: float = 0.0) -> bytes:
    """A damaged copy of a format's file; of a packed one either the file or what is in it is damaged."""
    if format.name.endswith(".gz") and rng.random() < 0.7:
        return gzip.compress(damaged(gzip.decompress(format.sound), rng, long_lines), mtime=0)
    if format.name.endswith(".gz"):
        return rng.choice((flipped, cut))(format.sound, rng)
    return damaged(format.sound, rng, long_lines)


def main() -> None:
    """Damage, read, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damaged", type=int, default=2000, help="copies of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="formats, by the names of their files")
    parser.add_argument("--long", type=float, default=0.005, help="share of the copies with a line of 10 MB")
    options = parser.parse_args()
    print("| file | right rows | refused | other exceptions | no paragraph | silent changes | slowest |")
    print("|---|---|---|---|---|---|---|")
    failures: Counter[str] = Counter()
    for format in formats().values():
        if not options.only or format.name in options.only:
            failures.update(_row(format, options))
    for failure, count in failures.most_common():
        print(f"{count} x {failure}", file=sys.stderr)
    sys.exit(bool(failures))


def _row(format: Format, options: argparse.Namespace) -> list[str]:
    counts: Counter[str] = Counter()
    failures, slowest = [], 0.0
    with TemporaryDirectory() as folder:
        assert outcome(format, format.sound, Path(folder)) == "right rows", format.name
        for number in range(options.damaged):
            data = damaged_file(format, Random(f"{options.seed}/{format.name}/{number}"), options.long)
            begun = time.perf_counter()
            result = outcome(format, data, Path(folder))
            slowest = max(slowest, time.perf_counter() - begun)
            counts[result.partition(":")[0]] += 1
            if ":" in result:
                failures.append(f"{format.name} [{number}] {result}")
    kinds = ("right rows", "refused", "another exception", "no paragraph", "a silent change")
    print(f"| {format.name} | " + " | ".join(str(counts[kind]) for kind in kinds) + f" | {slowest:.1f} s |", flush=True)
    return failures


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
