"""Run cells through an engine and a judge into a store that a kill cannot corrupt."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from esr_train.errors import RunError
from esr_train.steering.engine import Completion, Engine, Progress, Request, Sampling
from esr_train.steering.intervention import Positions
from eval.cells import Cell
from eval.judging.attempts import find_cues
from eval.judging.judge import Judge, JudgeItem, Judgement
from eval.store import Trial, TrialStore

if TYPE_CHECKING:
    from esr_train.steering.sae import Direction
    from esr_train.transcript import Strength

CHUNK_ROWS = 128
"""Trials between two writes: at most these are lost when a run is killed."""


@dataclass(frozen=True)
class Steerer:
    """Turns a cell's latent and multiple into an intervention.

    Args:
        directions: latent index -> its direction.
        norms: latent index -> its threshold in `norm` units.
        positions: which tokens are steered.
    """

    directions: Mapping[int, "Direction"]
    norms: Mapping[int, float]
    positions: Positions = "all"

    def strength(self, cell: Cell) -> "Strength | None":
        """The cell's strength in both units; None for an unsteered cell.

        Raises:
            KeyError: for a latent without direction or threshold.
        """
        if cell.latent is None:
            return None
        return self.directions[cell.latent].strength(self.norms[cell.latent] * cell.multiple)

    def request(self, cell: Cell, key: str) -> Request:
        """The cell as a request. Its seed is the cell's, so arms draw the same noise."""
        strength = self.strength(cell)
        if cell.latent is None or strength is None:
            return Request(id=key, prompt=cell.prompt, seed=cell.seed)
        add = self.directions[cell.latent].add(strength.norm, self.positions)
        return Request(id=key, prompt=cell.prompt, interventions=(add,), seed=cell.seed)


def run_trials(
    engine: Engine,
    judge: Judge,
    store: TrialStore,
    cells: Sequence[Cell],
    steerer: Steerer,
    sampling: Sampling,
    *,
    arm: str,
    condition: str,
    chunk_rows: int = CHUNK_ROWS,
    progress: Progress | None = None,
) -> list[Trial]:
    """Run every cell that is not in the store yet; the rows of all cells, in the cells' order.

    A row does not depend on which others ran beside it, so that a run which was killed and started again ends
    with the same rows.

    Args:
        progress: told of the rows already there at once, and of the others as they finish.

    Raises:
        RunError: if a steered cell was not steered, an unsteered one was, or the judge lost an item. Chunks
            finished before are kept.
    """
    keys = [trial_key(arm, condition, cell) for cell in cells]
    done = store.keys()
    missing = [(key, cell) for key, cell in zip(keys, cells, strict=True) if key not in done]
    if progress and len(missing) < len(cells):
        progress(len(cells) - len(missing), 0)
    for start in range(0, len(missing), chunk_rows):
        chunk = missing[start : start + chunk_rows]
        requests = [steerer.request(cell, key) for key, cell in chunk]
        completions = engine.generate(requests, sampling, progress)
        _check_steering(arm, chunk, completions)
        items = [
            JudgeItem(cell.prompt, completion.text, cell.label, recovery=True)
            for (_, cell), completion in zip(chunk, completions, strict=True)
        ]
        judgements = judge.judge(items)
        if len(judgements) != len(items):
            raise RunError(f"{judge.name} returned {len(judgements)} judgements for {len(items)} responses.")
        about = {"arm": arm, "condition": condition, "engine": engine.name, "sampling": asdict(sampling)}
        store.append(
            _row(key, cell, steerer.strength(cell), about, completion, judgement)
            for (key, cell), completion, judgement in zip(chunk, completions, judgements, strict=True)
        )
    rows = {row["key"]: row for row in store.rows()}
    return [rows[key] for key in keys]


def trial_key(arm: str, condition: str, cell: Cell) -> str:
    """The key of a trial's row."""
    return f"{arm}/{condition}/{cell.key}"


def _check_steering(arm: str, chunk: Sequence[tuple[str, Cell]], completions: Sequence[Completion]) -> None:
    if len(completions) != len(chunk):
        raise RunError(f"{arm}: the engine returned {len(completions)} completions for {len(chunk)} requests.")
    for (key, cell), completion in zip(chunk, completions, strict=True):
        if (completion.steered_tokens > 0) != (cell.latent is not None):
            wanted = "unsteered" if cell.latent is None else f"steered by latent {cell.latent}"
            found = f"{completion.steered_tokens} tokens were steered"
            raise RunError(f"the trial {key} should have been {wanted}, but {found}.")


def _row(
    key: str,
    cell: Cell,
    strength: "Strength | None",
    about: Mapping[str, Any],
    completion: Completion,
    judgement: Judgement,
) -> Trial:
    judged = judgement.to_json()
    return {
        "key": key,
        "arm": about["arm"],
        "condition": about["condition"],
        "seed": cell.seed,
        "cell": {
            "prompt": cell.prompt,
            "topic": cell.topic,
            "latent": cell.latent,
            "label": cell.label,
            "strength": asdict(strength) if strength else None,
            "seed": cell.seed,
        },
        "engine": about["engine"],
        "sampling": about["sampling"],
        "response": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
        "steered_tokens": completion.steered_tokens,
        "attempts": judged["attempts"],
        "cue": bool(find_cues(completion.text)),
        "judge": judged["judge"],
        "judge_raw": judged["judge_raw"],
        "flags": judged["flags"],
        "error": judged["error"],
    }


@contextmanager
def progress_bar(total: int, label: str) -> Iterator[Progress]:
    """A bar on standard error with responses/s, tokens/s and the time left, for `total` responses."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="resp", dynamic_ncols=True) as bar:
        tokens = 0

        def advance(rows: int, made: int) -> None:
            nonlocal tokens
            tokens += made
            bar.update(rows)
            elapsed = bar.format_dict["elapsed"]
            if elapsed:
                bar.set_postfix_str(f"{tokens / elapsed:,.0f} tok/s", refresh=False)

        yield advance
