"""Which layers of a model can change places.

Swapping two layers must be the same as swapping their weights. So they must be built alike: one class, parameters of
the same names and shapes, the same plain attributes, inputs and outputs of the same shapes. Those with a downsampling
block stay where they are, as in the paper; so do shared ones. A layer that knows its own number (``layer_idx``) may
move only if the output is the same whichever number it is told.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resect.analyse.reorder import reordered
from resect.analyse.subsets import downsamples
from resect.blocks.block import Blocks
from resect.blocks.metrics import logits_of
from resect.blocks.modes import kept_buffers, kept_modes
from resect.blocks.unwrap import unwrap
from resect.errors import BlocksError, InputError, check_all, quoted


def swappable(model: nn.Module, blocks: Blocks) -> tuple[list[str], list[list[str]]]:
    """Return the layers of the model in order of execution, and the groups of them that can change places.

    Raises ``BlocksError``, saying which layers and why, if no two can.
    """
    if blocks.example is None:
        raise BlocksError("Reordering runs the model on its example, and these blocks hold none. Call find_blocks.")
    root, layers = unwrap(model), blocks.layers()
    with kept_modes(model), kept_buffers(model), torch.no_grad():
        model.eval()
        calls = _calls(model, blocks, list(layers))
        why = {name: reason for name, inside in layers.items() if (reason := _fixed(root, name, inside, calls))}
        order = sorted((name for name in layers if len(calls[name]) == 1), key=lambda name: calls[name][0][0])
        alike: dict[Any, list[str]] = {}
        for name in order:
            if name not in why:
                alike.setdefault(_build(root.get_submodule(name), calls[name][0][1]), []).append(name)
        groups: dict[Any, list[str]] = {}
        for key, members in alike.items():
            numbers = _numbers(root, members) if len(members) > 1 else []
            if numbers and _numbers_matter(model, blocks, members, numbers):
                knows = f"it knows its own number ({numbers[0]!r}), and what the model computes hangs on that"
                why |= dict.fromkeys(members, knows)
                continue
            for name in members:
                told = tuple(item for item in _attributes(root.get_submodule(name)).items() if item[0] not in numbers)
                groups.setdefault((key, told), []).append(name)
    found = [members for members in groups.values() if len(members) > 1]
    if not found:
        why |= {
            m: "no other layer is built like it (its class, parameters, settings and shapes)"
            for members in groups.values()
            for m in members
        }
        reasons = ((reason, [name for name in why if why[name] == reason]) for reason in dict.fromkeys(why.values()))
        problems = (f"{quoted(names, 3)}: {reason}" for reason, names in reasons)
        check_all(problems, f"The layers of this {type(root).__name__} cannot be reordered", BlocksError)
    return order, found


def _calls(model: nn.Module, blocks: Blocks, layers: Sequence[str]) -> dict[str, list[tuple[int, Any]]]:
    """Run the example; return per layer its calls: when, and the shapes of what it took and gave."""
    calls: dict[str, list[tuple[int, Any]]] = {name: [] for name in layers}
    begun: list[str] = []
    root = unwrap(model)

    def begin(name: str) -> None:
        begun.append(name)

    def end(name: str, *passed: Any) -> None:
        shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(passed) if isinstance(leaf, Tensor))
        calls[name].append((begun.index(name), shapes))

    hooks = []
    for name in filter(None, layers):
        layer = root.get_submodule(name)
        hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: begin(name)))
        hooks.append(layer.register_forward_hook(lambda _, *passed, name=name: end(name, *passed), with_kwargs=True))
    try:
        assert blocks.example is not None
        blocks.example.run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _fixed(root: nn.Module, name: str, inside: Blocks, calls: dict[str, list[Any]]) -> str:
    """Why this layer must stay where it is, or nothing."""
    if not name or any(name != other and f"{other}.".startswith(f"{name}.") for other in calls):
        return "it holds other layers"
    if any(downsamples(block) for block in inside):
        return "its shortcut is more than the identity (a downsampling block)"
    layer = root.get_submodule(name)
    places = sum(module is layer for _, module in root.named_modules(remove_duplicate=False))
    if places > 1 or len(calls[name]) > 1:
        return f"it is shared: it stands in {places} and runs in {len(calls[name])} places"
    if not calls[name]:
        return "it is not called as a module, so another one in its place would not be either"
    inner = {id(module) for module in layer.modules()}
    own = {id(parameter) for parameter in layer.parameters()}
    outside = (module for module in root.modules() if id(module) not in inner)
    if any(id(parameter) in own for module in outside for parameter in module._parameters.values()):
        return "it shares parameters with other modules"
    return ""


def _build(layer: nn.Module, shapes: Any) -> Any:
    return type(layer), tuple((key, tuple(p.shape), p.dtype) for key, p in layer.named_parameters()), shapes


def _attributes(layer: nn.Module) -> dict[str, str]:
    """The plain attributes of a layer's modules, where those hold parameters: strides, windows, scales."""
    return {
        f"{path}.{key}".lstrip("."): repr(value)
        for path, module in layer.named_modules()
        if next(module.parameters(), None) is not None
        for key, value in vars(module).items()
        if type(value) in (int, float, bool, str, tuple, type(None)) and not key.startswith("_") and key != "training"
    }


def _numbers(root: nn.Module, layers: Sequence[str]) -> list[str]:
    """The attributes in which each of these layers holds the last number of its own name."""
    known = [_attributes(root.get_submodule(name)) for name in layers]
    own = [(re.findall(r"\d+", name) or [""])[-1] for name in layers]
    return [path for path in known[0] if all(k.get(path) == n for k, n in zip(known, own, strict=True))]


def _numbers_matter(model: nn.Module, blocks: Blocks, layers: Sequence[str], numbers: Sequence[str]) -> bool:
    """Whether the model computes something else when layers that moved are told the number of their new place."""
    order = [*range(1, len(layers)), 0]
    modules = [unwrap(model).get_submodule(name) for name in layers]

    def run() -> Tensor:
        assert blocks.example is not None
        return logits_of(blocks.example.run(model))

    def told(arrangement: Sequence[int]) -> None:
        for path in numbers:
            owner, _, key = path.rpartition(".")
            for module, number in zip(modules, arrangement, strict=True):
                setattr(module.get_submodule(owner), key, number)

    own = [int(re.findall(r"\d+", name)[-1]) for name in layers]
    try:
        with reordered(model, layers, order):
            moved = run()
            told([own[order.index(place)] for place in range(len(layers))])
            return not torch.equal(moved, run())
    except (InputError, RuntimeError, LookupError):
        return True
    finally:
        told(own)
