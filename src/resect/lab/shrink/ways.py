"""The ways to run a net that its latency is measured in: eager, compiled, in onnxruntime; those that work here."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import resect
from resect.blocks.example import Example, device_of
from resect.report.costs import Ready, eager


def usable(model: nn.Module, example: Any) -> tuple[dict[str, Ready], dict[str, str]]:
    """The ways that ``model`` can be run in on this machine, and of the others why not.

    Each is tried once on the example: a machine may lack a compiler, a model an operation that can be exported.
    """
    ways: dict[str, Ready] = {"eager": eager}
    missing: dict[str, str] = {}
    for name, (make, lacks) in {"compiled": (_compiled, _no_compile), "onnxruntime": (_onnxruntime, _no_onnx)}.items():
        if (reason := lacks()) is None:
            way = make()
            try:
                with torch.no_grad():
                    way(model, Example.of(example))()
            except Exception as error:  # whatever a compiler, an exporter or a runtime may raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if reason is None:
            ways[name] = way
        else:
            missing[name] = reason
    return ways, missing


def _no_compile() -> str | None:
    # Without it the nets of one class share a limit of graphs, and the last of them would run eager unsaid.
    old = "isolate_recompiles" not in inspect.signature(torch.compile).parameters
    return f"needs torch 2.15; this is {torch.__version__}" if old else None


def _no_onnx() -> str | None:
    lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(lacking)}" if lacking else None


def _compiled() -> Ready:
    """Make nets ready by `torch.compile`, each a copy, at the very shape of its example."""

    def ready(model: nn.Module, example: Example) -> Callable[[], Any]:
        here = example.to(device_of(model))
        alone: dict[str, Any] = {"isolate_recompiles": True}  # torch's overloads do not know it yet
        net = torch.compile(copy.deepcopy(model), dynamic=False, **alone)
        with torch.no_grad():  # as it is timed: a graph made in another mode would be made again
            net(*here.args, **here.kwargs)
        return lambda: net(*here.args, **here.kwargs)

    return ready


def _onnxruntime() -> Ready:
    """Make nets of one input ready in onnxruntime, on as many threads as torch has; each is exported once."""
    sessions: dict[int, Any] = {}

    def ready(model: nn.Module, example: Example) -> Callable[[], Any]:
        import onnxruntime

        if id(model) not in sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.onnx"
                resect.export(model, file, example=example)
                sessions[id(model)] = onnxruntime.InferenceSession(
                    file.read_bytes(), options, providers=["CPUExecutionProvider"]
                )
        session = sessions[id(model)]
        feed = {session.get_inputs()[0].name: example.tensors()[0].cpu().numpy()}
        return lambda: session.run(None, feed)

    return ready
