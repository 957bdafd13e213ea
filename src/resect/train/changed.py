"""Notice a model that was changed while a method is attached to it."""

from __future__ import annotations

from torch import nn

from resect.blocks.block import Blocks
from resect.errors import AttachError


class Wiring:
    """Which modules sat where when a method was attached: every link from the model down to a branch's modules."""

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        self._links: dict[tuple[int, str], tuple[nn.Module, str, nn.Module, str]] = {}
        for block in blocks:
            for path in block.modules:
                parent, walked = model, ""
                for part in path.split("."):
                    child = parent._modules[part]
                    assert child is not None
                    walked = f"{walked}.{part}" if walked else part
                    self._links[id(parent), part] = (parent, part, child, walked)
                    parent = child

    def check(self, name: str) -> None:
        """Raise ``AttachError`` if a module has been replaced or taken out since."""
        for parent, part, child, path in self._links.values():
            if parent._modules.get(part) is not child:
                now = parent._modules.get(part)
                what = f"replaced by a {type(now).__name__}" if now is not None else "taken out"
                raise AttachError(
                    f"The model was changed while {name} is attached: module {path!r} was {what}. Detach the method "
                    "first, change the model, find its blocks again, and attach."
                )
