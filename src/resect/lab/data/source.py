"""Where a training gets its batches from: one interface for resident and for streamed data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from resect.lab.augment import augment
from resect.lab.config.train import TrainConfig
from resect.lab.data.images import ImageData, in_batches, mean_std, normalize
from resect.lab.data.stream import StreamedData
from resect.lab.data.streamed import Streamed
from resect.lab.sampler import Sampler
from resect.train import draws

Data = ImageData | StreamedData


class Source(Protocol):
    """Batches for one process of a training: (images float32, normalised, augmented; labels), on the device."""

    @property
    def epoch(self) -> int:
        """The epoch under way, from 0."""

    @property
    def position(self) -> int:
        """Batches of this epoch already handed out."""

    def __len__(self) -> int:
        """Steps of a whole epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches left in this epoch; then the next begins. A function of (seed, epoch, position)."""

    def test(self, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole test split in order, not augmented."""

    def example(self, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count`` training images, not augmented, and their labels."""

    def state_dict(self) -> dict[str, int]:
        """Where the source stands: plain numbers."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from there; raises `InputError` if the state belongs to another seed or number of images."""


class Resident:
    """A `Source` whose images lie on the device: a batch is indexed, augmented and normalised as a whole."""

    def __init__(
        self, data: ImageData, config: TrainConfig, device: torch.device, rank: int = 0, ranks: int = 1
    ) -> None:
        mean, std = mean_std(data.train)
        self.stats = mean.to(device), std.to(device)
        self.images, self.labels = data.train.images.to(device), data.train.labels.to(device)
        self.tests = data.test
        self.device, self.config, self.rank = device, config, rank
        self.sampler = Sampler(len(self.labels), config.batch_size, seed=config.seed, rank=rank, ranks=ranks)

    @property
    def epoch(self) -> int:
        """The epoch under way, from 0."""
        return self.sampler.epoch

    @property
    def position(self) -> int:
        """Batches of this epoch already handed out."""
        return self.sampler.position

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches left in this epoch; then the next begins."""
        config, first = self.config, self.epoch * len(self) + self.position
        for step, indices in enumerate(self.sampler, first):
            indices = indices.to(self.device)
            generator = draws.generator(f"augment-{self.rank}", config.seed, step)
            images = augment(self.images[indices], shift=config.shift, flip=config.flip, generator=generator)
            yield normalize(images, *self.stats), self.labels[indices]

    def test(self, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole test split in order."""
        for images, labels in in_batches(self.tests.images, self.tests.labels, batch_size):
            yield normalize(images.to(self.device), *self.stats), labels.to(self.device)

    def example(self, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count`` training images and their labels."""
        return normalize(self.images[:count], *self.stats), self.labels[:count]

    def state_dict(self) -> dict[str, int]:
        """Where the source stands: plain numbers."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from there."""
        self.sampler.load_state_dict(state)


def open_source(data: Data, config: TrainConfig, device: torch.device, rank: int = 0, ranks: int = 1) -> Source:
    """The source for ``data`` on process ``rank`` of ``ranks``; batch size, seed and augmentation are ``config``'s.

    Raises:
        InputError: sizes that give no batch, or do not divide among the ranks.
    """
    if isinstance(data, ImageData):
        return Resident(data, config, device, rank, ranks)
    return Streamed(data, config, device, rank, ranks)
