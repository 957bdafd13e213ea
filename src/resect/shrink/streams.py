"""Scores that only look at the stream: what it is before some blocks, and after them. No labels are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.channels import channel_axis
from resect.blocks.example import Forward, device_of, to_device
from resect.blocks.gate import gates
from resect.blocks.modes import kept_buffers, kept_modes
from resect.blocks.unwrap import eager
from resect.errors import BlocksError, InputError, quoted
from resect.shrink.samples import size_of

Set = tuple[str, ...]
"""Names of neighbouring blocks, in order."""
Look = Callable[[Tensor, Tensor | None], Tensor]
"""``look(stream, mask)``: what is kept of a stream (B, places, C); ``mask``, (B, places): which are no padding."""
PLACES = 16
SCORES = ("influence", "angle", "size")


def influence(start: Tensor, end: Tensor) -> Tensor:
    """Return 1 − cos of the streams (…, C) before and after, at each place: block influence.

    Men et al. 2024 (ShortGPT, arXiv 2403.03853), section 3: BI = 1 − E[xᵀy / ‖x‖‖y‖], tokens being the places.
    """
    return 1 - _cosine(start, end)


def angle(start: Tensor, end: Tensor) -> Tensor:
    """Return arccos(cos)/π of the streams (…, C) before and after, 0 to 1: angular distance.

    Gromov et al. 2024 (arXiv 2403.17887), equation 7, at the last token; of images, at 16 evenly spaced places.
    """
    return _cosine(start, end).clamp(-1, 1).arccos() / torch.pi


def size(start: Tensor, end: Tensor) -> Tensor:
    """Return ‖what the blocks add‖ / ‖stream before‖ of each sample, (B,), all channels and places together.

    The ratio of Jastrzębski et al. 2017 (arXiv 1710.04773), section 4.
    """
    added, before = (end - start).double().flatten(1).norm(dim=1), start.double().flatten(1).norm(dim=1)
    return added / before


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(one.double(), other.double(), dim=-1, eps=1e-30)


def everywhere(stream: Tensor, mask: Tensor | None) -> Tensor:
    """Keep every place that is no padding: (B, places, C), or (some, C) where there is padding."""
    return stream if mask is None else stream[mask]


def whole(stream: Tensor, mask: Tensor | None) -> Tensor:
    """Keep all, with zeros for padding."""
    return stream if mask is None else stream * mask[..., None]


def last(stream: Tensor, mask: Tensor | None) -> Tensor:
    """Keep the last place that is no padding, (B, C)."""
    if mask is None:
        return stream[:, -1]
    at = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
    return stream[torch.arange(len(stream), device=mask.device), at]


def some(stream: Tensor, mask: Tensor | None) -> Tensor:
    """Keep at most 16 places, evenly spaced: (B, 16, C)."""
    if stream.shape[1] <= PLACES:
        return stream
    return stream[:, torch.linspace(0, stream.shape[1] - 1, PLACES, device=stream.device).round().long()]


def unbroken(blocks: Blocks, names: Set) -> bool:
    """Whether the stream before the blocks is what is left after them once they go: no other shortcut in between."""
    return all(blocks[name].shortcut == "identity" for name in names[1:])


def stream_scores(
    model: nn.Module,
    blocks: Blocks,
    data: Iterable[Any],
    gone: Iterable[str],
    sets: Sequence[Set],
    by: str,
    forward: Forward,
) -> list[float]:
    """Return the mean of a score over all samples, or places, for each set of neighbouring blocks, in one pass.

    The stream before a set is the shortcut at its first addition, as it is there; the stream after it, its last sum.
    ``gone``: blocks that are closed meanwhile. The model is left exactly as it was.

    Raises ``InputError`` for data without samples, blocks that do not run, or values that are not finite;
    ``BlocksError`` where a branch end cannot be watched.
    """
    gone = set(gone)
    watched = {name for names in sets for name in (names[0], names[-1])}
    hidden = [
        f"{name!r}: {blocks[name].reason}" for name in blocks.names if name in watched and not blocks[name].scalable
    ]
    if hidden:
        raise BlocksError(
            f"by={by!r} looks at additions, and some cannot be watched; leave them out. {'; '.join(hidden)}."
        )
    values = Values(model, blocks, sets, by)
    with ExitStack() as stack:
        for context in (kept_modes(model), kept_buffers(model), eager(), torch.random.fork_rng(), torch.no_grad()):
            stack.enter_context(context)
        handle = stack.enter_context(gates(model, blocks))
        for block in blocks:
            if block.name in gone:
                handle[block.name].close()
            elif block.name in watched:
                handle[block.name].join_by(Join(values, block))
        model.eval()
        for batch in data:
            if not size_of(batch):
                continue
            batch = to_device(batch, device_of(model))
            values.begin(batch)
            forward(model, batch)
    return values.means()


class Values:
    """The sums of a score, and how many there were, for each set of blocks."""

    def __init__(self, model: nn.Module, blocks: Blocks, sets: Sequence[Set], by: str) -> None:
        self.sets, self.by = list(sets), by
        self.score = {"influence": influence, "angle": angle, "size": size}[by]
        self.owners = {block.name: model.get_submodule(block.owner) for block in blocks}
        self.axes: dict[str, int] = {}
        self.totals: dict[Set, float] = dict.fromkeys(self.sets, 0.0)
        self.counts: dict[Set, int] = dict.fromkeys(self.sets, 0)
        self.tokens = False
        self.mask: Tensor | None = None
        self.starts: dict[str, Tensor] = {}
        self.waiting: Counter[str] = Counter()

    def begin(self, batch: Any) -> None:
        """Forget the pass before; the next one is of this batch."""
        self.tokens = _of_tokens(batch)
        mask = batch.get("attention_mask") if isinstance(batch, dict) else None
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.starts, self.waiting = {}, Counter(names[0] for names in self.sets)

    def note(self, block: ResidualBlock, shortcut: Tensor, total: Tensor) -> None:
        """Take down what meets at the addition of a block."""
        if self.waiting[block.name]:
            self.starts[block.name] = self._look(block, shortcut.expand_as(total)).clone()
        for names in self.sets:
            if names[-1] != block.name or names[0] not in self.starts:
                continue
            found = self.score(self.starts[names[0]], self._look(block, total))
            self.totals[names] += float(found.sum())
            self.counts[names] += found.numel()
            self.waiting[names[0]] -= 1
            if not self.waiting[names[0]]:
                del self.starts[names[0]]

    def means(self) -> list[float]:
        """Return the mean score of each set."""
        if not any(self.counts.values()):
            raise InputError(
                "The data gave no samples. Pass a list of batches or a DataLoader, not an exhausted iterator."
            )
        idle = sorted({names[0] for names in self.sets if not self.counts[names]})
        if idle:
            raise InputError(f"{quoted(idle)} did not run on these data. Choose blocks that every batch passes.")
        means = [self.totals[names] / self.counts[names] for names in self.sets]
        bad = [" to ".join(dict.fromkeys((names[0], names[-1]))) for names, mean in zip(self.sets, means, strict=True)
               if not abs(mean) < float("inf")]  # fmt: skip
        if bad:
            raise InputError(
                f"by={self.by!r} is NaN or infinite at {quoted(bad, 4)}: look at the inputs, and at "
                "the weights up to there."
            )
        return means

    def _look(self, block: ResidualBlock, stream: Tensor) -> Tensor:
        axis = self.axes.setdefault(block.name, channel_axis(stream, self.owners[block.name]))
        places = stream.detach().movedim(axis, -1).reshape(len(stream), -1, stream.shape[axis])
        mask = self.mask if self.mask is not None and self.mask.shape == places.shape[:2] else None
        look: Look = {"influence": everywhere, "size": whole, "angle": last if self.tokens else some}[self.by]
        return look(places, mask)


def _of_tokens(batch: Any) -> bool:
    """Whether the inputs are token ids: ``input_ids`` where they have names, else no input is of floating point."""
    if isinstance(batch, dict):
        inputs: Any = [value for name, value in batch.items() if name != "labels"]
    else:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    named = isinstance(batch, dict) and "input_ids" in batch
    return named or (bool(tensors) and not any(tensor.is_floating_point() for tensor in tensors))


class Join:
    """Adds as the model does, and lets the addition be looked at."""

    def __init__(self, values: Values, block: ResidualBlock) -> None:
        self.values, self.block = values, block

    def __call__(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Return ``shortcut + branch``."""
        total = shortcut + branch
        self.values.note(self.block, shortcut, total)
        return total
