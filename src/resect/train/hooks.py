"""A method's hook on a module: it stays with the original when the model is copied or pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
