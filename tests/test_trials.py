from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from esr_train.errors import RunError
from esr_train.ranks import Ranks
from esr_train.steering.directions import Add, Positions
from esr_train.steering.engine import Completion, Progress, Request, Sampling
from esr_train.transcript import Strength
from eval.arms import Arm
from eval.cells import Cell, Prompt, make_cells, unsteered
from eval.judging.judge import JudgeItem, Judgement
from eval.judging.lexical import LexicalJudge
from eval.metrics import pair_key
from eval.report.story import brief, finished_line, progress_bar
from eval.store import Trial, TrialCell, TrialStore, UsedStrength, read_trials, trial_to_json
from eval.trials import Observer, Plan, Steerer, run_trials
from tests.threads import as_ranks

JUDGE = LexicalJudge({"sailing": ["mast"], "baking": ["dough"]})
PROMPTS = [Prompt(f"How do I raise mast number {number}?", "sailing") for number in range(6)]
SAMPLING = Sampling(max_new_tokens=32)


class Killed(Exception):
    pass


@dataclass(frozen=True)
class FakeDirection:
    latent: int
    label: str

    def strength(self, norm: float) -> Strength:
        return Strength(raw=10 * norm, norm=norm)

    def add(self, norm: float, positions: Positions = "all") -> Add:
        return Add(self.latent, norm, positions)  # type: ignore[arg-type]


@dataclass
class FakeEngine:
    """Restarts when it is steered; its text names the row's seed. Dies at its `dies_at`th call."""

    name: str = "fake"
    steers: bool = True
    dies_at: int | None = None
    calls: list[list[Request]] = field(default_factory=list)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        self.calls.append(list(requests))
        if len(self.calls) == self.dies_at:
            raise Killed
        if progress:
            progress(len(requests), 4 * len(requests))
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion:
        text = f"Raise the mast by {request.seed} feet."
        if request.interventions:
            text = f"Knead the dough. Wait, that's not right. {text}"
        steered = 7 if request.interventions and self.steers else 0
        return Completion(request.id, text, (1, 2, 3, 4), "stop", 3, steered)


LATENTS = [FakeDirection(5, "baking"), FakeDirection(6, "baking")]
STEERER = Steerer({each.latent: each for each in LATENTS}, {5: 0.5, 6: 0.8})  # type: ignore[dict-item]
CELLS = make_cells(PROMPTS, LATENTS, 12, seed=3, multiple=2.0)  # type: ignore[arg-type]


class Noting(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.counted: list[tuple[int, int]] = []
        self.told: list[str] = []

    def __call__(self, rows: int, tokens: int) -> None:
        if rows or tokens:
            self.counted.append((rows, tokens))

    def on_trials_finished(self, trials: Sequence[Trial]) -> None:
        self.told.append(brief(trials))


def run(
    path: Path,
    engine: FakeEngine,
    cells: Sequence[Cell] = CELLS,
    arm: str = "base",
    chunk_rows: int = 5,
    **given,
) -> list[Trial]:
    condition = "steered" if cells[0].latent is not None else "unsteered"
    plan = Plan(tuple(cells), STEERER)
    return run_trials(
        Arm(engine, JUDGE, SAMPLING, arm), condition, plan, TrialStore(path), chunk_rows=chunk_rows, **given
    )


def test_a_row_describes_itself(tmp_path: Path):
    cell, row = CELLS[0], run(tmp_path / "base.jsonl", FakeEngine())[0]
    norm = 2.0 * STEERER.norms[cell.latent]
    assert list(trial_to_json(row)) == [
        "key", "arm", "condition", "seed", "cell", "variant", "engine", "sampling", "prefix", "response",
        "finish_reason", "tokens", "steered_tokens", "attempts", "cue", "restart_token", "restart_logprobs",
        "judge", "judge_raw", "flags", "error",
    ]  # fmt: skip
    used = UsedStrength(raw=10 * norm, norm=norm)
    assert row.cell == TrialCell(cell.prompt, "sailing", cell.latent, "baking", used, cell.seed)
    assert (row.arm, row.condition, row.seed, row.engine) == ("base", "steered", cell.seed, "fake")
    assert row.sampling == SAMPLING
    assert (row.finish_reason, row.tokens, row.steered_tokens) == ("stop", 4, 7)
    assert [attempt.score for attempt in row.attempts] == [0.0, 100.0]
    assert row.cue is True
    assert (row.judge, row.error) == (JUDGE.name, None)
    assert row.flags["hijacked"] is False


def test_rows_on_disk_are_the_rows_returned_in_the_cells_order(tmp_path: Path):
    rows = run(tmp_path / "base.jsonl", FakeEngine())
    assert [row.cell.seed for row in rows] == [cell.seed for cell in CELLS]
    assert read_trials(tmp_path / "base.jsonl") == rows


def test_unsteered_cells_run_beside_steered_ones_in_one_file(tmp_path: Path):
    run(tmp_path / "base.jsonl", FakeEngine())
    rows = run(tmp_path / "base.jsonl", FakeEngine(), unsteered(CELLS))
    assert len(TrialStore(tmp_path / "base.jsonl").rows()) == 24
    assert all(row.cell.strength is None and row.cell.latent is None for row in rows)
    assert not any(row.cue for row in rows)


def test_arms_pair_on_every_cell(tmp_path: Path):
    base, tuned = (run(tmp_path / f"{arm}.jsonl", FakeEngine(), arm=arm) for arm in ("base", "tuned"))
    assert [pair_key(row) for row in base] == [pair_key(row) for row in tuned]
    assert len({pair_key(row) for row in base}) == len(CELLS)


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_a_killed_run_goes_on_and_ends_with_the_same_rows(tmp_path: Path, dies_at: int):
    whole = run(tmp_path / "whole.jsonl", FakeEngine())
    with pytest.raises(Killed):
        run(tmp_path / "killed.jsonl", FakeEngine(dies_at=dies_at))
    again = FakeEngine()
    assert run(tmp_path / "killed.jsonl", again) == whole
    assert sum(map(len, again.calls)) == len(CELLS) - 5 * (dies_at - 1)


def test_every_arm_and_condition_draws_with_the_cells_seed(tmp_path: Path):
    for number, cells in enumerate((CELLS, CELLS, unsteered(CELLS))):
        engine = FakeEngine()
        run(tmp_path / f"{number}.jsonl", engine, cells, arm=f"arm{number}")
        assert [each.seed for call in engine.calls for each in call] == [cell.seed for cell in CELLS]


def test_finished_trials_are_not_run_again(tmp_path: Path):
    first = run(tmp_path / "base.jsonl", FakeEngine())
    again = FakeEngine()
    assert run(tmp_path / "base.jsonl", again) == first
    assert again.calls == []


def test_chunks_do_not_change_rows(tmp_path: Path):
    rows = [run(tmp_path / f"{size}.jsonl", FakeEngine(), chunk_rows=size) for size in (1, 5, 100)]
    assert rows[0] == rows[1] == rows[2]


def test_a_steered_trial_that_was_not_steered_is_an_error_and_no_data_point(tmp_path: Path):
    with pytest.raises(RunError, match="should have been steered, but 0 tokens"):
        run(tmp_path / "base.jsonl", FakeEngine(steers=False))
    assert TrialStore(tmp_path / "base.jsonl").rows() == []


def test_an_unsteered_trial_that_was_steered_is_an_error(tmp_path: Path):
    class Leaky(FakeEngine):
        def _complete(self, request: Request) -> Completion:
            return replace(super()._complete(request), steered_tokens=1)

    with pytest.raises(RunError, match="should have been unsteered, but 1 token"):
        run(tmp_path / "base.jsonl", Leaky(), unsteered(CELLS))


def test_a_judge_failure_is_kept_as_unscored(tmp_path: Path):
    class Silent:
        name = "silent"

        def judge(self, items: Sequence[JudgeItem]) -> list[Judgement]:
            return [Judgement((), self.name, error="no answer") for _ in items]

    arm = Arm(FakeEngine(), Silent(), SAMPLING, "a")
    rows = run_trials(arm, "steered", Plan(tuple(CELLS), STEERER), TrialStore(tmp_path / "a"))
    assert all(row.error == "no answer" and row.attempts == () and row.cue for row in rows)


def test_progress_counts_every_cell_once_even_when_resumed(tmp_path: Path):
    with pytest.raises(Killed):
        run(tmp_path / "base.jsonl", FakeEngine(dies_at=2))
    observer = Noting()
    run(tmp_path / "base.jsonl", FakeEngine(), observer=observer)
    assert observer.counted == [(5, 0), (5, 20), (2, 8)]


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_share_the_cells_and_end_with_the_rows_of_one(tmp_path: Path, count: int):
    alone = run(tmp_path / "alone.jsonl", FakeEngine())
    with pytest.raises(Killed):
        run(tmp_path / "shared.jsonl", FakeEngine(dies_at=2), chunk_rows=3)
    engines = [FakeEngine() for _ in range(count)]
    seen = [Noting() for _ in engines]

    def one(ranks: Ranks) -> list[Trial]:
        store = TrialStore(tmp_path / "shared.jsonl", writes=ranks.first)
        ranks.gather(None)
        arm, plan = Arm(engines[ranks.rank], JUDGE, SAMPLING), Plan(tuple(CELLS), STEERER)
        return run_trials(arm, "steered", plan, store, chunk_rows=2, observer=seen[ranks.rank], ranks=ranks)

    assert as_ranks(count, one) == [alone] * count
    asked = [request.id for engine in engines for call in engine.calls for request in call]
    assert len(asked) == len(set(asked)) == len(CELLS) - 3
    assert all(engine.calls for engine in engines)
    assert sorted((tmp_path / "shared.jsonl").read_text().splitlines()) == sorted(
        (tmp_path / "alone.jsonl").read_text().splitlines()
    )
    assert [sum(rows for rows, _ in each.counted) for each in seen] == [len(CELLS)] * count


def test_the_terminal_is_told_what_the_trials_so_far_have_given(tmp_path: Path):
    observer = Noting()
    rows = run(tmp_path / "base.jsonl", FakeEngine(), chunk_rows=6, observer=observer)
    assert observer.told == ["", *["second attempt 100%, ESR 100%, worse 0%, first score 0, last score 100"] * 2]
    failed = [replace(row, error="no answer", attempts=()) for row in rows[:3]]
    line = finished_line("tuned", "steered", [*rows[3:], *failed])
    assert line.startswith("tuned, steered: 12 trials, second attempt 100\u202f% (")
    assert line.endswith("last score 100 (100 to 100), 3 unscored")


def test_the_progress_bar_shows_count_and_label(capsys: pytest.CaptureFixture[str]):
    with progress_bar(4, "base, steered") as progress:
        progress(4, 100)
    shown = capsys.readouterr().err
    assert "base, steered" in shown
    assert "4/4" in shown


def test_of_several_processes_one_shows_a_bar(capsys: pytest.CaptureFixture[str]):
    with progress_bar(4, "base, steered", visible=False) as bar:
        bar(4, 100)
        bar.on_trials_finished([])
    assert capsys.readouterr().err == ""
