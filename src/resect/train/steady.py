"""A model's own random numbers held still, so that two runs on different samples can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PROBABILITY = {"dropout_p", "p"}


class Steady(TorchDispatchMode):
    """Dropout drops nothing, and other random floating-point numbers are all the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if "drop" in func._schema.name or "attention" in func._schema.name:
            given = list(args)
            for place, argument in enumerate(func._schema.arguments):
                if argument.name in _PROBABILITY and place < len(given):
                    given[place] = 0.0
                elif argument.name in _PROBABILITY and argument.name in kwargs:
                    kwargs[argument.name] = 0.0
            return func(*given, **kwargs)
        output = func(*args, **kwargs)
        if isinstance(output, Tensor) and output.is_floating_point():
            output.fill_(0.5)
        return output
