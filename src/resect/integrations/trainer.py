"""A training method in transformers' Trainer: steps, and the Trainer's own checkpoints."""

from __future__ import annotations

import base64
from typing import Any

import safetensors.torch
from torch import Tensor

from resect.errors import AttachError
from resect.integrations.belongs import check_belongs, not_in_checkpoint
from resect.train.method import Method

_TENSOR = "safetensors"


def callback(method: Method) -> Any:
    """Return a ``TrainerCallback`` that calls ``method.begin_step()`` and keeps its state in the Trainer's checkpoints.

    It begins a step before the first micro-batch of every optimizer step. The state goes into the checkpoint's
    ``trainer_state.json`` and is taken up by ``trainer.train(resume_from_checkpoint=…)``, whatever
    ``restore_callback_states_from_checkpoint`` says. Attaching is left to you, because the Trainer skips the end
    of a training that fails; so is the extra loss of a method that has one.

    Raises ``AttachError`` when training begins: the method is not attached, is on another model, or the
    checkpoint was written without it.

    >>> trainer = transformers.Trainer(model, arguments, train_dataset=data,
    ...                                callbacks=[resect.integrations.transformers.callback(method)],
    ...                                compute_loss_func=method.wrap(loss_fn))
    >>> with method:
    ...     trainer.train()
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class ResectCallback(TrainerCallback, ExportableState):
        # The Trainer may make a callback that it restores anew, from its class: so the class knows the method.
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"saved": pack(method.state_dict())}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
            check_belongs(method, found["model"])
            if not method.attached:
                raise AttachError(f"The {method.name} is not attached. Write `with method: trainer.train()`.")
            if state.global_step:
                if key not in state.stateful_callbacks:
                    raise not_in_checkpoint(method)
                method.load_state_dict(unpack(state.stateful_callbacks[key]["attributes"]["saved"]))

        def on_step_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
            found["model"].train()  # as the Trainer does a moment later; after an evaluation it is in eval mode still
            for parameter in method.parameters():
                parameter.grad = None  # the Trainer clears the model's alone
            method.begin_step()

    # The Trainer keeps states by the name of the class; of two methods on one model no block is the same.
    key = ResectCallback.__name__ = f"{method.name} on {method.blocks[0].name}"
    return ResectCallback()


def pack(value: Any) -> Any:
    """Return nested data with its tensors as text, bit for bit: what the Trainer keeps must be JSON."""
    if isinstance(value, Tensor):
        return {_TENSOR: base64.b64encode(safetensors.torch.save({"": value.contiguous()})).decode()}
    if isinstance(value, dict):
        return {key: pack(item) for key, item in value.items()}
    return [pack(item) for item in value] if isinstance(value, list) else value


def unpack(value: Any) -> Any:
    """Return what was given to ``pack``, tensors on the CPU."""
    if isinstance(value, dict) and set(value) == {_TENSOR}:
        return safetensors.torch.load(base64.b64decode(value[_TENSOR]))[""]
    if isinstance(value, dict):
        return {key: unpack(item) for key, item in value.items()}
    return [unpack(item) for item in value] if isinstance(value, list) else value
