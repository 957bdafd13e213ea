"""The committed list of models that the coverage benchmark runs: one file per source of models."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from .family import Family, lively

SOURCES = {
    "timm": ("timm_models", "timm"),
    "torchvision": ("torchvision_models", "torchvision"),
    "torch": ("torch_models", "torch"),
    "handwritten": ("handwritten_models", "torch"),
    "transformers": ("hf", "transformers"),
}
"""Source -> (file of this package, package that its models need)."""

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # the hand-written models are the tests' own


def families(source: str) -> tuple[Family, ...]:
    """Return the list of one source; it can be read even where the source itself is not installed."""
    return importlib.import_module(f".{SOURCES[source][0]}", __name__).FAMILIES


def is_installed(source: str) -> bool:
    """Whether the models of a source can be built here."""
    return importlib.util.find_spec(SOURCES[source][1]) is not None


__all__ = ["SOURCES", "Family", "families", "is_installed", "lively"]
