"""What the answers are worth: quality, retention, fidelity, parity. Arrays in, numbers out.

Every interval is the 95 % percentile bootstrap over examples (Efron and Tibshirani 1993, ch. 13).
A resample of right-or-wrong answers is a draw of counts from a multinomial over the kinds of
example there are: the same distribution as drawing the examples one by one, at any n in no time.

Shapes: logits (N, C), labels (N,), `correct` (N,) bool. Nothing here accepts zero examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from limbeck.types import Interval

_RESAMPLES = 2000
_ENDS = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far an exported file is from the model it came from."""

    max_abs_diff: float  # of two logits
    agreement: float  # share of examples with the same top-1 answer
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMeasure:
    """What became of one class: share of its own examples that are found (its recall)."""

    quality: Interval
    teacher_quality: Interval
    retention: Interval | None  # None: the teacher finds none of them
    n: int


def correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the largest logit is the label's; (N,) bool. A tie goes to the first."""
    _same_length(logits, labels)
    right: np.ndarray = logits.argmax(axis=1) == labels
    return right


def accuracy(
    logits: np.ndarray, labels: np.ndarray, *, seed: int, resamples: int = _RESAMPLES
) -> Interval:
    """Share of right answers."""
    return share(correct(logits, labels), seed=seed, resamples=resamples)


def agreement(a: np.ndarray, b: np.ndarray, *, seed: int, resamples: int = _RESAMPLES) -> Interval:
    """Share of examples with the same top-1 answer in both logits."""
    _same_length(a, b)
    return share(a.argmax(axis=1) == b.argmax(axis=1), seed=seed, resamples=resamples)


def share(true: np.ndarray, *, seed: int, resamples: int = _RESAMPLES) -> Interval:
    """Share of True. All or none of n gives an interval of no width: the bootstrap's own limit."""
    n = len(true)
    value = float(np.mean(true))
    draws = np.random.default_rng(seed).binomial(n, value, size=resamples) / n
    return _interval(value, draws, n)


def retention(
    student_correct: np.ndarray,
    teacher_correct: np.ndarray,
    *,
    seed: int,
    resamples: int = _RESAMPLES,
) -> Interval:
    """Student's quality over the teacher's, both on the same resampled examples (paired).

    Raises ValueError where the teacher is never right. Resamples in which it is never right (with
    few examples there are some) have no ratio and are left out.
    """
    _same_length(student_correct, teacher_correct)
    n = len(teacher_correct)
    student, teacher = student_correct.astype(bool), teacher_correct.astype(bool)
    if not teacher.any():
        raise ValueError("a teacher that is never right has nothing to keep")
    kinds = [(student & teacher), (student & ~teacher), (~student & teacher), (~student & ~teacher)]
    counts = np.array([kind.sum() for kind in kinds])  # both, student only, teacher only, neither
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)  # (R, 4)
    draws = draws[draws[:, 0] + draws[:, 2] > 0]
    ratios = (draws[:, 0] + draws[:, 1]) / (draws[:, 0] + draws[:, 2])
    return _interval(float(student.sum() / teacher.sum()), ratios, n)


def mean_kl(
    teacher_logits: np.ndarray, student_logits: np.ndarray, *, temperature: float = 1.0
) -> float:
    """Mean over examples of KL(teacher || student) at this temperature, in nats."""
    return float(np.mean(kl(teacher_logits, student_logits, temperature=temperature)))


def kl(
    teacher_logits: np.ndarray, student_logits: np.ndarray, *, temperature: float = 1.0
) -> np.ndarray:
    """KL(teacher || student) of each example, in nats. (N,)"""
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(f"logits differ in shape: {teacher_logits.shape}, {student_logits.shape}")
    teacher = _log_softmax(teacher_logits / temperature)  # (N, C)
    student = _log_softmax(student_logits / temperature)
    each: np.ndarray = np.sum(np.exp(teacher) * (teacher - student), axis=1)
    return each


def per_class(
    teacher_logits: np.ndarray,
    student_logits: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    seed: int,
    resamples: int = _RESAMPLES,
) -> Mapping[str, ClassMeasure]:
    """For each class, in the order of `names`; a class without examples is left out."""
    student, teacher = correct(student_logits, labels), correct(teacher_logits, labels)
    measures = {}
    for index, name in enumerate(names):
        rows = labels == index
        if not rows.any():
            continue
        ours, theirs = student[rows], teacher[rows]
        measures[name] = ClassMeasure(
            quality=share(ours, seed=seed, resamples=resamples),
            teacher_quality=share(theirs, seed=seed, resamples=resamples),
            retention=(
                retention(ours, theirs, seed=seed, resamples=resamples) if theirs.any() else None
            ),
            n=int(rows.sum()),
        )
    return measures


def parity(reference_logits: np.ndarray, exported_logits: np.ndarray) -> Parity:
    """How far the exported file's answers are from its model's, on the same examples."""
    _same_length(reference_logits, exported_logits)
    same = reference_logits.argmax(axis=1) == exported_logits.argmax(axis=1)
    return Parity(
        max_abs_diff=float(np.abs(reference_logits - exported_logits).max()),
        agreement=float(np.mean(same)),
        n=len(same),
    )


def compare(
    teacher_logits: np.ndarray,
    student_logits: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Retention, fidelity and capabilities of a student, as report.json spells them."""
    student, teacher = correct(student_logits, labels), correct(teacher_logits, labels)
    classes = per_class(teacher_logits, student_logits, labels, names, seed=seed)
    return {
        "retention": asdict(retention(student, teacher, seed=seed)) if teacher.any() else None,
        "fidelity": {
            "agreement": agreement(teacher_logits, student_logits, seed=seed).value,
            "mean_kl": mean_kl(teacher_logits, student_logits),
            "n": len(labels),
        },
        "capabilities": {
            name: {
                "quality": {"metric": "accuracy", **asdict(found.quality)},
                "teacher_quality": {"metric": "accuracy", **asdict(found.teacher_quality)},
                "retention": asdict(found.retention) if found.retention else None,
                "n": found.n,
            }
            for name, found in classes.items()
        },
    }


def _interval(value: float, draws: np.ndarray, n: int) -> Interval:
    low, high = np.percentile(draws, _ENDS)
    return Interval(value=value, low=float(low), high=float(high), n=n)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probs: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_probs


def _same_length(a: np.ndarray, b: np.ndarray) -> None:
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"{len(a)} and {len(b)} examples: must be as many, and at least one")
