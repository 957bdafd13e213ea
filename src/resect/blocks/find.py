"""Find the residual blocks of any model, each one verified before it is offered."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.branch import describe
from resect.blocks.gate import remember
from resect.blocks.look import looked_at
from resect.blocks.sums import find_terms
from resect.blocks.verify import verify as verify_blocks
from resect.errors import unknown


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
    if verify not in ("joint", "each"):
        raise unknown("way to verify", verify, ("joint", "each"))
    with looked_at(model, example) as look:
        candidates, refused = describe(look.graph, find_terms(look.graph), look.model)
        good, bad = verify_blocks(look.check(candidates), candidates, each=verify == "each")
    blocks = look.blocks(good, (*refused, *bad))
    remember(look.model, blocks)
    return blocks
