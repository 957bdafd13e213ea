"""Linear stand-ins: least squares, merged or kept, saved, and never worse than they say."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nets import Net
from torch import Tensor, nn

import resect
from resect.errors import InputError
from resect.shrink.least_squares import LeastSquares
from resect.shrink.seen import rows_of, strided


class Linear(nn.Module):
    """A branch that a linear map can replace without loss: ``down(up(x))``."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width, bias=bias), nn.Linear(3 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Curved(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


class Stream(nn.Module):
    """``x + branch(x)`` again and again."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.layers = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.layers:
            x = x + branch(x)
        return x


class Conv(nn.Module):
    """A convolution and its norm beside a shortcut: linear in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.two, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.norm(self.two(x))


def batches(*shape: int, number: int = 6, size: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, *shape, generator=generator) for _ in range(number)]


def found(net: nn.Module, x: Tensor) -> resect.Blocks:
    blocks = resect.find_blocks(net, x)
    assert len(blocks) > 1
    return blocks


def facts(small: nn.Module) -> dict:
    return small.resect_plan.evidence["replaced"]


def test_least_squares_against_a_solver_that_sees_all_rows():
    torch.manual_seed(0)
    x, noise = torch.randn(400, 5) * torch.tensor([1, 2, 3, 4, 5.0]), 0.1 * torch.randn(400, 3)
    y = x @ torch.randn(5, 3) + torch.randn(3) + noise
    for bias in (True, False):
        fit = LeastSquares(bias)
        for start in range(0, 400, 50):
            fit.add(x[start : start + 50], y[start : start + 50])
        weight, constant = fit.solve()
        full = torch.cat([x, torch.ones(400, 1)], dim=1) if bias else x
        wanted = torch.linalg.lstsq(full.double(), y.double()).solution
        assert torch.allclose(weight, wanted[:5].T, atol=5e-3)
        assert constant is None if not bias else torch.allclose(constant, wanted[5], atol=5e-3)


def test_what_cannot_be_learned_is_left_alone():
    torch.manual_seed(0)
    fit = LeastSquares()
    for _ in range(4):
        fit.add(torch.randn(12, 40), 3 + torch.randn(12, 2))
    weight, constant = fit.solve()
    assert weight.abs().max() < 0.05  # a plain fit: 0.3 and more
    assert torch.allclose(constant, torch.full((2,), 3.0, dtype=torch.float64), atol=0.5)


def test_the_error_of_the_sums_is_that_of_the_rows():
    torch.manual_seed(0)
    fit, x, y = LeastSquares(), torch.randn(30, 4), torch.randn(30, 2)
    fit.add(x, y)
    solution = torch.randn(5, 2, dtype=torch.float64)
    wanted = (y.double() - x.double() @ solution[:4] - solution[4]).square().sum()
    assert fit._folds[0].error(solution) == pytest.approx(float(wanted))


@pytest.mark.parametrize(("plan", "merged"), [(["layers.1", "layers.2"], "layers.0.down"), (["layers.0"], None)])
def test_a_linear_run_is_replaced_without_loss(plan, merged):
    torch.manual_seed(0)
    net = Stream(Linear(6), Linear(6), Linear(6), Curved(6)).eval()
    x = torch.randn(4, 5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    small = resect.replace(net, found(net, x), plan, batches(5))
    run = facts(small)[found(net, x)[plan[0]].name]
    assert run["merged_into"] == merged
    assert run["error"] < 5e-3 < 0.05 < run["error_removed"]
    assert (small(x) - net(x)).norm() < 5e-3 * net(x).norm()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    gone = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in small.parameters())
    branch = sum(p.numel() for p in net.layers[0].parameters())
    assert gone == len(plan) * branch - (0 if merged else 6 * 7)


def test_merged_is_the_formula():
    torch.manual_seed(0)
    net = Stream(Curved(6), Curved(6), Curved(6)).eval()
    x, data = torch.randn(7, 5), batches(5, number=1)
    small = resect.replace(net, found(net, x), ["layers.1"], data)
    stem, own = net.stem(data[0]), net.layers[0]
    with torch.no_grad():
        branch = own(stem)
        target = net.layers[1](stem + branch)
        fit = LeastSquares()
        fit.add(branch, target)
        weight, bias = fit.solve()
        h = net.stem(x)
        h = h + own(h) + own(h) @ weight.float().T + bias.float()
        assert torch.allclose(small(x), h + net.layers[2](h), atol=1e-5)


def test_the_evidence_says_whether_the_map_helps_and_on_what():
    torch.manual_seed(0)
    net, x = Stream(Linear(6), Linear(6), Curved(6)).eval(), torch.randn(3, 5)
    for data, held_out in ((batches(5, number=1), 0), (batches(5, number=2), 1), (batches(5, number=10), 2)):
        (run,) = facts(resect.replace(net, found(net, x), ["layers.1"], data)).values()
        assert run["held_out"] == held_out
        assert run["helps"] is True
    other = [*batches(5, number=4), 1e3 * torch.randn(40, 5)]  # nothing as what was fitted: tanh is at its ends
    (run,) = facts(resect.replace(net, found(net, x), ["layers.2"], other)).values()
    assert run["helps"] is (run["error"] < run["error_removed"]) is False


def test_without_a_bias_none_is_added():
    torch.manual_seed(0)
    net, x = Stream(Linear(6, bias=False), Linear(6, bias=False), Curved(6)).eval(), torch.randn(3, 5)
    small = resect.replace(net, found(net, x), ["layers.1"], batches(5))
    (run,) = facts(small).values()
    assert run["merged_into"] == "layers.0.down"
    assert small.layers[0].down.bias is None


def reloaded(small: nn.Module, fresh: nn.Module, x: Tensor, folder) -> None:
    resect.save(small, folder / "cut")
    for again in (resect.load(folder / "cut", fresh), copy.deepcopy(small), pickle.loads(pickle.dumps(small))):  # noqa: S301
        assert torch.equal(again(x), small(x))
    assert resect.export(small, folder / "cut.pt2", example=x).difference == 0


def test_a_convolution_with_its_norm_becomes_one_1x1(tmp_path):
    torch.manual_seed(0)
    net, x = Conv().train(), torch.randn(4, 3, 8, 8)
    for _ in range(20):
        net(torch.randn(16, 3, 8, 8))
    net.eval()
    small = resect.replace(net, resect.find_blocks(net, x), ["two"], batches(3, 8, 8, size=8))
    assert facts(small)["two"]["linear"] == {"in": 6, "out": 6, "stride": [1, 1]}
    assert (small(x) - net(x)).norm() < 1e-3 * net(x).norm()
    reloaded(small, Conv().eval(), x, tmp_path)


def test_a_downsampling_block_keeps_its_shortcut_and_strides(tmp_path):
    models = pytest.importorskip("resect.lab.models")
    torch.manual_seed(0)

    def fresh() -> nn.Module:
        return models.cifar_resnet(8, widths=(4, 8, 8), shortcut="B").eval()

    net, x = fresh(), torch.randn(4, 3, 8, 8)
    data = batches(3, 8, 8, size=8)
    blocks = found(net, x)
    small = resect.replace(net, blocks, ["layer2.0"], data)
    run = facts(small)[blocks["layer2.0"].name]
    assert run["linear"] == {"in": 4, "out": 8, "stride": [2, 2]}
    assert run["error"] < run["error_removed"]
    reloaded(small, fresh(), x, tmp_path)


def test_the_errors_are_those_of_the_held_out_batches():
    torch.manual_seed(0)
    net, x, data = Stream(Curved(6), Curved(6), Curved(6)).eval(), torch.randn(3, 5), batches(5, number=5)
    for plan in (["layers.1"], ["layers.0", "layers.1"]):
        small = resect.replace(net, found(net, x), plan, data)
        (run,) = facts(small).values()
        with torch.no_grad():
            h = net.stem(data[4])
            wanted = h + net.layers[0](h)
            first = wanted
            wanted = wanted + net.layers[1](wanted)
            left = first if len(plan) == 1 else h
            ours = h + small.layers[0](h)
        assert run["error_removed"] == pytest.approx(float((left - wanted).norm() / wanted.norm()), rel=1e-5)
        assert run["error"] == pytest.approx(float((ours - wanted).norm() / wanted.norm()), rel=1e-4)


def test_runs_are_fitted_on_what_the_earlier_ones_left():
    torch.manual_seed(0)
    net, x = Stream(*(Curved(6) for _ in range(6))).eval(), torch.randn(3, 5)
    data = batches(5)
    both = resect.replace(net, found(net, x), ["layers.1", "layers.4"], data)
    blocks = found(net, x)
    second = resect.replace(net, blocks, ["layers.4"], data)
    last = blocks["layers.4"].name
    assert facts(both)[last]["error_removed"] > facts(second)[last]["error_removed"]
    merged = both.get_submodule(facts(both)[last]["merged_into"]).weight
    assert not torch.equal(merged, second.get_submodule(facts(second)[last]["merged_into"]).weight)


def test_a_standard_class_loads_what_was_merged(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                                      num_attention_heads=2, num_key_value_heads=1, head_dim=8)  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(50, (8, 12))} for _ in range(3)]
    blocks = resect.find_blocks(model, data[0])
    layer = [block for block in blocks if block.owner == "model.layers.2"]
    small = resect.replace(model, blocks, layer, data, compact=True)
    (run,) = facts(small).values()
    assert run["merged_into"] == "model.layers.1.mlp.down_proj"
    assert run["error"] <= run["error_removed"]
    small.save_pretrained(tmp_path / "short")
    again = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "short").eval()
    assert torch.equal(again(**data[0]).logits, small(**data[0]).logits)
    resect.save(small, tmp_path / "cut")
    assert torch.equal(
        resect.load(tmp_path / "cut", transformers.Qwen3ForCausalLM(config).eval())(**data[0]).logits,
        small(**data[0]).logits,
    )


def test_cut_again_the_plan_knows_of_both(tmp_path):
    torch.manual_seed(0)
    net, x = Stream(*(Curved(6) for _ in range(5))).eval(), torch.randn(3, 5)
    once = resect.replace(net, found(net, x), ["layers.0"], batches(5))
    twice = resect.replace(once, found(once, x), ["layers.3"], batches(5))
    assert len(facts(twice)) == 2
    assert len(twice.resect_plan.blocks) == 2
    resect.save(twice, tmp_path / "cut")
    again = resect.load(tmp_path / "cut", Stream(*(Curved(6) for _ in range(5))).eval())
    assert torch.equal(again(x), twice(x))


class Inline(nn.Module):
    """Layers without a forward of their own: a map takes the places of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6)}) for _ in range(4)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).tanh())
        return x


@pytest.mark.parametrize("build", [Inline, lambda: Stream(*(Curved(6) for _ in range(4)))])
def test_a_linear_map_goes_like_any_block(tmp_path, build):
    torch.manual_seed(0)
    net, x = build().eval(), torch.randn(3, 5)
    blocks = found(net, x)
    once = resect.replace(net, blocks, blocks.names[:1], batches(5))
    left, before = found(once, x), once(x)
    plan = resect.rank(once, left, by={name: float(n) for n, name in enumerate(left.names)}, unit="block").choose(n=2)
    small, plain = resect.remove(once, left, plan), resect.remove(net, blocks, blocks.names[:2])
    assert torch.equal(small(x), plain(x))
    assert small.state_dict().keys() == plain.state_dict().keys()
    assert small.resect_plan.names == plain.resect_plan.names
    assert small.resect_plan.scores[blocks.names[0]] == 0
    assert "replaced" not in small.resect_plan.evidence
    assert not any("_entered" in vars(module) for module in small.modules())
    assert torch.equal(once(x), before)
    resect.save(small, tmp_path / "cut")
    assert torch.equal(resect.load(tmp_path / "cut", build().eval())(x), small(x))
    shorter = resect.shrink_gradually(
        once, left, 3, choose=lambda net, left, n: left.names[:n], heal=lambda small, model: None
    )
    assert shorter.resect_plan.names == blocks.names[:3]


def test_what_stands_in_already_is_not_replaced_and_takes_the_work_of_the_next():
    torch.manual_seed(0)
    net, x = Inline().eval(), torch.randn(3, 5)
    once = resect.replace(net, found(net, x), found(net, x).names[:1], batches(5))
    left = found(once, x)
    with pytest.raises(InputError, match=f"{left.names[0]} is a linear map already"):
        resect.replace(once, left, left.names[:1], batches(5))
    twice = resect.replace(once, left, left.names[1:2], batches(5))
    assert facts(twice)[left.names[1]]["merged_into"] == "layers.0.down.linear"
    assert facts(twice)[left.names[1]]["helps"]


@pytest.mark.parametrize(("size", "stride"), [(8, 2), (7, 2), (9, 3), (8, 1)])
def test_the_features_are_those_that_a_strided_convolution_sees(size, stride):
    features, conv = torch.randn(2, 3, size, size), nn.Conv2d(3, 4, 1, stride=stride)
    wanted = conv(features)
    picked, strides = strided(features, wanted, 1)
    assert strides == (stride, stride)
    rows = rows_of(picked, 1) @ conv.weight.flatten(1).T + conv.bias
    assert torch.allclose(rows, rows_of(wanted, 1), atol=1e-5)


def test_empty_batches_among_others_and_a_carrier_of_zeros():
    torch.manual_seed(0)
    net, x = Stream(Linear(6, bias=False), Curved(6), Curved(6)).eval(), torch.randn(3, 5)
    blocks, data = found(net, x), batches(5)
    plain = resect.replace(net, blocks, ["layers.1"], data)
    sparse = resect.replace(net, blocks, ["layers.1"], [data[0], torch.zeros(0, 5), *data[1:]])
    assert torch.equal(plain(x), sparse(x))
    nn.init.zeros_(net.layers[0].down.weight)
    small = resect.replace(net, blocks, ["layers.1"], data)
    assert facts(small)[blocks.names[1]]["merged_into"] == "layers.0.down"
    assert torch.equal(small(x), resect.remove(net, blocks, ["layers.1"])(x))


class Normed(Stream):
    """Normalises after every addition: what one block hands on is not its sum."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.layers:
            x = nn.functional.layer_norm(x + branch(x), (6,))
        return x


def test_nothing_is_merged_across_a_norm():
    torch.manual_seed(0)
    net, x = Normed(*(Curved(6) for _ in range(4))).eval(), torch.randn(3, 5)
    small = resect.replace(net, found(net, x), ["layers.2"], batches(5))
    (run,) = facts(small).values()
    assert run["merged_into"] is None
    assert run["error"] < run["error_removed"]


@pytest.mark.parametrize("first", [1, 2])
def test_a_selection_of_blocks_is_replaced_as_all_of_them_are(first):
    torch.manual_seed(0)
    net, x = Stream(*(Curved(6) for _ in range(4))).eval(), torch.randn(3, 5)
    blocks = found(net, x)
    whole = resect.replace(net, blocks, ["layers.2"], batches(5))
    part = resect.replace(net, blocks[first:], ["layers.2"], batches(5))
    (of_all,), (of_part,) = facts(whole).values(), facts(part).values()
    assert of_all["merged_into"] is not None
    assert of_part["merged_into"] == (of_all["merged_into"] if first == 1 else None)
    assert torch.equal(part(x), whole(x)) or first == 2


class Outside(Stream):
    """Its branches end in the owner's own code."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.layers:
            x = x + branch(x) * 0.5
        return x


def test_bad_input():
    torch.manual_seed(0)
    net, x = Stream(Curved(6), Curved(6)).eval(), torch.randn(3, 5)
    blocks = found(net, x)
    with pytest.raises(InputError, match="Unknown stand-in 'quadratic'"):
        resect.replace(net, blocks, ["layers.1"], batches(5), by="quadratic")
    for nothing in ([], [torch.zeros(0, 5)]):
        with pytest.raises(InputError, match="gave no samples"):
            resect.replace(net, blocks, ["layers.1"], nothing)
    for bad in (0, -1):  # where it is fitted, where it is measured
        data = batches(5)
        data[bad][0, 0] = float("nan")
        with pytest.raises(InputError, match=r"layers\.1\S*: .* not finite"):
            resect.replace(net, blocks, ["layers.1"], data)
    with pytest.raises(InputError, match="replaces nothing"):
        resect.replace(net, blocks, [], batches(5))
    outside = Outside(Curved(6), Curved(6)).eval()
    with pytest.raises(InputError, match=r"layers\.0\S*: operations follow its branch's last module"):
        resect.replace(outside, found(outside, x), found(outside, x).names, batches(5))
    parallel = Net((False, True)).eval()
    blocks = resect.find_blocks(parallel, x)
    with pytest.raises(InputError, match=r"layers\.1/a is one of several branches of one addition"):
        resect.replace(parallel, blocks, ["layers.1/a"], batches(5))
    assert not hasattr(net, "resect_plan")
