"""The gradient that flows along paths of each length, in two different quantities.

Veit, Wilber, Belongie (NIPS 2016), section 5: the gradient of one path shrinks exponentially with its
length, so that most of it comes along short paths although most paths are of middle length.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resect.analyse.backward import Case, differentiable
from resect.analyse.by_length import by_length, paths_of
from resect.analyse.effective import EffectiveLengths, effective_lengths
from resect.analyse.interval import interval
from resect.analyse.loss import Batch, LossFn, check_parts, loss_kind
from resect.analyse.single_paths import check_samples, passes, sample_path_gradients
from resect.blocks.gate import Which
from resect.blocks.measure import Progress
from resect.blocks.unwrap import unwrap
from resect.errors import InputError, check_counts, unknown


@dataclass(frozen=True)
class PathGradients:
    """Size of the gradient that arrives at ``at``, by path length 0 … n.

    Two different quantities, not to be drawn on one axis:

    ``norm_of_sum`` is exact: mean over samples of ‖sum of the gradients of all paths of that length‖₂.
    ``sum_of_norms`` is the paper's (section 5, figure 6c): number of paths × mean ‖gradient of one path‖₂,
    sampled; ``low`` and ``high`` bound it (95 %), ``mean_norm`` is the mean of one path alone. Empty
    tensors when nothing was sampled.

    ``paths`` is the number of paths by length. With ``max_length`` = K, lengths end at K, and ``norm_of_sum`` and
    ``paths`` have one entry more, for all longer paths together; nothing is sampled of those.
    """

    norm_of_sum: Tensor
    sum_of_norms: Tensor
    low: Tensor
    high: Tensor
    mean_norm: Tensor
    paths: tuple[int, ...]
    at: str
    rescaled: bool
    """The loss was a mean over the batch and was turned into a sum."""
    max_length: int | None = None

    @property
    def coherence(self) -> Tensor:
        """Return norm of the sum over sum of the norms, by length: 1 if all paths of a length pull one way.

        It is estimated, since ``sum_of_norms`` is: where paths agree it may come out a little above 1.
        """
        return self.norm_of_sum[: len(self.sum_of_norms)] / self.sum_of_norms

    def effective(
        self, quantity: Literal["sum_of_norms", "norm_of_sum"] = "sum_of_norms", part: float = 0.95
    ) -> EffectiveLengths:
        """Return the narrowest run of lengths that holds ``part`` of a quantity, and the share of paths they are.

        Raises ``InputError`` where nothing was sampled, or not every length is there.
        """
        if quantity not in ("sum_of_norms", "norm_of_sum"):
            raise unknown("quantity", quantity, ("sum_of_norms", "norm_of_sum"))
        if self.max_length is not None:
            raise InputError("Effective lengths need every length: compute without max_length.")
        values = getattr(self, quantity).tolist()
        if not values:
            raise InputError("Nothing was sampled (samples=0): ask for the effective lengths of 'norm_of_sum'.")
        return effective_lengths(values, self.paths, part)

    def __str__(self) -> str:
        lines = [f"gradient at {self.at}, by the number of branches on the paths:"]
        for row in self.rows():
            length = f"{'≥ ' * row.get('longer', False)}{row['length']}"
            lines.append(f"  {length:>5}  {row['paths']:.4g} paths, norm of their sum {row['norm_of_sum']:.4g}")
            if "sum_of_norms" in row:
                lines[-1] += f", sum of their norms {row['sum_of_norms']:.4g} (sampled)"
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict per path length, for CSV and tables; ``longer`` marks that of all paths beyond max_length."""
        rows = []
        for k, exact in enumerate(self.norm_of_sum.tolist()):
            row: dict[str, Any] = {"length": k, "paths": float(self.paths[k]), "norm_of_sum": exact}
            if self.max_length is not None:
                row["longer"] = k > self.max_length
            if k < len(self.sum_of_norms):
                row |= {name: float(getattr(self, name)[k]) for name in ("sum_of_norms", "low", "high", "coherence")}
            rows.append(row)
        return rows


def path_gradients(
    model: nn.Module,
    blocks: Which,
    batch: Any,
    loss_fn: LossFn | None = None,
    *,
    at: str = "first",
    samples: int = 1000,
    max_length: int | None = None,
    seed: int = 0,
    chunk: int = 32,
    progress: Progress | None = None,
) -> PathGradients:
    """Split the gradient of the loss by the length of the paths it flows along.

    Parameters
    ----------
    model, blocks: left exactly as they are; the model runs in eval mode.
    batch: ``(inputs, target)``, B samples, or a mapping that is run as ``model(**batch)``.
    loss_fn: ``loss_fn(output, target)``, a scalar: the sum over samples. A mean is detected and rescaled. Of a mapping,
        the target is the whole mapping; None takes ``output.loss``.
    at: where the gradient is taken: ``"first"`` (what enters the first block), the name of a block (what enters that
        block; paths begin there) or ``"input"``: the first floating-point input of the model, or, where there is none,
        what the first ``nn.Embedding`` makes of the batch's tokens.
    samples: single paths drawn per length for ``sum_of_norms``, dealt out evenly over the B samples of the batch; 0
        leaves it out. It needs a model that does not couple samples; the exact part does not.
    max_length: the longest length to tell apart; all longer paths come as one. Time grows with it.
    seed: of those draws.
    chunk: samples handled at once: memory is that of a training step with so many, and one value more per branch.
    progress: called as ``progress(done, total)`` after every backward pass.

    The exact part runs the model once, with the graph cut at every branch end: a backward pass reaches ``at`` along
    shortcuts alone, and what it leaves at the branch ends is the seed of the next one. Pass k gives the summed gradient
    of all paths of length k; n + 1 of them cost about half of n + 1 ordinary backward passes, without weights.

    Raises
    ------
    BlocksError: no blocks, or those of another model.
    InputError: a branch end that cannot be acted on; a loss that is no scalar, not finite, neither sum nor mean, or
        independent of ``at``; a place that cannot be seen; a model that couples samples, where paths are sampled.
    """
    check_counts(samples=(samples, 0), chunk=(chunk, 1), max_length=(0 if max_length is None else max_length, 0))
    model = unwrap(model)
    with differentiable(model):
        whole = Batch.of(batch, model)
        mean = loss_kind(model, whole, loss_fn) == "mean"
        if mean:
            check_parts(whole, chunk)
        case = Case.of(model, blocks, loss_fn, at, whole)
        paths = paths_of(case, whole)
        longest = min(len(paths) - 1, len(paths) if max_length is None else max_length)
        more = longest < len(paths) - 1
        if samples:
            check_samples(case, whole, paths)
        there = sum(count > 0 for count in paths[: longest + 1])
        total = (longest + 1) * -(-whole.size // chunk) + passes(whole, chunk, there, samples)
        made = [0]

        def done() -> None:
            made[0] += 1
            if progress:
                progress(min(made[0], total), total)

        # Within a part a mean loss divides by the part's own size.
        exact = [by_length(case, part, longest, more, done) * (part.size if mean else 1) for part in whole.parts(chunk)]
        drawn = sample_path_gradients(case, whole, chunk, longest + 1, samples, seed, done, mean) if samples else []
    norms = torch.cat(exact, dim=1).double().cpu()
    if not torch.isfinite(norms).all():
        length = int((~torch.isfinite(norms)).any(dim=1).nonzero()[0])
        raise InputError(
            f"The gradient of the paths of length {length} is not finite on this batch: compute in float32 "
            "(model.float()), and check the model's values."
        )
    scale = torch.tensor([float(count) for count in paths[: len(drawn)]], dtype=torch.float64)
    means = torch.tensor([sum(values) / max(1, len(values)) for values in drawn], dtype=torch.float64)
    spans = [interval(values) if values else (0.0, 0.0) for values in drawn]
    bounds = torch.tensor(spans, dtype=torch.float64).reshape(-1, 2)
    for length in range(len(drawn)):
        if paths[length] == 1:  # the sum is that of one path: known of every sample, nothing to estimate
            means[length] = bounds[length] = norms[length].mean()
    return PathGradients(
        norm_of_sum=norms.mean(dim=1),
        sum_of_norms=scale * means,
        low=scale * bounds[:, 0].clamp_min(0),
        high=scale * bounds[:, 1],
        mean_norm=means,
        paths=(*paths[: longest + 1], *([sum(paths[longest + 1 :])] if more else [])),
        at=at,
        rescaled=mean,
        max_length=longest if more else None,
    )


def path_gradients_by_state(
    model: nn.Module,
    blocks: Which,
    batch: Any,
    states: Mapping[str, Mapping[str, Tensor]],
    loss_fn: LossFn | None = None,
    **options: Any,
) -> dict[str, PathGradients]:
    """Return the path gradients of one model at several moments: at initialisation, by epoch.

    ``states`` maps a label to a ``state_dict``, each of which is loaded into a copy of the model; the other arguments
    are those of ``path_gradients``, and so are the errors.

    >>> states = {"initialisation": first, "epoch 10": later}
    >>> found = resect.path_gradients_by_state(model, blocks, batch, states, loss_fn)
    >>> rows = [{"when": when} | row for when, one in found.items() for row in one.rows()]
    """
    copied = copy.deepcopy(model)
    found = {}
    for when, state in states.items():
        copied.load_state_dict(state)
        found[when] = path_gradients(copied, blocks, batch, loss_fn, **options)
    return found
