"""What the detectors of a run read in the beginnings that an arm's replies go on from."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from esr_train.models import load_model, load_tokenizer
from esr_train.recipe import ModelSection
from esr_train.steering.direction_files import load_sae
from esr_train.steering.transformers_engine import TransformersEngine
from esr_train.transcript import SaeRef
from eval.arms import PLAIN
from eval.beginnings import SQUARE, noticed_store
from eval.cells import Cell
from eval.detectors import Detector, Detectors, DetectorSet
from eval.trials import Plan, Steerer, trial_key
from recipes.noticing.given_beginnings import read_beginnings

CELLS = (Cell("How do I fold a sheet?", "linen", 7, None, 1.0, 1), Cell("How do I bake?", "bread", 7, None, 1.0, 2))
TEXTS = {True: "Keg the mash malt.", False: "Fold the sheet."}


@pytest.fixture(scope="module")
def arm(assets):
    section = ModelSection(path=str(assets / "llama"), dtype="float32", device="cpu")
    engine = TransformersEngine(load_model(section), load_tokenizer(section), batch_rows=4)
    return SimpleNamespace(engine=engine, variant=PLAIN, sae=load_sae(SaeRef(str(assets), "llama-sae")))


def plans(sae) -> dict[str, Plan]:
    steerer = Steerer({7: sae.direction(7, 20.0)}, {7: 0.8})
    return {
        condition: Plan(
            CELLS, replace(steerer, off="push off" in title), {each.key: TEXTS["text off" in title] for each in CELLS}
        )
        for condition, title in SQUARE.items()
    }


def found(sae, latents: tuple[int, ...]) -> Detectors:
    detectors = tuple(Detector(latent, "", *[0.0] * 8, 0, (0.0, 0.0)) for latent in latents)  # type: ignore[arg-type]
    return Detectors("r", "i", sae.layer, (DetectorSet("off_topic", detectors, None, (), (), (), 0, 0),))


def test_the_same_text_is_read_with_and_without_the_push_and_an_interrupted_reading_goes_on(arm, tmp_path):
    stages = []

    def do(stage, work):
        stages.append(stage)
        work()

    resources = SimpleNamespace(read_sae=lambda: arm.sae)
    experiment = SimpleNamespace(directory=tmp_path, resources=resources, cache=SimpleNamespace(do=do))
    given = (experiment, "tuned", lambda: arm, plans(arm.sae))
    read_beginnings(*given, found(arm.sae, (3, 7)), {"arm": 1})  # type: ignore[arg-type]
    path = tmp_path / "beginnings" / "tuned.jsonl"
    rows = noticed_store(path).by_key()
    assert rows.keys() == {trial_key("tuned", condition, cell) for condition in SQUARE for cell in CELLS}
    sums = {row.condition: row.sums["off_topic"] for row in rows.values()}
    pushed = [condition for condition, title in SQUARE.items() if "push on" in title]
    assert all(sums[one] > sums[other] for one, other in zip(pushed, list(SQUARE)[2:], strict=True)), "7 is pushed"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    read_beginnings(*given, found(arm.sae, (3, 7)), {"arm": 1})  # type: ignore[arg-type]
    assert noticed_store(path).by_key() == rows
    read_beginnings(*given, found(arm.sae, (3,)), {"arm": 1})  # type: ignore[arg-type]
    first, again, other = (stage.inputs for stage in stages)
    assert first == again != other, "other detectors are read anew"
    read_beginnings(*given, found(arm.sae, ()), {"arm": 1})  # type: ignore[arg-type]
    read_beginnings(*given[:3], {}, found(arm.sae, (3,)), {"arm": 1})  # type: ignore[arg-type]
    assert len(stages) == 3, "without detectors, or without all four conditions, there is nothing to read"
