"""How a net is trained as fast as the machine can: precision, memory layout, compiling; "auto" is measured."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import resect
from resect.errors import InputError, ResectError
from resect.lab.config.train import TrainConfig
from resect.lab.methods import NoMethod
from resect.lab.optimize import make_optimizer
from resect.lab.recipe import Recipe
from resect.train.warmup import Warmable

Say = Callable[[str], None]

MIN_STEPS = 500  # measuring takes 16 of them
ROUNDS = 4  # timed steps of each way, the first of which warms up
MARGIN = 1.1  # a way must be this much faster than a simpler one
MIN_SECONDS_TO_COMPILE = 1800  # of training: compiling alone takes 20 to 100 seconds


@dataclass(frozen=True)
class Pace:
    """One way to run the training steps of a net."""

    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False

    def __str__(self) -> str:
        parts = [self.precision, self.channels_last * "channels_last", self.compile * "compile"]
        return " + ".join(filter(None, parts)) if self != Pace() else "plain fp32"

    def lay_out(self, model: nn.Module) -> None:
        """Give the weights of ``model`` this memory layout."""
        model.to(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of forward passes, as a context."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")


def compiled(net: nn.Module, model: nn.Module, method: Any) -> nn.Module:
    """``net``, compiled: as a whole, or with a method in place, block by block.

    Raises `InputError` for a method that compiling would not follow, or a torch that is too old.
    """
    if isinstance(method, NoMethod):
        whole: Any = torch.compile(net)
        return whole
    if not isinstance(method, Warmable):
        raise InputError(f"train.compile = true does not go with a {type(method).__name__}. Set it to false.")
    resect.compile(model, method.blocks)
    return net


def choose(recipe: Recipe, model: nn.Module, images: Tensor, labels: Tensor, steps: int, say: Say) -> Pace:
    """What the recipe asks for; where it says "auto", the fastest way to train for ``steps`` steps.

    Every way in question takes a few training steps on ``images`` (N, C, H, W), normalised, and ``labels``
    (N,), in turns; its least time counts. They train a copy: the model and the random numbers stay as they are.
    A way that fails here is out. Compiling is tried last, not with a method, and only for a training of half
    an hour or more; the time it takes counts. ``say`` is told what was found.
    """
    config = recipe.train
    precisions = ["fp32", "bf16"] if config.precision == "auto" else [config.precision]
    layouts = [False, True] if config.channels_last == "auto" else [config.channels_last]
    ways = [Pace(*way) for way in itertools.product(precisions, layouts)]
    may_compile = config.compile == "auto" and recipe.method is None
    plain = replace(ways[0], compile=config.compile is True)
    if len(ways) == 1 and not may_compile:
        return plain
    if steps < MIN_STEPS:
        say(f"{plain}: {steps} steps are too few to measure what is faster (from {MIN_STEPS} on).")
        return plain
    try:
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            times = measure(copy.deepcopy(model), config, ways, images, labels)
            best = fastest(times)
            if may_compile and steps * times[best] >= MIN_SECONDS_TO_COMPILE:
                compiled = replace(best, compile=True)
                times[compiled] = measure_compiled(copy.deepcopy(model), config, compiled, images, labels, steps)
                best = fastest(times)
    except (RuntimeError, TypeError) as error:  # a model that cannot be copied
        say(f"{plain}: what is faster cannot be measured here ({_first_line(error)}).")
        return plain
    say(_found(times, best, len(images)))
    return replace(best, compile=best.compile or config.compile is True)


def measure(
    model: nn.Module, config: TrainConfig, ways: list[Pace], images: Tensor, labels: Tensor
) -> dict[Pace, float]:
    """Seconds of one training step, by way; inf for a way that fails. Trains ``model``."""
    optimizer = make_optimizer(model.train(), config)
    times = dict.fromkeys(ways, math.inf)
    for _ in range(ROUNDS):
        for way in ways:
            way.lay_out(model)
            times[way] = min(times[way], _step(model, optimizer, way, images, labels))
    return times


def measure_compiled(
    model: nn.Module, config: TrainConfig, way: Pace, images: Tensor, labels: Tensor, steps: int
) -> float:
    """The same for ``model`` compiled, with the time to compile it spread over ``steps`` steps."""
    way.lay_out(model.train())
    net, optimizer = torch.compile(model), make_optimizer(model, config)
    first = _step(net, optimizer, way, images, labels)
    return min(_step(net, optimizer, way, images, labels) for _ in range(ROUNDS - 1)) + first / steps


def _step(net: Any, optimizer: Optimizer, way: Pace, images: Tensor, labels: Tensor) -> float:
    begun = time.perf_counter()
    try:
        with way.autocast(images.device):
            logits = net(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
    except RuntimeError:  # no kernel, no compiler, no memory
        return math.inf
    finally:
        optimizer.zero_grad()
    return time.perf_counter() - begun


def fastest(times: dict[Pace, float]) -> Pace:
    """The first, hence simplest, way that no other one beats clearly."""
    return next(way for way, seconds in times.items() if seconds <= MARGIN * min(times.values()))


def _found(times: dict[Pace, float], best: Pace, batch: int) -> str:
    plain, *others = times
    speed = {
        way: f"{batch / seconds:.0f} images/s" if seconds < math.inf else "fails" for way, seconds in times.items()
    }
    if best != plain:
        return f"{best}: {speed[best]}, against {speed[plain]} in {plain}."
    rest = ", ".join(f"{way} {speed[way]}" for way in others)
    return f"{plain}: {speed[plain]}" + (f", and nothing is clearly faster ({rest})." if rest else ".")


@contextmanager
def explained(pace: Pace) -> Iterator[None]:
    """Turn torch's errors about compiling into one message."""
    if not pace.compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise ResectError(
            f"The net cannot be compiled here: {_first_line(error)}. Set train.compile=false and start again."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
