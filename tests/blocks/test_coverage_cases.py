"""What real models were found to do, in miniature: each of these once failed in the coverage run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import resect
from resect.blocks.upkeep import Upkeep

WIDTH = 6


def chain(layer: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, WIDTH), layer(), layer(), nn.Linear(WIDTH, 3)).eval()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


@torch.no_grad()
def closed_is_zeroed(model: nn.Module, x: Tensor, name: str, end: str) -> None:
    """Closing a block gives the same bits as its branch end replaced by zeros."""
    hook = model.get_submodule(end).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    expected = model(x)
    hook.remove()
    assert not torch.equal(expected, model(x)), "the test would prove nothing"
    blocks = resect.find_blocks(model, x)
    with resect.closed(model, [name]):
        assert torch.equal(model(x), expected)
    assert torch.equal(resect.remove(model, blocks, [name])(x), expected)


class AddsByKeyword(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(input=x, other=self.f(x))


class AddsInto(Layer):
    def forward(self, x: Tensor) -> Tensor:
        total = torch.empty_like(x)
        torch.add(x, self.f(x), out=total)
        return total


@pytest.mark.parametrize("layer", [AddsByKeyword, AddsInto])
@torch.no_grad()
def test_an_addition_may_name_its_operands_and_its_result(layer: type[Layer]) -> None:
    model, x = chain(layer), torch.randn(4, 5)
    blocks = resect.find_blocks(model, x)
    assert [block.owner for block in blocks] == ["1", "2"]
    assert all(block.scalable for block in blocks)
    closed_is_zeroed(model, x, blocks[1].name, "2.f")
    whole = model(x)
    with resect.gates(model, blocks) as gates:
        assert torch.equal(model(x), whole)
        gates[0].apply(torch.zeros_like)
        scaled = model(x)
        gates[0].close()
        assert torch.equal(model(x), scaled)


class Versioned(Layer):
    """Refuses weights that do not say in which form they were saved, as torchvision's MNASNet does."""

    _version = 2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def _load_from_state_dict(self, state, prefix, metadata, *others):  # type: ignore[no-untyped-def]
        if metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_a_cut_model_loads_where_the_class_wants_to_know_the_version(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, x = chain(Versioned), torch.randn(4, 5)
    small = resect.remove(model, resect.find_blocks(model, x), ["2"])
    resect.save(small, tmp_path / "cut")
    again = resect.load(tmp_path / "cut", chain(Versioned))
    assert torch.equal(again(x), small(x))


class HandsOn(nn.Module):
    """A branch whose module returns, beside its result, an argument that later layers use (T5's position bias)."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, *, bias: Tensor) -> tuple[Tensor, Tensor]:
            return self.f(torch.tanh(x) + bias), bias

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, bias = pair
        out, bias = self.inner(x, bias=bias)
        return x + out, bias


class WithBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(5, WIDTH), nn.Sequential(HandsOn(), HandsOn(), HandsOn())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((self.stem(x), x.sum(-1, keepdim=True)))[0]


@torch.no_grad()
def test_what_a_closed_module_only_hands_on_goes_on() -> None:
    torch.manual_seed(0)
    model, x = WithBias().eval(), torch.randn(4, 5)
    blocks = resect.find_blocks(model, x)
    assert not blocks.refused
    assert [block.modules for block in blocks] == [(f"layers.{place}.inner",) for place in range(3)]
    assert resect.Blocks.from_json(blocks.to_json())[0] == blocks[0]
    closed_is_zeroed(model, x, "layers.0", "layers.0.inner.f")
    closed_is_zeroed(model, x, "layers.1", "layers.1.inner.f")


class Gated(nn.Module):
    """A stream of its own ends in the other's branch, and each layer keeps a state in the model's tensor."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.side = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.queries = nn.Parameter(torch.randn(3, width))
        self.own, self.cross = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, context):
        for layer in self.side:
            context = context + torch.tanh(layer(context))
        queries = self.queries + torch.tanh(self.own(self.queries))
        return queries + self.cross(torch.softmax(queries @ context.T, 1) @ context)


def test_a_stream_that_only_ends_in_a_branch_is_no_part_of_it():
    torch.manual_seed(0)
    model = Gated().eval()
    blocks = resect.find_blocks(model, torch.randn(5, 4))
    assert blocks.names == ["side.0", "side.1", "own", "cross"]  # learned queries carry a stream too
    assert blocks["cross"].modules == ("cross",)


class Stateful(nn.Module):
    """Writes the branch's value into a tensor of its own and into one of the caller's."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, state):
        value = torch.tanh(self.first(x))
        state[:, 0] = value[:, -1]
        x = x + value
        mixed = torch.ones_like(x)  # zeros would hide that it was not written
        mixed[:, 1:] = self.second(x)[:, :-1]
        return x + mixed * 2


def test_what_a_closed_branch_would_write_stays_unwritten():
    torch.manual_seed(0)
    model, x, state = Stateful().eval(), torch.randn(3, 4), torch.ones(3, 2)
    blocks = resect.find_blocks(model, (x, state))
    assert blocks.names == ["first", "second"]
    with torch.no_grad():
        with resect.closed(model, "second"):
            assert torch.equal(model(x, state.clone()), x + torch.tanh(model.first(x)))
        after = state.clone()
        with resect.closed(model, "first"):
            out = model(x, after)
        shifted = torch.cat([torch.ones(3, 1), model.second(x)[:, :-1]], 1)
        assert torch.equal(out, x + 2 * shifted)
        assert torch.equal(after, state)
        small = resect.remove(model, blocks, blocks.names)
        assert torch.equal(small(x, state.clone()), x)


def test_a_closed_module_hands_the_cache_back():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x, cache):
            cache["seen"] = True
            return self.f(x), cache

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Cached()

        def forward(self, x):
            cache = Cache()
            value, again = self.attention(x, cache)
            assert again is cache
            return x + value

    model, x = Model().eval(), torch.randn(2, 4)
    with resect.closed(model, resect.find_blocks(model, x)):
        assert torch.equal(model(x), x)


class Cache(dict):
    """Not a plain dict: it can be handed on, not made anew."""

    def __init__(self):
        super().__init__()


def test_an_activation_with_parameters_is_no_block():
    class Snake(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.alpha = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

        def forward(self, x):
            x = self.f(x)
            return x + torch.sin(self.alpha * x) ** 2 / self.alpha

    assert not resect.find_blocks(Snake().eval(), torch.randn(2, 4))


def test_what_else_a_module_returns_does_not_count_as_on_the_way():
    """A router's scores meet sums inside the module; the caller drops them."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.router = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            scores = self.router(x)
            return self.f(x) + scores.sigmoid() + scores, scores

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

        def forward(self, x):
            value, _ = self.experts(x)
            return x + value

    model, x = Model().eval(), torch.randn(2, 4)
    blocks = resect.find_blocks(model, x)
    assert blocks.names == ["experts"]
    with resect.closed(model, blocks):
        assert torch.equal(model(x), x)


class Windows(nn.Module):
    """Partitions into windows and back, as Swin does: a view of what was permuted and made contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, width = x.shape
        windows = x.view(batch, 2, width // 2).permute(1, 0, 2).contiguous().view(-1, width // 2)
        h = self.f(windows).view(2, batch, width // 2).permute(1, 0, 2).contiguous().view(batch, width)
        return x + h[:, : h.shape[1]]


def test_windows_of_a_closed_branch_have_a_shape() -> None:
    model, x = chain(Windows), torch.randn(4, 5)
    assert not resect.find_blocks(model, x).refused
    closed_is_zeroed(model, x, "1", "1.f")


class ActivatesTwice(nn.Module):
    """One dropout for the inner sum and for the block's end, as EdgeNeXt has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.drop(torch.tanh(self.inner(h)))
        return x + self.drop(self.last(h))


def test_a_module_without_weights_may_run_before_and_after_an_inner_sum() -> None:
    model, x = chain(ActivatesTwice), torch.randn(4, 5)
    assert len(resect.find_blocks(model, x)) == 2
    closed_is_zeroed(model, x, "1", "1.last")


def conv(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after))


class Pictures(nn.Module):
    """A branch beside a shortcut that subclasses give; the example is a batch of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 4), conv(12, 3)
        self.f = nn.Sequential(conv(4, 8, 2), nn.ReLU(), conv(8, 8))

    def shortcut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added, and what goes on beside the sum."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        shortcut, beside = self.shortcut(x)
        return self.head(torch.cat([self.f(x) + shortcut, beside], 1))


class TwoConvolutions(Pictures):
    """GhostNet: depthwise, then pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1))

    def shortcut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(x), nn.functional.avg_pool2d(x, 2)


class FrozenNorm(Pictures):
    """DETR: the shortcut's norm is a product and a sum with constants."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.scale, self.bias = (
            nn.Conv2d(4, 8, 1, 2),
            nn.Parameter(torch.rand(1, 8, 1, 1)),
            nn.Buffer(torch.rand(1, 8, 1, 1)),
        )

    def shortcut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(x) * self.scale + self.bias, nn.functional.avg_pool2d(x, 2)


class SharedPool(Pictures):
    """DLA: the pooled input is projected for the shortcut, and goes on beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.project = nn.MaxPool2d(2), nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))

    def shortcut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.pool(x)
        return self.project(pooled), pooled


class ActivatedFirst(Pictures):
    """DPN: norm, activation and convolution, of which a part is the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 12, 1, 2))

    def shortcut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = self.down(x)
        return both[:, :8], both[:, 8:]


class PooledAlike(Pictures):
    """A searched cell: a pooling that keeps the size is an operation beside another, no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 4))
        self.head = conv(8, 3)

    def shortcut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.max_pool2d(x, 3, 1, 1), x


class Positioned(TwoConvolutions):
    """TNT: two streams out of one embedding, one of them with learned positions, meet in a layer."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(8, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.positions

    def __init__(self) -> None:
        super().__init__()
        self.down.append(self.Positions())


class ActivatedLast(Pictures):
    """Two branches, the light one with an activation at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.ReLU())

    def shortcut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(x), nn.functional.avg_pool2d(x, 2)


@pytest.mark.parametrize("kind", [TwoConvolutions, FrozenNorm, SharedPool, ActivatedFirst])
def test_a_projection_may_be_of_several_linear_parts(kind: type[Pictures]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 3, 8, 8)
    blocks = resect.find_blocks(model, x)
    assert [(block.modules, block.shortcut) for block in blocks] == [(("f",), "projection")]
    closed_is_zeroed(model, x, blocks[0].name, "f")


def test_a_pooled_shortcut_is_one_also_where_there_is_nothing_left_to_pool() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x) + nn.functional.max_pool2d(x, 3, 2, 1)

    for size in (8, 1):
        assert len(
            resect.find_blocks(nn.Sequential(nn.Conv2d(3, 3, 1), Pooled()).eval(), torch.randn(2, 3, size, size))
        )


@pytest.mark.parametrize("kind", [PooledAlike, Positioned, ActivatedLast])
def test_two_operations_side_by_side_are_no_residual_block(kind: type[Pictures]) -> None:
    assert not len(resect.find_blocks(kind().eval(), torch.randn(2, 3, 8, 8)))


class Aliased(nn.Module):
    """Attention whose position encoding the model holds under a name of its own, as CoaT does."""

    class Attention(nn.Module):
        def __init__(self, position: nn.Module) -> None:
            super().__init__()
            self.f, self.position = nn.Linear(WIDTH, WIDTH), position

        def forward(self, x: Tensor) -> Tensor:
            return self.f(torch.tanh(x)) * self.position(x)

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Linear(WIDTH, WIDTH)
        self.attention = self.Attention(self.position)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


def test_a_module_of_two_names_is_one_module(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, x = chain(Aliased), torch.randn(4, 5)
    blocks = resect.find_blocks(model, x)
    assert [block.raw_parameters for block in blocks] == [(), ()]
    assert blocks[0].parameters == 2 * (WIDTH * WIDTH + WIDTH)
    closed_is_zeroed(model, x, "1", "1.attention")
    small = resect.remove(model, blocks, ["1"])
    resect.save(small, tmp_path / "cut")
    assert torch.equal(resect.load(tmp_path / "cut", chain(Aliased))(x), small(x))


class OwnNorm(nn.Module):
    """Two branches with a norm of their own and one MLP between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.mlp = nn.LayerNorm(5), nn.LayerNorm(5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.one(x))
        return x + self.mlp(self.two(x))


@torch.no_grad()
def test_what_a_removed_block_has_for_itself_goes_though_its_mlp_stays(tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model, x = OwnNorm().eval(), torch.randn(4, 5)
    blocks = resect.find_blocks(model, x)
    small = resect.remove(model, blocks, [blocks[0].name])
    assert sorted(small.state_dict()) == ["mlp.bias", "mlp.weight", "two.bias", "two.weight"]
    assert torch.equal(small(x), x + model.mlp(model.two(x)))
    resect.save(small, tmp_path / "cut")
    assert torch.equal(resect.load(tmp_path / "cut", OwnNorm().eval())(x), small(x))


def test_a_raw_parameter_of_several_branches_stays_when_one_goes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Parameter(torch.randn(4))
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x + torch.tanh(self.first(x) * self.shared)
            return x + torch.tanh(self.second(x) * self.shared)

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 4)
    blocks = resect.find_blocks(model, x)
    small = resect.remove(model, blocks, "first")
    with torch.no_grad():
        assert torch.equal(small(x), x + torch.tanh(model.second(x) * model.shared))
    assert sorted(small.state_dict()) == ["second.bias", "second.weight", "shared"]


class Strided(nn.Module):
    """The shortcut is a slice with gaps in memory; the sum has none, and other layouts round otherwise later."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, ::2]
        return x + self.f(x)


def test_a_closed_sum_lies_in_memory_as_the_sum_does() -> None:
    model, x = Strided().eval(), torch.randn(3, 4)
    blocks = resect.find_blocks(model, x)
    with torch.no_grad(), resect.closed(model, blocks):
        assert model(x).stride() == (model.f.weight.shape[0], 1)


class Keys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_idx = 3

    def forward(self, x: Tensor, cache) -> Tensor:  # type: ignore[no-untyped-def]
        return cache.update(x, x, self.layer_idx)[0]


class State(nn.Module):
    """A state-space mixer knows its layer too, but adds no keys to the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_idx = 3

    def forward(self, x: Tensor, cache) -> Tensor:  # type: ignore[no-untyped-def]
        return cache.update_recurrent_state(x, self.layer_idx)


class Derived(State):
    pass


@pytest.mark.parametrize(("kind", "layers", "states"), [(Keys, (3,), ()), (State, (), (3,)), (Derived, (), (3,))])
def test_what_a_module_keeps_up_is_read_off_its_code(kind, layers, states) -> None:  # type: ignore[no-untyped-def]
    upkeep = Upkeep.of(nn.ModuleDict({"mixer": kind()}), "mixer")
    assert (upkeep.layers, upkeep.states) == (layers, states)
