"""A method's hook on a module, which stays with the original of a copied model; and hooks of others kept silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def nothing(*_: Any, **__: Any) -> None:
    """What stands in a copy of the model for a hook that belongs to the original."""


class Hook:
    """Calls a function; copied or pickled it is ``nothing``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    return nothing


@contextmanager
def accumulating_in_silence(model: nn.Module) -> Iterator[None]:
    """Keep what users run whenever a gradient has been accumulated from running: an optimizer may step there."""
    hooks = [getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in model.parameters()]
    before = [(found, dict(found)) for found in hooks if found]
    for found, _ in before:
        found.clear()
    try:
        yield
    finally:
        for found, kept in before:
            found.update(kept)
