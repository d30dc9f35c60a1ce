"""Feature maps (B, C, H, W) of a convolutional student and its teacher.

Attention transfer needs no projector; `channel_kl` compares channel by channel, so the student's
go through one first. The two sides' heights and widths may differ: the larger map is averaged down
(adaptive average pooling) to the smaller height and width. No teacher receives a gradient.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from limbeck.losses.numerics import at_least_fp32, finite_log_softmax, unit


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """|| Q_s / |Q_s| - Q_t / |Q_t| ||, Q the sum over channels of squares, as a vector of H W.

    Activation-based attention transfer, equation 2 with p = 2 (Zagoruyko & Komodakis 2017,
    1612.03928); their code, and most that names it, takes the mean of the squared difference
    instead. (B, C_student, H, W), (B, C_teacher, H', W') -> (B,), at most sqrt 2; not in nats. The
    distance has no gradient where it is 0: there it is set to 0. A map of zeros is a zero vector.
    Raises ValueError where the shapes are none of these.
    """
    s, t = _same_size(_attention(student), _attention(teacher.detach()))
    squares = (unit(s.flatten(1)) - unit(t.flatten(1))).square().sum(-1)  # (B,)
    equal = squares == 0
    return squares.masked_fill(equal, 1).sqrt().masked_fill(equal, 0)


def channel_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Per channel, KL(teacher || student) of the softmaxes over locations, in nats.

    Channel-wise distillation, (T^2 / C) sum over c and i of p[c, i] log(p[c, i] / q[c, i]) (Shu et
    al. 2021, 2011.13256), without T^2: `channel_kl(...).mean()` times it is theirs. (B, C, H, W),
    (B, C, H', W') -> (B, C), at least 0 but for rounding, and blind to a constant added to a
    channel. Raises ValueError where the numbers of channels differ: project the student first.
    """
    if student.shape[:2] != teacher.shape[:2]:
        ours, theirs = tuple(student.shape), tuple(teacher.shape)
        raise ValueError(
            f"student {ours} and teacher {theirs} must have the same examples and channels; "
            "project the student to the teacher's channels first"
        )
    s, t = _same_size(student, teacher.detach())
    log_q = finite_log_softmax(s.flatten(2), temperature)  # (B, C, H W)
    log_p = finite_log_softmax(t.flatten(2), temperature)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _attention(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W), for each example up to a factor.

    A factor is lost in `unit` anyway, and the squares of fp16's largest are within fp32, but sums
    of squares of 1e20 are not: each example is divided by its largest first.
    """
    features = at_least_fp32(features)
    if features.ndim != 4:
        raise ValueError(f"feature maps must be (B, C, H, W), not {tuple(features.shape)}")
    largest = features.detach().abs().amax((1, 2, 3), keepdim=True)
    features = features / largest.masked_fill(largest == 0, 1)
    return features.square().sum(1, keepdim=True)


def _same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both averaged down to the smaller height and the smaller width, in fp32."""
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
        ours, theirs = tuple(student.shape), tuple(teacher.shape)
        raise ValueError(
            f"student {ours} and teacher {theirs} must be (B, C, H, W) with the same B"
        )
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    s, t = (
        x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size)
        for x in (at_least_fp32(student), at_least_fp32(teacher))
    )
    return s, t
