"""Save a cut timm model as a checkpoint, with the ``timm.create_model`` line that builds and loads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from resect.blocks.example import Example
from resect.blocks.gate import check_detached
from resect.blocks.plan import Plan
from resect.blocks.trace import quiet
from resect.errors import InputError, ProofError, quoted
from resect.files import write_with
from resect.shrink.compact import gone_from
from resect.shrink.history import COMPACT
from resect.shrink.structure import differences, unequal, values

_ONE_NUMBER = ("depth", "num_blocks", "num_layers", "depths", "layers")
_TRAINING_ONLY = ("DropPath", "Dropout", "Identity")
_PER_STAGE = ("depths", "layers", "depth", "num_blocks")


def save(small: nn.Module, path: str | Path, example: Any, **options: Any) -> str:
    """Write a checkpoint of a cut timm model and return the line that builds and loads it without Resect.

    The line is found by building: a model of the same name with fewer layers must take the weights, key by
    key, and give the same outputs bit for bit. It is kept in the file's metadata too, under ``timm``.

    Parameters
    ----------
    small: a timm model cut by ``resect.remove(..., compact=True)`` of which whole layers went.
    path: the file, ending in ``.safetensors``.
    example: what both models are run on, as in ``find_blocks``.
    options: what ``timm.create_model`` was called with beyond the name, where the model does not tell:
        ``num_classes``, ``img_size`` and ``in_chans`` are known.

    Raises
    ------
    InputError: no such argument of ``create_model`` builds this model: what was tried, and how it failed.
    ProofError: the file that was written does not give the model back.

    >>> resect.integrations.timm.save(small, "cut.safetensors", x)
    "timm.create_model('resnet50', layers=(2, 4, 5, 3), checkpoint_path='cut.safetensors')"
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"timm reads safetensors from files named *.safetensors, not {path.name!r}.")
    check_detached(small)
    name = _name(small)
    gone = gone_from(small)
    if gone:
        raise InputError(
            f"timm has no argument for layers that lack a branch, and here {quoted(gone, 4)} are gone. "
            "Use resect.save and resect.load, or remove whole layers with compact=True."
        )
    sample, options = Example.of(example), {**_known(small), **options}
    with quiet(small):
        expected = values(sample.run(small))
    arguments = _search(small, name, options, sample, expected)
    weights = {key: value.detach().cpu().clone().contiguous() for key, value in small.state_dict().items()}
    shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    line = f"timm.create_model({name!r}, {shown}, checkpoint_path={str(path)!r})"
    write_with(path, lambda place: save_file(weights, place, metadata={"timm": line, "format": "pt"}))
    try:
        difference = _differs(_create(name, **arguments, checkpoint_path=str(path)), small, sample, expected)
    except BaseException:
        path.unlink()
        raise
    if difference:
        path.unlink()
        raise ProofError(f"{line} does not give the model that was saved: {difference}.")
    return line


def _name(small: nn.Module) -> str:
    card = getattr(small, "pretrained_cfg", None)
    if not isinstance(card, Mapping) or not card.get("architecture"):
        raise InputError(f"This {type(small).__name__} does not carry the name that timm.create_model builds it by.")
    import timm.models

    name, tag = str(card["architecture"]), card.get("tag")
    usual = timm.models.get_pretrained_cfg(name)
    return f"{name}.{tag}" if tag and usual is not None and usual.tag != tag else name


def _known(small: Any) -> dict[str, Any]:
    """Return the arguments that differ from the architecture's usual ones and that the model tells."""
    card, known = small.pretrained_cfg, {}
    if getattr(small, "num_classes", card.get("num_classes")) != card.get("num_classes"):
        known["num_classes"] = small.num_classes
    size = getattr(getattr(small, "patch_embed", None), "img_size", None)
    if size is not None and tuple(size) != tuple(card["input_size"][1:]):
        known["img_size"] = tuple(size)
    stem = card.get("first_conv")
    weights = small.state_dict().get(f"{stem}.weight") if isinstance(stem, str) else None
    if weights is not None and weights.dim() == 4 and weights.shape[1] != card["input_size"][0]:
        known["in_chans"] = int(weights.shape[1])
    return known


def _search(
    small: nn.Module, name: str, options: dict[str, Any], example: Example, expected: list[Any]
) -> dict[str, Any]:
    """Return the first arguments that build the model."""
    tried = {}
    for arguments in _candidates(small):
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        try:
            built = _create(name, **arguments, **options)
            built.load_state_dict(small.state_dict(), strict=True)
            tried[shown] = _made_otherwise(built, small) or _differs(built, small, example, expected)
        except TypeError as error:  # how a constructor refuses an argument
            tried[shown] = f"not an argument of it ({error})"
        except Exception as error:  # anything that a constructor may do with an argument that means something else
            tried[shown] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if not tried[shown]:
            return {**arguments, **options}
    lines = "".join(f"\n  - {shown}: {reason}" for shown, reason in tried.items())
    if all(reason.startswith("not an argument") for reason in tried.values()):
        raise InputError(
            f"timm.create_model({name!r}) has no argument for the number of layers, so timm alone cannot build the "
            f"model that is left. Use resect.save and resect.load. Tried:{lines}"
        )
    raise InputError(
        f"No argument of timm.create_model({name!r}) builds the model that is left. If you built it with further "
        f"arguments, pass them too; else use resect.save and resect.load. Tried:{lines}"
    )


def _create(name: str, **arguments: Any) -> nn.Module:
    import timm

    with torch.random.fork_rng():
        return timm.create_model(name, **arguments)


def _differs(built: nn.Module, small: nn.Module, example: Example, expected: list[Any]) -> str:
    weight = next(small.parameters())
    built = built.to(weight.device, weight.dtype)
    with quiet(built):
        return unequal(expected, values(example.run(built)))


def _made_otherwise(built: nn.Module, small: nn.Module) -> str:
    """Say what differs in the layers whatever the example: a window's shift that goes by the layer's number."""
    random = [p for m in (built, small) for p, part in m.named_modules() if type(part).__name__ in _TRAINING_ONLY]
    layers = [layer for container in _containers(small) for layer in small.get_submodule(container).children()]
    return "; ".join(differences(built, small, random, layers)[:3])


def _containers(small: nn.Module) -> list[str]:
    plan = getattr(small, "resect_plan", None)
    layers = plan.evidence.get(COMPACT, {}).get("layers", ()) if isinstance(plan, Plan) else ()
    return sorted({layer.rpartition(".")[0] for layer in layers})


def _candidates(small: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the arguments that may say how many layers there are now."""
    containers = _containers(small)
    if not containers:
        raise InputError("No whole layer went from this model. Remove with resect.remove(..., compact=True).")
    stages = {re.sub(r"\d+", "#", container, count=1) for container in containers}
    if len(stages) > 1:
        raise InputError(f"Layers went from {quoted(containers)}, which no one argument of timm.create_model counts.")
    pattern = re.compile(re.escape(stages.pop()).replace(r"\#", r"(\d+)"))
    found = {path: module for path, module in small.named_modules() if pattern.fullmatch(path)}
    lengths = tuple(len(list(module.children())) for module in found.values())
    if pattern.groups:
        yield from ({name: lengths} for name in _PER_STAGE)
    else:
        yield from ({name: lengths[0]} for name in _ONE_NUMBER)
