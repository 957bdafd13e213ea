"""What data cost: reading, augmenting and normalising batches of CIFAR-size images, as a share of a training step.

Peer: torchvision's transforms on one image at a time in a DataLoader with a worker process, as its tutorials
write it. ResNet-20, batch 128, shift 4 and flip, float32, SGD; one thread for each side's training process.

Both sides train the same net on the same images, a step of each in turns. Two figures a side, both relative to
the step without data: the time for which the training waits for a batch, and the processor time that batches
take in all processes. The peer's worker hides its time only while a processor is free for it.

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
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 128


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
