"""Side supervision: a second classifier half-way up the net, whose loss is added with a small weight.

Yu et al. 2018: BatchNorm, ReLU, global average pooling, a linear layer and cross entropy, weight 0.1, in the middle
of the second of three stages; it goes when the net is cut.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.example import device_of
from resect.blocks.hooks import Hook
from resect.blocks.modes import kept_modes
from resect.blocks.ranks import mean_over_ranks
from resect.blocks.recompute import is_recomputing
from resect.errors import AttachError, InputError
from resect.train.draws import generator


class SideHead(nn.Module):
    """Norm, ReLU, mean over all places, linear; made to fit a stream of (N, C), (N, T, C) or (N, C, H, W).

    ``tokens``: of (N, H, W, C), which is taken as (N, T, C).
    """

    def __init__(self, stream: Tensor, classes: int, seed: int, tokens: bool = False) -> None:
        super().__init__()
        self.tokens = tokens
        stream = stream.flatten(1, 2) if tokens else stream
        norms = {2: nn.BatchNorm1d, 3: nn.LayerNorm, 4: nn.BatchNorm2d}
        if stream.ndim not in norms:
            raise InputError(
                f"Side supervision fits streams of shape (N, C), (N, T, C) and (N, C, H, W), not "
                f"{tuple(stream.shape)}. Name another block: side_at=…"
            )
        channels = stream.shape[-1 if stream.ndim == 3 else 1]
        self.norm, self.fc = norms[stream.ndim](channels), nn.Linear(channels, classes)
        with torch.no_grad():  # its own draws: the caller's random numbers stay as they are
            bound = channels**-0.5
            for parameter in self.fc.parameters():
                parameter.uniform_(-bound, bound, generator=generator("side", seed, 0))

    def forward(self, stream: Tensor) -> Tensor:
        """Stream to logits (N, classes)."""
        stream = stream.flatten(1, 2) if self.tokens else stream
        x = F.relu(self.norm(stream.to(self.fc.weight.dtype)))
        places = {2: (), 3: (1,), 4: (2, 3)}[x.ndim]
        return self.fc(x.mean(places) if places else x)


class SideSupervision:
    """The head after one block's owner, and the stream it saw last."""

    def __init__(self, model: nn.Module, blocks: Blocks, where: str | None, seed: int) -> None:
        if blocks.example is None:
            raise InputError("Side supervision fits its head on an example: use blocks that find_blocks() returned.")
        # The published place, after block 2.⌊n/2⌋ of n in each of three stages, is the middle one of all 3n.
        self.block: ResidualBlock = blocks[len(blocks) // 2] if where is None else blocks[where]
        self.owner = model.get_submodule(self.block.owner)
        self._stream: Tensor | None = None
        seen: list[Any] = []
        hook = self.owner.register_forward_hook(lambda *call: seen.append(_stream(call[-1], self.block)))
        try:
            with kept_modes(model), torch.no_grad(), torch.random.fork_rng():
                output = blocks.example.run(model.eval())
        finally:
            hook.remove()
        output = getattr(output, "logits", output)
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise InputError("Side supervision needs a model that returns logits (N, classes).")
        with torch.random.fork_rng():
            tokens = _ends_in_channels(model, self.block, seen[-1])
            self.head = SideHead(seen[-1], output.shape[1], seed, tokens).to(device_of(model))

    def attach(self, undo: ExitStack) -> None:
        """Watch the stream until ``undo``."""
        self.head.to(device_of(self.owner))  # a trainer may have moved the model since the head was made
        undo.callback(self.owner.register_forward_hook(Hook(self._hook)).remove)
        undo.callback(self._forget)
        for parameter in self.head.parameters():
            undo.callback(parameter.register_post_accumulate_grad_hook(average_over_ranks).remove)

    def check(self) -> None:
        """Raise ``AttachError`` if the latest forward pass in train mode went without its loss."""
        if self._stream is not None:
            raise AttachError(
                "Side supervision: extra_loss(y) was not called in this step, so the side head learns nothing. Write "
                "loss = loss_fn(model(x), y) + method.extra_loss(y)."
            )

    def loss(self, target: Any) -> Tensor:
        """Return the cross entropy of the head on the latest forward pass in train mode; ``target``: int64 (N,)."""
        if not isinstance(target, Tensor):
            raise InputError("Side supervision needs the labels of the batch: write method.extra_loss(y).")
        if self._stream is None:
            raise InputError(
                "extra_loss(y) comes after the forward pass in train mode: call model(x) first. (Under reentrant "
                "gradient checkpointing the stream has no graph: take use_reentrant=False.)"
            )
        stream, self._stream = self._stream, None
        return F.cross_entropy(self.head(stream), target.to(stream.device))

    def _hook(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training and torch.is_grad_enabled() and not is_recomputing():
            self._stream = _stream(output, self.block)

    def _forget(self) -> None:
        self._stream = None


def _stream(output: Any, block: ResidualBlock) -> Tensor:
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if not tensors:
        raise InputError(f"Side supervision finds no tensor in what {block.owner!r} returns. Name another block.")
    return tensors[0]


def _ends_in_channels(model: nn.Module, block: ResidualBlock, stream: Tensor) -> bool:
    """Whether a stream is (N, H, W, C), as Swin's: its branch has linear layers of that width and no convolution."""
    modules = [module for name in block.modules for module in model.get_submodule(name).modules()]
    linear = any(isinstance(module, nn.Linear) and module.out_features == stream.shape[-1] for module in modules)
    return stream.ndim == 4 and linear and not any(isinstance(module, _ConvNd) for module in modules)


def average_over_ranks(parameter: Tensor) -> None:
    """Average a gradient over all processes, if there are several: the head is outside what DDP wraps."""
    if parameter.grad is not None:
        mean_over_ranks(parameter.grad)
