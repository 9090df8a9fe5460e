"""The probe that watches behaviour while a model is trained: a few steered and unsteered responses, judged."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from esr_train.restarts import find_cues
from esr_train.steering.engine import Engine, Sampling
from eval.cells import Cell, unsteered
from eval.judging.judge import Judge, JudgeItem
from eval.trials import Steerer

if TYPE_CHECKING:
    from esr_train.training.callbacks import Observation, Probe

MakeProbe = Callable[[Any, Any], "Probe"]
"""What the trainer is given: makes the probe from the model in training and its tokenizer."""


def probing(judge: Judge, cells: Sequence[Cell], steerer: Steerer, sampling: Sampling, batch_rows: int) -> MakeProbe:
    """A probe on these cells, steered and unsteered, for `esr_train.training.trainer.train`.

    Args:
        judge: scores the responses.
        cells: steered ones, of the validation split: the test's must not be looked at while training.
        steerer: knows the cells' latents.
        sampling: as in the evaluation.
        batch_rows: responses generated at once.
    """

    def make(model: Any, tokenizer: Any) -> "Probe":
        from esr_train.steering.transformers_engine import TransformersEngine

        engine = TransformersEngine(model, tokenizer, batch_rows=batch_rows)
        return lambda step, logged: observe(engine, judge if logged else None, cells, steerer, sampling)

    return make


def observe(
    engine: Engine, judge: Judge | None, cells: Sequence[Cell], steerer: Steerer, sampling: Sampling
) -> "Observation":
    """Restart rates and mean last scores (without a judge: no scores), steered and not, and a response of each."""
    from esr_train.training.callbacks import Observation

    figures: dict[str, float] = {}
    samples = []
    for name, group in (("steered", cells), ("unsteered", unsteered(cells))):
        requests = [steerer.request(cell, str(number)) for number, cell in enumerate(group)]
        texts = [completion.text for completion in engine.generate(requests, sampling)]
        figures[f"restarts_{name}"] = sum(bool(find_cues(text)) for text in texts) / len(texts)
        scores = _last_scores(judge, group, texts) if judge else []
        # No figure at all is better than one that takes a silent judge for a score of 0.
        if scores:
            figures[f"last_score_{name}"] = sum(scores) / len(scores)
        samples.append({"condition": name, "prompt": group[0].prompt, "label": group[0].label, "response": texts[0]})
    return Observation(figures, tuple(samples))


def _last_scores(judge: Judge, cells: Sequence[Cell], texts: Sequence[str]) -> list[float]:
    items = [JudgeItem(cell.prompt, text, cell.label) for cell, text in zip(cells, texts, strict=True)]
    last = [found.attempts[-1].score for found in judge.judge(items) if found.attempts]
    return [score for score in last if score is not None]
