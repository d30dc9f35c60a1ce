"""Relations between examples or positions, free of the widths: no projector is needed.

Student (N, D_student), teacher (N, D_teacher), mask (N,) bool: rows that do not count take no part
and get exactly zero gradient. The teacher never receives one. Flatten (B, T, D) and its mask for
positions. Values depend on what is in the batch, and none is in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from limbeck.losses.numerics import counted_rows, put_back, unit, without_autocast


def cka(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, debiased: bool = False
) -> Tensor:
    """Linear centred kernel alignment: a similarity; the loss is `1 - cka(...)`. -> ().

    In [0, 1], 1 for features equal up to rotation and scale (Kornblith et al. 2019, 1905.00414).
    With few rows and many dimensions that is near 1 for noise; `debiased` (Song et al. 2012 through
    Nguyen et al. 2021, 2010.15327, eq. 3) is near 0 there, can be below 0 and needs n >= 4, else
    ValueError. 0 where either side is constant.
    """
    x, y = counted_rows(mask, student, teacher.detach())
    if debiased and len(x) < 4:
        raise ValueError(f"debiased CKA needs at least 4 counted rows, found {len(x)}")
    x, y = _centred(x), _centred(y)
    hsic = _unbiased_hsic if debiased else _biased_hsic
    with without_autocast(x):
        # of features of norm 1 it is at least 1 / D, or 0 where they are constant
        length_x, length_y = (hsic(z, z).clamp_min(1e-12).sqrt() for z in (x, y))
        return hsic(x, y) / (length_x * length_y)


def _centred(x: Tensor) -> Tensor:
    """Centred and of Frobenius norm 1, to which CKA is indifferent and fp32 is not."""
    centred = x - x.sum(0) / max(len(x), 1)
    # 1e-6: some tens of fp32's roundings; what they leave of a constant would be blown up to 1
    constant = centred.detach().norm() <= 1e-6 * x.detach().norm()
    return unit(centred.masked_fill(constant, 0).flatten()).view_as(x)


def _biased_hsic(x: Tensor, y: Tensor) -> Tensor:
    # the squared norm of (D, D') equals the trace over (n, n) grams, which n may be too large for
    return (x.T @ y).square().sum()


def _unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """Up to 1 / (n (n - 3)): with K, L the grams without their diagonals,

    tr(K L) + 1K1 1L1 / ((n - 1)(n - 2)) - 2 1KL1 / (n - 2)
    """
    n = len(x)
    diagonal_x, diagonal_y = x.square().sum(-1), y.square().sum(-1)  # (n,)
    rows_x = x @ x.sum(0) - diagonal_x  # K 1
    rows_y = y @ y.sum(0) - diagonal_y
    trace = (x.T @ y).square().sum() - diagonal_x @ diagonal_y
    mean = rows_x.sum() * rows_y.sum() / ((n - 1) * (n - 2))
    return trace + mean - 2 * (rows_x @ rows_y) / (n - 2)


def rkd_distance(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Huber loss between distances, each side's divided by its mean (RKD, Park et al. 2019).

    (1904.05068, eq. 4-6.) -> (N,): row i's mean over its n - 1 partners, so that the mean over the
    counted rows is the mean over pairs. Fewer than two rows give 0. Memory (n, n).
    """
    a, b = counted_rows(mask, student, teacher.detach())
    if len(a) < 2:
        return put_back(a.sum(-1) * 0, mask)
    difference = smooth_l1_loss(_distances(a), _distances(b), reduction="none")
    return put_back(difference.sum(-1) / (len(a) - 1), mask)


def rkd_angle(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Huber loss between the cosines of the angles at row j of all triplets (i, j, k).

    (1904.05068, eq. 7-8.) -> (N,): row j's mean over ordered pairs i != k of the others, so that
    the mean over the counted rows is the mean over triplets. Fewer than three rows give 0.
    Memory (n, n, n) and (n, n, D).
    """
    a, b = counted_rows(mask, student, teacher.detach())
    n = len(a)
    if n < 3:
        return put_back(a.sum(-1) * 0, mask)
    with without_autocast(a):
        # i = k gives cosine 1 on both sides and i = j or k = j gives 0: none adds anything
        difference = smooth_l1_loss(_cosines(a), _cosines(b), reduction="none")  # (n, n, n)
    distinct = 1 - torch.eye(n, dtype=a.dtype, device=a.device)
    return put_back((difference * distinct).sum((1, 2)) / ((n - 1) * (n - 2)), mask)


def _distances(x: Tensor) -> Tensor:
    """(n, D) -> (n, n) with mean 1 off the diagonal; no matmul, which would cancel near pairs."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (len(x) * (len(x) - 1))
    return distances / mean.masked_fill(mean == 0, 1)


def _cosines(x: Tensor) -> Tensor:
    """[j, i, k]: the cosine of the angle at j, from i to k. (n, D) -> (n, n, n)."""
    directions = unit(x.unsqueeze(0) - x.unsqueeze(1))  # (j, i, D)
    return directions @ directions.transpose(1, 2)
