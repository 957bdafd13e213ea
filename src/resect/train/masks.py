"""Drop path: a branch left out for some samples of a batch and kept for the others."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resect.blocks.block import Blocks
from resect.blocks.ranks import least_over_ranks, rank_of_ranks
from resect.blocks.response import look_on_example
from resect.blocks.rows import Rows
from resect.errors import AttachError
from resect.train.draws import draw_keys, is_dropped

Per = Literal["batch", "sample"]
Compute = Literal["auto", "subset", "mask"]


class SampleMasks:
    """Which samples drop which branch in the current step: a function of (seed, step, number of the sample) alone.

    The numbers of a step are written into the same tensors every time, so that what reads them can be compiled once.
    Plain data, so that a copy of the model keeps the draws of its step.
    """

    def __init__(self, probs: list[float], device: torch.device | None) -> None:
        exact = torch.float32 if device is not None and device.type == "mps" else torch.float64
        self.probs = probs
        self.keys = torch.zeros(len(probs), 2, dtype=torch.int64, device=device)
        self.scales = torch.ones(len(probs), dtype=exact, device=device)
        self.rank, self.ranks = rank_of_ranks()
        self.most = torch.zeros((), dtype=torch.int64, device=device)
        """The largest number of samples seen in this step: whatever holds of them all holds of fewer."""
        self.least = [1] * len(probs)
        """Per block, on how many samples it is computed at least, be it with a factor of 0."""
        self._drawn, self._factors = self.keys.cpu(), [1.0] * len(probs)
        self._rows: dict[tuple[int, torch.device], list[Rows]] = {}

    def begin(self, probs: list[float], seed: int, step: int, *, scaled: bool) -> None:
        """Draw for a step. ``scaled``: kept branches are multiplied by 1/(1 − p)."""
        self.probs = probs
        self._drawn = draw_keys(probs, seed, step)
        self.keys.copy_(self._drawn, non_blocking=True)
        self._factors = [1.0 / (1.0 - prob) if scaled and prob < 1 else 1.0 for prob in probs]
        self.scales.copy_(torch.tensor(self._factors, dtype=torch.float64), non_blocking=True)
        self._rows.clear()
        self.most.zero_()

    def dropped(self, place: int, samples: int, device: torch.device) -> Tensor:
        """Return for one block which samples of this process drop it, bool (samples,).

        Sample i of rank r is sample i·N + r of the batch that N ranks share: as ``DistributedSampler`` deals it out.
        """
        self._note(samples)
        return is_dropped(self.keys[place].to(device), self._numbers(samples, device))

    def _note(self, samples: int) -> None:
        """Take down how many samples learn: without gradients none do, and a transform may not write what it reads."""
        if torch.is_grad_enabled() and (
            torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None
        ):
            self.most.clamp_(min=samples)

    def rows(self, place: int, samples: int, device: torch.device) -> Rows:
        """Return for one block the samples of this process that keep it, with the step's factor.

        All blocks' are drawn at the first call of a step, on the host, so that an accelerator is not waited for.
        """
        self._note(samples)
        if (samples, device) not in self._rows:
            with torch.inference_mode(False):  # kept for training steps too
                self._rows[samples, device] = self._all_rows(samples, device)
        return self._rows[samples, device][place]

    def _numbers(self, samples: int, device: torch.device | None = None) -> Tensor:
        return torch.arange(self.rank, samples * self.ranks, self.ranks, device=device)

    def _all_rows(self, samples: int, device: torch.device) -> list[Rows]:
        dropped = is_dropped(self._drawn.T.unsqueeze(-1), self._numbers(samples))  # (blocks, samples)
        kept = (~dropped).sum(1).tolist()
        counts = [min(samples, max(count, least)) for count, least in zip(kept, self.least, strict=True)]
        order = dropped.to(torch.uint8).argsort(dim=1, stable=True)  # those kept first
        index = torch.cat([row[:count] for row, count in zip(order, counts, strict=True)]).to(device, non_blocking=True)
        found = []
        for at, one in enumerate(index.split(counts)):
            factor: float | Tensor = self._factors[at]
            if kept[at] < counts[at]:  # computed for its gradients' sake, zeros as with a mask
                factor = torch.tensor([factor] * kept[at] + [0.0] * (counts[at] - kept[at]), device=device)
            found.append(Rows(samples, counts[at], one, factor))
        return found

    def agreed(self, training: list[bool], *, dropped: bool) -> list[int]:
        """Return the blocks that all samples seen in this step drop, on every rank, or that none drops.

        Of those alone that train and can drop; all ranks must call this.
        """
        found = torch.ones(len(self.probs), dtype=torch.uint8, device=self.keys.device)
        most = int(self.most)
        for place in range(len(self.probs) if most else 0):
            found[place] &= (self.dropped(place, most, self.keys.device) == dropped).all()
        can = [trains and prob > 0 for trains, prob in zip(training, self.probs, strict=True)]
        return [place for place, value in enumerate(least_over_ranks(found).tolist()) if value and can[place]]


def over_samples(mask: Tensor, value: Tensor) -> Tensor:
    """Shape a mask (samples,) so that it broadcasts over ``value`` (samples, …)."""
    return mask.view(-1, *([1] * (value.ndim - 1)))


class DropSamples:
    """The gate function of drop path: 0 for dropped samples, the step's scale times the branch for the others.

    A gate may compute the branch on the others' ``rows`` alone instead.
    """

    def __init__(self, masks: SampleMasks, place: int) -> None:
        self.masks, self.place = masks, place

    def __call__(self, branch: Tensor) -> Tensor:
        """Return the branch end (samples, …) with dropped samples at 0."""
        dropped = self.masks.dropped(self.place, len(branch), branch.device)
        factor = torch.where(dropped, 0.0, self.masks.scales[self.place].to(branch.device, branch.dtype))
        return branch * over_samples(factor, branch)

    def rows(self, samples: int, device: torch.device) -> Rows:
        """Return the samples that keep the branch, and its factor there."""
        return self.masks.rows(self.place, samples, device)


def check_batch_first(model: nn.Module, blocks: Blocks, name: str) -> dict[str, int]:
    """Raise ``AttachError`` if some branch's first dimension is not the batch, as far as the example shows.

    Return the size of that dimension per block, on the example; nothing where there is none.
    """
    if blocks.example is None:
        return {}
    tensors = [leaf for leaf in tree_leaves((blocks.example.args, blocks.example.kwargs)) if isinstance(leaf, Tensor)]
    samples = {len(tensor) for tensor in tensors if tensor.ndim}
    first = look_on_example(model, blocks, blocks.example, len)
    wrong = {block: size for block, size in first.items() if size not in samples}
    if wrong:
        block, size = next(iter(wrong.items()))
        raise AttachError(
            f'{name}(per="sample") needs the batch as the first dimension of every branch, but that of {block!r} is '
            f'{size} for a batch of {max(samples)}. Use per="batch", or leave out such blocks '
            f"({len(wrong)} of {len(first)})."
        )
    return first
