"""Linear probes by depth: how well a linear classifier reads the label off the stream.

Alain & Bengio 2016 (1610.01644), there with softmax regression; here ridge regression, which has a closed form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resect.errors import InputError

RIDGE = 1e-3
"""Weight of ‖W‖², the mean square error of standardised features being the rest of the loss."""
HELD_OUT = 2048
MEMORY = 4 * 2**30
"""Bytes that the sums may take."""


class Probes:
    """Ridge regression from the pooled stream of each depth to one-hot labels, in closed form, in one pass.

    A quarter of the samples, chosen by their place in the data alone, and at most ``HELD_OUT`` of them, are held out to
    test on. Memory does not grow with the data: the sums take (C + classes) · C numbers a depth.
    """

    def __init__(self) -> None:
        self.seen = self.classes = self.count = 0
        self._test: list[tuple[list[Tensor], Tensor]] = []
        self._held = 0

    def add(self, streams: Sequence[Tensor], labels: Tensor) -> None:
        """Take the pooled streams of one batch, per depth (B, C), and its labels, whole numbers from 0, (B,)."""
        labels = labels.long()
        if not self.seen:
            self._begin(streams)
        held = held_out(self.seen, len(labels)) & (self._held < HELD_OUT)
        self.seen += len(labels)
        self.classes = max(self.classes, int(labels.max()) + 1)
        self._held += int(held.sum())
        self._test.append(([stream[held] for stream in streams], labels[held]))
        kept = labels[~held]
        wanted = torch.nn.functional.one_hot(kept, self.classes).double()
        self.count += len(kept)
        for place, stream in enumerate(streams):
            rows = stream[~held].double() - self.origins[place]
            rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
            self.squares[place] += rows.T @ rows
            more = self.classes - self.products[place].shape[1]
            self.products[place] = torch.nn.functional.pad(self.products[place], (0, more)) + rows.T @ wanted

    def _begin(self, streams: Sequence[Tensor]) -> None:
        size = sum(8 * (stream.shape[1] + 1) ** 2 for stream in streams)
        if size > MEMORY:
            raise InputError(
                f"Probes at {len(streams)} depths of up to {max(stream.shape[1] for stream in streams)} channels need "
                f"{size / 2**30:.1f} GiB. Choose fewer blocks, or probes=False."
            )
        self.origins = [stream.double().mean(dim=0) for stream in streams]
        widths = [stream.shape[1] + 1 for stream in streams]
        self.squares = [torch.zeros(width, width, dtype=torch.float64) for width in widths]
        self.products = [torch.zeros(width, 0, dtype=torch.float64) for width in widths]

    def accuracies(self) -> tuple[Tensor, float]:
        """Return the share of the held-out samples each depth's probe gets right, (depths,), and that of guessing.

        Guessing: the class most frequent among them. NaN where nothing could be trained on or tested.
        """
        labels = torch.cat([part for _, part in self._test])
        if not len(labels) or not self.count:
            return torch.full((len(self.squares),), torch.nan, dtype=torch.float64), float("nan")
        found = []
        for place, (square, product) in enumerate(zip(self.squares, self.products, strict=True)):
            rows = torch.cat([streams[place] for streams, _ in self._test]).double() - self.origins[place]
            scores = predict(rows, *solve(square, product, self.count))
            found.append((scores.argmax(dim=1) == labels).double().mean())
        return torch.stack(found), float(labels.bincount().max()) / len(labels)


def held_out(start: int, count: int) -> Tensor:
    """Return which of ``count`` samples from number ``start`` on are held out, bool (count,): a quarter of them.

    By a multiple of the golden section, which no order of the classes can be in step with.
    """
    return (torch.arange(start, start + count) * 2654435761) % 2**32 < 2**30


def solve(square: Tensor, product: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return weights (C, K) and bias (K,) of the ridge regression, from sums over ``count`` rows ``[x, 1]``.

    ``square``: of their outer products, (C+1, C+1); ``product``: with the targets, (C+1, K). Features are standardised;
    one that does not vary gets no weight.
    """
    mean, target = square[-1, :-1] / count, product[-1] / count
    covariance = square[:-1, :-1] / count - torch.outer(mean, mean)
    spread = covariance.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(spread > 1e-6 * (spread + mean.abs()), 1 / spread, 0.0)
    normal = inverse[:, None] * covariance * inverse + RIDGE * torch.eye(len(mean), dtype=torch.float64)
    cross = inverse[:, None] * (product[:-1] / count - torch.outer(mean, target))
    weights = inverse[:, None] * torch.linalg.solve(normal, cross)
    return weights, target - mean @ weights


def predict(rows: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """Return the scores (N, K) of rows (N, C)."""
    return rows @ weights + bias
