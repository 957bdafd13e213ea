"""Models as people write them: every way to add a branch to a shortcut, and sums that are no residual blocks.

``MODELS`` gives, for each, the builder, the number of residual blocks of its structure, and why that many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 8


def mlp(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def conv(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after))


class Layers(nn.Module):
    """A stem, two layers of one kind, a head."""

    def __init__(self, layer: Callable[[], nn.Module], count: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(count))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class One(nn.Module):
    """One MLP, added in the way a subclass writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()


class Plain(One):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Reversed(One):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + x


class InPlaceOnShortcut(One):
    def forward(self, x: Tensor) -> Tensor:
        out = 1.0 * x  # a fresh tensor: autograd still needs x itself
        out += self.f(x)
        return out


class InPlaceOnBranch(One):
    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        out += x
        return F.relu_(out)


class MethodOnBranch(One):
    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        out.add_(x)  # its result is thrown away
        return out


class MethodOnShortcut(One):
    def forward(self, x: Tensor) -> Tensor:
        out = 1.0 * x
        out.add_(self.f(x))
        return out


class AddInto(One):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.add(x, self.f(x), out=out)
        return out


class AddFunction(One):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(input=x, other=self.f(x))


class AddWithAlpha(One):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.f(x), alpha=0.5)


class Minus(One):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.f(x)


class SumOfList(One):
    def forward(self, x: Tensor) -> Tensor:
        return sum([x, self.f(x)])


class StackedSum(One):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, self.f(x)]).sum(0)


class EndsInFunction(One):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.f(x))


class EndsInAffine(One):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.f(x)


class Highway(One):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.gate(x))
        return t * self.f(x) + (1 - t) * x


class Interpolated(One):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * (self.f(x) - x)


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(WIDTH), mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.a(h) + self.b(h)


class ParallelFirst(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.a(h) + self.b(h) + x


class Keywords(nn.Module):
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = mlp()

        def forward(self, *, hidden: Tensor, scale: float = 1.0) -> Tensor:
            return scale * self.f(hidden)

    def __init__(self) -> None:
        super().__init__()
        self.branch = self.Branch()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(hidden=x, scale=0.5)


@dataclass
class Output:
    hidden: Tensor
    weights: Tensor | None = None
    name: str = "branch"


class ReturnsTuple(One):
    class Branch(One):
        def forward(self, x: Tensor) -> Any:
            return self.f(x), None, (3, "three")

    kind: Callable[[], nn.Module] = Branch

    def __init__(self) -> None:
        super().__init__()
        self.f = type(self).kind()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        out, _, (number, _) = self.f(x)
        return x + out * number


class ReturnsDict(ReturnsTuple):
    class Branch(One):
        def forward(self, x: Tensor) -> Any:
            return {"hidden": self.f(x), "steps": 2}

    kind = Branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)["hidden"]


class ReturnsDataclass(ReturnsTuple):
    class Branch(One):
        def forward(self, x: Tensor) -> Any:
            return Output(self.f(x))

    kind = Branch

    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        return x + out.hidden if out.name == "branch" else x


class ByHandStochasticDepth(One):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()).item() < 0.3:
            return x
        return x + self.f(x)


class DropoutBetween(One):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.f(x), 0.2, self.training)


class RawWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / (2 * WIDTH) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(F.gelu(F.linear(x, self.up)), self.down)


class ReadsShapes(One):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f[0](x)
        n, width = h.shape
        h = self.f[3](self.f[2](self.f[1](h.view(n, 1, width)))).reshape(h.size(0), -1)
        assert len(h) == n
        return x + h


class Splits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return x + self.down(torch.cat([value[..., :WIDTH], gate[..., WIDTH:]], -1) * torch.sigmoid(gate))


class CatsTheInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.cat([x, self.a(x)], -1))


class PartOfTheChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(WIDTH, WIDTH + 2), nn.GELU(), nn.Linear(WIDTH + 2, WIDTH + 2))
        self.back = nn.Linear(WIDTH + 2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        return self.back(torch.cat([out[:, :WIDTH] + x, out[:, WIDTH:]], dim=1))


class SharedActivation(One):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)  # type: ignore[assignment]
        self.g, self.act = nn.Linear(WIDTH, WIDTH), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.g(self.act(self.f(x))))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(WIDTH, WIDTH), mlp(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return x + self.last(h + self.inner(h))


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.shortcut = mlp(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + self.shortcut(x)


class ProjectedTwice(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH))  # type: ignore[assignment]
        self.f = nn.Sequential(mlp(), mlp())


class LambdaShortcut(nn.Module):
    """CIFAR ResNet as in the well-known implementation: option A, strided slice and zero padding in a lambda."""

    class Lambda(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            self.one, self.two = conv(before, after, stride), conv(after, after)
            self.shortcut: nn.Module = nn.Sequential()
            if stride != 1:
                pad = (after - before) // 2
                self.shortcut = LambdaShortcut.Lambda(_Slice(pad))

        def forward(self, x: Tensor) -> Tensor:
            out = self.two(F.relu(self.one(x)))
            out += self.shortcut(x)
            return F.relu(out)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.layers = nn.Sequential(self.Block(4, 4, 1), self.Block(4, 8, 2), self.Block(8, 8, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(F.relu(self.stem(x))).mean((2, 3)))


class _Slice:
    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class SharedBlock(nn.Module):
    """One layer called three times: a block is a module and a call of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(5, WIDTH), layer, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.layer(x)
        return self.head(x)


class SharedMlp(nn.Module):
    """Two layers with attention-like parts of their own and one MLP between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.shared = nn.Linear(5, WIDTH), mlp(), mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a(x)
        x = x + self.shared(x)
        x = x + self.b(x)
        return x + self.shared(x)


class SideOutput(nn.Module):
    """The first branch computes a bias that the later ones use, as in T5."""

    class Attention(nn.Module):
        def __init__(self, has_bias: bool) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.bias = nn.Embedding(9, 1) if has_bias else None

        def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            if self.bias is not None:
                places = torch.arange(x.shape[1])
                bias = self.bias((places[:, None] - places[None]).clamp(-4, 4) + 4).squeeze(-1)
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out((q @ k.transpose(1, 2) + bias).softmax(-1) @ v), bias

    class Layer(nn.Module):
        def __init__(self, has_bias: bool) -> None:
            super().__init__()
            self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), SideOutput.Attention(has_bias), mlp()

        def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            out, bias = self.attn(self.norm(x), bias)
            x = x + out
            return x + self.mlp(x), bias

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList(self.Layer(place == 0) for place in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self.stem(x), None
        for layer in self.layers:
            x, bias = layer(x, bias)
        return x


class TwoInputs(nn.Module):
    """An encoder and a decoder; the example is a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(5, WIDTH), nn.Linear(5, WIDTH)
        self.a, self.cross, self.b = mlp(), nn.MultiheadAttention(WIDTH, 2, batch_first=True), mlp()

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        memory = self.encode(source)
        memory = memory + self.a(memory)
        x = self.decode(target)
        x = x + self.cross(x, memory, memory)[0]
        return {"memory": memory, "x": x + self.b(x)}


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.f = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True), mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.f(x)


class PostNorm(One):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.f(x))


class Flat(nn.Module):
    """Everything in one module, the blocks written out; its list of features keeps every sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.f1, self.f2, self.f3, self.head = mlp(), mlp(), mlp(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        x0 = self.stem(x)
        x1 = x0 + self.f1(x0)
        x2 = x1 + self.f2(x1)
        x3 = x2 + self.f3(x2)
        return [x1, x2, self.head(x3)]


class Checkpointed(One):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.utils.checkpoint.checkpoint(self.f, x, use_reentrant=False)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rnn = nn.LayerNorm(WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(self.norm(x))
        return x + out


# ------------------------------------------------------------------------- sums that are no residual blocks


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(13, 8), nn.Linear(21, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, F.relu(self.a(x))], -1)
        x = torch.cat([x, F.relu(self.b(x))], -1)
        return self.c(x)


class UNet(nn.Module):
    """Additive connections from the way down to the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv(3, 4), conv(4, 8, 2), conv(8, 16, 2)
        self.up2, self.up1, self.head = conv(16, 8), conv(8, 4), conv(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.down1(x))
        two = F.relu(self.down2(one))
        deep = F.relu(self.middle(two))
        up = two + F.interpolate(F.relu(self.up2(deep)), scale_factor=2)
        up = one + F.interpolate(F.relu(self.up1(up)), scale_factor=2)
        return self.head(up)


class Pyramid(nn.Module):
    """FPN: lateral convolutions, added to the upsampled coarser level."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = conv(3, 4), conv(4, 8, 2), conv(8, 16, 2)
        self.side1, self.side2, self.side3 = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        one = F.relu(self.one(x))
        two = F.relu(self.two(one))
        three = self.side3(F.relu(self.three(two)))
        middle = self.side2(two) + F.interpolate(three, scale_factor=2)
        return [three, middle, self.side1(one) + F.interpolate(middle, scale_factor=2)]


class RepVgg(nn.Module):
    """Parallel sums of convolutions and a normalised identity, then the nonlinearity."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = conv(4, 4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.wide(x) + self.narrow(x) + self.norm(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = conv(3, 4), nn.Sequential(self.Block(), self.Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(F.relu(self.stem(x)))


class Positions(nn.Module):
    """Learned positions, a segment embedding, a mask and a rotation are added or mixed in; no residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.place, self.kind = nn.Linear(5, WIDTH), nn.Embedding(9, WIDTH), nn.Embedding(2, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        x = self.stem(x) + self.place(torch.arange(length)) + self.kind(torch.zeros(length, dtype=torch.long))
        q, k, v = self.qkv(x).chunk(3, -1)
        angle = torch.arange(length)[:, None] / 10 ** torch.arange(WIDTH // 2)
        angle = torch.cat([angle, angle], -1)
        q, k = (t * angle.cos() + _half_turned(t) * angle.sin() for t in (q, k))
        mask = torch.full((length, length), float("-inf")).triu(1)
        return self.out((q @ k.transpose(1, 2) + mask).softmax(-1) @ v)


def _half_turned(x: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([-two, one], -1)


class Ensemble(nn.Module):
    """Two nets whose outputs are added, and a loss-like sum of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(5, 8)
        self.one, self.two = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x)) + F.relu(self.b(x))
        return self.one(h) + self.two(h)


def rows() -> Tensor:
    return torch.randn(4, 5)


def words() -> Tensor:
    return torch.randn(2, 6, 5)


def pictures() -> Tensor:
    return torch.randn(2, 3, 16, 16)


Built = tuple[Callable[[], nn.Module], Callable[[], Any], int, str]


def _twice(layer: Callable[[], nn.Module], each: int = 1, example: Callable[[], Any] = rows, why: str = "") -> Built:
    return lambda: Layers(layer), example, 2 * each, why or f"2 layers x {each}"


MODELS: dict[str, Built] = {
    "plain": _twice(Plain),
    "reversed": _twice(Reversed),
    "x += f(x)": _twice(InPlaceOnShortcut),
    "f += x": _twice(InPlaceOnBranch),
    "f.add_(x), result discarded": _twice(MethodOnBranch),
    "x.add_(f(x)), result discarded": _twice(MethodOnShortcut),
    "torch.add(x, f, out=)": _twice(AddInto),
    "torch.add(input=, other=)": _twice(AddFunction),
    "torch.add(x, f, alpha=)": _twice(AddWithAlpha),
    "x - f(x)": _twice(Minus),
    "sum([x, f(x)])": _twice(SumOfList),
    "stack([x, f(x)]).sum(0)": _twice(StackedSum),
    "x + tanh(f(x))": _twice(EndsInFunction),
    "x + gamma * f(x)": _twice(EndsInAffine),
    "highway": _twice(Highway),
    "x + a * (f(x) - x)": _twice(Interpolated),
    "parallel": _twice(Parallel, 2, why="2 layers x 2 branches of one sum"),
    "parallel, identity last": _twice(ParallelFirst, 2, why="2 layers x 2 branches of one sum"),
    "keyword arguments": _twice(Keywords),
    "tuple output": _twice(ReturnsTuple),
    "dict output": _twice(ReturnsDict),
    "dataclass output": _twice(ReturnsDataclass),
    "stochastic depth by hand": _twice(ByHandStochasticDepth),
    "F.dropout between": _twice(DropoutBetween),
    "raw weights": _twice(RawWeights),
    "reads shapes": _twice(ReadsShapes),
    "splits": _twice(Splits),
    "cats the input": _twice(CatsTheInput),
    "part of the channels": _twice(PartOfTheChannels),
    "one activation inside and outside": _twice(SharedActivation),
    "nested": _twice(Nested, why="2 layers x 1: the inner block is part of the outer branch"),
    "projection": _twice(Projected),
    "projection of two layers": _twice(ProjectedTwice),
    "post-norm": _twice(PostNorm),
    "attention": _twice(Attends, 2, words),
    "recurrent": _twice(Recurrent, 1, words),
    "checkpointed": _twice(Checkpointed),
    "lambda shortcut": (LambdaShortcut, pictures, 3, "3 blocks, one of them with a padded shortcut"),
    "one layer, three calls": (lambda: SharedBlock(Plain()), rows, 3, "3 calls x 1"),
    "raw weights, three calls": (lambda: SharedBlock(RawWeights()), rows, 3, "3 calls x 1"),
    "shared MLP": (SharedMlp, rows, 4, "2 own MLPs + 2 calls of the shared one"),
    "side output": (SideOutput, words, 6, "3 layers x 2"),
    "two inputs": (TwoInputs, lambda: {"source": words(), "target": torch.randn(2, 4, 5)}, 3, "1 encoder + 2 decoder"),
    "flat": (Flat, rows, 3, "3 sums"),
    "dense": (Dense, rows, 0, "concatenation"),
    "U-Net": (UNet, pictures, 0, "long additive connections"),
    "FPN": (Pyramid, pictures, 0, "long additive connections"),
    "RepVGG": (RepVgg, pictures, 0, "plain parallel sums"),
    "positions, mask, rotation": (Positions, words, 0, "positional sums, mask, rotary embedding"),
    "ensemble": (Ensemble, rows, 0, "sums of independent nets and heads"),
}


def build(name: str) -> tuple[nn.Module, Any]:
    """Build one of ``MODELS`` and its example, both always the same."""
    torch.manual_seed(0)
    model, example, _, _ = MODELS[name]
    return model().eval(), example()
