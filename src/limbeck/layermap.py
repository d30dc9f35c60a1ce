"""Which of the student's layers learns from which of the teacher's.

Hidden states are numbered: 0 is what the first layer gets, l what layer l gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from limbeck.losses.relational import cka

LayerPair = tuple[str, str]  # the student's, the teacher's: a number, or a module's path


def last(student_layers: int, teacher_layers: int) -> list[LayerPair]:
    return [(str(student_layers), str(teacher_layers))]


def uniform(student_layers: int, teacher_layers: int) -> list[LayerPair]:
    """Every layer of the shallower one, at equal steps through the deeper one; last on last.

    (PKD-skip, Sun et al. 2019, 1908.09355, made to end on the last layer.)
    """
    least = min(student_layers, teacher_layers)
    return [
        (str(-(-student_layers * i // least)), str(-(-teacher_layers * i // least)))
        for i in range(1, least + 1)
    ]


def by_cka(similarities: Tensor) -> list[LayerPair]:
    """Every layer of the shallower one, in order, with the largest sum of similarities (S, L).

    In order: a deeper layer of the student never learns from an earlier one of the teacher.
    """
    rows, columns = similarities.shape
    if rows > columns:
        return [(a, b) for b, a in by_cka(similarities.T)]
    # best[i][j]: of the first i layers of the student within the first j of the teacher
    best = torch.full((rows + 1, columns + 1), -torch.inf, dtype=torch.float64)
    best[0] = 0
    for i, j in itertools.product(range(1, rows + 1), range(1, columns + 1)):
        here = best[i - 1, j - 1] + similarities[i - 1, j - 1].double()
        best[i, j] = torch.maximum(best[i, j - 1], here)
    pairs, j = [], columns
    for i in range(rows, 0, -1):
        while best[i, j] == best[i, j - 1]:
            j -= 1
        pairs.append((str(i), str(j)))
        j -= 1
    return pairs[::-1]


def similarities(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Debiased linear CKA of each layer of the one with each of the other.

    S of (N, D_student) and L of (N, D_teacher), the same N >= 4 positions -> (S, L), at most 1.
    """
    found = [[cka(s, t, debiased=True) for t in teacher] for s in student]
    return torch.stack([torch.stack(row) for row in found])


def layer_pairs(
    kind: Literal["auto", "last", "uniform"], student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> list[LayerPair]:
    """Hidden states of a few examples, layer 1 first, each (N, D) -> pairs."""
    if kind == "last":
        return last(len(student), len(teacher))
    if kind == "uniform":
        return uniform(len(student), len(teacher))
    return by_cka(similarities(student, teacher))
