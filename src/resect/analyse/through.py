"""Which blocks carry the gradient: what arrives through each branch, and what arrives past it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from resect.analyse.backward import Case, check_ran, differentiable, running
from resect.analyse.loss import Batch, LossFn, check_parts, loss_kind
from resect.blocks.gate import Gates, Which
from resect.blocks.measure import Progress
from resect.blocks.unwrap import unwrap
from resect.errors import InputError, check_counts


@dataclass(frozen=True)
class BlockGradients:
    """How much of the gradient that arrives at ``at`` flows through each block's branch; all exact.

    Per block, in order of execution, as means over samples of L2 norms: ``through``, of the summed gradient of all
    paths that pass its branch; ``past``, of all others. Both add up to the full gradient g as vectors, not as numbers.
    ``share`` is how far what comes through goes along g: ⟨through, g⟩ / ⟨g, g⟩, both summed over the samples; above 1
    or below 0 where paths work against each other. ``full`` is the mean of ‖g‖.
    """

    names: tuple[str, ...]
    through: Tensor
    past: Tensor
    share: Tensor
    full: float
    at: str

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict per block, for CSV and tables."""
        return [
            {"index": index, "name": name, "through": float(self.through[index]), "past": float(self.past[index]),
             "share": float(self.share[index]), "full": self.full}
            for index, name in enumerate(self.names)
        ]  # fmt: skip


def block_gradients(
    model: nn.Module,
    blocks: Which,
    batch: Any,
    loss_fn: LossFn | None = None,
    *,
    at: str = "first",
    chunk: int = 32,
    progress: Progress | None = None,
) -> BlockGradients:
    """Split the gradient of the loss by whether it flows through a block's branch or past it, for every block.

    The model runs once, and backward once to see what arrives at every branch end; from each of them what arrived is
    carried on to ``at`` alone, which takes about half a backward pass per block. Paths are not enumerated: what leaves
    the branch end of a block is the sum over all paths through it.

    Parameters as for ``path_gradients``. Of a block inside the branch of another, ``through`` is part of the other's.

    Raises
    ------
    BlocksError, InputError: as ``path_gradients``.
    """
    check_counts(chunk=(chunk, 1))
    model = unwrap(model)
    with differentiable(model):
        whole = Batch.of(batch, model)
        mean = loss_kind(model, whole, loss_fn) == "mean"
        if mean:
            check_parts(whole, chunk)
        case = Case.of(model, blocks, loss_fn, at, whole)
        counted = [0, -(-whole.size // chunk) * len(case.blocks)]

        def done() -> None:
            counted[0] += 1
            if progress:
                progress(*counted)

        found = [_through(case, part, part.size if mean else 1, done) for part in whole.parts(chunk)]
    through, past, along, full = (torch.cat([part[k] for part in found], dim=-1).double().cpu() for k in range(4))
    if not torch.isfinite(torch.cat([through, past])).all():
        raise InputError("The gradient is not finite on this batch: compute in float32, and check the model's values.")
    return BlockGradients(
        names=tuple(case.blocks.names),
        through=through.mean(dim=1),
        past=past.mean(dim=1),
        share=along.sum(dim=1) / full.square().sum(),
        full=float(full.mean()),
        at=at,
    )


@dataclass
class _Tap:
    """Hand a branch's value on as it is, and note where its gradient leaves the addition, and enters the branch."""

    taps: dict[str, tuple[Tensor, GradientEdge]]
    name: str

    def __call__(self, branch: Tensor) -> Tensor:
        after = branch.clone()
        if torch._C._current_graph_task_id() == -1 and after.requires_grad:
            self.taps[self.name] = branch, get_gradient_edge(after)
        return after


def _through(case: Case, batch: Batch, scale: float, done: Callable[[], None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return, of every sample, the norms through and past each branch and ⟨through, g⟩, (n, B), and ‖g‖, (B,)."""
    taps: dict[str, tuple[Tensor, GradientEdge]] = {}

    def act(handle: Gates) -> None:
        for gate in handle:
            gate.apply(_Tap(taps, gate.block.name))

    found: list[Tensor] = []
    with running(case, batch, act) as run:
        check_ran(case.blocks.names, taps)
        ends = [taps[name] for name in case.blocks.names]
        full = scale * run.full()
        _, *arrived = run.back([run.loss], [None], [edge for _, edge in ends])
        rows = case.place.rows(full, batch.size).double()
        for (branch, _), seed in zip(ends, arrived, strict=True):
            via = None if seed is None else run.back([branch], [scale * seed])[0]
            through = torch.zeros_like(rows) if via is None else case.place.rows(via, batch.size).double()
            found.append(torch.stack([through.norm(dim=1), (rows - through).norm(dim=1), (through * rows).sum(dim=1)]))
            done()
    through, past, along = torch.stack(found, dim=1)
    return through, past, along, rows.norm(dim=1)
