"""How several loss terms become one gradient.

    fixed        the weights as given
    calibrated   weights that bring the terms' gradient norms to the given ratio, found on the
                 first batches before any step, then fixed
    uncertainty  a weight for each term, learnt with the student (Kendall et al. 2018, 1705.07115)
    upgrad       no conflict: of the terms' gradients a combination that harms none of them
                 (Quinton and Rey 2024, 2406.16232), by torchjd
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from limbeck.errors import MissingExtraError


class Balance(nn.Module):
    """`fixed`, and what the others have in common: one factor for each term."""

    separate = False  # whether each term's gradient is needed by itself

    def __init__(self, factors: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.factors = dict(factors or {})

    def total(self, terms: Mapping[str, Tensor], share: float) -> Tensor:  # noqa: ARG002
        """Terms () of a part of the step, its share of the step's positions -> ()."""
        return torch.stack([term * self.factors.get(n, 1.0) for n, term in terms.items()]).sum()

    def weights(self, names: Sequence[str]) -> dict[str, float]:
        """For the log: the factor of each term now."""
        return {name: self.factors.get(name, 1.0) for name in names}


class Uncertainty(Balance):
    """exp(-s) L + s / 2 for each term, s = log variance, 0 at first (eq. 10, as it is commonly
    written). The weights can only grow as a term falls, so a term that cannot be learnt fades."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.log_variance = nn.ParameterDict({n: nn.Parameter(torch.zeros(())) for n in names})

    def total(self, terms: Mapping[str, Tensor], share: float) -> Tensor:
        parts = []
        for name, term in terms.items():
            s = self.log_variance[name]
            parts.append((-s).exp() * term + share * s / 2)
        return torch.stack(parts).sum()

    def weights(self, names: Sequence[str]) -> dict[str, float]:
        return {name: math.exp(-self.log_variance[name].item()) for name in names}


class UPGrad(Balance):
    """Gradients of the terms, each its own, are combined after the whole step's sums are known."""

    separate = True

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchjd.aggregation import UPGrad as Aggregator

            self._aggregate = Aggregator()
        except ImportError as error:
            raise MissingExtraError.of("distill.balance upgrad", "balance") from error

    def combined(self, gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Of each term one tensor per parameter -> one tensor per parameter."""
        jacobian = torch.stack([torch.cat([g.flatten() for g in term]) for term in gradients])
        # the aggregator's mean of projections; times their number, as a sum of losses would be
        flat = self._aggregate(jacobian) * len(gradients)
        sizes = [g.numel() for g in gradients[0]]
        parts = flat.split(sizes)
        return [part.view_as(g) for part, g in zip(parts, gradients[0], strict=True)]


def calibrated(norms: Mapping[str, float], wanted: Mapping[str, float]) -> Balance:
    """Factors that bring gradient norms to the ratio of `wanted`, keeping the norms' sum.

    A term without gradient, as of a student that equals its teacher, keeps its factor 1.
    """
    counted = {name: norm for name, norm in norms.items() if norm > 0}
    if len(counted) < 2:
        return Balance()
    scale = sum(counted.values()) / sum(wanted[name] for name in counted)
    return Balance({name: scale * wanted[name] / norm for name, norm in counted.items()})
