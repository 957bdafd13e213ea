"""A source for data that do not fit into memory: worker processes read, decode and transform ahead of the training."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from resect.errors import FileError, ResectError, check_all
from resect.lab.config.train import TrainConfig
from resect.lab.data.images import normalize
from resect.lab.data.rows import said
from resect.lab.data.stream import StreamedData, is_table
from resect.train import draws


class Streamed:
    """A `Source` that reads: worker processes decode and transform, the device normalises.

    The order of the images, and their transforms, depend on (seed, epoch) and the numbers of workers and
    processes alone. A resume reads again what was trained on, without decoding it. Each worker has shards of
    its own; one with fewer images than the others begins again with its first ones.

    Raises:
        InputError: sizes that do not divide, or augmentation that is not timm's.
    """

    def __init__(
        self, data: StreamedData, config: TrainConfig, device: torch.device, rank: int = 0, ranks: int = 1
    ) -> None:
        problems = []
        if config.batch_size % ranks or data.images < config.batch_size:
            problems.append(f"batches of {config.batch_size} from {data.images} images, for {ranks} processes")
        if config.shift or config.flip:
            problems.append("train.shift and train.flip are not for streamed data, which have data.options.flip")
        shards = len(data.train) if is_table(data.train) else data.train.num_shards
        if shards < ranks:
            problems.append(f"{shards} parts (files or row groups) are too few for {ranks} processes")
        check_all(problems, f"Data {data.name!r}")
        self.data, self.device, self.batch = data, device, config.batch_size // ranks
        self.seed, self.rank, self.ranks = config.seed, rank, ranks
        self.steps = data.images // config.batch_size
        self.workers = min(data.workers, shards // ranks)
        self.stats = [part.to(device) for part in data.stats]
        self.epoch = 0
        self.position = 0  # batches of this epoch already handed out

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches left in this epoch, normalised, on the device; then the next epoch begins."""
        seed = draws.generator("order", self.seed, self.epoch).initial_seed()
        augment = f"augment-{self.rank}", self.seed, self.epoch
        batches = _Batches(self._order(seed), self.data, self.batch, augment, self.position, self.steps)
        for number, (images, labels) in self._loaded(batches, self.workers):
            self.position += 1
            yield self._erased(images, number), labels
        self.epoch, self.position = self.epoch + 1, 0

    def test(self, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole test split, the same batches on every process."""
        rows = self.data.test
        shards = max(1, min(self.data.workers, len(rows) if is_table(rows) else rows.num_shards))
        rows = rows.to_iterable_dataset(num_shards=shards) if is_table(rows) else rows
        batches = _Batches(rows, self.data, batch_size)
        return (batch for _, batch in self._loaded(batches, min(self.data.workers, shards)))

    def example(self, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count`` training images, cut as for testing, and their labels."""
        images, labels = self.data.sample("train", count)
        return images.to(self.device), labels.to(self.device)

    def state_dict(self) -> dict[str, int]:
        """Where the source stands: plain numbers."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "size": self.data.images}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from there.

        Raises:
            InputError: the state belongs to another seed or number of images.
        """
        mine = self.state_dict()
        check_all(
            (f"{key} was {state[key]}, is {mine[key]}" for key in ("seed", "size") if state[key] != mine[key]),
            "Stream of another run",
        )
        self.epoch, self.position = state["epoch"], state["position"]

    def _order(self, seed: int) -> Any:
        """This process's training rows in the order that ``seed`` gives, in as many shards as there are workers."""
        rows, ranks = self.data.train, {"num_shards": self.ranks, "index": self.rank}
        if is_table(rows):
            rows = rows.shuffle(seed=seed, keep_in_memory=True).shard(**ranks, keep_in_memory=True)
            return rows.to_iterable_dataset(num_shards=max(1, self.workers))
        return rows.shard(**ranks).shuffle(seed=seed, buffer_size=self.data.buffer)

    def _loaded(self, batches: _Batches, workers: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else each pass takes a number of the training's: a resume one too many
        )
        for number, batch in enumerate(loader):
            if isinstance(batch, ResectError):
                raise batch
            if batch is not None:
                images, labels = (part.to(self.device, non_blocking=True) for part in batch)
                yield number, (normalize(images, *self.stats), labels)

    def _erased(self, images: Tensor, number: int) -> Tensor:
        from timm.data.random_erasing import RandomErasing

        if self.data.erase:
            with seeded(f"erase-{self.rank}-{number}", self.seed, self.epoch):
                images = RandomErasing(self.data.erase, device=self.device)(images)
        return images


class _Batches(IterableDataset[Any]):
    """What a worker of a loader does: of batches 0, 1, 2, … every ``workers``-th, decoded and transformed.

    A batch before ``first`` is read but not decoded, and is None. With ``stop`` there are as many batches,
    drawn at random by ``draws``; without it, each row once, as for testing.
    """

    def __init__(
        self,
        rows: Any,
        data: StreamedData,
        batch_size: int,
        draws: tuple[str, int, int] | None = None,
        first: int = 0,
        stop: int | None = None,
    ) -> None:
        self.rows, self.data, self.batch_size = rows, data, batch_size
        self.draws, self.first, self.stop = draws, first, stop

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | ResectError | None]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        transform = self.data.transform(self.draws is not None)
        rows = iter(self.rows) if self.stop is None else _endless(self.rows)
        numbers = itertools.count(mine, workers) if self.stop is None else range(mine, self.stop, workers)
        try:
            for number in numbers:
                part = self._read(rows)
                if not part:
                    return
                yield None if number < self.first else self._decode(part, transform, number)
        except ResectError as error:
            yield error  # raised by a loader's worker, it would be wrapped in that worker's traceback

    def _read(self, rows: Iterator[Any]) -> list[Any]:
        try:
            return list(itertools.islice(rows, self.batch_size))
        except ResectError:
            raise
        except Exception as error:  # of datasets, pyarrow, fsspec and the network
            raise FileError(f"{self.data.name} cannot be read any further ({said(error)}).") from error

    def _decode(self, rows: list[Any], transform: Any, number: int) -> tuple[Tensor, Tensor]:
        if self.draws is None:
            return self.data.decode(rows, transform)
        purpose, seed, epoch = self.draws
        with seeded(f"{purpose}-{number}", seed, epoch):
            return self.data.decode(rows, transform)


def _endless(rows: Any) -> Iterator[Any]:
    while True:
        row = None
        for row in rows:
            yield row
        if row is None:
            raise FileError("A part of the streamed training data has no rows. Use fewer data.options.workers.")


@contextmanager
def seeded(purpose: str, seed: int, epoch: int) -> Iterator[None]:
    """Inside, the global random numbers, which timm's transforms use, depend on these three alone."""
    number = draws.generator(purpose, seed, epoch).initial_seed()
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    random.seed(number)
    numpy.random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        torch.set_rng_state(before[2])
