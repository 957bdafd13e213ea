"""A training method in Lightning's Trainer: attach, steps, checkpoints. For ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from resect.errors import InputError
from resect.integrations.belongs import check_belongs, not_in_checkpoint
from resect.train.method import Method

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _bases() -> tuple[type, ...]:
    """Return the ``Callback`` of whichever package is in use: they are two copies of the same code."""
    used = [name for name in _NAMES if name in sys.modules]
    for name in used or _NAMES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        used = used or [name]
    if not used:
        raise InputError('Neither lightning nor pytorch_lightning is installed: pip install "lightning>=2.6.4".')
    return tuple(sys.modules[name].Callback for name in used)


_Callback: Any = type("_Callback", _bases(), {})


class ResectCallback(_Callback):
    """See ``callback``."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self._attached = False

    @property
    def state_key(self) -> str:
        """The name of the state in a checkpoint; of two methods on one model no block is the same."""
        return f"resect {self.method.name} on {self.method.blocks[0].name}"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach, unless `with method:` has."""
        check_belongs(self.method, pl_module)
        if not self.method.attached:
            self.method.attach()
            self._attached = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a checkpoint that knows nothing of the method."""
        if trainer.global_step and not self.method.steps:
            raise not_in_checkpoint(self.method)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin a step where Lightning begins to accumulate gradients."""
        if pl_module.automatic_optimization and batch_idx % trainer.accumulate_grad_batches == 0:
            self.method.begin_step()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Detach what was attached."""
        if self._attached:
            self.method.detach()
            self._attached = False

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach: Lightning tears nothing down after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state."""
        return self.method.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the method's state."""
        self.method.load_state_dict(state_dict)


def callback(method: Method) -> ResectCallback:
    """Return a Lightning ``Callback`` that attaches the method, steps it, detaches it, and saves it in checkpoints.

    It is attached for the length of ``fit``, and detached after an exception too. A step begins where Lightning
    begins to accumulate gradients: once per optimizer step. The method's ``state_dict`` is in Lightning's own
    checkpoints, and ``fit(ckpt_path=…)`` takes it up. With manual optimization Lightning does not say where a step
    begins: call ``method.begin_step()`` in ``training_step`` yourself, the rest is as above.

    Raises ``AttachError`` when fitting begins: the method is on another model, or the checkpoint was written
    without it. On import, ``InputError`` if neither ``lightning`` nor ``pytorch_lightning`` is installed.

    >>> trainer = lightning.Trainer(callbacks=[resect.integrations.lightning.callback(method)])
    >>> trainer.fit(module, loader)
    """
    return ResectCallback(method)
