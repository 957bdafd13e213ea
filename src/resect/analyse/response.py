"""What each block does to the stream: size and direction of its branch, and what depths have in common.

Everything is taken down in one pass over the data, in eval mode, and summed: memory does not grow with the data but for
one number per sample and block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from resect.analyse.likeness import Angles, Cka, Correlations
from resect.analyse.probes import Probes
from resect.analyse.profile import PROFILE, BlockResponse
from resect.analyse.streams import Look, Pool, Streams, samples_of, unwatched
from resect.blocks.block import Blocks
from resect.blocks.example import Forward, device_of, forward_batch, to_device
from resect.blocks.gate import Which, gates, resolve
from resect.blocks.measure import Progress, count_of
from resect.blocks.metrics import logits_of, target_of
from resect.blocks.modes import kept_buffers, kept_modes
from resect.blocks.unwrap import eager
from resect.errors import BlocksError, InputError, unknown

LossFn = Callable[[Any, Tensor], Tensor]


def block_response(
    model: nn.Module,
    blocks: Which,
    data: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    gradient: bool = True,
    probes: bool = True,
    pool: Pool | None = None,
    forward: Forward = forward_batch,
    progress: Progress | None = None,
) -> BlockResponse:
    """Look at what every block adds to the stream, over the data, in one pass. The model is left exactly as it was.

    Per block, mean and standard deviation over the samples, each sample's branch f and shortcut taken whole (all
    channels and places; padding that an ``attention_mask`` marks is left out):

    - L2 norms of branch and shortcut, their ratio (as Jastrzębski et al. 2017, 1710.04773), and the angle between them;
    - the cosine of the branch with −∂L/∂s, where s = shortcut + f is the stream the branch goes into: f·∂L/∂s is the
      derivative of the loss by a factor on the branch. That paper takes the gradient at the block's input, the same to
      first order in f, but of another shape than f where the shortcut is no identity;
    - max|f| of each sample, for strict identity: ``strict_rows``, ``closed_rows``.

    Between depths (before the first block, and after each): angular distance (Gromov et al. 2024, 2403.17887) where the
    shapes agree, at up to 16 evenly spaced places of a stream, or at the last token; linear CKA (Kornblith et al. 2019,
    1905.00414), estimated without bias on minibatches of 256 samples (Nguyen et al. 2021, 2010.15327), which bounds the
    memory; linear probes (Alain & Bengio 2016, 1610.01644) by ridge regression, tested on a quarter of the samples.
    CKA and probes see one vector per sample: the stream pooled. Between blocks: the mean over units (at most 32
    channels of the branch, evenly spaced, pooled) of the largest absolute correlation with any unit of the other block.

    Parameters
    ----------
    model, blocks: blocks whose branch end cannot be watched are left out, and named in ``left_out``.
    data: batches: tuples (inputs, target), mappings run as keyword arguments, or tensors; an iterator will do.
    loss_fn: ``loss_fn(output, target)``, a scalar; a sum or a mean of samples alike. By default the output's own
        ``loss`` where it has one, else cross-entropy.
    gradient: whether to take the gradient, which needs a target and about three times the time.
    probes: whether to train probes, which need whole numbers as labels, one per sample; else they are left out.
    pool: ``"mean"`` over places or tokens, or the ``"last"`` token; by default the latter where there is one target per
        token.
    forward: how to run one batch, ``(model, batch) -> output``, where the default does not fit.
    progress: called as ``progress(done, total)`` after every batch; total 0: the data do not say.

    Raises
    ------
    BlocksError: no block, or none that can be watched.
    InputError: no samples, no target though the gradient is wanted, NaN or infinite responses, a block that does not
        run, runs twice or that the loss does not depend on, a loss that is no scalar, an unknown ``pool``, probes too
        large for memory.

    >>> response = resect.block_response(model, blocks, loader)
    >>> response.closed_rows(epsilon=2.5, batch_sizes=[1, 64])
    """
    if pool not in (None, "mean", "last"):
        raise unknown("pool", pool, ("mean", "last"))
    blocks = resolve(model, blocks)
    blocks, left_out = _watchable(blocks)
    found = _Sums(blocks, probes, left_out)
    total = count_of(data)
    with ExitStack() as stack:
        stack.enter_context(kept_modes(model))
        stack.enter_context(kept_buffers(model))
        stack.enter_context(eager())
        stack.enter_context(torch.random.fork_rng())
        handle = stack.enter_context(gates(model, blocks))
        stack.enter_context(torch.set_grad_enabled(gradient))
        model.eval()
        streams = Streams(model, blocks, handle, gradient)
        for done, batch in enumerate(data, start=1):
            batch = to_device(batch, device_of(model))
            if not samples_of(batch):
                continue
            target = _target(batch) if probes or gradient or pool is None else None
            chosen = pool or ("last" if _per_token(batch, target) else "mean")
            if gradient and target is None and loss_fn is None:
                raise InputError(
                    "The gradient needs a loss, and this batch has no target: give tuples (inputs, target) or mappings "
                    "with 'labels', a loss_fn, or gradient=False."
                )
            streams.begin(samples_of(batch), _mask(batch), chosen)
            output = forward(model, batch)
            streams.check()
            if gradient:
                streams.descend(_loss(loss_fn, output, target))
            with torch.no_grad():
                found.add([streams.looks[name] for name in blocks.names], target, chosen)
            if progress:
                progress(done, total)
    return found.result()


def _watchable(blocks: Blocks) -> tuple[Blocks, dict[str, str]]:
    """The blocks that can be looked at, and why the others cannot."""
    if not blocks:
        raise BlocksError("There is nothing to look at: the selection of residual blocks is empty.")
    tensors = blocks.example.tensors() if blocks.example else []
    samples = len(tensors[0]) if tensors and tensors[0].ndim else None
    reasons = {block.name: unwatched(block, samples) for block in blocks}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    if len(left_out) == len(blocks):
        name, reason = next(iter(left_out.items()))
        raise BlocksError(f"None of the {len(blocks)} blocks can be looked at; {name!r}: {reason}.")
    return blocks.select([name for name in blocks.names if name not in left_out]), left_out


def _target(batch: Any) -> Tensor | None:
    try:
        return target_of(batch)
    except (InputError, IndexError):
        return None


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _per_token(batch: Any, target: Tensor | None) -> bool:
    """Whether there is a target for each token."""
    tokens = batch.get("input_ids") if isinstance(batch, dict) else None
    return tokens is not None and target is not None and target.ndim == 2 and target.shape == tokens.shape


def _loss(loss_fn: LossFn | None, output: Any, target: Any) -> Tensor:
    if loss_fn is not None:
        loss = loss_fn(output, target)
    elif isinstance(getattr(output, "loss", None), Tensor):
        loss = output.loss
    else:
        logits = logits_of(output)
        if logits.ndim != 2 or target.ndim != 1:
            raise InputError(
                f"No loss is known for outputs of shape {tuple(logits.shape)} and targets of {tuple(target.shape)}: "
                "give loss_fn(output, target), or gradient=False."
            )
        # Classes as long; shares of classes stay what they are.
        target = target if target.is_floating_point() else target.long()
        loss = nn.functional.cross_entropy(logits, target, reduction="sum")
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        raise InputError("loss_fn must return a scalar tensor that depends on the model's output with its gradient.")
    return loss


class _Sums:
    """What is known of all batches so far."""

    def __init__(self, blocks: Blocks, probes: bool, left_out: dict[str, str]) -> None:
        last = {block.sum: place for place, block in enumerate(blocks)}
        self.ends = sorted(last.values())
        self.blocks, self.left_out = blocks, left_out
        depths = len(self.ends) + 1
        self.cka, self.angles, self.units = Cka(depths), Angles(depths), Correlations()
        self.probes = Probes() if probes else None
        self.samples = 0
        self.pool: Pool = "mean"
        self.largest: list[Tensor] = []
        self.moments = torch.zeros(3, len(PROFILE), len(blocks), dtype=torch.float64)

    def add(self, looks: list[Look], target: Tensor | None, pool: Pool) -> None:
        """Take what one batch shows of every block."""
        self.samples += len(looks[0].largest)
        self.pool = pool
        self.largest.append(torch.stack([look.largest for look in looks]))
        values = torch.stack([_profile(look) for look in looks], dim=1)  # (PROFILE, n, B)
        there = values.isfinite()
        values = values.nan_to_num(0, 0, 0)
        self.moments += torch.stack([there.double().sum(2), values.sum(2), values.square().sum(2)])
        before = looks[0].before
        assert before is not None
        streams = [before[0], *(looks[end].stream for end in self.ends)]
        self.cka.add(streams)
        self.angles.add([before[1], *(looks[end].positions for end in self.ends)])
        self.units.add([look.units for look in looks])
        if self.probes is not None:
            if target is None or target.ndim != 1 or target.is_floating_point() or int(target.min()) < 0:
                self.left_out["probes"] = "they need one whole number from 0 as the label of each sample"
                self.probes = None
            else:
                self.probes.add(streams, target.cpu())

    def result(self) -> BlockResponse:
        """Return what all batches show."""
        if not self.samples:
            raise InputError(
                "The data gave no samples. Pass a list of batches or a DataLoader, not an exhausted iterator."
            )
        count, total, squares = self.moments
        mean = total / count
        deviation = (squares / count - mean**2).clamp(min=0).sqrt()
        largest = torch.cat(self.largest, dim=1)
        accuracies, guessing = self.probes.accuracies() if self.probes else (torch.empty(0), float("nan"))
        return BlockResponse(
            blocks=self.blocks,
            samples=self.samples,
            mean=dict(zip(PROFILE, mean, strict=True)),
            deviation=dict(zip(PROFILE, deviation, strict=True)),
            largest=dict(zip(self.blocks.names, largest, strict=True)),
            depths=("", *(self.blocks[end].name for end in self.ends)),
            distance=self.angles.matrix(),
            cka=self.cka.matrix(),
            similarity=self.units.similarity(),
            probes=accuracies,
            guessing=guessing,
            pool=self.pool,
            left_out=self.left_out,
        )


def _profile(look: Look) -> Tensor:
    """The quantities of PROFILE for each sample, (PROFILE, B); NaN or infinite where they are not defined."""
    missing = torch.full_like(look.cosine, torch.nan)
    angle = look.cosine.arccos().rad2deg()
    descent = missing if look.descent is None else look.descent
    return torch.stack([look.branch, look.shortcut, look.branch / look.shortcut, look.cosine, angle, descent])
