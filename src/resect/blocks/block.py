"""What a residual block is: plain frozen data, valid for any copy of the model, JSON in and out."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeAlias, overload

from resect.blocks import choose, show
from resect.blocks.example import Example
from resect.errors import InputError, unknown

Shortcut = Literal["identity", "projection", "reshape"]
_ABLE = ("closable", "scalable", "removable")  # these follow from the fields


@dataclass(frozen=True)
class ResidualBlock:
    """One shortcut, one branch and their addition.

    Strings and numbers only. ``modules`` are the branch's largest module calls, in call order: what is
    intercepted, and what goes when the block is removed. A branch of functions on raw parameters has none:
    there, the ``entries`` are intercepted.
    """

    name: str
    """``<owner>/<branch module with most parameters>``: ``layer3.4/conv1``; ``…@2``: the module's third call."""
    owner: str
    """The innermost module that holds both the branch and the addition."""
    index: int
    """Place in the order of execution, from 0."""
    stage: int
    """Run of neighbouring blocks in one numbered container whose sums have one shape, counted from 1."""
    shortcut: Shortcut
    """``identity``, ``projection`` (has weights) or ``reshape`` (pools, pads, slices or weighs)."""
    part: str
    """``attention``, ``mlp`` or ``conv``: what the branch mostly is."""
    modules: tuple[str, ...]
    calls: tuple[int | None, ...]
    """Per module: which of its calls is the branch's, where it also runs elsewhere; None: all of them."""
    templates: tuple[Any, ...]
    """Per module, the shape of its output: ``"absent"`` for a tensor, lists and None around it."""
    raw_parameters: tuple[str, ...]
    """Parameters that the branch uses outside its modules (a raw layer scale)."""
    entries: tuple[str, ...]
    """Those of them that no value of a branch module ever meets: they are absent while the block is closed."""
    pending: tuple[int, ...]
    """Per module, then per raw parameter: additions on the way from there to the block's own."""
    end: int | None
    """Place, in modules then raw parameters, of what gates act on; None: the block can only be closed."""
    end_leaf: tuple[int | str, ...] | None
    """Where that value sits in a container the module returns; None: it returns the tensor itself."""
    exact: bool
    """Whether that value is the branch end; if functions follow, gates act at the addition instead."""
    owner_call: int | None
    """Which of the owner's calls, where it runs more than once and its raw parameters are intercepted."""
    counted_in: str | None
    """The module during whose call the numbered calls are counted. None: there are none, and nothing of what is
    intercepted serves others too."""
    sum: int
    """Number of the addition; parallel branches of one sum share it."""
    places: tuple[tuple[str, int, int], ...]
    """Where the branch's value enters the sum: operation, how many of its name ran before, operand."""
    clone: bool
    """The sum is later written in place, so a shortcut that passes alone is cloned."""
    unwrap: bool
    """The sum is written into the branch's own value, which the owner may return."""
    zeros: bool
    """Part of the branch's value goes on beside the sum (a concatenation): zeros while it is closed."""
    spreads: bool
    """The branch writes its value into tensors that it makes outside its modules: they are absent too."""
    shape: tuple[int, ...]
    """Shape of the sum, on the example."""
    parameters: int
    """Number of weights that only this branch uses."""
    flops: int
    """Floating-point operations of the branch on the example (two per multiply-add)."""
    reason: str = ""
    """Why the block cannot be scaled, where it cannot."""
    verified: Literal["values", "structure"] = "values"
    """How it was compared with the oracle: to the bit, or, on the meta device, by what is executed alone."""

    @property
    def closable(self) -> bool:
        """Whether the model can run without the branch: true of every block, or it would have been refused."""
        return True

    @property
    def intercepts(self) -> tuple[Any, ...]:
        """What tells one block of a model from another, in every run: what is intercepted, and at which calls."""
        return self.owner, self.owner_call, self.modules, self.calls, self.entries

    @property
    def scalable(self) -> bool:
        """Whether a function can act on exactly the branch end."""
        return self.end is not None

    @property
    def removable(self) -> bool:
        """Whether the branch can be taken out for good: true of every block that can be closed."""
        return self.closable

    def to_json(self) -> dict[str, Any]:
        """Return a dict of strings, numbers, lists and None; what can be done with the block included."""
        return asdict(self) | {able: getattr(self, able) for able in _ABLE}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ResidualBlock:
        """Rebuild a block from ``to_json``; raises ``InputError`` on missing or unknown fields."""
        names = {field.name for field in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k not in _ABLE}
        if set(values) != names:
            wrong = sorted(set(values) ^ names)
            raise InputError(f"This is not a residual block written by this version: fields {wrong} differ.")
        values["places"] = tuple((op, int(number), int(operand)) for op, number, operand in values["places"])
        return cls(**values)

    def __str__(self) -> str:
        return show.line(self)


@dataclass(frozen=True)
class Refusal:
    """A residual addition that was seen but is not offered, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


Key: TypeAlias = "str | int | ResidualBlock"


class Blocks(Sequence[ResidualBlock]):
    """The residual blocks of one model, in order of execution.

    ``blocks["layer3.4"]`` (a canonical name, or an owner with a single block), ``blocks[0]``,
    ``blocks[3:5]``; ``print(blocks)`` shows a table. ``refused`` lists what is not offered, with reasons; ``found`` are
    all blocks of the model, of which these may be a selection, ``whole`` their names; ``flops`` are the whole model's
    floating-point operations on the example, 0 where they are not known.
    """

    def __init__(
        self,
        items: Iterable[ResidualBlock],
        *,
        model: str = "",
        refused: Iterable[Refusal] = (),
        example: Example | None = None,
        flops: int = 0,
    ) -> None:
        self._items = tuple(items)
        self.found, self.whole = self._items, tuple(self.names)
        self.model = model
        self.refused = tuple(refused)
        self.example, self.flops = example, flops

    @overload
    def __getitem__(self, key: str | int) -> ResidualBlock: ...
    @overload
    def __getitem__(self, key: slice) -> Blocks: ...
    def __getitem__(self, key: str | int | slice) -> ResidualBlock | Blocks:
        """Look up by name or place; a slice gives ``Blocks``."""
        if isinstance(key, slice):
            return self._with(self._items[key])
        if isinstance(key, str):
            return self._by_name(key)
        return self._items[key]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[ResidualBlock]:
        return iter(self._items)

    def __add__(self, other: Blocks) -> Blocks:
        """Return the blocks of both, found on the same model and example, in order of execution, each once.

        Where two different blocks have one name, that of the second gets a number: ``mlp~1``.
        """
        together = list(self)
        for block in other:
            if all((block.sum, block.places) != (known.sum, known.places) for known in together):
                together.append(choose.named_apart(block, together))
        ordered = sorted(together, key=lambda block: (block.sum, block.places))
        return self._with(choose.number_stages(replace(block, index=place) for place, block in enumerate(ordered)))

    def _with(self, items: Iterable[ResidualBlock]) -> Blocks:
        chosen = Blocks(items, model=self.model, refused=self.refused, example=self.example, flops=self.flops)
        known = {block.name: block for block in (*self.found, *chosen)}
        chosen.found, chosen.whole = tuple(known.values()), tuple(known)
        return chosen

    def _by_name(self, name: str) -> ResidualBlock:
        exact = [block for block in self if block.name == name]
        owned = exact or [block for block in self if block.owner == name]
        if len(owned) == 1:
            return owned[0]
        if owned:
            names = ", ".join(block.name for block in owned)
            raise InputError(f"{name!r} holds {len(owned)} residual blocks. Name one of them: {names}.")
        raise unknown("residual block", name, self.names)

    @property
    def names(self) -> list[str]:
        """Return the canonical names, in order."""
        return [block.name for block in self]

    def select(self, which: Blocks | Key | Iterable[Key]) -> Blocks:
        """Return the blocks meant by names, places, blocks, or one of them; each once, in order of execution."""
        keys: Iterable[Any] = [which] if isinstance(which, (str, int, ResidualBlock)) else which
        wanted = {self._meant(key).name for key in keys}
        return self._with(block for block in self if block.name in wanted)

    def _meant(self, key: Key) -> ResidualBlock:
        """Return what a name, a place or a block means: a block by what it is, whatever it is called here."""
        if isinstance(key, int) and not -len(self) <= key < len(self):
            raise InputError(f"There is no block {key}: there are {len(self)}, counted from 0.")
        if not isinstance(key, ResidualBlock):
            return self[key]
        for block in self:
            if block.intercepts == key.intercepts:
                return block
        raise InputError(f"The block {key.name!r} is none of these {len(self)}: it comes from elsewhere.")

    def kind(self, shortcut: Shortcut) -> Blocks:
        """Return the blocks with this kind of shortcut: ``identity``, ``projection`` or ``reshape``."""
        if shortcut not in ("identity", "projection", "reshape"):
            raise unknown("kind of shortcut", shortcut, ("identity", "projection", "reshape"))
        return self._with(block for block in self if block.shortcut == shortcut)

    def matching(self, pattern: str) -> Blocks:
        """Return the blocks whose name or owner matches a shell pattern such as ``layer3.*``."""
        fits = [any(fnmatch.fnmatchcase(name, pattern) for name in (block.name, block.owner)) for block in self]
        return self._with(itertools.compress(self, fits))

    def part(self, part: str) -> Blocks:
        """Return the blocks whose branch is ``attention``, ``mlp`` or ``conv``, in small letters or large.

        Raises ``InputError`` for a part that no branch here is.
        """
        return self._with(choose.of_part(self, part))

    def stage(self, number: int) -> Blocks:
        """Return the blocks of one stage, counted from 1; raises ``InputError`` where there is none of that number."""
        return self._with(choose.of_stage(self, number))

    def stages(self) -> dict[int, Blocks]:
        """Group the blocks by stage, in order: ``{1: the blocks of layer1, 2: those of layer2, …}``."""
        return self._grouped(lambda block: block.stage)

    def layers(self) -> dict[str, Blocks]:
        """Group the blocks by layer, in order: ``{"blocks.0": attention and MLP, …}``.

        A layer is a child of the repeated container: ``encoder.layer.3``, also for a block that
        ``encoder.layer.3.attention.output`` owns. An owner outside any numbered container is a layer by itself.
        """
        return self._grouped(lambda block: choose.layer_of(block.owner))

    def _grouped(self, key: Callable[[ResidualBlock], Any]) -> dict[Any, Blocks]:
        groups: dict[Any, list[ResidualBlock]] = {}
        for block in self:
            groups.setdefault(key(block), []).append(block)
        return {group: self._with(items) for group, items in groups.items()}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict (the example is not part of it)."""
        return {
            "model": self.model,
            "flops": self.flops,
            "blocks": [block.to_json() for block in self],
            "refused": [asdict(refusal) for refusal in self.refused],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Blocks:
        """Rebuild from ``to_json``."""
        try:
            return cls(
                (ResidualBlock.from_json(item) for item in data["blocks"]),
                model=data["model"],
                refused=(Refusal(**item) for item in data["refused"]),
                flops=data["flops"],
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"This is not a list of blocks written by Resect: {error!r}.") from error

    def summary(self) -> str:
        """Return one line: how many blocks, in how many layers, of which parts."""
        return show.summary(self)

    def __str__(self) -> str:
        return show.table(self)

    def __repr__(self) -> str:
        return f"<Blocks: {self.summary()}>"
