"""Divergences between a teacher's and a student's categorical distribution.

Every function takes logits (..., C) and returns one value per position (...), in nats.
Nothing here masks, averages, weighs or multiplies by the temperature's square: `objective` does.

    p  teacher      q  student      C  classes or vocabulary
"""

from torch import Tensor


def forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """KL(p || q): mass-covering, the classic soft-target loss (Hinton et al. 2015, 1503.02531).

    (..., C), (..., C) -> (...). Raises ValueError where the shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits "
            f"{tuple(teacher_logits.shape)} must match; never pad a vocabulary with zeros"
        )
    # fp32: a softmax loses most of its tail in bf16
    log_q = (student_logits.float() / temperature).log_softmax(-1)
    log_p = (teacher_logits.float() / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """-log q[label], with hard labels. (..., C), (...) int64 -> (...)."""
    log_q = student_logits.float().log_softmax(-1)
    return -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
