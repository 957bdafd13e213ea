"""Ridge regression in closed form, its sums taken batch by batch, its strength chosen by cross-validation."""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the ridge, in units of the features' mean variance."""
FOLDS = 4


class Sums:
    """What a linear regression needs to know of its rows: XᵀX, XᵀY and the sum of Y², in float64."""

    def __init__(self, xx: Tensor, xy: Tensor, yy: float, rows: int) -> None:
        self.xx, self.xy, self.yy, self.rows = xx, xy, yy, rows

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy, self.rows + other.rows)

    def error(self, solution: Tensor) -> float:
        """Sum of the squared errors of a solution (n, m) on these rows."""
        return self.yy - 2 * float((solution * self.xy).sum()) + float((solution * (self.xx @ solution)).sum())


class LeastSquares:
    """``targets ≈ features · Wᵀ + b``: W and b of the least squared error over all rows seen, with a ridge on W.

    The sums take (n + 1)·(n + 1 + m) numbers of float64 for each of `FOLDS` parts, however many rows there are. The
    ridge is the one of `STRENGTHS`, or W = 0 alone, that does best on the parts it was not fitted to: so where there
    is little data, what is learned by heart does no harm.
    """

    def __init__(self, bias: bool = True) -> None:
        self.bias = bias
        self._folds: list[Sums] = []
        self._added = 0

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take in a batch: features (rows, n) and targets (rows, m)."""
        x, y = features.double(), targets.double()
        if self.bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        new = Sums(x.T @ x, x.T @ y, float(y.square().sum()), len(x))
        if len(self._folds) < FOLDS:
            self._folds.append(new)
        else:
            self._folds[self._added % FOLDS] += new
        self._added += 1

    def solve(self) -> tuple[Tensor, Tensor | None]:
        """Return W (m, n) and b (m,), or None without a bias; float64."""
        whole = _total(self._folds)
        solution = self._solution(whole, self._strength())
        return (solution[:-1].T, solution[-1]) if self.bias else (solution.T, None)

    def _strength(self) -> float:
        """Return the best strength by cross-validation; one batch alone says nothing about it: 0.01."""
        if len(self._folds) == 1:
            return 1e-2
        errors = dict.fromkeys((*STRENGTHS, float("inf")), 0.0)
        for number, left_out in enumerate(self._folds):
            others = _total([fold for place, fold in enumerate(self._folds) if place != number])
            for strength in errors:
                errors[strength] += left_out.error(self._solution(others, strength))
        return min(errors, key=lambda strength: errors[strength])

    def _solution(self, sums: Sums, strength: float) -> Tensor:
        xx, xy = sums.xx / sums.rows, sums.xy / sums.rows
        size = len(xx) - self.bias
        if strength == float("inf"):  # W = 0; b is the mean
            return torch.cat([xy.new_zeros(size, xy.shape[1]), xy[size:]])
        means = xx[-1, :size] if self.bias else xx.new_zeros(size)
        variance = (xx.diagonal()[:size] - means.square()).mean()
        # A little above zero, so that features that never change, or are all zero, do not make the system singular.
        ridge = (strength * variance).clamp(min=1e-12 * xx.diagonal().mean()).clamp(min=torch.finfo(xx.dtype).tiny)
        penalty = torch.cat([ridge.expand(size), ridge.new_zeros(len(xx) - size)])
        return torch.linalg.solve(xx + penalty.diag(), xy)


def _total(folds: list[Sums]) -> Sums:
    total = folds[0]
    for fold in folds[1:]:
        total = total + fold
    return total
