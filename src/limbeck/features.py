"""Losses between hidden states or embeddings: what is compared with what, through which projector.

A projector brings the student's width to the teacher's. It is trained with the student, belongs to
the objective and is never saved in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.layermap import LayerPair
from limbeck.losses.embedding import cosine, mse, similarity_kl
from limbeck.losses.hidden import relation_kl
from limbeck.losses.relational import cka, rkd_angle, rkd_distance
from limbeck.observe import tokens
from limbeck.types import Batch, LossTerm, Need, Signal

# As many relations as BERT-base has heads, at most (MiniLM, 2002.10957, sec. 3).
_RELATION_HEADS = 12
_RIDGE = 1e-3  # of the mean squared activation


def _one_minus_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Of a batch, so each row has the same share. (N, D), (N, D') -> (N,)."""
    return (1 - cka(student, teacher)).expand(len(student))


_PROJECTED: Mapping[str, Callable[..., Tensor]] = {"mse": mse, "cosine": cosine}
_FREE: Mapping[str, Callable[..., Tensor]] = {
    "cka": _one_minus_cka, "similarity_kl": similarity_kl, "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
}  # fmt: skip


class Feature(nn.Module):
    """One term of an objective. Its value is a mean over the pairs, per token or per example.

    `cka`, `similarity_kl` and the RKD losses compare the rows of a micro-batch with each other, so
    they depend on how a step is cut, as `dist` does.
    """

    def __init__(
        self,
        *,
        loss: str,
        weight: float,
        pairs: Sequence[LayerPair] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Of the layers of `pairs`, token by token; without pairs of the embeddings."""
        super().__init__()
        self.loss, self.weight, self.pairs = loss, weight, tuple(pairs)
        self.settings = dict(settings or {})
        self.projectors = nn.ModuleDict()  # by number of the pair, where the widths differ

    @property
    def name(self) -> str:
        return "hidden" if self.pairs else "embedding"

    @property
    def need(self) -> Need:
        return Need.HIDDEN if self.pairs else Need.EMBEDDING

    def count(self, batch: Batch) -> Tensor:
        """Of the values that a batch has. () int64."""
        return tokens(batch).sum() if self.pairs else torch.tensor(len(batch.example_ids))

    def forward(self, student: Signal, teacher: Signal, batch: Batch) -> LossTerm:
        values = [
            self._values(number, ours, theirs, batch)
            for number, (ours, theirs) in enumerate(self._compared(student, teacher))
        ]
        mean = torch.stack(values).mean(0)  # (N,)
        return LossTerm(total=mean.sum() * self.weight, count=self.count(batch))

    def _values(self, number: int, ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
        """(B, T, D), (B, T, D') -> (N,) of the tokens; or (B, D), (B, D') -> (B,)."""
        if self.loss == "relation":
            heads = self.settings.get("relation_heads") or _heads(ours.shape[-1], theirs.shape[-1])
            mask = tokens(batch)
            value = relation_kl((ours, ours), (theirs, theirs), mask=mask, relation_heads=heads)
            return value[mask]
        if self.pairs:
            ours, theirs = ours[tokens(batch)], theirs[tokens(batch)]  # (N, D), (N, D')
        if self.loss in _FREE:
            return _FREE[self.loss](ours, theirs, **self.settings)
        if str(number) in self.projectors:
            ours = self.projectors[str(number)](ours)
        return _PROJECTED[self.loss](ours, theirs, **self.settings)

    def _compared(self, student: Signal, teacher: Signal) -> Iterable[tuple[Tensor, Tensor]]:
        if self.pairs:
            for ours, theirs in self.pairs:
                target = teacher.hidden[theirs]
                yield student.hidden[ours], target.to(student.hidden[ours].device)
        else:
            assert student.embedding is not None
            assert teacher.embedding is not None
            yield student.embedding, teacher.embedding.to(student.embedding.device)

    @torch.no_grad()
    def start(self, student: Signal, teacher: Signal, batch: Batch) -> None:
        """Projectors where the widths differ, from the least squares of these examples (ridge).

        A random one would pull a student that starts as the teacher's prefix out of its place.
        """
        if self.loss not in _PROJECTED:
            return
        for number, (ours, theirs) in enumerate(self._compared(student, teacher)):
            if ours.shape[-1] == theirs.shape[-1]:
                continue
            x, y = (s[tokens(batch)] if self.pairs else s for s in (ours, theirs))
            x, y = x.double(), y.double()
            ridge = _RIDGE * x.square().mean() * len(x)
            gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            projector = nn.Linear(x.shape[1], y.shape[1], bias=False, device=ours.device)
            projector.weight.copy_(torch.linalg.solve(gram, x.T @ y).T)
            self.projectors[str(number)] = projector


def _heads(*widths: int) -> int:
    """The largest number up to `_RELATION_HEADS` that divides the widths."""
    common = gcd(*widths)
    return next(n for n in range(_RELATION_HEADS, 0, -1) if common % n == 0)
