"""CIFAR ResNets of depth 6n+2: post-activation (He 2016a) and pre-activation (He 2016b).

The pre-activation net follows the ε-ResNet paper's code (Yu 2018): the stem is conv-BN-ReLU, so the first
block of stage 1 has no leading BN-ReLU of its own; a BN-ReLU (`bn_last`) precedes the pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from resect.errors import InputError, check_all, unknown


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """``x`` (N, C, H, W) with zero channels on both sides, so that it has ``channels``."""
    missing = channels - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))


class SubsamplePad(nn.Module):
    """Option A of He 2016a: every second row and column, then zero channels. No parameters."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels, ceil(H/stride), ceil(W/stride))."""
        return pad_channels(x[:, :, :: self.stride, :: self.stride], self.channels)


class PoolPad(SubsamplePad):
    """Option A as the ε-ResNet code has it: average pooling instead of subsampling. No parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels, ceil(H/stride), ceil(W/stride))."""
        if self.stride > 1:  # ceil_mode: odd sizes must come out as a strided convolution leaves them
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return pad_channels(x, self.channels)


def conv3x3(channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the image size at stride 1."""
    return nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)


class PostBlock(nn.Module):
    """``relu(x + bn(conv(relu(bn(conv(x))))))``; without the ``x`` when ``residual`` is False."""

    def __init__(self, channels: int, width: int, stride: int, option: str, residual: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.residual = residual
        self.shortcut: nn.Module | None = None
        if residual and (stride > 1 or channels != width):
            projection = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            self.shortcut = SubsamplePad(width, stride) if option == "A" else projection

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, width, ceil(H/stride), ceil(W/stride))."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.residual:
            out = out + (x if self.shortcut is None else self.shortcut(x))
        return F.relu(out)


class PreBlock(nn.Module):
    """``x + conv(relu(bn(conv(relu(bn(x))))))``; ``leading=False`` leaves the first BN-ReLU out."""

    def __init__(self, channels: int, width: int, stride: int, option: str, residual: bool, leading: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels) if leading else None
        self.conv1 = conv3x3(channels, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width)
        self.residual, self.option = residual, option
        self.shortcut: nn.Module | None = None
        if residual and (stride > 1 or channels != width):
            projection = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut = PoolPad(width, stride) if option == "A" else projection

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, width, ceil(H/stride), ceil(W/stride))."""
        active = x if self.bn1 is None else F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        if not self.residual:
            return out
        if self.shortcut is None:
            return out + x
        # He 2016b: a 1x1 convolution reads the activated input; pooling reads the stream itself.
        return out + self.shortcut(active if self.option == "B" else x)


class CifarResNet(nn.Module):
    """Stem, three stages ``layer1`` … ``layer3``, global average pooling, ``fc``."""

    def __init__(
        self,
        block: Callable[[int, int, int, bool], nn.Module],
        blocks_per_stage: Iterable[int],
        widths: tuple[int, ...],
        in_channels: int,
        num_classes: int,
        last_norm: bool,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(in_channels, widths[0]), nn.BatchNorm2d(widths[0])
        channels = widths[0]
        stages = []
        for stage, (count, width) in enumerate(zip(blocks_per_stage, widths, strict=True)):
            blocks = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width, stride, stage == index == 0))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn_last = nn.BatchNorm2d(channels) if last_norm else None
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.bn_last is not None:
            x = F.relu(self.bn_last(x))
        return self.fc(x.mean((2, 3)))


def cifar_resnet(
    depth: int = 110,
    *,
    preactivation: bool = False,
    shortcut: str = "A",
    widths: Iterable[int] = (16, 32, 64),
    in_channels: int = 3,
    num_classes: int = 10,
    shortcuts: bool = True,
    blocks_per_stage: Iterable[int] | None = None,
) -> nn.Module:
    """A CIFAR ResNet with (depth - 2) / 6 basic blocks of two 3x3 convolutions in each of three stages.

    Args:
        depth: number of weight layers, 6n+2.
        preactivation: BN-ReLU before the convolutions (He 2016b) instead of after them (He 2016a).
        shortcut: where a stage changes the shape, "A": no parameters (subsampling, or average pooling in
            the pre-activation net, then zero channels); "B": a 1x1 convolution,
            with BN in the post-activation net.
        widths: channels of the three stages, ascending.
        in_channels: channels of the images.
        num_classes: number of logits.
        shortcuts: False builds the same layers without any shortcut (the contrast of Veit 2016).
        blocks_per_stage: three counts that replace the n of ``depth``, e.g. (18, 18, 1) for a cut shape.

    Raises:
        InputError: a depth that is not 6n+2, or counts, widths or options that make no net.
    """
    for name, value in (("widths", widths), ("blocks_per_stage", blocks_per_stage)):
        if value is not None and not isinstance(value, Iterable):
            raise InputError(f"CIFAR ResNet: {name} must be three numbers, for instance [8, 16, 32], not {value!r}.")
    widths = tuple(widths)
    counts = ((depth - 2) // 6,) * 3 if blocks_per_stage is None else tuple(blocks_per_stage)
    check_all(_problems(depth, shortcut, widths, counts, in_channels, num_classes), "CIFAR ResNet")

    def block(channels: int, width: int, stride: int, first: bool) -> nn.Module:
        if preactivation:
            return PreBlock(channels, width, stride, shortcut, shortcuts, leading=not first)
        return PostBlock(channels, width, stride, shortcut, shortcuts)

    return CifarResNet(block, counts, widths, in_channels, num_classes, last_norm=preactivation)


def depth_problem(depth: int) -> str | None:
    """What is wrong with ``depth``, with the nearest two valid ones; None when it is 6n+2, n ≥ 1."""
    if depth >= 8 and depth % 6 == 2:
        return None
    below = max(8, depth - (depth - 2) % 6)
    return f"depth must be 6n+2, not {depth}. Nearest: {below} and {below + 6}"


def _problems(
    depth: int, shortcut: str, widths: tuple[int, ...], counts: tuple[int, ...], channels: int, classes: int
) -> list[str]:
    found = [depth_problem(depth)]
    if shortcut not in ("A", "B"):
        found.append(str(unknown("shortcut option", shortcut, ["A", "B"])))
    if len(widths) != 3 or list(widths) != sorted(widths) or min(widths, default=0) < 1:
        found.append(f"widths must be three ascending positive numbers, not {widths}")
    if len(counts) != 3 or min(counts, default=0) < 1:
        found.append(f"blocks_per_stage must be three numbers of at least 1, not {counts}")
    if channels < 1 or classes < 1:
        found.append(f"in_channels and num_classes must be at least 1, not {channels} and {classes}")
    return [problem for problem in found if problem]
