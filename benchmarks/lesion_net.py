"""The net whose lesions `lesion.py` times: a CIFAR ResNet-56, its images, and a brief training."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resect.lab.registry import build

Images = tuple[Tensor, Tensor]


def cifar10(folder: Path, split: str, count: int) -> Images:
    """The first ``count`` images (count, 3, 32, 32), normalised, and labels of a folder of parquet files."""
    import datasets

    rows = datasets.Dataset.from_parquet(str(folder / f"{split}.parquet")).select(range(count)).with_format("torch")
    x = torch.stack([row["img"].reshape(3, 32, 32) for row in rows]).float() / 255
    mean, std = torch.tensor([0.491, 0.482, 0.447]), torch.tensor([0.247, 0.243, 0.262])
    return (x - mean[:, None, None]) / std[:, None, None], torch.tensor(list(rows["label"]))


def digits(split: str, count: int) -> Images:
    """scikit-learn's 8x8 digits enlarged to (count, 3, 32, 32): at most 1,000 to train, 797 to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    part = slice(0, 1000) if split == "train" else slice(1000, None)
    x = torch.tensor(found.images[part][:count]).float()[:, None] / 8 - 1
    return F.interpolate(x, 32).repeat(1, 3, 1, 1), torch.tensor(found.target[part][:count])


def settle(net: nn.Module, x: Tensor, y: Tensor) -> nn.Module:
    """Fit the BatchNorms of an untrained net to the images, and its last layer by least squares: a net that knows
    something, in seconds."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean
    features: list[Tensor] = []
    hook = net.fc.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    with torch.no_grad():
        net.train()(x)
        net.eval()(x)
        hook.remove()
        known = F.pad(features[-1].double(), (0, 1), value=1.0)
        gram = known.T @ known + 0.01 * len(x) * torch.eye(known.shape[1])
        weights = torch.linalg.solve(gram, known.T @ F.one_hot(y, 10).double()).float()
        net.fc.weight.copy_(10 * weights[:-1].T)
        net.fc.bias.copy_(10 * weights[-1])
    return net


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int, batch: int = 128) -> nn.Module:
    """SGD with momentum, the rate rising and falling once, crops and flips."""
    net.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.15 * min(step / (0.2 * steps), (1 - step / steps) / 0.8)
        rows = torch.randint(len(x), (batch,), generator=draw)
        top, left, flip = torch.randint(9, (3,), generator=draw).tolist()
        images = F.pad(x[rows], (4, 4, 4, 4))[..., top : top + 32, left : left + 32]
        images = (images.flip(-1) if flip > 4 else images).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(images), y[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return net.eval().to(memory_format=torch.contiguous_format)


def trained(images: Images, steps: int, cache: Path | None) -> nn.Module:
    """A ResNet-56 after ``steps`` of training, kept in ``cache``; with none, settled alone."""
    torch.manual_seed(0)
    net = build("cifar-resnet-56", num_classes=10, in_channels=3)
    if not steps:
        return settle(net, *images)
    file = None if cache is None else cache / f"resnet56-{len(images[0])}-{steps}.safetensors"
    if file is not None and file.exists():
        safetensors.torch.load_model(net, file)
        return net.eval()
    train(net, *images, steps)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(net, str(file))
    return net


def batches(images: Images, size: int) -> list[Images]:
    """Images and labels in batches of ``size``."""
    return list(zip(*(tensor.split(size) for tensor in images), strict=True))
