"""Open what a user names on the command line: a model by name, the folder of a run, or a cut model."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import resect
from resect.blocks.block import Blocks
from resect.blocks.plan import Plan
from resect.errors import FileError, InputError
from resect.lab import registry, runs
from resect.lab.config.method import EpsilonGateConfig
from resect.lab.data import Data, in_batches, open_data
from resect.lab.display import Bars
from resect.lab.recipe import Recipe, parse


@dataclass(frozen=True)
class Opened:
    """A model and, where it is known, the data it was trained on."""

    name: str
    model: nn.Module
    recipe: Recipe | None = None
    data: Data | None = None
    folder: Path | None = None

    @property
    def gated(self) -> bool:
        """Whether it was trained with an ε-gate, which is not attached here, and has not been cut."""
        method = self.recipe.method if self.recipe is not None else None
        return isinstance(method, EpsilonGateConfig) and not hasattr(self.model, "resect_plan")

    def example(self, size: int | None = None) -> Tensor | dict[str, Tensor]:
        """Return a batch to find blocks with: training images where there are any, else noise by the model's name."""
        if self.data is not None:
            return self.data.sample("train", 64)[0]
        return registry.example(self.name, self.model, size)

    def test_images(self, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (images, labels) of the test split, normalised as in training."""
        return self._images("test", limit)

    def train_images(self, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (images, labels) of the training split, normalised."""
        return self._images("train", limit)

    def _images(self, which: str, limit: int | None) -> tuple[Tensor, Tensor]:
        if self.data is None:
            raise InputError(f"{self.name!r} has no data of its own. Name some, for instance --data digits.")
        return self.data.sample(which, limit)


def open_model(name: str, options: Sequence[str] = (), data: str | None = None) -> Opened:
    """Open ``name``: ``cifar-resnet-110``, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``, or a folder.

    A folder is that of a run, of a cut model, or one that transformers saved.

    ``options`` are ``key=value`` for a model by name; ``data`` names the data set, where the model brings none.

    Raises ``InputError`` for an unknown model, option or data set, ``FileError`` for a damaged folder.
    """
    folder = Path(name)
    looks_like_path = folder.exists() or "/" in name.partition(":")[0]
    if folder.is_file():
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
            return _open_cut(folder)
        if (folder / "plan.json").exists() and not (folder / "recipe.json").exists():
            raise FileError(
                f"{name!r} is a cut model saved from Python: load it there with resect.load({name!r}, model)."
            )
        return _open_run(folder)
    values = dict(_read_option(option) for option in options)
    images = open_data(data) if data else None
    if images is not None:
        values = registry.fit_options(name, images.shape[0], len(images.classes)) | values
    return Opened(name, registry.build(name, **values).eval(), data=images)


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


def choose_plan(
    opened: Opened,
    blocks: Blocks,
    number: int | None,
    names: str | None,
    file: Path | None,
    limit: int | None,
    display: Bars,
) -> Plan:
    """Return the plan meant by ``resect shrink``: a number of blocks, names, a file, or the run's own plan.

    Raises ``InputError`` when more than one is given, none, or a plan that cuts nothing.
    """
    if sum(choice is not None for choice in (number, names, file)) > 1:
        raise InputError("Give one of --blocks, --names and --plan.")
    own = opened.folder / "plan.json" if opened.folder else None
    if number is not None:
        images, labels = opened.train_images(limit)
        data = in_batches(images, labels, 128)
        ranking = resect.rank(
            opened.model, blocks, data, metric="cross_entropy", progress=functools.partial(display.steps, "ranked")
        )
        return ranking.choose(number)
    if names is not None:
        return Plan.of(blocks, [name.strip() for name in names.split(",")])
    if file is None and (own is None or not own.exists()):
        raise InputError("Nothing says which blocks to cut. Give --blocks N, --names a,b or --plan FILE.")
    plan = Plan.load(file or own)  # type: ignore[arg-type]
    if not plan.blocks:
        raise InputError(
            "This plan cuts nothing: no block was muted in every step of the last epochs. "
            "Train longer, or cut the blocks that are missed least: --blocks N."
        )
    return plan


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
