"""Which branches can be computed on the samples that keep them alone: tried on the example, beside the mask."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from resect.blocks.axes import Axes
from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.example import Example
from resect.blocks.gate import Gates
from resect.blocks.hooks import Hook
from resect.blocks.inflight import InFlight, settled
from resect.blocks.modes import Buffers, kept_modes
from resect.blocks.rows import Rows
from resect.blocks.template import tensors_in
from resect.blocks.units import is_sharded
from resect.blocks.unwrap import eager, is_compiled, is_wrapped_compiled, unwrap
from resect.blocks.verify import at_fault
from resect.errors import AttachError, check_all
from resect.train.alike import GRADIENT, difference, gradients
from resect.train.freeze import branch_modules
from resect.train.masks import Compute, over_samples
from resect.train.steady import Steady

SIZES = (5, 7)
"""Numbers of samples to try on: a dimension that is one of them by accident is not the other too."""
KEPT = ([2], [1, 2, 4], [0, 1, 2, 3, 4])
"""Samples of the smaller batch to keep: one, some, all; which block keeps which takes turns."""


def try_subsets(
    model: nn.Module, blocks: Blocks, gates: Gates, first: Mapping[str, int], compute: Compute
) -> dict[str, Axes | str]:
    """Return per block what a gate needs to compute it on some samples, or why it cannot.

    ``first``: the number of samples at each branch end, on the example. Modes, buffers, gradients and random numbers
    are as before afterwards. Raises ``AttachError`` for ``compute="subset"``, with every block that cannot.
    """
    wrapped, model = is_wrapped_compiled(model), unwrap(model)
    found: dict[str, Axes | str] = {}
    for block in blocks:
        found[block.name] = _hindrance(model, blocks, block, first, compute)
        if not found[block.name] and (wrapped or _meets_compiled_code(model, block)):
            found[block.name] = "it runs in compiled code, which would be compiled for every number of samples"
    trial = [block for block in blocks if not found[block.name]]
    if trial:
        assert blocks.example is not None
        found.update(_Trial(model, blocks, gates, blocks.example, first[trial[0].name]).of(trial))
    if compute == "subset":
        wrong = (f"{name}: {reason}" for name, reason in found.items() if isinstance(reason, str))
        check_all(
            wrong, 'compute="subset" cannot be had for these blocks (compute="auto" masks them instead)', AttachError
        )
    return found


def _meets_compiled_code(model: nn.Module, block: ResidualBlock) -> bool:
    steps = block.owner.split(".")
    above = [model.get_submodule(".".join(steps[:depth])) for depth in range(len(steps) + 1)]
    return any(is_compiled(module) for module in [*above, *branch_modules(model, block)])


def _is_watched(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not isinstance(hook, Hook) for hook in hooks)


def norms_of(model: nn.Module, block: ResidualBlock) -> list[nn.Module]:
    """Return the modules of a branch that compute statistics of the batch."""
    return [m for m in branch_modules(model, block) if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _hindrance(
    model: nn.Module, blocks: Blocks, block: ResidualBlock, first: Mapping[str, int], compute: Compute
) -> str:
    """Say why a block need not be tried, "" if it is to be."""
    if compute == "mask":
        return "as asked"
    if blocks.example is None:
        return "the blocks bring no example to try it on: find them on this model"
    if is_sharded(model):
        return "the model is sharded, and was not tried before: attach first, then shard"
    if any(tensor.is_meta for tensor in model.parameters()):
        return "the model is on the meta device"
    if not block.modules:
        return "the branch has no modules, so there is nothing to call on some samples"
    if block.name not in first:
        return "the branch did not run on the example"
    if first[block.name] < 2 or first[block.name] != max(first.values()):
        return f"the example has {first[block.name]} sample(s) here: at least two are needed, of one batch"
    if compute == "auto" and any(_is_watched(module) for module in branch_modules(model, block)):
        return 'a forward hook on it would see the kept samples alone (compute="subset" asks for it all the same)'
    norms = norms_of(model, block) if compute == "auto" else ()
    if norms:
        return f'a {type(norms[0]).__name__} takes statistics of the batch (compute="subset" asks for it all the same)'
    return ""


class _Fixed:
    """The gate function of a mask that is given, not drawn."""

    def __init__(self, kept: list[int] | None) -> None:
        self.kept = kept
        self._rows: dict[int, Rows] = {}

    def __call__(self, branch: Tensor) -> Tensor:
        mask = branch.new_zeros(len(branch))
        mask[self.kept if self.kept is not None else slice(None)] = 1.5
        return branch * over_samples(mask, branch)

    def rows(self, samples: int, device: torch.device) -> Rows:
        if samples not in self._rows:
            index = torch.tensor(self.kept if self.kept is not None else range(samples), device=device)
            self._rows[samples] = Rows(samples, len(index), index, 1.5)
        return self._rows[samples]


class _Trial:
    """One model, run with branches computed on some samples and with the mask."""

    def __init__(self, model: nn.Module, blocks: Blocks, gates: Gates, example: Example, samples: int) -> None:
        self.model, self.blocks, self.gates = model, blocks, gates
        self.examples = [_resized(example, samples, size) for size in SIZES]
        self.axes: dict[str, Axes] = {}
        self._masked = functools.cache(self._run_masked)
        self._buffers = Buffers(model)

    def of(self, trial: list[ResidualBlock]) -> dict[str, Axes | str]:
        """Return per block of the trial its axes, or how it differs from the mask."""
        with self._quiet():
            try:
                self._run_masked(0, SIZES[1])
            except Exception as error:
                why = f"the model cannot be tried on {SIZES[0]} and {SIZES[1]} samples: {_told(error)}"
                return dict.fromkeys((block.name for block in trial), why)
            bad = at_fault(trial, self._differs, False)
            good = [block for block in trial if block.name not in bad]
            if bad and good and (reason := self._differs(good)):
                bad |= dict.fromkeys((block.name for block in good), reason)
        return {block.name: bad.get(block.name) or self.axes[block.name] for block in trial}

    def _differs(self, candidates: Sequence[ResidualBlock]) -> str:
        """Say how computing these branches on some samples differs from the mask, "" if it does not."""
        mine = {block.name: Axes() for block in candidates}
        self.axes.update(mine)
        try:
            for size, example in zip(SIZES, self.examples, strict=True):
                for axes in mine.values():
                    axes.learning = size
                self._set(mine, None)
                self._restore()
                example.run(self.model)
            doubts = [doubt for axes in mine.values() if (doubt := axes.settle())]
            if doubts:
                return doubts[0]
            for turn in range(len(KEPT)):
                expected = self._masked(turn, SIZES[0])
                self._set(mine, turn)
                if differing := difference(expected, self._run(SIZES[0])):
                    return f"computed on some samples it is not what the mask gives: {differing}"
        except Exception as error:
            return f"it cannot be computed on some samples: {_told(error)}"
        finally:
            for gate in self.gates:
                gate.open()
        return ""

    def _set(self, on_rows: Mapping[str, Axes], turn: int | None) -> None:
        for place, gate in enumerate(self.gates):
            fixed = _Fixed(None if turn is None else KEPT[(place + turn) % len(KEPT)])
            if gate.block.name in on_rows:
                gate.apply_on_rows(fixed, on_rows[gate.block.name])
            else:
                gate.apply(fixed)

    def _run_masked(self, turn: int, size: int) -> dict[str, list[Any]]:
        self._set({}, turn)
        return self._run(size)

    def _run(self, size: int) -> dict[str, list[Any]]:
        """Run forward and backward; return values, gradients and buffers, in groups of one scale."""
        values: list[Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            output = tree_map_only(InFlight, settled, output)
            values.extend(leaf.clone() for leaf in tensors_in(output) if leaf.is_floating_point())

        owners = {id(gate.owner): gate.owner for gate in self.gates}
        with ExitStack() as hooks:
            for owner in owners.values():
                hooks.callback(owner.register_forward_hook(note).remove)
            self._restore()
            output = self.examples[SIZES.index(size)].run(self.model)
            leaves = tensors_in(output, and_absent=True)
        if any(isinstance(leaf, InFlight) for leaf in leaves):
            raise ValueError("the model returns a value of the branch")
        values += [leaf for leaf in leaves if leaf.is_floating_point()]
        seen: dict[str, list[Any]] = {f"value {place}": [value.detach()] for place, value in enumerate(values)}
        for name, gradient in gradients(self.model, values).items():
            seen.setdefault(f"{GRADIENT} {name.rpartition('.')[0]!r}", []).append(gradient)
        for name, buffer in self.model.named_buffers():
            seen[f"buffer {name!r}"] = [buffer.detach().clone()]
        for block in self.blocks:  # what a module leaves for others to read (a loss that balances experts)
            for place, module in enumerate(branch_modules(self.model, block)):
                for name, value in vars(module).items():
                    if isinstance(value, Tensor) and value.is_floating_point():
                        seen[f"{type(module).__name__}.{name} of {block.name!r}, {place}"] = [value.detach().clone()]
        return seen

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Run in train mode, gradients on, without a trace; batch statistics stand still."""
        with kept_modes(self.model), torch.enable_grad(), torch.random.fork_rng(), eager(), Steady():
            self.model.train()
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()  # a few samples alike, and their statistics would magnify rounding to anything
            try:
                yield
            finally:
                self._restore()

    def _restore(self) -> None:
        torch.manual_seed(0)
        self._buffers.restore()


def _resized(example: Example, samples: int, size: int) -> Example:
    """Return an example with another number of samples: the first of them, over again if there are too few."""
    rows = torch.arange(size) % min(samples, size)

    def resized(tensor: Tensor) -> Tensor:
        batched = tensor.ndim and len(tensor) == samples
        return tensor.index_select(0, rows.to(tensor.device)) if batched else tensor

    args, kwargs = tree_map_only(Tensor, resized, (example.args, dict(example.kwargs)))
    return Example(args, kwargs)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"
