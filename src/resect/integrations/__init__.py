"""Other libraries' ways of training, building, saving and loading a model; each is imported only when used."""

import importlib


def __getattr__(name: str) -> object:
    if name in ("lightning", "peft", "timm", "transformers"):
        return importlib.import_module(f"resect.integrations.{name}")
    raise AttributeError(f"module 'resect.integrations' has no attribute {name!r}")
