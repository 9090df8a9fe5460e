"""The search for detectors on planted truth: what is there is found, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kstest, norm

from esr_train.errors import InputError
from eval.detectors import (
    Classes,
    Detectors,
    DetectorSet,
    Dictionary,
    auc_of,
    best,
    discovered,
    find,
    grouped,
    paper_rule,
    read_detectors,
    separation,
    write_detectors,
)
from eval.report.detector_figures import search_figure, search_table

LATENTS, PLANTED, SHIFT = 4096, 8, 1.5
TRUE_AUC = float(norm.cdf(SHIFT / np.sqrt(2)))
"""Of two normal classes a shift apart."""
DETECTORS = tuple(range(100, 100 + 37 * PLANTED, 37))


def stream(seed: int, responses: int = 200, planted: tuple[int, ...] = DETECTORS) -> Classes:
    """Activations of latents that are silent on most responses, and of planted ones that are not."""
    random = np.random.default_rng(seed)
    share = np.random.default_rng(0).uniform(0.02, 0.9, LATENTS)

    def kind(shift: float) -> np.ndarray:
        values = random.exponential(size=(responses, LATENTS)) * (random.random((responses, LATENTS)) < share)
        # Far from 0, so that no activation of a planted one is cut off.
        values[:, planted] = 10 + shift + random.normal(size=(responses, len(planted)))
        return values.astype(np.float32)

    return Classes(kind(0.0), kind(SHIFT))


@pytest.fixture(scope="module")
def planted() -> Classes:
    return stream(1)


@pytest.fixture(scope="module")
def found(planted) -> DetectorSet:
    return find("off_topic", planted, stream(2, 100), dictionary(), 0)


def dictionary() -> Dictionary:
    random = np.random.default_rng(3)
    rows = random.normal(size=(LATENTS, 32))
    rows[DETECTORS[1]] = rows[DETECTORS[0]] + 0.1 * random.normal(size=32)
    return Dictionary(
        random.uniform(0.01, 0.5, LATENTS), np.linalg.norm(rows, axis=1), lambda chosen: rows[list(chosen)]
    )


def test_the_search_returns_the_planted_detectors_and_no_other_latent(found):
    assert set(found.chosen) == set(DETECTORS)
    assert [detector.auc for detector in found.detectors] == sorted((d.auc for d in found.detectors), reverse=True)
    assert found.held_out.low > 0.95
    assert max(found.random_aucs) < 0.7
    assert len(found.random_sets) == 20
    assert not {*DETECTORS} & {latent for those in found.random_sets for latent in those}


def test_the_auc_of_a_planted_detector_lies_in_its_interval(planted):
    found = separation(Classes(*planted.of(DETECTORS)))
    assert np.abs((found.auc - TRUE_AUC) / found.error).max() < 3
    aucs = [
        auc_of(Classes(*(half[:, [latent]] for half in (planted.negative, planted.positive)))) for latent in DETECTORS
    ]
    assert sum(auc.low <= TRUE_AUC <= auc.high for auc in aucs) >= 7


def test_the_interval_of_an_auc_covers_it_as_often_as_it_says():
    random = np.random.default_rng(5)
    negative, positive = random.normal(size=(60, 2000)), SHIFT + random.normal(size=(60, 2000))
    found = separation(Classes(negative, positive))
    assert np.mean(np.abs(found.auc - TRUE_AUC) < 1.96 * found.error) == pytest.approx(0.95, abs=0.02)


def test_what_a_text_does_in_both_readings_neither_hides_a_detector_nor_widens_its_interval():
    random = np.random.default_rng(9)
    text = 4 * random.normal(size=(80, 300))
    negative = text + random.normal(size=text.shape)
    positive = text + 1 + random.normal(size=text.shape)
    found = separation(Classes(negative, positive))
    assert found.auc.mean() < 0.6
    assert np.median(found.p) < 1e-5
    assert found.error.mean() == pytest.approx(found.auc.std(), rel=0.15)


@pytest.mark.parametrize("active", [1.0, 0.4], ids=["dense", "mostly silent, so tied"])
def test_p_values_are_uniform_where_nothing_is_planted(active):
    """Each column is a run of its own."""
    random = np.random.default_rng(7)
    shape = (100, 200)
    kinds = [random.exponential(size=shape) * (random.random(shape) < active) for _ in range(2)]
    assert kstest(separation(Classes(*kinds)).p, "uniform").pvalue > 0.05


def test_nothing_is_found_where_nothing_is_planted():
    found = find("off_topic", stream(4, 100, ()), stream(5, 60, ()), dictionary(), 0)
    assert found.detectors == ()
    assert found.held_out is None
    assert "0 by AUC" in "\n".join(search_table(Detectors("r", "i", 3, (found,))))


def test_a_latent_that_is_never_active_has_no_say():
    silent = separation(Classes(np.zeros((5, 1)), np.zeros((5, 1))))
    assert (silent.auc[0], silent.p[0], silent.error[0]) == (0.5, 1.0, 0.0)


def test_latents_come_in_pieces_and_the_numbers_stay(planted, monkeypatch):
    few = Classes(planted.negative[:, 90:150], planted.positive[:, 90:150])
    whole = separation(few)
    monkeypatch.setattr("eval.detectors.AT_ONCE", 25)
    assert np.array_equal(separation(few).auc, whole.auc)


def test_the_papers_rule_wants_silence_on_topic_and_four_fifths_off_topic():
    negative, positive = np.zeros((10, 3)), np.ones((10, 3))
    positive[:2, 0], positive[:3, 1], negative[0, 2] = 0, 0, 1
    assert paper_rule(separation(Classes(negative, positive))) == [0]


def test_many_tests_are_allowed_for_and_a_small_difference_is_not_enough():
    random = np.random.default_rng(11)
    negative, positive = random.normal(size=(2000, 50)), random.normal(size=(2000, 50))
    positive[:, 0] += 0.15
    found = separation(Classes(negative, positive))
    assert discovered(found)[0] < 0.01
    assert found.auc[0] < 0.55
    assert best(found) == []


def test_latents_that_point_alike_or_fire_together_are_one_group():
    random = np.random.default_rng(13)
    rows, activations = random.normal(size=(4, 64)), random.exponential(size=(50, 4))
    rows[1], activations[:, 3] = rows[0] + 0.1, activations[:, 2] + 0.1 * random.random(50)
    groups, places = grouped(rows, activations)
    assert groups == [0, 0, 1, 1]
    near, far = np.subtract(places[0], places[1]), np.subtract(places[0], places[2])
    assert np.linalg.norm(near) < 0.5 * np.linalg.norm(far)
    assert grouped(rows[:1], activations[:, :1]) == ([0], [(0.0, 0.0)])


def test_what_was_found_is_read_back_and_shown(found, tmp_path):
    named = tuple(replace(each, name="a <<mast>> & sail") for each in found.detectors)
    detectors = Detectors("release", "id", 7, (replace(found, detectors=named),))
    path = tmp_path / "detectors.json"
    write_detectors(path, detectors)
    assert read_detectors(path) == detectors
    figure = search_figure(detectors)
    assert len(figure.table) == 1 + PLANTED
    assert "&lt;&lt;mast&gt;&gt; &amp; sail" in figure.svg
    path.write_text('{"schema": 2}')
    with pytest.raises(InputError, match=r"no detectors\.json"):
        read_detectors(path)


def test_a_single_pair_is_refused():
    with pytest.raises(InputError, match="1 pairs of responses are too few"):
        separation(Classes(np.zeros((1, 3)), np.zeros((1, 3))))
