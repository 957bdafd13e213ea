"""Open what a user names on the command line: a model by name, the folder of a run, or a cut model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resect
from resect.errors import FileError, InputError, check_all
from resect.files import refuse_pickle
from resect.lab import registry, runs
from resect.lab.config.method import EpsilonGateConfig
from resect.lab.data import Data, data_by_name, in_batches, open_data
from resect.lab.recipe import Recipe, parse
from resect.lab.text import TextData, open_text

TEXT = "text:"


@dataclass(frozen=True)
class Opened:
    """A model and its data: what it was trained on, where that is known, or what was named instead."""

    name: str
    model: nn.Module
    recipe: Recipe | None = None
    data: Data | TextData | None = None
    folder: Path | None = None
    stats: tuple[Tensor, Tensor] | None = None
    """Mean and deviation per channel of the images it was trained on, where ``data`` are others."""
    pretrained: bool = False

    @property
    def label(self) -> str:
        """Return what figures and provenance call it: its name, and before that a run's folder."""
        return self.name if self.folder is None else f"{self.folder.name} ({self.name})"

    @property
    def gated(self) -> bool:
        """Whether it was trained with an ε-gate, which is not attached here, and has not been cut."""
        method = self.recipe.method if self.recipe is not None else None
        return isinstance(method, EpsilonGateConfig) and not hasattr(self.model, "resect_plan")

    def example(self, size: int | None = None) -> Tensor | dict[str, Tensor]:
        """Return a batch to find blocks with: training images or text where there are any, else noise by its name."""
        if isinstance(self.data, TextData):
            return {"input_ids": self.data.sequences[:4]}
        if self.data is not None:
            return self.images("train", 64)[0]
        return registry.example(self.name, self.model, size)

    def images(self, which: str = "test", limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (images, labels) of the split "test" or "train", normalised as in training."""
        data = self._data()
        if isinstance(data, TextData):
            raise InputError(f"{self.name!r} was given text, and this is for images.")
        images, labels = data.sample(which, limit)
        return images if self.stats is None else _restated(images, data.stats, self.stats), labels

    def batches(self, which: str = "test", limit: int | None = None, size: int = 128) -> list[Any]:
        """Return the first ``limit`` samples in batches: pairs of images and labels, or mappings of tokens."""
        data = self._data()
        if isinstance(data, TextData):  # which has no splits
            return data.batches(size, limit)
        return in_batches(*self.images(which, limit), size)

    def _data(self) -> Data | TextData:
        if self.data is None:
            raise InputError(
                f"{self.name!r} has no data of its own. Name some, for instance --data digits; for a language model "
                "--data text:FILE."
            )
        return self.data


def open_model(
    name: str, options: Sequence[str] = (), data: str | None = None, data_options: Sequence[str] = ()
) -> Opened:
    """Open ``name``: ``cifar-resnet-110``, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``, or a folder.

    A folder is that of a run, of a cut model, or one that transformers saved.

    ``options`` are ``key=value`` for a model by name. ``data`` names the data, by default those a run was trained on:
    see `data_by_name`, or ``text:FILE``, see `open_text`; ``data_options`` are ``key=value`` of them.

    Raises ``InputError`` for an unknown model, option or data set, or data that the model is not for; ``FileError``
    for a damaged folder or file.
    """
    folder = Path(name)
    looks_like_path = folder.exists() or "/" in name.partition(":")[0]
    if folder.is_file():
        refuse_pickle(folder)
        raise FileError(
            f"{name!r} is a file. This command takes models by name and folders; for a model of your own, in Python: "
            "print(resect.find_blocks(model, example))."
        )
    if (folder / "config.json").is_file() and not (folder / "recipe.json").exists():
        name, looks_like_path = f"hf:{name}", False
    if looks_like_path and not folder.is_dir():
        raise FileError(
            f"There is no folder {name!r}. A folder is one that `resect train` "
            f"or transformers' save_pretrained wrote. For instance: resect train digits-plain --out {name}"
        )
    if looks_like_path:
        if options:
            raise InputError("Options go with a model by name; a folder says itself how its model was built.")
        if (folder / "base.json").exists():
            return _with_data(_open_cut(folder), data, data_options)
        if (folder / "plan.json").exists() and not (folder / "recipe.json").exists():
            raise FileError(
                f"{name!r} is a cut model saved from Python: load it there with resect.load({name!r}, model)."
            )
        return _with_data(_open_run(folder), data, data_options)
    values = dict(_read_option(option) for option in options)
    text = data is not None and data.startswith(TEXT)
    images = None if text else _named(data, data_options)
    if images is not None:
        values = registry.fit_options(name, images.shape[0], len(images.classes)) | values
    opened = Opened(name, registry.build(name, **values).eval(), data=images, pretrained=bool(values.get("pretrained")))
    return _with_data(opened, data, data_options) if text else opened


def _named(data: str | None, options: Sequence[str]) -> Data | None:
    if data is None and options:
        raise InputError(f"{options[0]!r} is an option of data, and none are named: add --data NAME.")
    return None if data is None else data_by_name(data, dict(_read_option(option) for option in options))


def _with_data(opened: Opened, data: str | None, options: Sequence[str]) -> Opened:
    """``opened`` with the data that are named instead of its own, which it must fit."""
    if data is not None and data.startswith(TEXT):
        values = dict(_read_option(option) for option in options)
        return replace(opened, data=open_text(data.removeprefix(TEXT), opened.model, opened.name, values))
    others, own = _named(data, options), opened.data
    if others is None or own is None or isinstance(own, TextData):
        return opened
    problems = []
    if len(others.classes) != len(own.classes):
        problems.append(f"it has {len(others.classes)} classes, the model was trained on {len(own.classes)}")
    if others.shape[0] != own.shape[0]:
        problems.append(f"its images have {others.shape[0]} channels, the model takes {own.shape[0]}")
    check_all(problems, f"Data {data!r} do not fit {str(opened.folder)!r}")
    return replace(opened, data=others, stats=own.stats)


def _restated(images: Tensor, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> Tensor:
    """Images normalised by mean and deviation ``now``, normalised by ``then`` instead."""
    (mean, std), (other, scale) = ([part.view(1, -1, 1, 1) for part in stats] for stats in (now, then))
    return (images * std + mean - other) / torch.where(scale > 0, scale, 1.0)


def _open_run(folder: Path) -> Opened:
    model, recipe, data = runs.open_run(folder)
    return Opened(recipe.model.name, model, recipe, data, folder)


def _open_cut(folder: Path) -> Opened:
    try:
        recipe = parse(json.loads((folder / "base.json").read_text(encoding="utf-8")), str(folder / "base.json"))
    except (OSError, ValueError) as error:
        raise FileError(f"Cannot read {str(folder / 'base.json')!r}: {error}") from error
    data = open_data(recipe.data.name, **recipe.data.options)
    model = resect.load(folder, runs.build_model(recipe, data)).eval()
    return Opened(f"cut {recipe.model.name}", model, recipe, data, folder)


def save_cut(small: nn.Module, folder: Path, source: Opened) -> None:
    """Save a cut model, with what is needed to build the uncut one again where that is known."""
    resect.save(small, folder, base=None if source.recipe is None else source.recipe.dump())


def _read_option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"Option {text!r} must look like key=value, for instance num_classes=10.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def whole_numbers(text: str) -> list[int]:
    """Read ``1,2,4``."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{text!r} must be whole numbers with commas between: 1,2,4.") from None
