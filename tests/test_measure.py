"""Known answers by hand, and intervals that hold the truth as often as they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import measure


def logits_for(answers: list[int], classes: int = 3) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[answers]


def test_accuracy_of_three_out_of_four():
    found = measure.accuracy(logits_for([0, 1, 2, 0]), np.array([0, 1, 2, 1]), seed=0)
    assert (found.value, found.n) == (0.75, 4)
    assert found.low == 0.25 and found.high == 1.0  # binomial(4, 3/4): P(<=1) = 5.1 %, P(0) = 0.4 %


def test_all_right_has_no_width_and_the_seed_decides_the_rest():
    labels = np.array([0, 1, 2] * 20)
    sure = measure.accuracy(logits_for(list(labels)), labels, seed=0)
    assert (sure.value, sure.low, sure.high, sure.n) == (1.0, 1.0, 1.0, 60)
    half = logits_for([0] * 60)
    again = [measure.accuracy(half, labels, seed=seed) for seed in (1, 1, 2)]
    assert again[0] == again[1]
    assert again[0].value == again[2].value


def test_interval_of_accuracy_is_the_binomials():
    """Against the exact quantiles of a normal approximation at n = 7,528."""
    correct = np.arange(7528) % 5 > 0
    found = measure.share(correct, seed=3, resamples=20_000)
    half = 1.96 * np.sqrt(found.value * (1 - found.value) / found.n)
    assert found.low == pytest.approx(found.value - half, abs=3e-4)
    assert found.high == pytest.approx(found.value + half, abs=3e-4)


def test_intervals_hold_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = {"accuracy": 0, "retention": 0}
    teacher_quality, kept, gained, tries = 0.8, 0.9, 0.2, 600
    student_quality = teacher_quality * kept + (1 - teacher_quality) * gained
    for seed in range(tries):
        teacher = rng.random(500) < teacher_quality
        student = np.where(teacher, rng.random(500) < kept, rng.random(500) < gained)
        quality = measure.share(student, seed=seed, resamples=400)
        ratio = measure.retention(student, teacher, seed=seed, resamples=400)
        hits["accuracy"] += quality.low <= student_quality <= quality.high
        hits["retention"] += ratio.low <= student_quality / teacher_quality <= ratio.high
    for name, count in hits.items():  # 3 standard deviations around 95 %, and a little bias
        assert 0.915 < count / tries < 0.98, name


def test_retention_is_a_ratio_on_the_same_examples():
    teacher = np.array([True, True, True, True, False])
    found = measure.retention(np.array([True, True, True, False, False]), teacher, seed=0)
    assert (found.value, found.n) == (0.75, 5)
    same = measure.retention(teacher, teacher, seed=0)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)  # paired: nothing can vary


def test_pairing_narrows_the_interval():
    """A slow loop over the examples is the reference; shuffling the pairs makes it wider."""
    rng = np.random.default_rng(1)
    teacher = rng.random(400) < 0.8
    student = teacher & (rng.random(400) < 0.95)
    found = measure.retention(student, teacher, seed=0, resamples=4000)
    at = rng.integers(0, 400, (4000, 400))
    ratios = student[at].sum(1) / teacher[at].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.004)
    assert found.high == pytest.approx(high, abs=0.004)
    loose = measure.retention(rng.permutation(student), teacher, seed=0)
    assert loose.high - loose.low > 1.5 * (found.high - found.low)


def test_retention_may_exceed_one_and_needs_a_teacher_that_is_ever_right():
    found = measure.retention(np.array([True, True]), np.array([True, False]), seed=0)
    assert found.value == 2.0
    assert np.isfinite([found.low, found.high]).all()  # resamples without a right teacher left out
    with pytest.raises(ValueError, match="never right"):
        measure.retention(np.array([True]), np.array([False]), seed=0)


def test_agreement_is_of_answers_not_of_truth():
    found = measure.agreement(logits_for([0, 1, 2, 2]), 5 * logits_for([0, 1, 2, 0]) - 3, seed=0)
    assert (found.value, found.n) == (0.75, 4)


def test_mean_kl_by_hand():
    teacher, student = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    by_hand = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert measure.mean_kl(teacher, student) == pytest.approx(by_hand, rel=1e-12)
    other_way = (0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)) / 2
    assert measure.mean_kl(student, teacher) == pytest.approx(other_way, rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.floats(0.5, 8), st.floats(-50, 50))
def test_mean_kl_properties(seed, temperature, shift):
    a, b = np.random.default_rng(seed).normal(0, 5, (2, 7, 4)).astype(np.float32)
    found = measure.mean_kl(a, b, temperature=temperature)
    assert found >= 0
    assert measure.mean_kl(a, a + np.float32(shift), temperature=temperature) < 1e-5
    order = [2, 0, 3, 1]
    assert measure.mean_kl(a[:, order], b[:, order], temperature=temperature) == pytest.approx(
        found, rel=1e-6, abs=1e-9
    )
    assert measure.mean_kl(a / temperature, b / temperature) == pytest.approx(found, rel=1e-5)


def test_mean_kl_bears_huge_logits():
    assert measure.mean_kl(np.array([[1e4, 0.0]]), np.array([[0.0, 0.0]])) == pytest.approx(
        np.log(2)
    )


def test_per_class_looks_at_each_class_alone():
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    student, teacher = logits_for([0, 0, 1, 2, 1, 0, 0]), logits_for([0, 0, 0, 1, 1, 1, 1])
    found = measure.per_class(teacher, student, labels, ["a", "b", "c", "never"], seed=0)
    assert list(found) == ["a", "b", "c"]
    assert [m.n for m in found.values()] == [4, 2, 1]
    assert [m.quality.value for m in found.values()] == [0.5, 0.5, 0.0]
    assert [m.teacher_quality.value for m in found.values()] == [0.75, 1.0, 0.0]
    kept = [m.retention.value if m.retention else None for m in found.values()]
    assert kept == [pytest.approx(2 / 3), 0.5, None]


def test_compare_is_what_the_report_reads():
    from limbeck.report import Capability, Fidelity, Retention

    labels = np.array([0, 0, 1, 1])
    teacher, student = logits_for([0, 0, 1, 2]), logits_for([0, 1, 1, 2])
    found = measure.compare(teacher, student, labels, ["a", "b", "none"])
    assert Retention.model_validate(found["retention"]).value == pytest.approx(2 / 3)
    assert Fidelity.model_validate(found["fidelity"]).agreement == 0.75
    capabilities = {k: Capability.model_validate(v) for k, v in found["capabilities"].items()}
    assert [c.quality.value for c in capabilities.values()] == [0.5, 0.5]
    assert measure.compare(logits_for([1, 1]), teacher[:2], labels[:2], "ab")["retention"] is None


def test_parity_finds_the_largest_difference():
    reference = np.array([[1.0, 0.0], [0.0, 1.0]])
    exported = reference + np.array([[0.0, 0.25], [1.5, 0.0]])
    assert measure.parity(reference, exported) == measure.Parity(
        max_abs_diff=1.5, agreement=0.5, n=2
    )


@pytest.mark.parametrize("rows", [0, 2])
def test_lengths_must_fit(rows):
    with pytest.raises(ValueError, match="examples"):
        measure.accuracy(logits_for([0] * rows), np.zeros(3 * (rows > 0), dtype=int), seed=0)
    with pytest.raises(ValueError, match="shape"):
        measure.mean_kl(np.zeros((1, 2)), np.zeros((2, 2)))


def test_no_torch_is_needed():
    import subprocess
    import sys

    code = "import sys, limbeck.measure; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
