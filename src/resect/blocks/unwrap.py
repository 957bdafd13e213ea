"""The model inside a wrapper; and the models whose branches cannot be seen, each refused by name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from resect.errors import BlocksError

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

# Name of a class among a module's ancestors -> what is wrong, what to do. By name: nothing is imported for it.
_REFUSED = {
    "FullyShardedDataParallel": (
        "is wrapped by FullyShardedDataParallel, which turns its parameters into flat pieces",
        "Find the blocks before wrapping: their names hold for any copy of the model. Gates need `fully_shard` "
        "(FSDP2), which leaves the modules as they are",
    ),
    "FSDPModule": (
        "is sharded by fully_shard (FSDP2), so that this process holds pieces of its parameters",
        "Find the blocks before fully_shard, also on another process or a copy: the names do not change, and "
        "resect.gates and the methods take them on the sharded model",
    ),
    "DeepSpeedEngine": (
        "is held by a DeepSpeedEngine",
        "Find the blocks before deepspeed.initialize: their names hold for engine.module",
    ),
}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model that DistributedDataParallel, DataParallel or torch.compile wraps; any other as it is.

    What is done to the model inside takes effect through the wrapper too, so blocks are named as in the model.
    """
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # what torch.compile(model) returns
            model = model.get_submodule("_orig_mod")
        else:
            return model


def is_wrapped_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile(model)`` is around a model, or between it and another wrapper."""
    while isinstance(model, _WRAPPERS):
        model = model.module
    return type(model).__name__ == "OptimizedModule"


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled in place, by ``module.compile()``."""
    return getattr(module, "_compiled_call_impl", None) is not None


def check_visible(model: nn.Module) -> None:
    """Raise ``BlocksError`` for a model whose branches cannot be seen, saying which part and what to do."""
    if isinstance(model, torch.jit.ScriptModule):
        raise BlocksError(
            f"This model is a {type(model).__name__}: compiled by torch.jit, it runs without calling its modules. Find "
            "the blocks of the Python model it was made from; after closing or removing, script that."
        )
    for name, module in model.named_modules():
        what = f"{name!r} ({type(module).__name__})" if name else f"This {type(module).__name__}"
        for ancestor in type(module).__mro__:
            if ancestor.__name__ in _REFUSED:
                problem, remedy = _REFUSED[ancestor.__name__]
                raise BlocksError(f"{what} {problem}. {remedy}.")
        if _is_statically_quantised(module):
            raise BlocksError(
                f"{what} is statically quantised: its additions are fused into quantised operations, which no gate "
                "can reach. Find and remove blocks on the float model, then quantise what is left."
            )
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
                raise BlocksError(
                    f"Parameter {parameter_name!r} of {what} is a DTensor (tensor parallel): this process holds a "
                    "piece of it. Find the blocks on the whole model first: the names do not change."
                )
    on_meta = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    total = sum(1 for _ in model.parameters())
    if on_meta and any("_hf_hook" in module.__dict__ for module in model.modules()):
        raise BlocksError(
            f"{len(on_meta)} of {total} parameters are offloaded by accelerate (for instance {on_meta[0]!r}), "
            "there only while their own module runs. Find the blocks before offloading, or on a copy "
            "on the meta device: their names hold here too."
        )
    if 0 < len(on_meta) < total:
        raise BlocksError(
            f"{len(on_meta)} of the model's {total} parameters are on the meta device (for instance {on_meta[0]!r}), "
            "the others are not, so it cannot run. Load them; or move all of it, model.to('meta'), to find blocks "
            "without computing."
        )


def _is_statically_quantised(module: nn.Module) -> bool:
    home = type(module).__module__
    quantised = home.startswith("torch.ao.nn.") and ".quantized" in home and ".dynamic" not in home
    # FloatFunctional stands in float models made ready for quantisation, packed parameters in dynamic ones too.
    return (
        quantised
        and ".reference" not in home
        and not any(word in type(module).__name__ for word in ("Float", "PackedParams"))
    )


@contextmanager
def eager() -> Iterator[None]:
    """Run parts that torch.compile compiled (``module.compile()``, a compiled child or function) as written.

    A compiled part calls no module, so nothing of it could be traced. Checkpointed parts do not warn that no
    gradient will flow: none is wanted.
    """
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
