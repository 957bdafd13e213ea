"""Delete layers from a container and repair what counts or numbers them; every change can be taken back.

What is repaired: the names in the container, the remaining layers' own indices (``layer_idx`` …), and, on the
modules above and on their ``config`` objects, the number of layers, every list with an entry per layer, every
list of layer indices. The kept layers keep their own entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from resect.blocks.upkeep import Upkeep

_INDEX = re.compile(r"((layer|block|depth)_?)?(idx|id|index|number|num|nr)")
_COUNT = re.compile(r"(n|num|number_of)?_?(hidden_|encoder_|decoder_|transformer_)*(layers?|blocks?|depth)")
_PER_STAGE = ("depths", "layers", "num_blocks", "n_blocks", "num_layers", "depth")
_INDEX_LIST = re.compile(r".*(layers|indexes|indices|idxs|idx|ids)")
# Lists whose length has nothing to do with the number of layers, whatever it happens to be.
_NOT_PER_LAYER = re.compile(
    r"architectures|.*(mean|std|names|features|kernel|strides?|token).*|(image|patch|hidden)_?sizes?"
)

Undo = list[Callable[[], None]]


def shorten(model: nn.Module, container: str, kept: Sequence[int], undo: Undo) -> dict[str, str]:
    """Keep the children at ``kept`` (places, ascending) of a container; repair everything that counts them.

    Numbered children are renumbered; named ones keep their names. Returns {new path: old path} of the
    layers that stay. Each change appends to ``undo``; run it backwards to take everything back.
    """
    holder = model.get_submodule(container)
    before = dict(holder._modules)
    names = list(before)
    numbered = names == [str(place) for place in range(len(names))]
    children = [before[name] for name in names]
    _renumber(children, kept, undo)
    after = {str(new) if numbered else names[old]: children[old] for new, old in enumerate(kept)}
    _refill(holder, after, before, undo)
    seen: set[int] = set()
    for path in _ancestors(container):
        above = model.get_submodule(path)
        for owner in (above, getattr(above, "config", None)):
            if owner is None or id(owner) in seen or not hasattr(owner, "__dict__"):
                continue
            seen.add(id(owner))
            own = owner is not getattr(model, "config", None)  # a stack's own copy speaks of that stack alone
            _repair(owner, container, len(names), kept, own, undo)
    prefix = container + "." if container else ""
    return {prefix + name: prefix + names[old] for name, old in zip(after, kept, strict=True)}


def put_back(undo: Undo) -> None:
    """Take back every change, the last first."""
    while undo:
        undo.pop()()


def _refill(holder: nn.Module, after: Mapping[str, Any], before: Mapping[str, Any], undo: Undo) -> None:
    def fill(content: Mapping[str, Any]) -> None:
        holder._modules.clear()
        holder._modules.update(content)

    undo.append(lambda: fill(before))
    fill(after)


def _set(owner: Any, name: str, value: Any, undo: Undo) -> None:
    before = getattr(owner, name)
    undo.append(lambda: setattr(owner, name, before))
    setattr(owner, name, value)


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _renumber(children: Sequence[nn.Module | None], kept: Sequence[int], undo: Undo) -> None:
    """Give every kept layer, wherever inside it knows its own index, its new one."""
    found: dict[tuple[str, str], dict[int, tuple[nn.Module, int]]] = {}
    for place, child in enumerate(children):
        for path, module in child.named_modules() if child is not None else ():
            upkeep = vars(module).get("upkeep")
            if place in kept and isinstance(upkeep, Upkeep) and upkeep:
                _set(module, "upkeep", upkeep.shifted(kept.index(place) - place), undo)
            for name, value in vars(module).items():
                if type(value) is int and _INDEX.fullmatch(name):
                    found.setdefault((path, name), {})[place] = (module, value)
    for (_, name), places in found.items():
        offsets = {value - place for place, (_, value) in places.items()}
        if len(offsets) != 1 or not offsets <= {0, 1}:
            continue  # not the layer's own index
        for place, (module, value) in places.items():
            if place in kept:
                _set(module, name, value - place + kept.index(place), undo)


def _repair(owner: Any, container: str, count: int, kept: Sequence[int], own: bool, undo: Undo) -> None:
    fields = {name: value for name, value in vars(owner).items() if not name.startswith("_")}
    counts = [
        name for name, value in fields.items() if type(value) is int and value == count and _COUNT.fullmatch(name)
    ]
    for name in _of_this_side(counts, container, own):
        _set(owner, name, len(kept), undo)
    for name, value in fields.items():
        if type(value) is int and name.startswith("first_k"):  # the first k layers are of another kind
            _set(owner, name, sum(place < value for place in kept), undo)
    stage = next((int(part) for part in reversed(container.split(".")[:-1]) if part.isdigit()), None)
    for name, value in fields.items():
        if not isinstance(value, (list, tuple)) or not value or _NOT_PER_LAYER.fullmatch(name):
            continue
        new = _without_gone(name, value, count, kept, stage)
        if new is not None:
            _set(owner, name, type(value)(new), undo)


def _without_gone(name: str, value: Sequence[Any], count: int, kept: Sequence[int], stage: int | None) -> Any:
    ints = all(type(item) is int for item in value)
    if name in _PER_STAGE and ints:
        if stage is None or stage >= len(value) or value[stage] != count:
            return None
        return [len(kept) if place == stage else item for place, item in enumerate(value)]
    numbers = ints and _INDEX_LIST.fullmatch(name) and list(value) == sorted(set(value))
    if numbers and (len(value) != count or count > 2):  # [0, 1] of two layers are two entries
        return [kept.index(item) for item in value if item in kept] if 0 <= value[0] <= value[-1] < count else None
    return [value[place] for place in kept] if len(value) == count else None


def _of_this_side(names: list[str], container: str, own: bool) -> list[str]:
    """Choose between an encoder's and a decoder's numbers where both are equal."""
    other = {"decoder": "encoder", "encoder": "decoder"}
    side = next((word for word in other if word in container), None)
    here = [name for name in names if side is None or other[side] not in name]
    sided = [name for name in here if side is not None and side in name]
    if side == "decoder" and sided and not own:
        return sided
    return here
