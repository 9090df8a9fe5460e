"""How far the likelihood judge agrees with a reader, on the labelled responses in `tests/data/on-topic.jsonl`.

    python -m benchmarks.judges                        from the log-probabilities stored with the responses
    python -m benchmarks.judges MODEL                  asked anew of a model, and how long that takes
    python -m benchmarks.judges MODEL --store          and kept in the file

Grades are of single attempts: 0, 25, 50, 75 or 100, how much of the text deals with the question. `half` says which
prompts the judge's constants were chosen on ("tuned") and which were never looked at for that ("held out").
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu, spearmanr

from esr_train.files import replacing
from esr_train.steering.engine import Request, Sampling
from eval.judging.judge import JudgeItem
from eval.judging.likelihood import LikelihoodJudge, Passage, attempt_score, is_degenerate, passages
from eval.judging.prose import bodies, novelty

DATA = Path(__file__).parent.parent / "tests" / "data" / "on-topic.jsonl"
BATCH = 48
ON_TOPIC = 50
"""The least grade of an attempt that counts as on topic."""


@dataclass(frozen=True)
class Graded:
    """An attempt: the reader's grade, the judge's score, and where it comes from."""

    grade: float
    score: float
    half: str
    kind: str


def read(path: Path = DATA) -> list[dict[str, Any]]:
    """The labelled responses."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stored(row: dict[str, Any]) -> list[list[Passage]]:
    """The passages of each attempt, with the log-probabilities that are kept in the file."""
    found = []
    for body, values in zip(bodies(row["response"]), row["passages"], strict=True):
        texts = passages(body.text)
        pairs = zip(texts, values, novelty(texts), strict=True)
        found.append([Passage(text, tokens, *sums, new) for text, (tokens, *sums), new in pairs])
    return found


def graded(rows: Sequence[dict[str, Any]], scores: Sequence[Sequence[float]]) -> list[Graded]:
    """First and last attempts (one, where there is one) with the judge's scores of all attempts."""
    found = []
    for row, mine in zip(rows, scores, strict=True):
        ends = [(row["first"], mine[0])]
        if row["restarted"] and len(mine) > 1:
            ends.append((row["last"], mine[-1]))
        found += [Graded(grade, score, row["half"], row["kind"]) for grade, score in ends]
    return found


def rank_correlation(found: Sequence[Graded]) -> float:
    """Spearman's, of grades and scores."""
    return float(spearmanr([each.grade for each in found], [each.score for each in found]).statistic)


def auc(found: Sequence[Graded]) -> float:
    """The chance that an attempt on topic scores above one that is not."""
    on = [each.score for each in found if each.grade >= ON_TOPIC]
    off = [each.score for each in found if each.grade < ON_TOPIC]
    return float(mannwhitneyu(on, off).statistic) / (len(on) * len(off))


def retest(rows: Sequence[dict[str, Any]]) -> tuple[int, float, float]:
    """Of the responses read twice: how many, rank correlation of the last attempts' grades, share of equal ones."""
    twice = [(row["last"], row["second"]["last"]) for row in rows if row.get("second")]
    first, second = np.array(twice).T
    return len(twice), float(spearmanr(first, second).statistic), float((first == second).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or name of a fetched model; without it stored values serve")
    parser.add_argument("--store", action="store_true", help="keep the model's log-probabilities in the file")
    arguments = parser.parse_args()
    rows = read()
    if arguments.model:
        rows = _asked(rows, arguments.model)
        if arguments.store:
            with replacing(DATA) as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _print(rows)


def _asked(rows: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """The rows with what the model says of their passages; prints how long judging takes, and generating."""
    from esr_train.models import load_model, load_tokenizer
    from esr_train.recipe import ModelSection
    from esr_train.steering.transformers_engine import TransformersEngine

    section = ModelSection(path=model)
    engine = TransformersEngine(load_model(section), load_tokenizer(section), batch_rows=BATCH)
    judge = LikelihoodJudge(model, lambda: engine)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:BATCH]
    start = time.perf_counter()
    made = engine.generate([Request(prompt, prompt) for prompt in prompts], Sampling(max_new_tokens=96))
    generated = time.perf_counter()
    judge.read([JudgeItem(prompt, each.text) for prompt, each in zip(prompts, made, strict=True)])
    judged = time.perf_counter()
    tokens = sum(len(each.token_ids) for each in made)
    found = judge.read([JudgeItem(row["prompt"], row["response"]) for row in rows])
    print(
        f"{tokens} tokens to {len(prompts)} prompts generated in {generated - start:.1f} s and judged in "
        f"{judged - generated:.1f} s ({(judged - generated) / (generated - start):.0%}); the {len(rows)} labelled "
        f"responses judged in {time.perf_counter() - judged:.0f} s\n"
    )
    values = [[[[p.tokens, round(p.question, 2), round(p.neutral, 2)] for p in a] for a in each] for each in found]
    return [{**row, "passages": mine} for row, mine in zip(rows, values, strict=True)]


def _print(rows: list[dict[str, Any]]) -> None:
    read_ = [stored(row) for row in rows]
    found = graded(rows, [[attempt_score(attempt) for attempt in each] for each in read_])
    subsets: dict[str, Callable[[Graded], bool]] = {
        "all": lambda each: True,
        "prompts the constants were chosen on": lambda each: each.half == "tuned",
        "held-out prompts": lambda each: each.half == "held out",
        "held-out prompts, steered": lambda each: each.half == "held out" and each.kind == "steered",
    }
    print("| attempts | n | rank correlation | AUC of on topic | mean score of grades 0, 25, 50, 75, 100 |")
    print("|---|---|---|---|---|")
    for name, belongs in subsets.items():
        those = [each for each in found if belongs(each)]
        means = [
            np.mean([each.score for each in those if each.grade == grade] or [np.nan]) for grade in range(0, 101, 25)
        ]
        told = ", ".join(f"{mean:.0f}" for mean in means)
        print(f"| {name} | {len(those)} | {rank_correlation(those):.3f} | {auc(those):.3f} | {told} |")
    restarts = [(len(each) > 1, row["restarted"]) for each, row in zip(read_, rows, strict=True)]
    garbled = [(any(map(is_degenerate, each)), row["degenerate"]) for each, row in zip(read_, rows, strict=True)]
    for name, pairs in {"restarted": restarts, "degenerate": garbled}.items():
        both = sum(a and b for a, b in pairs)
        recall, precision = both / sum(b for _, b in pairs), both / max(sum(a for a, _ in pairs), 1)
        print(f"\n{name}: agreement {np.mean([a == b for a, b in pairs]):.2f}, precision {precision:.2f}, ", end="")
        print(f"recall {recall:.2f} (the reader says so of {sum(b for _, b in pairs)} of {len(pairs)})")
    n, correlation, equal = retest(rows)
    print(f"\nthe reader read {n} twice: rank correlation {correlation:.3f}, equal grades {equal:.2f}")


if __name__ == "__main__":
    main()
