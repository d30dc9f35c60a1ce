"""The paths that `losses.py` compares: ours, the plain ones, and peers'. Each gives a mean in nats.

Every path has the same work: hidden (P, D) and the head's weight (V, D), both with a gradient; the
teacher's last hidden states (P, 2 D) and its head, or its top k. Peers as shipped, but:
Liger with its hard loss off, beta 0 (its name for forward KL) and `compiled=False`, with its own
chunk and with a smaller one; TRL's tiled ones by private functions, without their trainers, and
with the entropies they add.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.losses import fused
from limbeck.losses.divergence import forward_kl

TOP_K = 64


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # (P, D), float32 or bfloat16
    weight: Tensor  # (V, D), float32
    labels: Tensor  # (P,)
    teacher_hidden: Tensor  # (P, 2 D)
    teacher_weight: Tensor  # (V, 2 D)
    teacher_logits: Tensor  # (P, V), or empty where a path does not start from them
    ids: Tensor  # (P, K), distinct
    probs: Tensor  # (P, K)
    tail: Tensor  # (P,)

    @property
    def outer_hidden(self) -> Tensor:
        """What the paths that are not ours multiply: autocast rounds it, else it is fp32."""
        return self.hidden.float()

    def logits(self) -> Tensor:
        return F.linear(self.outer_hidden, self.weight).float()


def cross_entropy(x: Inputs) -> Tensor:
    return F.cross_entropy(x.logits(), x.labels)


def naive_kl(x: Inputs) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(x.teacher_hidden, x.teacher_weight).float()
    return _kl(x.logits(), teacher)


def naive_kl_stored(x: Inputs) -> Tensor:
    return _kl(x.logits(), x.teacher_logits)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def _fused(x: Inputs, loss: fused.Loss) -> Tensor:
    each = torch.full((len(x.hidden),), 1 / len(x.hidden))
    head = fused.Head(weight=x.weight)
    return fused.fused_loss(x.hidden, head, [fused.Term(loss=loss, weight=each)]).total


def fused_kl(x: Inputs) -> Tensor:
    teacher_head = fused.Head(weight=x.teacher_weight)
    return _fused(x, fused.against_head(forward_kl, x.teacher_hidden, teacher_head))


def fused_top_k(x: Inputs) -> Tensor:
    return _fused(x, fused.against_sparse(forward_kl, x.ids, x.probs, x.tail))


def fused_sample(x: Inputs) -> Tensor:
    return _fused(x, fused.against_sample(x.ids, x.probs))


def trl_gkd(x: Inputs) -> Tensor:
    """Its "batchmean" of (P, V) is the mean; beta = 0 is forward KL."""
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher = F.linear(x.teacher_hidden, x.teacher_weight).float()
    return GKDTrainer.generalized_jsd_loss(x.logits(), teacher, beta=0)


def trl_tiled(x: Inputs) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden, teacher = x.outer_hidden[None], x.teacher_hidden[None]
    mask = torch.ones(hidden.shape[:2])
    return _chunked_divergence_loss(hidden, teacher, x.weight, x.teacher_weight, mask, beta=0.0)[0]


def trl_top_k(x: Inputs) -> Tensor:
    """Top k and a tail bucket; a sum, which its trainer divides by the count."""
    from trl.experimental.async_distillation.async_distillation_trainer import _chunked_jsd_loss

    total = _chunked_jsd_loss(
        x.outer_hidden, x.weight, None, 1.0, None, x.ids, x.probs.log(),
        torch.ones_like(x.ids, dtype=torch.bool), 0.0, 1.0, True, None, 1, 256,
    )[0]  # fmt: skip
    return total / len(x.ids)


def _liger(chunk_size: int) -> Callable[[Inputs], Tensor]:
    def liger(x: Inputs) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0, compiled=False,
            chunk_size=chunk_size,
        )  # fmt: skip
        return loss(x.outer_hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels)

    return liger


PATHS: dict[str, Callable[[Inputs], Tensor]] = {
    "cross-entropy": cross_entropy,
    "naive KL": naive_kl,
    "naive KL stored": naive_kl_stored,
    "fused KL": fused_kl,
    "fused top-k": fused_top_k,
    "fused sample": fused_sample,
    "TRL GKD": trl_gkd,
    "TRL tiled": trl_tiled,
    "Liger 1024": _liger(1024),
    "Liger 128": _liger(128),
    "TRL top-k": trl_top_k,
}


def make_inputs(path: str, positions: int, classes: int, width: int, dtype: str) -> Inputs:
    torch.manual_seed(0)
    hidden = torch.randn(positions, width).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(classes, width) / width**0.5).requires_grad_()
    # as at capture: a teacher's last hidden states are what is stored, its head is at hand; what
    # a path has no use for is not there, so that memory is its own
    lives = 2 * width if path not in ("cross-entropy", "fused top-k", "fused sample") else 0
    stored = path == "naive KL stored"
    teacher_hidden = torch.randn(positions, lives)
    teacher_weight = torch.randn(classes, lives) / max(lives, 1) ** 0.5
    top_k = min(TOP_K, classes // 2)
    return Inputs(
        hidden=hidden,
        weight=weight,
        labels=torch.randint(classes, (positions,)),
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_logits=teacher_hidden @ teacher_weight.T if stored else torch.empty(0),
        ids=torch.randint(classes - top_k, (positions, 1)) + torch.arange(top_k),
        probs=torch.rand(positions, top_k).softmax(-1) * 0.9,
        tail=torch.full((positions,), 0.1),
    )


# what must be the same number: dense forward KL, and top k with a tail
SAME = {
    "fused KL": ("naive KL", "naive KL stored", "TRL GKD", "TRL tiled", "Liger 1024", "Liger 128"),
    "fused top-k": ("TRL top-k",),
}


def disagreements() -> dict[str, str]:
    """Per path that cannot be compared, why: not installed, or another value or gradient."""
    problems = {}
    for ours, others in SAME.items():
        x = make_inputs("all", 300, 200, 16, "float32")
        x = Inputs(**{**vars(x), "teacher_logits": x.teacher_hidden @ x.teacher_weight.T})
        expected = _value_and_gradients(ours, x)
        for path in others:
            try:
                found = _value_and_gradients(path, x)
            except ImportError as error:
                problems[path] = f"left out, {error}"
                continue
            for a, b in zip(found, expected, strict=True):
                off = ((a - b).norm() / b.norm()).item()
                if off > 1e-4:
                    problems[path] = f"left out, not the same loss as {ours!r}: off by {off:.1e}"
    return problems


def _value_and_gradients(path: str, x: Inputs) -> tuple[Tensor, ...]:
    total = PATHS[path](x)
    return (total.detach(), *torch.autograd.grad(total, (x.hidden, x.weight)))
