"""Which modules hold weights, in whatever form."""

from __future__ import annotations

import torch
from torch import nn

_PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)


def has_weights(module: nn.Module) -> bool:
    """Whether a module, or one inside it, holds parameters or quantised weights.

    Quantised weights are packed objects (torch.ao's dynamic quantisation) or buffers of small numbers (GPTQ, AWQ
    and the like), so that such a module has no parameter at all.
    """
    return any(True for _ in module.parameters()) or any(_is_packed(part) for part in module.modules())


def _is_packed(module: nn.Module) -> bool:
    if hasattr(module, "_packed_params") or hasattr(module, "_all_weight_values"):  # torch.ao: linear; recurrent
        return True
    buffers = dict(module.named_buffers(recurse=False))
    packed = any(t.dim() >= 2 and t.dtype in _PACKED for t in buffers.values())
    # A table of positions or a mask is whole numbers too; what is quantised has scales beside it.
    return packed and any("scale" in name or "absmax" in name for name in buffers)
