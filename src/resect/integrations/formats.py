"""The formats of exported models: written, read again, and run."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from resect.blocks.example import Example
from resect.errors import ExportError, InputError

Run = Callable[[Example], list[Tensor]]


def exported_program(model: nn.Module, example: Example, batch: int | None) -> ExportedProgram:
    """Trace a model. Tensors whose first dimension is ``batch`` may have any number of rows; None: all sizes are fixed.

    Raises ``ExportError`` with the model's own line where it cannot be traced.
    """

    def dimensions(leaf: Any) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor):
            return None
        return {0: Dim.DYNAMIC} if leaf.dim() and len(leaf) == batch else {}

    shapes = tree_map(dimensions, {"args": example.args, **example.kwargs})
    names = _argument_names(model, len(example.args))
    by_name = dict(zip(names, shapes.pop("args"), strict=True)) | shapes
    try:
        return torch.export.export(
            model, example.args, dict(example.kwargs), dynamic_shapes=by_name if by_name else None, strict=False
        )
    except Exception as error:  # whatever the model's own code raises under tracing
        cached = re.search(r"Found <class '[\w.]*Cache'> in output", str(error))
        said = "it hands back its cache: put use_cache=False into the example." if cached else ""
        said = said or f"{_first_line(error)}{_where(error)}{_advice(error, batch is not None)}"
        raise ExportError(f"This {type(model).__name__} cannot be exported: {said}") from error


def _argument_names(model: nn.Module, positional: int) -> list[str]:
    names = list(inspect.signature(model.forward).parameters.values())
    found = [name.name for name in names if name.kind in (name.POSITIONAL_ONLY, name.POSITIONAL_OR_KEYWORD)]
    if len(found) < positional:
        raise InputError(
            f"{type(model).__name__}.forward takes its inputs as *args, whose sizes cannot be named. Pass keyword "
            "arguments, or dynamic=False."
        )
    return found[:positional]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."


def _where(error: BaseException) -> str:
    """The model's own line at which tracing stopped, where the error tells."""
    found = re.search(r'raised this error:\s*File "([^"]+)", line (\d+), in \w+\s*\n\s*(.+)', str(error))
    return f" At {found[1]}:{found[2]}: {found[3].strip()}" if found else ""


def _advice(error: BaseException, dynamic: bool) -> str:
    fixed = dynamic and ("dynamic but your code specialized" in str(error) or "Constraints violated" in str(error))
    return " The model's code fixes the batch size: pass dynamic=False for a file for this size alone." if fixed else ""


def write_pt2(program: ExportedProgram, file: Path) -> Run:
    """Write a program; return what runs the file."""
    torch.export.save(program, file)
    again = torch.export.load(file).module()
    return lambda example: outputs(again(*example.args, **example.kwargs))


def write_onnx(program: ExportedProgram, file: Path) -> Run:
    """Write a program as ONNX; return what runs the file in onnxruntime, on the CPU.

    Raises ``ExportError`` naming the operations that ONNX does not have.
    """
    import onnxruntime

    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")  # of what torch itself is about to rename
            made = torch.onnx.export(program, dynamo=True, verbose=False)
        assert made is not None
        made.save(str(file))
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(_unsupported(error)) from error
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class of their own
        raise ExportError(
            f"onnxruntime cannot load the file on the CPU: {_first_line(error)} Try another dtype (model.float())."
        ) from error
    names = [entry.name for entry in session.get_inputs()]

    def run(example: Example) -> list[Tensor]:
        given = dict(zip(names, (tensor.cpu().numpy() for tensor in example.tensors()), strict=True))
        return [torch.from_numpy(value) for value in session.run(None, given)]

    return run


def _unsupported(error: BaseException) -> str:
    """Name the operations that have no counterpart in ONNX."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = dict.fromkeys(re.findall(r"OpOverload\(op='([^']+)'", text))
    if found:
        return f"ONNX has no counterpart of {', '.join(found)}. format='pt2' keeps torch's own operations."
    last = [line.strip() for line in text.splitlines() if "Error" in line]
    return f"ONNX export failed: {last[0] if last else _first_line(error)}"


def outputs(output: Any) -> list[Tensor]:
    """Return the tensors of an output, in order, as copies."""
    return [leaf.detach().clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
