"""Save a cut transformers model so that its own class loads it; train with a method in its Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from resect.blocks.example import Example
from resect.blocks.gate import check_detached
from resect.blocks.trace import quiet
from resect.errors import InputError, ProofError, quoted
from resect.files import whole_folder
from resect.integrations.trainer import callback as callback
from resect.shrink.compact import gone_from
from resect.shrink.structure import unequal, values

_OWN = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md")


def save(small: nn.Module, path: str | Path, example: Any) -> str:
    """Write a cut model with ``save_pretrained``, load it back, and prove the outputs equal bit for bit.

    ``small.save_pretrained(path)`` alone writes the same files; this refuses what cannot be loaded again, and
    proves what can. Nothing is written where the proof fails.

    Parameters
    ----------
    small: a transformers model cut by ``resect.remove(..., compact=True)`` of which whole layers went.
    path: a folder; an earlier one of the same kind is replaced.
    example: what both models are run on, as in ``find_blocks``.

    Returns
    -------
    The line of Python that loads it.

    Raises
    ------
    InputError: it is no transformers model, or a branch is gone from a layer that stays.
    ProofError: what was loaded differs.
    """
    model: Any = small
    if not hasattr(small, "save_pretrained") or not hasattr(type(small), "from_pretrained"):
        raise InputError(f"A {type(small).__name__} has no save_pretrained: it is not a transformers model.")
    check_detached(small)
    gone = gone_from(small)
    if gone:
        raise InputError(
            f"transformers has no configuration for layers that lack a branch, and here {quoted(gone, 4)} are gone. "
            "Use resect.save and resect.load, or remove whole layers with compact=True."
        )
    sample, name = Example.of(example), type(small).__name__
    with whole_folder(Path(path), own=_OWN) as folder:
        model.save_pretrained(folder)
        again = (
            type(model)
            .from_pretrained(folder, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
            .to(model.device)
        )
        with quiet(small):
            expected = values(sample.run(small))
        with quiet(again):
            difference = unequal(expected, values(sample.run(again)))
        if difference:
            raise ProofError(f"{name}.from_pretrained does not give the model that was saved: {difference}.")
    return f"transformers.{name}.from_pretrained({str(path)!r})"
