"""Put a gate on everything that a block intercepts, and take it off again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from torch import nn

from resect.blocks.block import ResidualBlock
from resect.blocks.frame import Frame
from resect.blocks.intercept import Part, Port, port_of, release
from resect.blocks.state import PORT, REMOVED, Gate
from resect.blocks.unwrap import is_compiled
from resect.blocks.upkeep import Upkeep
from resect.errors import AttachError

_FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


def install(modules: Mapping[str, nn.Module], gate: Gate, undo: ExitStack) -> None:
    """Intercept what a gate's block names; ``undo`` gets what takes it all back, also when this raises."""
    block = gate.block
    for position, name in enumerate(block.modules):
        module = modules[name]
        part = _part(port_of(module), block, position, Upkeep.of(modules[""], name))
        part.gates.append(gate)
        undo.callback(_take_off, module, part, gate)
        if block.calls[position] is not None:
            _count(module, modules[block.counted_in or ""], undo)
    owner = modules[block.owner]
    ends_raw = block.end is not None and block.end >= len(block.modules)
    if block.entries or block.unwrap or block.spreads or ends_raw or is_compiled(owner):
        frame = _frame(port_of(owner), block, modules)
        frame.gates.append(gate)
        undo.callback(_take_off, owner, frame, gate)
        if block.owner_call is not None:
            _count(owner, modules[block.counted_in or ""], undo)
    for name in _above(block.modules):
        if isinstance(modules[name], _FUSED):
            port = port_of(modules[name])
            port.fast_path_off += 1
            undo.callback(_fast_path_back, modules[name])


def _above(names: tuple[str, ...]) -> set[str]:
    """Return the names of every module around these, the model itself ("") included."""
    return {".".join(name.split(".")[:depth]) for name in names for depth in range(name.count(".") + 1)}


def _part(port: Port, block: ResidualBlock, position: int, upkeep: Upkeep) -> Part:
    call = block.calls[position]
    for part in port.parts:
        if part.block == block and part.position == position:
            return part
        if part.block != block and (call is None or part.call is None or part.call == call):
            raise AttachError(_held(block, block.modules[position], part))
    port.parts.append(Part(block, position, upkeep))
    return port.parts[-1]


def _held(block: ResidualBlock, module: str, part: Part) -> str:
    holders = ", ".join(dict.fromkeys(gate.holder for gate in part.gates))
    if any(gate.holder == REMOVED for gate in part.gates):
        return (
            f"{block.name!r} cannot be controlled: {module!r} also ran for {part.block.name!r}, which was removed, and "
            "from then on its calls cannot be told apart. Remove all at once, from the uncut model."
        )
    return (
        f"{block.name!r} and {part.block.name!r} ({holders}) share {module!r}: one lies in the other's branch, or they "
        "were found on different examples. Attach one of the two at a time."
    )


def _frame(port: Port, block: ResidualBlock, modules: Mapping[str, nn.Module]) -> Frame:
    for frame in port.frames:
        if frame.block == block:
            return frame
    holders = {name: modules[name.rpartition(".")[0]] for name in block.raw_parameters}
    port.frames.append(Frame(block, holders))
    return port.frames[-1]


def _count(module: nn.Module, around: nn.Module, undo: ExitStack) -> None:
    port = port_of(module)
    port.counted += 1
    counters = port_of(around).counters
    counters.append(port)
    undo.callback(_stop_counting, module, port, around)


def _stop_counting(module: nn.Module, port: Port, around: nn.Module) -> None:
    port.counted -= 1
    counters = port_of(around).counters
    del counters[next(place for place, counter in enumerate(counters) if counter is port)]
    release(around)
    release(module)


def _fast_path_back(module: nn.Module) -> None:
    port_of(module).fast_path_off -= 1
    release(module)


def _take_off(module: nn.Module, holder: Part | Frame, gate: Gate) -> None:
    port = port_of(module)
    if gate.state != "open":
        gate.version += 1  # a recomputation after this must not pass for the forward pass it repeats
    holder.gates[:] = [other for other in holder.gates if other is not gate]
    if not holder.gates:
        port.parts = [part for part in port.parts if part is not holder]
        port.frames = [frame for frame in port.frames if frame is not holder]
    release(module)


def strip(model: nn.Module) -> None:
    """Take every gate off a model, whoever attached it."""
    for module in model.modules():
        if PORT in module.__dict__:
            module.__dict__[PORT] = Port()
            release(module)
