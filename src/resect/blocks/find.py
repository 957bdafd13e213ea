"""Find the residual blocks of any model, each one verified before it is offered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.branch import describe
from resect.blocks.choose import number_stages
from resect.blocks.example import Example
from resect.blocks.gate import check_detached, remember
from resect.blocks.graph import Graph
from resect.blocks.outline import OutlineCheck
from resect.blocks.rehearse import check_repeats, run_once
from resect.blocks.sums import find_terms
from resect.blocks.trace import quiet, trace
from resect.blocks.unwrap import check_visible, eager, unwrap
from resect.blocks.verify import Check, ValueCheck
from resect.blocks.verify import verify as verify_blocks
from resect.errors import InputError, unknown


def find_blocks(model: nn.Module, example: Any, *, verify: Literal["joint", "each"] = "joint") -> Blocks:
    """Find the residual blocks of a model by running it on an example.

    The model is run as it is, in eval mode without gradients, and left as it was. Every block is verified
    against an independent oracle that replaces the block's one operand of its one addition in the stream
    of operations: closing must agree to the bit, acting on the branch end too.

    Parameters
    ----------
    model: any ``nn.Module``. One on the meta device (``with torch.device("meta"): …``) is not computed: its blocks are
        verified by structure alone (``block.verified``), and their names hold for the model with weights.
        Of one wrapped by ``DistributedDataParallel``, ``DataParallel`` or ``torch.compile`` the
        model inside is taken, and blocks are named as in there; compiled parts run as written meanwhile.
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
    InputError: the model is none, or the example does not fit it (the model's own error is the cause).
    BlocksError: the model does not repeat itself (the first difference is shown), or it is sharded, scripted or
        statically quantised, so that its branches cannot be seen.
    AttachError: a gate or a method is attached to the model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"find_blocks needs a torch.nn.Module, not {_told(model)}")
    if verify not in ("joint", "each"):
        raise unknown("way to verify", verify, ("joint", "each"))
    inner = unwrap(model)
    check_visible(inner)
    check_detached(inner)
    sample = Example.of(example)
    with eager(), quiet(inner):
        output = run_once(inner, sample)
        torch.manual_seed(0)
        recorded = trace(inner, sample)
        check_repeats(inner, sample, recorded, output)
        graph = Graph(recorded)
        candidates, refused = describe(graph, find_terms(graph), inner)
        on_meta = any(tensor.is_meta for tensor in inner.parameters())
        check: Check = OutlineCheck(inner, sample, recorded) if on_meta else ValueCheck(inner, sample, candidates)
        good, bad = verify_blocks(check, candidates, each=verify == "each")
    blocks = Blocks(
        number_stages(good),
        model=type(inner).__name__,
        refused=(*refused, *bad),
        example=sample,
        flops=sum(node.flops for node in recorded.nodes),
    )
    remember(inner, blocks)
    return blocks


def _told(value: Any) -> str:
    if isinstance(value, type) and issubclass(value, nn.Module):
        return f"the class {value.__name__}. Pass an instance: {value.__name__}(…)."
    if isinstance(value, str):
        return f"the string {value!r}. Build the model first, for instance timm.create_model({value!r})."
    if isinstance(value, Mapping):
        return (
            f"{type(value).__name__}. If this is a state_dict, build the model and load it: model.load_state_dict(…)."
        )
    return f"{type(value).__name__}. A function has no modules to close: write it as a torch.nn.Module."
