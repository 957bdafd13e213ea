"""A model that was compiled in a way that does not hold where code changes from step to step: refused, not slow."""

from __future__ import annotations

from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.compiled import by_owner
from resect.blocks.gate import Gates
from resect.blocks.state import tracings
from resect.blocks.unwrap import is_compiled
from resect.errors import AttachError


class CompiledCode:
    """What is compiled of a model while a method is attached that opens, closes or freezes its blocks.

    Torch compiles a function 8 times, then runs it uncompiled without a word. Around many blocks, or for all the
    layers of one class together, that is used up in a few steps. ``wrapped``: the method was given what
    ``torch.compile(model)`` returns.
    """

    def __init__(self, model: nn.Module, blocks: Blocks, name: str, wrapped: bool) -> None:
        self.name = name
        modules = dict(model.named_modules())
        owners = by_owner(blocks)
        above = {".".join(o.split(".")[:depth]) for o in owners if o for depth in range(o.count(".") + 1)}
        found = [repr(path) if path else "The model" for path in sorted(above) if is_compiled(modules[path])]
        if found or wrapped:
            raise _refused(name, found[0] if found else "The model", "as a whole")
        self._calls = [(owner, modules[owner], modules[owner]._compiled_call_impl) for owner in owners]
        for owner, _, call in self._calls:
            if call is not None and getattr(call, "_isolate_recompiles_id", -1) < 0:
                raise _refused(name, repr(owner) if owner else "The model", "with 8 graphs for all of its class")

    def begin(self, gates: Gates) -> None:
        """Begin a step; raises ``AttachError`` if an owner of blocks was compiled since the method was attached."""
        for owner, module, call in self._calls:
            if module._compiled_call_impl is not call:
                raise AttachError(f"{owner!r} was compiled while {self.name} is attached. Compile first, then attach.")
        self._tracings = tracings()
        for gate in gates:
            gate.noted = False

    def end(self, gates: Gates) -> None:
        """End a step; raises ``AttachError`` if every block ran inside code that was compiled around all of them."""
        if tracings() != self._tracings and not any(gate.noted for gate in gates):
            raise _refused(self.name, "The model", "as a whole")


def _refused(name: str, what: str, how: str) -> AttachError:
    return AttachError(
        f"{what} is compiled {how}, and {name} changes what runs from step to step: after 8 changes it would run "
        "uncompiled, without a word. Leave that out, and before attaching write resect.compile(model, blocks), which "
        "compiles block by block."
    )
