"""Recipes: what to train, on what, how. TOML files into strict models; every problem is reported at once."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from resect.errors import FileError, InputError, check_all, unknown
from resect.lab.config.base import Config
from resect.lab.config.data import DataConfig
from resect.lab.config.distill import DistillConfig
from resect.lab.config.method import METHODS, EpsilonGateConfig, MethodConfig
from resect.lab.config.model import ModelConfig
from resect.lab.config.train import TrainConfig


class Recipe(Config):
    """One training run: `model`, `data`, `train`, a `method` or none, and `distill` where a teacher helps."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    method: MethodConfig | None = None
    distill: DistillConfig | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.train.schedule == "adaptive" and not isinstance(self.method, EpsilonGateConfig):
            raise ValueError('train.schedule = "adaptive" follows muted blocks: it needs method.name = "epsilon-gate"')
        if self.distill is not None and self.train.compile is True:
            raise ValueError("train.compile = true does not go with a teacher, who watches the net: leave it out")
        return self

    def settled(self) -> Recipe:
        """The same training with the method's seed, where none is given, spelled out: the training's."""
        if self.method is None or self.method.seed is not None:
            return self
        return self.model_copy(update={"method": self.method.model_copy(update={"seed": self.train.seed})})

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
        raise InputError(f"{unknown('recipe', source, names())} All that ship: {', '.join(names())}.")
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
    if (key.strip(), value.strip()) == ("method", "none"):  # TOML has no word for it
        tables.pop("method", None)
        return
    try:
        table[last] = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = value.strip()


def _problem(error: Any) -> str:
    """One entry of pydantic's list as a sentence about the key."""
    place: list[Any] = list(error["loc"])
    table: Any = Recipe
    if len(place) > 1 and place[1] in METHODS:  # pydantic names the member of the union that it tried
        table = METHODS[place.pop(1)]
    elif place[:1] == ["distill"]:
        table = DistillConfig
    elif place[:-1]:
        table = Recipe.model_fields[place[0]].annotation
    key = ".".join(map(str, place))
    match error["type"]:
        case "extra_forbidden":
            return f"{key}: {unknown('key', place[-1], table.model_fields)}"
        case "union_tag_invalid":
            return f"{key}.name: {unknown('method', error['ctx']['tag'], METHODS)}"
        case "union_tag_not_found":
            return f"{key}.name: missing; one of {', '.join(METHODS)}"
        case "value_error":  # of keys that do not fit together
            return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{key}: must be a table of keys and values, not {error['input']!r}"
        case "missing":
            return f"{key}: {error['msg'].lower()}"
    return f"{key}: {error['msg'].lower()}, not {error['input']!r}"
