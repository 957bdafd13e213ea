"""Recipes: what to train, on what, how. TOML files into strict models; every problem is reported at once."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from resect.errors import FileError, InputError, check_all, unknown


class Config(BaseModel):
    """A table of a recipe: no unknown keys, no silent conversions, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelConfig(Config):
    """A name for `registry.build`, and its options. Channels and classes follow the data unless given."""

    name: str
    options: dict[str, Any] = {}


class DataConfig(Config):
    """A name for `data.load`, and its options."""

    name: str = "digits"
    options: dict[str, Any] = {}


class TrainConfig(Config):
    """The training. ``shift`` in pixels; ``batch_size`` over all processes together.

    ``decay``: what weight decay acts on; "weights" leaves BatchNorm and biases out, as the ε-ResNet paper does.
    """

    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=0.1, gt=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=1e-3, ge=0)
    decay: Literal["weights", "all"] = "weights"
    schedule: Literal["one-cycle", "cosine", "step", "constant"] = "one-cycle"
    shift: int = Field(default=0, ge=0)
    flip: bool = False
    channels_last: bool = False
    tensorboard: bool = False
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _nesterov(self) -> TrainConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0")
        return self


class MethodConfig(Config):
    """A training method on the residual blocks: all of them, or those with an identity shortcut."""

    name: Literal["epsilon-gate"] = "epsilon-gate"
    epsilon: float = Field(default=3.0, ge=0)
    skip_muted_after: int | None = Field(default=None, ge=1)
    settle_after: int | None = Field(default=None, ge=1)
    blocks: Literal["all", "identity"] = "all"


class Recipe(Config):
    """One training run: `model`, `data`, `train`, and a `method` or none."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    method: MethodConfig | None = None

    def dump(self) -> dict[str, Any]:
        """All values as JSON-able data; `parse` turns it back into an equal recipe."""
        return self.model_dump(mode="json")


def names() -> list[str]:
    """The recipes that ship with Resect."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def read(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a TOML file, or one of `names`, with ``key=value`` overrides such as ``train.epochs=3``.

    A value is read as TOML, and as a string where it is none (``model.name=cifar-resnet-56``).

    Raises:
        InputError: an unknown recipe, or every unknown key and wrong value, keys with the nearest valid ones.
        FileError: a file that is missing or no TOML.
    """
    is_path = isinstance(source, Path) or source.endswith(".toml") or "/" in source
    if not is_path and source not in names():
        raise unknown("recipe", source, names())
    file = Path(source) if is_path else _folder() / f"{source}.toml"
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"Cannot read recipe {source}: {error.strerror}.") from error
    except ValueError as error:
        raise FileError(f"Recipe {source} is not TOML: {error}.") from error
    for override in overrides:
        _override(tables, override)
    return parse(tables, f"Recipe {str(source)!r}")


def parse(tables: dict[str, Any], place: str = "Recipe") -> Recipe:
    """Nested tables into a `Recipe`; raises one `InputError` with every problem, starting with ``place``."""
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        check_all(map(_problem, error.errors()), place)
        raise  # not reached: a validation error has at least one entry


def differences(one: Recipe, other: Recipe) -> Iterator[str]:
    """``key: value, now value`` for every key in which two recipes differ."""

    def compare(old: Any, new: Any, path: str) -> Iterator[str]:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in [*old, *(key for key in new if key not in old)]:
                yield from compare(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        elif old != new:
            yield f"{path}: {old!r}, now {new!r}"

    return compare(one.dump(), other.dump(), "")


def _folder() -> Any:
    return resources.files("resect.lab") / "recipes"


def _override(tables: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not last:
        raise InputError(f"Override {text!r} must look like key=value, e.g. train.epochs=3.")
    table = tables
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise InputError(f"Override {text!r}: {parent!r} is a value, not a table.")
    try:
        table[last] = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = value.strip()


def _problem(error: Any) -> str:
    """One entry of pydantic's list as a sentence about the key."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{key}: {error['msg'].lower()}" + ("" if error["type"] == "missing" else f", not {error['input']!r}")
    table: Any = Recipe
    for part in error["loc"][:-1]:  # the table that has the unknown key
        table = MethodConfig if part == "method" else table.model_fields[part].annotation
    return f"{key}: {unknown('key', error['loc'][-1], table.model_fields)}"
