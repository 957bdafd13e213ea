"""Make factors on branches permanent: multiplied into the last weights of each branch, then checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.example import Example
from resect.blocks.gate import gates
from resect.blocks.modes import kept_modes
from resect.blocks.response import watch
from resect.errors import InputError, ProofError


def fold(model: nn.Module, blocks: Blocks, factors: Mapping[str, float]) -> None:
    """Multiply every branch by its factor, for good: ``f`` becomes ``factors[name] · f``, in the weights.

    The last affine module of a branch (convolution, linear, norm, layer scale) takes the factor. That the
    branch end then is the factor times what it was is checked on the blocks' example, in eval mode, to
    ``1e-4`` of its largest value (four roundings in half precision).

    Raises ``InputError`` without an example and ``ProofError`` where no weights of a branch can take the
    factor (it ends in a ReLU, say); the model is then unchanged.
    """
    if blocks.example is None:
        raise InputError("Folding is checked on an example: use blocks that find_blocks() returned.")
    before = [(p, p.detach().clone()) for p in model.parameters()]
    try:
        for block in blocks:
            if factors[block.name] != 1.0:
                _fold_one(model, block, factors[block.name], blocks.example)
    except BaseException:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise


def _fold_one(model: nn.Module, block: ResidualBlock, factor: float, example: Example) -> None:
    wanted = _branch_end(model, block, example) * factor
    tolerance = max(1e-4, 4 * torch.finfo(wanted.dtype).eps) * float(wanted.abs().max())
    for parameters in _candidates(model, block):
        kept = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(factor)
        if float((_branch_end(model, block, example) - wanted).abs().max()) <= tolerance:
            return
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
    raise ProofError(
        f"The factor {factor:g} cannot be folded into {block.name!r}: no single module's weights scale its branch end. "
        'Train with scaling="inverted", which needs nothing at test time, or keep the method attached.'
    )


def _branch_end(model: nn.Module, block: ResidualBlock, example: Example) -> Tensor:
    with kept_modes(model), torch.no_grad(), torch.random.fork_rng(), gates(model, block) as gate:
        seen: dict[str, Tensor] = watch(gate, lambda branch: branch.detach().clone())
        example.run(model.eval())
    return seen[block.name]


def _candidates(model: nn.Module, block: ResidualBlock) -> Iterator[list[nn.Parameter]]:
    """Yield sets of parameters that may scale the branch end, the likeliest first."""
    for name in block.raw_parameters:
        yield [model.get_parameter(name)]
    for name in reversed(block.modules):
        for module in reversed(list(model.get_submodule(name).modules())):
            direct = list(module.parameters(recurse=False))
            if direct:
                yield direct
