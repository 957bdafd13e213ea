"""What data cost: reading, augmenting and normalising batches of CIFAR-size images, as a share of a training step.

Peer: torchvision's transforms on one image at a time in a DataLoader with a worker process, as its tutorials
write it. ResNet-20, batch 128, shift 4 and flip, SGD, one thread; bf16 with channels_last where that is faster.

In each round both sides make a batch, and then one training step is run, the same for both. Two figures a side:
the share of a step's processor time (the peer's without a worker, whose time would not show), and the share of
a step for which the training waits (the peer's with a worker, which hides its time while a processor is free).

    python benchmarks/data_cost.py --quick
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timing import quartiles
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from resect.lab.config.train import TrainConfig
from resect.lab.data import ImageData, Split, open_source
from resect.lab.registry import build

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 128
LIMIT = 0.05  # of a step


class Pictures(Dataset):
    """As torchvision.datasets.CIFAR10 keeps its images: arrays (H, W, 3), a PIL image made of each when asked."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable) -> None:
        self.data, self.targets = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def peer(images: Tensor, labels: Tensor, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    pictures = Pictures(images, labels, transform)
    loader = DataLoader(
        pictures, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def ours(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    data = ImageData("noise", Split(images, labels), Split(images[:BATCH], labels[:BATCH]), tuple("0123456789"))
    config = TrainConfig(batch_size=BATCH, shift=4, flip=True)
    source = open_source(data, config, torch.device("cpu"))
    return itertools.chain.from_iterable(itertools.repeat(source))


class Step:
    """ResNet-20 and its optimizer."""

    def __init__(self, fast: bool) -> None:
        torch.manual_seed(0)
        self.fast = fast  # bf16 and channels_last
        self.model = build("cifar-resnet-20", num_classes=10, in_channels=3)
        self.model.to(memory_format=torch.channels_last if fast else torch.contiguous_format)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def __call__(self, batch: tuple[Tensor, Tensor]) -> None:
        """One optimizer step on a batch."""
        images, labels = batch
        with torch.autocast("cpu", torch.bfloat16, enabled=self.fast):
            logits = self.model(images)
        F.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def clock(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of this process's processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="15 rounds instead of 60")
    rounds = 15 if parser.parse_args().quick else 60
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5120, 3, 32, 32), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 10, (5120,), generator=generator)
    source, hidden, alone = ours(images, labels), peer(images, labels, workers=1), peer(images, labels, workers=0)
    for batches in (source, hidden, alone):
        batch = next(batches)
    steps = [Step(fast) for fast in (False, True)]
    took = [min(clock(lambda step=step: step(batch))[1] for _ in range(3)) for step in steps]
    step = steps[took.index(min(took))]  # the faster the step, the larger the share

    shares: dict[str, list[float]] = {name: [] for name in ("resect", "peer", "resect_waits", "peer_waits", "ratio")}
    step_seconds = []
    for _ in range(rounds):
        ready = clock(lambda: next(source))
        made = clock(lambda: next(alone))
        waited = clock(lambda: next(hidden))
        whole = clock(lambda: step(batch))
        step_seconds.append(whole[1])
        shares["resect"].append(ready[1] / (ready[1] + whole[1]))
        shares["peer"].append(made[1] / (made[1] + whole[1]))
        shares["resect_waits"].append(ready[0] / (ready[0] + whole[0]))
        shares["peer_waits"].append(waited[0] / (waited[0] + whole[0]))
        shares["ratio"].append(made[1] / ready[1])

    result: dict[str, object] = {"rounds": rounds, "step": "bf16+channels_last" if step.fast else "fp32"}
    result["step_processor_seconds"] = round(statistics.median(step_seconds), 4)
    for name, values in shares.items():
        result[name] = [round(value, 5) for value in quartiles(values)]
    names = {
        "resect": "processor time, whole batch at once",
        "peer": "processor time, image by image",
        "resect_waits": "the training waits, whole batch at once",
        "peer_waits": "the training waits, image by image in a worker",
    }
    for name, text in names.items():
        low, middle, high = quartiles(shares[name])
        print(f"{text}: {100 * middle:.2f} % of a step ({100 * low:.2f} … {100 * high:.2f})")
    low, middle, high = quartiles(shares["ratio"])
    print(f"image by image takes {middle:.1f} times the processor time ({low:.1f} … {high:.1f})")
    low, middle, high = quartiles(shares["resect"])
    result["within_5_percent"] = middle <= LIMIT and high - low <= (LIMIT - middle) / 2
    print(json.dumps(result))
    if not result["within_5_percent"]:
        raise SystemExit("data cost more than 5 % of a step, or the spread is too wide to say")


if __name__ == "__main__":
    main()
