"""What several processes that train together must agree on, and how they ask each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from resect.blocks.example import device_of
from resect.errors import InputError

Result = TypeVar("Result")


def several_ranks() -> bool:
    """Whether other processes train with this one."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def rank_of_ranks() -> tuple[int, int]:
    """Return this process's rank and how many there are."""
    if not several_ranks():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gathered(value: Tensor) -> Tensor:
    """Return the ``value`` of every process, stacked in their order; every process must call this.

    The answer is the same everywhere to the bit, and a NaN stays one, which no reduction promises.
    """
    if not several_ranks():
        return value[None]
    flat = value.detach().reshape(-1)  # a compiled exchange of a tensor without dimensions fails
    everyones = [torch.empty_like(flat) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyones, flat)
    return torch.stack(everyones).reshape(-1, *value.shape)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Replace ``value`` by its mean over all processes, in place; every process must call this."""
    if several_ranks():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


def least_over_ranks(value: Tensor) -> Tensor:
    """Replace ``value`` by its least over all processes, in place; every process must call this."""
    if several_ranks():
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MIN)
    return value


def meeting_place(model: nn.Module) -> torch.device:
    """Return the device on which the processes can exchange tensors: the model's, or the GPU that NCCL needs."""
    device = device_of(model) or torch.device("cpu")
    if device.type in ("cpu", "meta") and torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "meta" else device


def said_by_all(facts: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Return the ``facts`` (JSON) of every process, in their order; every process must call this.

    One collective of two numbers while all say the same, a second one of the text where they do not.
    """
    text = json.dumps(facts, sort_keys=True).encode()
    digest = int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)
    told = gathered(torch.tensor([digest, len(text)], device=device)).tolist()
    if all(row == told[0] for row in told):
        return [facts] * len(told)
    longest = max(length for _, length in told)
    texts = gathered(torch.tensor(list(text.ljust(longest)), dtype=torch.uint8, device=device)).cpu()
    return [json.loads(bytes(row.tolist())) for row in texts]


def together(work: Callable[[], Result]) -> list[Result]:
    """Run ``work`` on every process and return what each of them returned, in their order.

    Where it raises on some process, it raises on all: its own error there, ``InputError`` elsewhere.
    """
    if not several_ranks():
        return [work()]
    own, error, said = None, None, ""
    try:
        own = work()
    except Exception as raised:
        error, said = raised, f"{type(raised).__name__}: {raised}"
    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, (own, said))
    if error is not None:
        raise error
    failed = [f"process {rank}: {said}" for rank, (_, said) in enumerate(everyones) if said]
    if failed:
        raise InputError(f"Another process could not go on. {'; '.join(failed)}")
    return [value for value, _ in everyones]
