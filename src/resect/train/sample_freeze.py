"""Let a block's weights learn from some samples of a batch only, while gradients flow through it for all.

Every module inside the branch that has parameters of its own is computed twice, with its weights and with
detached copies, and each sample takes the value of one or the other. Values are the same; a weight's gradient
has the chosen samples' share alone, and the input's gradient is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from resect.blocks.block import Blocks
from resect.blocks.example import Example
from resect.blocks.hooks import Hook
from resect.blocks.modes import kept_buffers, kept_modes
from resect.errors import AttachError
from resect.train.masks import SampleMasks, over_samples


class SampleFreeze:
    """While ``masks`` is set, the weights of block ``place`` learn from ``masks.dropped(place, …)`` alone."""

    def __init__(self, model: nn.Module, blocks: Blocks, undo: ExitStack) -> None:
        self.masks: SampleMasks | None = None
        self._samples: set[int] = set()
        of: dict[nn.Module, str] = {}
        for place, block in enumerate(blocks):
            if block.raw_parameters:
                raise AttachError(
                    f'ResidualDroppath(per="sample") cannot split the gradient of {block.raw_parameters[0]!r}, which '
                    'the branch uses outside its modules. Use per="batch", or leave such blocks out.'
                )
            owner = model.get_submodule(block.owner)
            for module in _with_parameters(model, block.modules):
                if (other := of.setdefault(module, block.name)) != block.name:
                    raise AttachError(
                        f'ResidualDroppath(per="sample") cannot split the gradient of the {type(module).__name__} that '
                        f'{other!r} and {block.name!r} share. Use per="batch", or leave such blocks out.'
                    )
                hook = module.register_forward_hook(Hook(self._hook(place, owner)), with_kwargs=True, prepend=True)
                undo.callback(hook.remove)
        if blocks.example is not None:
            self._check_example(model, blocks.example)

    def _check_example(self, model: nn.Module, example: Example) -> None:
        """Run the example once: every module whose gradient is to be split must have the batch first."""
        self._samples = {len(t) for t in example.tensors() if t.ndim}
        try:
            with kept_modes(model), kept_buffers(model), torch.no_grad(), torch.random.fork_rng():
                example.run(model.train())
        finally:
            self._samples = set()

    def _check(self, module: nn.Module, output: Any) -> None:
        if isinstance(output, Tensor) and len(output) not in self._samples:
            raise AttachError(
                f'ResidualDroppath(per="sample") cannot split {type(module).__name__} by samples: its output begins '
                f'with {len(output)} for a batch of {max(self._samples)}. Use per="batch", or leave its block out.'
            )

    def _hook(self, place: int, owner: nn.Module) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._samples:
                self._check(module, output)
            if self.masks is None or not owner.training:
                return None
            if not isinstance(output, Tensor):
                raise AttachError(
                    f'ResidualDroppath(per="sample") cannot split {type(module).__name__}, which returns '
                    f'{type(output).__name__}, by samples. Use per="batch", or leave its block out.'
                )
            frozen = _forward_detached(module, args, kwargs)
            dropped = self.masks.dropped(place, len(output), output.device)
            return torch.where(over_samples(dropped, output), output, frozen)

        return hook


def _with_parameters(model: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Module]:
    """Yield the outermost modules that hold parameters directly."""
    for name in names:
        waiting = [model.get_submodule(name)]
        while waiting:
            module = waiting.pop()
            if any(True for _ in module.parameters(recurse=False)):
                yield module
            else:
                waiting.extend(module.children())


def _forward_detached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Run a module's forward with parameters that get no gradient, past its hooks and gates."""
    held = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None]
    try:
        for holder, name, parameter in held:
            holder._parameters[name] = parameter.detach()  # type: ignore[assignment]
        output: Tensor = module.forward(*args, **kwargs)
    finally:
        for holder, name, parameter in held:
            holder._parameters[name] = parameter
    return output
