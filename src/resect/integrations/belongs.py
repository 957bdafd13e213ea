"""What every engine's callback checks before a training begins."""

from __future__ import annotations

from torch import nn

from resect.errors import AttachError
from resect.train.method import Method


def check_belongs(method: Method, trained: nn.Module) -> None:
    """Raise ``AttachError`` if the method's model is no part of the one that is trained."""
    if not any(module is method.model for module in trained.modules()):
        raise AttachError(
            f"This {method.name} is on another model (a {type(method.model).__name__}) than the one that is trained "
            f"(a {type(trained).__name__}): a copy, or one that was built anew. Make the method of the model that "
            "the trainer holds."
        )


def not_in_checkpoint(method: Method) -> AttachError:
    """Return the error for a resumed training whose checkpoint knows nothing of the method."""
    return AttachError(
        f"The checkpoint has no state of this {method.name}: it was written by a training without it, or with it on "
        "other blocks. To begin with the method now, load the weights alone and start a new training."
    )
