"""Find the residual blocks of any model, each one verified before it is offered."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.branch import describe
from resect.blocks.example import Example
from resect.blocks.gate import check_detached, remember
from resect.blocks.graph import Graph
from resect.blocks.sums import find_terms
from resect.blocks.trace import quiet, trace
from resect.blocks.verify import verify as check
from resect.errors import InputError, ResectError, unknown


def find_blocks(model: nn.Module, example: Any, *, verify: Literal["joint", "each"] = "joint") -> Blocks:
    """Find the residual blocks of a model by running it on an example.

    The model is run as it is, in eval mode without gradients, and left as it was. Every block is verified
    against an independent oracle that replaces the block's one operand of its one addition in the stream
    of operations: closing must agree to the bit, acting on the branch end too.

    Parameters
    ----------
    model: any ``nn.Module``, not yet compiled or wrapped for several devices.
    example: what the model is called with: a tensor, a tuple of positional arguments, a mapping of
        keyword arguments, or ``resect.Example(args, kwargs)``. Use a real training batch where an epsilon
        gate is to be attached: it compares with ``max|f|`` measured here.
    verify: ``"joint"`` checks all blocks together and bisects on disagreement; ``"each"`` checks every
        block alone as well.

    Returns
    -------
    Blocks, in order of execution; ``.refused`` lists residual additions that cannot be controlled, and why.
    A model without residual blocks gives an empty ``Blocks``.

    Raises
    ------
    InputError: the example does not fit the model (the model's own error is the cause).
    AttachError: a gate or a method is attached to the model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"find_blocks needs a torch.nn.Module, not {type(model).__name__}.")
    if hasattr(model, "_orig_mod"):
        raise InputError(
            "This model is wrapped by torch.compile. Find the blocks of the model inside: model._orig_mod."
        )
    if verify not in ("joint", "each"):
        raise unknown("way to verify", verify, ("joint", "each"))
    check_detached(model)
    sample = Example.of(example)
    with quiet(model):
        _run_once(model, sample)
        graph = Graph(trace(model, sample))
        candidates, refused = describe(graph, find_terms(graph), model)
        good, bad = check(model, sample, candidates, each=verify == "each")
    blocks = Blocks(good, model=type(model).__name__, refused=(*refused, *bad), example=sample)
    remember(model, blocks)
    return blocks


def _run_once(model: nn.Module, example: Example) -> None:
    """Fill lazy caches before the recorded run; tell an example that does not fit from a fault of ours."""
    try:
        example.run(model)
    except ResectError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in example.tensors())
        raise InputError(
            f"{type(model).__name__} cannot run on this example ({shapes or 'no tensors'}): "
            f"{type(error).__name__}: {error}. Pass what you would call the model with, for instance "
            "torch.randn(2, 3, 224, 224)."
        ) from error
