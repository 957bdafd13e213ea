"""Export a model to a file that runs without Resect, and check what the file computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from resect.blocks.example import Example, device_of
from resect.blocks.gate import check_detached
from resect.blocks.trace import quiet
from resect.blocks.unwrap import unwrap
from resect.errors import InputError, ProofError, unknown
from resect.files import files_beside
from resect.integrations.formats import exported_program, outputs, write_onnx, write_pt2

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of the largest output: runtimes add in another order, and may fuse what the model rounds in between."""


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how far what it computes is from the model."""

    path: Path
    format: str
    difference: float
    """Largest absolute difference of any output, over the batch sizes tried."""
    batches: tuple[int, ...]
    """Batch sizes at which it was compared; one alone where the batch size is fixed."""

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.batches))
        return f"{self.path}: differs by {self.difference:.2g} at most (batch sizes {sizes})"


def export(
    model: nn.Module,
    path: str | Path,
    *,
    example: Any,
    format: Literal["onnx", "pt2"] | None = None,
    dynamic: bool = True,
) -> Exported:
    """Write a model, cut or not, as ONNX or as a ``torch.export`` program, and compare the file with the model.

    Parameters
    ----------
    model: left as it is; exported in eval mode. Branches that were removed are not in the file.
    path: the file to write, ``.onnx`` or ``.pt2``. It appears only if what it computes was found equal; an earlier
        one stays until then. Weights of an ONNX file above 2 GB lie beside it.
    example: what ``find_blocks`` takes. Its first dimension is the batch, in every tensor that has as many entries
        there as the first one; other sizes are fixed to the example's.
    format: ``"onnx"`` (opset of the installed torch) or ``"pt2"``; by default what the suffix says.
    dynamic: whether the file takes any batch size. It is then compared at the example's, at one more and at 1.

    A transformers language model is exported without its key-value cache, as if the example held ``use_cache=False``.
    Every output is compared with the model's: by onnxruntime on the CPU, or by the reloaded program. Differences up to
    1e-4 of the largest output pass for fp32 (fp64 1e-5, fp16 2e-2, bf16 5e-2).

    Raises
    ------
    ExportError: the model's code, or an operation that is named, cannot be exported.
    ProofError: the file computes something else; it is not kept.
    InputError: an unknown format, no batch dimension, or a package that is missing (``pip install 'resect[export]'``).
    FileError: the place cannot be written.
    """
    target, kind = Path(path), format_of(Path(path), format)
    check_detached(model)
    model = unwrap(model)
    example = Example.of(example).to(device_of(model))
    if dynamic:
        example = _at_least_two(example)
    examples = _sizes(example) if dynamic else [example]
    with quiet(model), _without_cache(model, example):
        program = exported_program(model, example, _batch(example) if dynamic else None)
        wanted = [outputs(one.run(model)) for one in examples]
        with files_beside(target) as folder:
            file = folder / target.name
            run = (write_onnx if kind == "onnx" else write_pt2)(program, file)
            difference = max(_compare(run(one), want) for one, want in zip(examples, wanted, strict=True))
    return Exported(target, kind, difference, tuple(_batch(one) for one in examples))


@contextmanager
def _without_cache(model: nn.Module, example: Example) -> Iterator[None]:
    """Let a transformers model hand back no cache, which no file can hold, unless the example asks for one."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    caching = [] if "use_cache" in example.kwargs else caching
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


def format_of(path: Path, format: str | None = None) -> str:
    """Return the format to write a file in; ``InputError`` for another suffix, or a package that is missing."""
    if format is not None and format not in SUFFIXES:
        raise unknown("format", format, SUFFIXES)
    found = next((name for name, suffix in SUFFIXES.items() if suffix == path.suffix), None)
    if found is None or (format or found) != found:
        raise InputError(f"{str(path)!r} must end in {SUFFIXES.get(format or '', '.onnx or .pt2')}.")
    if found == "onnx":
        _check_installed()
    return found


def _check_installed() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise InputError(f"ONNX needs more packages: pip install 'resect[export]' ({missing}).") from missing


def _batch(example: Example) -> int:
    sizes = [len(tensor) for tensor in example.tensors() if tensor.dim()]
    if not sizes:
        raise InputError("The example holds no tensor with a batch dimension. Pass dynamic=False to fix all sizes.")
    return sizes[0]


def _rows(example: Example, pick: Callable[[Tensor], Tensor]) -> Example:
    """Return the example with other rows in every tensor that has the batch's."""
    size = _batch(example)

    def changed(leaf: Any) -> Any:
        return pick(leaf) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size else leaf

    args, kwargs = tree_map(changed, (example.args, dict(example.kwargs)))
    return Example(args, kwargs)


def _at_least_two(example: Example) -> Example:
    """A batch of one would be taken for a constant."""
    return _rows(example, lambda rows: torch.cat([rows, rows])) if _batch(example) == 1 else example


def _sizes(example: Example) -> list[Example]:
    more = _rows(example, lambda rows: torch.cat([rows.flip(0), rows[:1]]))
    return [example, more, _rows(example, lambda rows: rows[-1:])]


def _compare(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference, or raise ``ProofError`` where it is more than rounding."""
    if [tuple(one.shape) for one in found] != [tuple(one.shape) for one in wanted]:
        raise ProofError(
            f"The file gives outputs of shapes {[tuple(one.shape) for one in found]}, the model "
            f"{[tuple(one.shape) for one in wanted]}. It was not kept."
        )
    worst = 0.0
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        one, other = one.cpu().double(), other.cpu()
        allowed = TOLERANCE.get(other.dtype, 0.0) * max(1.0, float(other.double().abs().max()) if other.numel() else 0)
        difference = float((one - other.double()).abs().max()) if other.numel() else 0.0
        if not difference <= allowed:
            raise ProofError(
                f"Output {number} of the file differs by {difference:.3g} from the model's, where {allowed:.3g} is "
                "rounding. It was not kept."
            )
        worst = max(worst, difference)
    return worst
