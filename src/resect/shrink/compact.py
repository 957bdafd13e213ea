"""Delete the layers of which a removal left nothing, so that containers are really shorter.

A layer may go when it hands its input on unchanged, in eval and in train mode and whatever the weights that it
still has (a norm that only fed the branches). What stays is proven: the output and every kept layer equal bit
for bit on the example, and for a transformers model the repaired ``config`` builds exactly these modules. Else
it is put back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from resect.blocks.absent import Absent
from resect.blocks.example import Example
from resect.blocks.state import PORT
from resect.blocks.trace import quiet
from resect.blocks.upkeep import Upkeep
from resect.errors import InputError
from resect.shrink.history import original
from resect.shrink.repair import Undo, put_back, shorten
from resect.shrink.structure import differences, same, standard, under, unequal, values


def compact(small: nn.Module, example: Example) -> dict[str, Any]:
    """Delete from a cut model every whole layer that the removal emptied; the model is changed in place.

    Parameters
    ----------
    small: the model after its blocks were taken out.
    example: what the proof runs on.

    Returns
    -------
    JSON for the plan's evidence: ``layers``, the paths deleted; ``moved``, {new path: old path} of modules;
    ``keys``, {new key: old key} of the whole ``state_dict``; ``kept``, {layer: why it could not go}.

    Raises
    ------
    InputError: no layer can go; every reason is listed and the model is as it was.
    """
    candidates, kept = _touched(small), dict[str, str]()
    with quiet(small):
        passing = [layer for layer in candidates if not kept.setdefault(layer, _changes(small, layer, example))]
        deleted = passing if passing and not _fault(small, passing, example) else []
        for layer in passing if not deleted else ():
            kept[layer] = _fault(small, [*deleted, layer], example)
            if not kept[layer]:
                deleted = [*deleted, layer]
    kept = {layer: reason for layer, reason in kept.items() if reason}
    if not deleted:
        kept = kept or dict.fromkeys(_touched(small, alone=True), "it is the only one of its class there")
        reasons = "".join(f"\n  - {layer}: {reason}" for layer, reason in kept.items()) or " No layer lost a module."
        raise InputError(
            "compact=True deletes those children of an nn.ModuleList or nn.Sequential of which nothing is left, and "
            f"here is none.{reasons}\nRemove without compact=True, and use resect.save and resect.load."
        )
    return {**delete_layers(small, deleted), "kept": kept}


def delete_layers(model: nn.Module, layers: Iterable[str], undo: Undo | None = None) -> dict[str, Any]:
    """Delete these layers from their containers and repair what counts or numbers the others.

    Returns ``layers``, ``moved`` and ``keys`` as ``compact`` does. Nothing is checked: see ``compact``.
    """
    layers, undo = list(layers), [] if undo is None else undo
    before = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
    for container in sorted({layer.rpartition(".")[0] for layer in layers}, key=len, reverse=True):
        names = list(model.get_submodule(container)._modules)
        prefix = container + "." if container else ""
        shorten(model, container, [place for place, name in enumerate(names) if prefix + name not in layers], undo)
    moved: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if original(path, moved) != before[id(module)]:
            moved[path] = before[id(module)]
    return {"layers": layers, "moved": moved, "keys": {key: original(key, moved) for key in model.state_dict()}}


def gone_from(model: nn.Module) -> list[str]:
    """Return the paths of the modules and raw parameters that were taken out of a cut model."""
    found = [path for path, module in model.named_modules() if isinstance(vars(module).get("upkeep"), Upkeep)]
    return found + [
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Absent)
    ]


def _touched(small: nn.Module, *, alone: bool = False) -> list[str]:
    """Return the layers that lost something; a stage of layers is none, nor one ``alone`` of its class: only these."""
    gone, touched = gone_from(small), list[str]()
    for path, container in small.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        # By name: a class that a gate has swapped keeps it.
        kinds = [type(layer).__qualname__ for layer in container._modules.values()]
        for name, kind in zip(container._modules, kinds, strict=True):
            layer = f"{path}.{name}".removeprefix(".")
            if (kinds.count(kind) == 1) == alone and any(under(place, [layer]) for place in gone):
                touched.append(layer)
    return [layer for layer in touched if not any(other.startswith(layer + ".") for other in touched)]


def _changes(small: nn.Module, path: str, example: Example) -> str:
    """Say how an emptied layer changes what goes through it; nothing where it hands it on, in both modes."""
    layer = small.get_submodule(path)
    if layer in gone_modules(small):
        return ""  # a branch that is itself a child of the container: the proof on the whole model decides
    if any(getattr(vars(module).get(PORT), "counted", 0) for module in layer.modules()):
        return "it shares modules with other layers, whose calls are told apart by their number"
    calls: list[Any] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(copy.deepcopy((args, kwargs)))

    hook = layer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        example.run(small)
    finally:
        hook.remove()
    # NaN in every weight that is left: if any mattered, what comes out would show it.
    unknown = {name: torch.full_like(weight, float("nan")) for name, weight in layer.named_parameters()}
    left = ", ".join(list(unknown)[:3]) + " …" * (len(unknown) > 3)
    modes = {"in eval mode": (False, {}), "in train mode": (True, {}), "by its weights": (False, unknown)}
    for mode, (training, weights) in modes.items():
        for args, kwargs in calls:
            given = _first([kwargs.get("hidden_states"), *args, *kwargs.values()])
            state = {**weights, **{name: buffer.clone() for name, buffer in layer.named_buffers()}}
            layer.train(training)  # the caller puts every mode back
            result = _first([functional_call(layer, state, *copy.deepcopy((args, kwargs)))])
            layer.eval()
            if given is None or result is None or not same(given, result):
                return f"it changes what goes through it {mode}" + f"; it still has weights: {left}" * bool(left)
    return "" if calls else "the example does not run it"


def gone_modules(model: nn.Module) -> list[nn.Module]:
    """Return what stands where modules were taken out."""
    return [module for module in model.modules() if isinstance(vars(module).get("upkeep"), Upkeep)]


def _first(items: Iterable[Any]) -> Tensor | None:
    return next((item for given in items for item in values(given)), None)


def _fault(small: nn.Module, layers: list[str], example: Example) -> str:
    """Delete layers, say what is then not as before (nothing if all is), and put them back."""
    containers = {layer.rpartition(".")[0] for layer in layers}
    watched = [
        child
        for container in containers
        for name, child in small.get_submodule(container)._modules.items()
        if child is not None and f"{container}.{name}".removeprefix(".") not in layers
    ]
    bases = [(m, _standard(m)) for m in _outermost_pretrained(small)]
    standards = [m for m, built in bases if built is not None and not differences(built, m, gone_from(m), watched)]
    expected = _observe(small, watched, example)
    undo: Undo = []
    try:
        delete_layers(small, layers, undo)
        problem = unequal(expected, _observe(small, watched, example))
        for model in standards if not problem else ():
            built = standard(model)
            differing = differences(built, model, gone_from(model), watched) if built is not None else []
            if differing:
                name = type(model).__name__
                problem = f"a {name} built from the repaired config would differ: {'; '.join(differing[:3])}"
        return problem
    except Exception as error:  # the model's own code, or its config's own checks, do without no layer
        return f"the model does not run without it: {type(error).__name__}: {error}"
    finally:
        put_back(undo)


def _standard(model: nn.Module) -> nn.Module | None:
    """Return what a model's class makes of its config; None where it needs more than that (adapters around a model)."""
    try:
        return standard(model)
    except Exception:
        return None


def _outermost_pretrained(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that can save and load themselves by their ``config``."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if hasattr(module, "save_pretrained") and not any(not top or under(path, [top]) for top in inside):
            inside.append(path)
            yield module


def _observe(model: nn.Module, watched: list[nn.Module], example: Example) -> list[Tensor]:
    """Return what the watched modules and the model give, as copies."""
    torch.manual_seed(0)
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        for module in watched:
            hook = module.register_forward_hook(lambda _, args, output: seen.extend(values(output)))
            hooks.callback(hook.remove)
        return [*values(example.run(model)), *seen]
