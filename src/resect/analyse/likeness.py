"""How alike representations at different depths are: CKA, angular distance, units found again; in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 256
"""Samples of one estimate of HSIC; memory for it grows with the depths times CHUNK²."""


class Cka:
    """Linear CKA between depths (Kornblith et al. 2019, 1905.00414, section 3), from minibatches.

    HSIC is estimated without bias on minibatches of ``CHUNK`` samples and averaged (Nguyen et al. 2021, 2010.15327,
    equation 3: HSIC₁ of Song et al. 2012), so that neither the number of samples nor that of channels costs memory.
    Samples are collected to whole minibatches first: the result does not depend on how the data came in batches.
    """

    def __init__(self, depths: int) -> None:
        self.sums = torch.zeros(depths, depths, dtype=torch.float64)
        self._waiting: list[list[Tensor]] = []
        self._count = 0

    def add(self, streams: Sequence[Tensor]) -> None:
        """Take the pooled streams of one batch: per depth (B, C)."""
        self._waiting.append(list(streams))
        self._count += len(streams[0])
        while self._count >= CHUNK:
            joined = self._joined()
            self._estimate([stream[:CHUNK] for stream in joined])
            self._waiting = [[stream[CHUNK:] for stream in joined]]
            self._count -= CHUNK

    def _joined(self) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(*self._waiting, strict=True)]

    def _estimate(self, streams: Sequence[Tensor]) -> None:
        n = len(streams[0])
        grams = torch.stack([_gram(stream.double()) for stream in streams])
        rows, flat = grams.sum(dim=2), grams.flatten(1)
        totals = rows.sum(dim=1)
        trace = flat @ flat.T + totals[:, None] * totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T
        self.sums += n * trace / (n * (n - 3))

    def matrix(self) -> Tensor:
        """Return CKA, (depths, depths), float64; NaN of fewer than four samples or of a stream that never varies."""
        if self._count >= 4:  # the estimator needs four
            self._estimate(self._joined())
        self._waiting, self._count = [], 0
        own = self.sums.diagonal().clamp(min=0)
        own = torch.where(own > 1e-20, own, torch.nan)
        return self.sums / (own[:, None] * own).sqrt()


def _gram(stream: Tensor) -> Tensor:
    """The Gram matrix of (n, C), without its diagonal; centred first, which changes nothing but the rounding."""
    centred = stream - stream.mean(dim=0)
    return (centred @ centred.T).fill_diagonal_(0)


class Angles:
    """Angular distance between depths of one shape: arccos(cos(x, x'))/π, mean over positions and samples.

    Gromov et al. 2024 (2403.17887), where the position is the last token.
    """

    def __init__(self, depths: int) -> None:
        self.sums = torch.zeros(depths, depths, dtype=torch.float64)
        self.counts = torch.zeros(depths, depths, dtype=torch.float64)

    def add(self, positions: Sequence[Tensor]) -> None:
        """Take the streams of one batch at some positions: per depth (B, P, C)."""
        for shape in {tuple(stream.shape) for stream in positions}:
            places = [place for place, stream in enumerate(positions) if stream.shape == shape]
            rows = torch.stack([positions[place].flatten(0, 1) for place in places]).double()  # (depths, B·P, C)
            rows = rows / rows.norm(dim=2, keepdim=True)  # NaN where there is no direction
            cosines = torch.einsum("irc,jrc->ijr", rows, rows).clamp(-1, 1)
            found = cosines.arccos() / torch.pi
            at = torch.tensor(places)
            self.sums[at[:, None], at] += found.nan_to_num().sum(dim=2)
            self.counts[at[:, None], at] += found.isfinite().sum(dim=2)

    def matrix(self) -> Tensor:
        """Return the mean distance, (depths, depths), from 0 to 1; NaN between depths of different shapes."""
        return (self.sums / self.counts).fill_diagonal_(0)


class Correlations:
    """Correlation over the data between every two units of the blocks; a unit is a channel of a branch, pooled."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, units: Sequence[Tensor]) -> None:
        """Take the units of one batch: per block (B, U)."""
        values = torch.cat(list(units), dim=1).double()
        if not self.count:
            self.widths = [part.shape[1] for part in units]
            self.origin = values.mean(dim=0)  # near the mean, so that little is lost in the differences below
            self.sums = torch.zeros(values.shape[1], dtype=torch.float64)
            self.products = torch.zeros(values.shape[1], values.shape[1], dtype=torch.float64)
        shifted = values - self.origin
        self.count += len(values)
        self.sums += shifted.sum(dim=0)
        self.products += shifted.T @ shifted

    def similarity(self) -> Tensor:
        """Return how well the units of block i are found again in block j: see ``found_again``."""
        covariance = self.products / self.count - torch.outer(self.sums, self.sums) / self.count**2
        mean = self.sums / self.count
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        still = deviation <= 1e-6 * ((mean + self.origin) ** 2 + deviation**2).sqrt()
        scale = torch.where(still, torch.inf, deviation)
        correlation = (covariance / torch.outer(scale, scale)).abs()
        blocks = [part.split(self.widths, dim=1) for part in correlation.split(self.widths, dim=0)]
        return torch.stack([torch.stack([found_again(pair) for pair in line]) for line in blocks])


def found_again(correlation: Tensor) -> Tensor:
    """Return the mean over the units of one block of the largest |correlation| with any unit of the other, ().

    ``correlation``: absolute, (units, units of the other). A unit that responds the same everywhere has correlation 0.
    """
    return correlation.amax(dim=1).mean().clamp(max=1.0)


def similarity(maps: Tensor, others: Tensor | None = None) -> Tensor:
    """Return how well the units of block i are found again in block j: (blocks, blocks), from 0 to 1.

    ``maps``: what each unit responds on the same points, (blocks, units, points); see ``found_again``. ``others``: the
    maps of block j are those of another net, which can have reused nothing from this one.
    """
    ours, theirs = _standard(maps), _standard(maps if others is None else others)
    correlation = torch.einsum("iup,jvp->ijuv", ours, theirs).abs()
    return correlation.amax(dim=3).mean(dim=2).clamp(max=1.0)


def _standard(maps: Tensor) -> Tensor:
    centred = maps.double() - maps.double().mean(dim=2, keepdim=True)
    size = centred.norm(dim=2, keepdim=True)
    # Rounding makes a constant map wobble a little: that is no feature.
    still = size <= 1e-6 * maps.double().norm(dim=2, keepdim=True)
    return torch.where(still, 0.0, centred / size.clamp(min=torch.finfo(torch.float64).tiny))


def summary(matrix: Tensor) -> dict[str, float]:
    """Return the mean similarity of ``adjacent`` blocks and of ``others``, and where a block's likest one stands.

    ``elsewhere``: the share of blocks whose most similar block is not a neighbour.
    """
    place = torch.arange(len(matrix))
    distance = (place[:, None] - place).abs()
    likest = matrix.masked_fill(distance == 0, -1.0).argmax(dim=1)
    return {
        "adjacent": float(matrix[distance == 1].mean()),
        "others": float(matrix[distance > 1].mean()),
        "elsewhere": float(((likest - place).abs() > 1).double().mean()),
    }
