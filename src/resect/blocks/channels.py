"""Which axis of a stream holds its channels."""

from __future__ import annotations

from torch import Tensor, nn


def channel_axis(stream: Tensor, owner: nn.Module) -> int:
    """Return the axis of a stream that holds its channels: 1 (images as convolutions see them) or −1 (tokens).

    It is the one whose length the weights of the block's owner share; where that does not tell, 1 if the owner holds a
    convolution.
    """
    if stream.ndim == 2:
        return 1
    sizes = [size for parameter in owner.parameters() for size in parameter.shape]
    first, last = sizes.count(stream.shape[1]), sizes.count(stream.shape[-1])
    if first != last:
        return 1 if first > last else -1
    return 1 if any(isinstance(module, nn.modules.conv._ConvNd) for module in owner.modules()) else -1
