"""Look at a model once: run it, record it, and check that it repeats itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from resect.blocks.block import Blocks, Refusal, ResidualBlock
from resect.blocks.choose import number_stages
from resect.blocks.example import Example
from resect.blocks.gate import check_detached
from resect.blocks.graph import Graph
from resect.blocks.outline import OutlineCheck
from resect.blocks.rehearse import check_repeats, run_once
from resect.blocks.trace import quiet, trace
from resect.blocks.unwrap import check_visible, eager, unwrap
from resect.blocks.verify import Check, ValueCheck
from resect.errors import InputError


class Look:
    """What one recorded run showed of a model."""

    def __init__(self, model: nn.Module, example: Example, graph: Graph) -> None:
        self.model = model
        self.example = example
        self.graph = graph

    def check(self, candidates: Sequence[ResidualBlock]) -> Check:
        """Return what verifies these candidates: by values, or on the meta device by what is executed."""
        if any(tensor.is_meta for tensor in self.model.parameters()):
            return OutlineCheck(self.model, self.example, self.graph.trace)
        return ValueCheck(self.model, self.example, candidates)

    def blocks(self, good: Iterable[ResidualBlock], refused: Iterable[Refusal] = ()) -> Blocks:
        """Return verified blocks with what is known of the whole model."""
        return Blocks(
            number_stages(good),
            model=type(self.model).__name__,
            refused=refused,
            example=self.example,
            flops=sum(node.flops for node in self.graph.nodes),
        )


@contextmanager
def looked_at(model: nn.Module, example: Any) -> Iterator[Look]:
    """Record a run of a model; inside, it stays in eval mode, without gradients, and runs as written.

    Raises what ``find_blocks`` does for a model or an example that cannot be worked with.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"Finding blocks needs a torch.nn.Module, not {_told(model)}")
    inner = unwrap(model)
    check_visible(inner)
    check_detached(inner)
    sample = Example.of(example)
    with eager(), quiet(inner):
        output = run_once(inner, sample)
        torch.manual_seed(0)
        recorded = trace(inner, sample)
        check_repeats(inner, sample, recorded, output)
        yield Look(inner, sample, Graph(recorded))


def _told(value: Any) -> str:
    if isinstance(value, type) and issubclass(value, nn.Module):
        return f"the class {value.__name__}. Pass an instance: {value.__name__}(…)."
    if isinstance(value, str):
        return f"the string {value!r}. Build the model first, for instance timm.create_model({value!r})."
    if isinstance(value, Mapping):
        return (
            f"{type(value).__name__}. If this is a state_dict, build the model and load it: model.load_state_dict(…)."
        )
    return f"{type(value).__name__}. A function has no modules to close: write it as a torch.nn.Module."
