"""Which images come in which batch: a pure function of (seed, epoch), so that a resume needs no replay."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resect.errors import check_all
from resect.train.draws import generator


def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """int64 (size,): the order of the images in ``epoch``."""
    return torch.randperm(size, generator=generator("order", seed, epoch))


class Sampler:
    """Batches of indices, epoch after epoch; every image at most once an epoch.

    ``batch_size`` counts the images of all ranks together: rank r takes every ``ranks``-th one, from the
    r-th on. With ``drop_last`` (default) an incomplete last batch is left out; without it the last
    batch is shorter, and is left out only if it has no image for some rank.

    Raises:
        InputError: sizes that give no batch at all, or do not divide among the ranks.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        problems = []
        if batch_size < 1 or batch_size % ranks:
            problems.append(f"batch size {batch_size} is not a positive multiple of {ranks} ranks")
        if size < (batch_size if drop_last else ranks):
            problems.append(f"{size} images do not fill one batch of {batch_size}; use a smaller batch size")
        if not 0 <= rank < ranks:
            problems.append(f"rank {rank} is not one of 0 … {ranks - 1}")
        check_all(problems, "Sampler")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.drop_last, self.rank, self.ranks = drop_last, rank, ranks
        self.epoch = 0
        self.position = 0  # batches of this epoch already handed out

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        whole, rest = divmod(self.size, self.batch_size)
        return whole + (not self.drop_last and rest >= self.ranks)

    def __iter__(self) -> Iterator[Tensor]:
        """The batches left in this epoch, each int64 (at most batch_size / ranks,); then the next begins."""
        order = permutation(self.size, self.seed, self.epoch)
        while self.position < len(self):
            start = self.position * self.batch_size
            self.position += 1
            yield order[start : start + self.batch_size][self.rank :: self.ranks]
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the sampler stands: plain numbers."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "size": self.size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from there.

        Raises:
            InputError: the state belongs to another seed or number of images.
        """
        mine = {"seed": self.seed, "size": self.size}
        check_all(
            (f"{key} was {state[key]}, is {mine[key]}" for key in mine if state[key] != mine[key]),
            "Sampler state of another run",
        )
        self.epoch, self.position = state["epoch"], state["position"]
