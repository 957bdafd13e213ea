"""What a branch does to its stream, against values taken by hand from nets whose forward is written out."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from nets import Net
from torch import nn
from torch.utils.checkpoint import checkpoint

import resect
from resect.analyse import streams
from resect.analyse.likeness import similarity
from resect.blocks.block import Blocks
from resect.errors import BlocksError, InputError

pytestmark = pytest.mark.core
CE = nn.functional.cross_entropy


class Conv(nn.Module):
    """Two stages of post-activation blocks that write into the sum, as torchvision's do; the second one projects."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.one = ConvBlock(4, 4, 1)
        self.two = ConvBlock(4, 6, 2)
        self.three = ConvBlock(6, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.three(self.two(self.one(self.stem(x))))
        return self.head(x.mean((2, 3)))


class ConvBlock(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.inner = nn.Conv2d(channels, width, 3, stride, 1)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(channels, width, 1, stride) if stride > 1 else None

    def forward(self, x):
        out = self.norm(self.conv(self.inner(x).tanh()))
        out += x if self.down is None else self.down(x)
        return torch.relu_(out)


@dataclass
class Answer:
    logits: torch.Tensor
    loss: torch.Tensor | None


class Tokens(nn.Module):
    """Embeddings, two blocks over tokens, a loss of its own: a causal language model in small."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Residual(6) for _ in range(2))
        self.out = nn.Linear(6, 11)

    def forward(self, input_ids, labels=None, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.out(x)
        loss = None if labels is None else CE(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Answer(logits, loss)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 9), nn.Linear(9, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def by_hand_net(net, x):
    """(shortcut, branch, sum) of every block, and the output."""
    stream, seen = net.stem(x), []
    for layer in net.layers:
        branches = [branch(stream) for branch in layer.branches]
        total = sum(branches, stream)
        seen += [(stream, branch, total) for branch in branches]
        stream = total
    return seen, net.head(stream)


def by_hand_conv(net, x):
    stream, seen = net.stem(x), []
    for block in (net.one, net.two, net.three):
        branch = block.norm(block.conv(block.inner(stream).tanh()))
        shortcut = stream if block.down is None else block.down(stream)
        total = shortcut + branch
        seen.append((shortcut, branch, total))
        stream = total.relu()
    return seen, net.head(stream.mean((2, 3)))


def by_hand_tokens(net, ids):
    stream, seen = net.embed(ids), []
    for layer in net.layers:
        branch = layer.down(torch.tanh(layer.up(layer.norm(stream))))
        total = stream + branch
        seen.append((stream, branch, total))
        stream = total
    return seen, net.out(stream)


def profile_by_hand(seen, loss):
    """Per block and quantity the value of each sample, one sample at a time."""
    gradients = torch.autograd.grad(loss, [total for _, _, total in seen])
    rows = []
    for (shortcut, branch, _), gradient in zip(seen, gradients, strict=True):
        values = []
        for s, f, g in zip(shortcut.detach(), branch.detach(), gradient, strict=True):
            s, f, g = s.flatten(), f.flatten(), g.flatten()
            cosine = torch.dot(f, s) / f.norm() / s.norm()
            descent = -torch.dot(f, g) / f.norm() / g.norm()
            values.append([f.norm(), s.norm(), f.norm() / s.norm(), cosine, torch.acos(cosine).rad2deg(), descent])
        rows.append(torch.tensor(values))
    return torch.stack(rows).detach()  # (blocks, samples, quantities)


def detached(seen):
    return [tuple(value.detach() for value in values) for values in seen]


def check_profile(response, wanted):
    for place, name in enumerate(("branch", "shortcut", "ratio", "cosine", "angle", "descent")):
        values = wanted[:, :, place].double()
        torch.testing.assert_close(response.mean[name], values.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(response.deviation[name], values.std(1, correction=0), rtol=1e-4, atol=1e-5)


def setup_net(parallel=(False, True, False), samples=12):
    torch.manual_seed(1)
    net = Net(parallel).double()
    x, y = torch.randn(samples, 5, dtype=torch.float64), torch.arange(samples) % 4
    return net, resect.find_blocks(net, x[:4]), x, y


def setup_conv(samples=9):
    torch.manual_seed(2)
    net, x, y = Conv(), torch.randn(samples, 2, 8, 8), torch.arange(samples) % 3
    net.train()(x)  # statistics of its own
    return net, resect.find_blocks(net, x[:4]), x, y


def in_parts(x, y, *sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def test_every_quantity_equals_the_one_taken_by_hand():
    net, blocks, x, y = setup_net()
    seen, output = by_hand_net(net, x)
    wanted, seen = profile_by_hand(seen, CE(output, y)), detached(seen)
    response = resect.block_response(net, blocks, in_parts(x, y, 5, 7))
    check_profile(response, wanted)
    for name, (_, branch, _) in zip(blocks.names, seen, strict=True):
        torch.testing.assert_close(response.largest[name], branch.abs().amax(1))
    assert response.samples == 12
    assert response.depths == ("", blocks.names[0], blocks.names[2], blocks.names[3])  # two branches, one sum
    depths = torch.stack([seen[0][0], seen[0][2], seen[2][2], seen[3][2]])
    for i, one in enumerate(depths):
        for j, other in enumerate(depths):
            cosine = nn.functional.cosine_similarity(one, other).clamp(-1, 1)
            torch.testing.assert_close(response.distance[i, j], (cosine.acos() / torch.pi).mean() * (i != j))
    torch.testing.assert_close(response.similarity, similarity(torch.stack([f.T for _, f, _ in seen])))


def test_in_place_sums_projections_and_pooled_images():
    net, blocks, x, y = setup_conv()
    net.eval()
    seen, output = by_hand_conv(net, x)
    wanted, seen = profile_by_hand(seen, CE(output, y, reduction="sum")), detached(seen)
    net.train()  # looked at in eval mode all the same
    response = resect.block_response(net, blocks, in_parts(x, y, 4, 5), loss_fn=lambda out, y: CE(out, y))
    check_profile(response, wanted)
    places = torch.linspace(0, 63, 16).round().long()
    one, other = (value.flatten(2)[:, :, places] for value in (seen[0][0], seen[0][2]))
    cosine = nn.functional.cosine_similarity(one.double(), other.double())
    torch.testing.assert_close(response.distance[0, 1], (cosine.acos() / torch.pi).mean())
    assert response.distance[1, 2].isnan()  # another shape
    maps = torch.stack([f.mean((2, 3)).T for _, f, _ in seen[1:]])
    torch.testing.assert_close(response.similarity[1:, 1:], similarity(maps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", [None, "mean"])
def test_tokens_with_padding_are_seen_without_it(pool):
    torch.manual_seed(3)
    net, ids = Tokens(), torch.randint(11, (6, 5))
    mask = torch.arange(5) < torch.tensor([5, 4, 3, 5, 2, 5])[:, None]
    blocks = resect.find_blocks(net, {"input_ids": ids})
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask.long()}
    response = resect.block_response(net, blocks, [batch], pool=pool)
    assert response.pool == (pool or "last")
    assert "probes" in response.left_out
    assert not any(found.requires_grad for found in (response.distance, response.cka, response.similarity))
    seen, output = by_hand_tokens(net, ids)
    loss = CE(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    gradients, seen = torch.autograd.grad(loss, [total for _, _, total in seen]), detached(seen)
    for place, ((shortcut, branch, _), gradient) in enumerate(zip(seen, gradients, strict=True)):
        own = [[value[i][mask[i]].flatten() for i in range(6)] for value in (branch, shortcut, gradient)]
        size = torch.stack([f.norm() for f in own[0]]).double().mean()
        torch.testing.assert_close(response.mean["branch"][place], size)
        descent = [-torch.dot(f, g) / f.norm() / g.norm() for f, _, g in zip(*own, strict=True)]
        torch.testing.assert_close(response.mean["descent"][place], torch.stack(descent).double().mean())
        torch.testing.assert_close(response.largest[blocks.names[place]], branch.flatten(1).abs().amax(1))
    if pool is None:
        last = [[value[i][mask[i]][-1] for i in range(6)] for value in (seen[0][0], seen[1][2])]
        one, other = map(torch.stack, last)
        cosine = nn.functional.cosine_similarity(one.double(), other.double())
        torch.testing.assert_close(response.distance[0, 2], (cosine.acos() / torch.pi).mean())
    units = torch.stack(
        [torch.stack([f[i][mask[i]][-1] if pool is None else f[i][mask[i]].mean(0) for i in range(6)], 1)
         for _, f, _ in seen]
    )  # fmt: skip
    torch.testing.assert_close(response.similarity, similarity(units), rtol=1e-4, atol=1e-4)


def test_how_the_data_come_changes_nothing():
    net, blocks, x, y = setup_net(samples=40)
    whole = resect.block_response(net, blocks, [(x, y)])
    parts = iter([{"x": a, "labels": b} for a, b in in_parts(x, y, 1, 7, 32)])
    seen = []
    other = resect.block_response(
        net, blocks.names, parts, forward=lambda model, batch: model(batch["x"]), progress=lambda *now: seen.append(now)
    )
    assert seen == [(1, 0), (2, 0), (3, 0)]
    for name in ("distance", "cka", "similarity", "probes"):
        torch.testing.assert_close(getattr(whole, name), getattr(other, name))
    torch.testing.assert_close(whole.mean, other.mean)
    torch.testing.assert_close(whole.largest, other.largest)


def test_without_the_gradient_nothing_else_changes():
    net, blocks, x, y = setup_conv()
    full = resect.block_response(net, blocks, [(x, y)])
    less = resect.block_response(net, blocks, [x], gradient=False, probes=False)
    assert less.mean["descent"].isnan().all()
    assert [row["descent_mean"] for row in less.rows()] == [None] * 3
    assert len(less.probes) == 0
    assert less.probe_rows() == []
    for name in ("branch", "angle"):
        torch.testing.assert_close(full.mean[name], less.mean[name])
    torch.testing.assert_close(full.cka, less.cka)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(fails, frozen):
    net, blocks, x, y = setup_conv()
    net.two.eval()
    net.requires_grad_(not frozen)
    modes = [module.training for module in net.modules()]
    net.register_buffer("calls", torch.tensor(0))
    hook = net.register_forward_hook(lambda net, *_: (net.calls.add_(1), torch.rand(()))[2:] or None)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    data = [(x, y), (x * torch.nan, y)] if fails else [(x, y)]
    if fails:
        with pytest.raises(InputError, match=r"'one/.*' is NaN or infinite"):
            resect.block_response(net, blocks, data)
    else:
        assert resect.block_response(net, blocks, data).mean["descent"].isfinite().all()
    assert modes == [module.training for module in net.modules()]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad != frozen for parameter in net.parameters())
    hook.remove()
    assert type(net.one.conv) is nn.Conv2d
    assert torch.equal(torch.get_rng_state(), state)


class Checkpointed(Net):
    reentrant = False

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x)


def test_checkpointed_blocks_are_looked_at_once():
    net, blocks, x, y = setup_net()
    same = Checkpointed((False, True, False)).double()
    same.load_state_dict(net.state_dict())
    wanted = resect.block_response(net, blocks, [(x, y)])
    torch.testing.assert_close(resect.block_response(same, blocks, [(x, y)]).mean, wanted.mean)
    same.reentrant = True
    with pytest.raises(InputError, match="reentrant checkpointing cuts it off"):
        resect.block_response(same, blocks, [(x, y)])
    found = resect.block_response(same, blocks, [(x, y)], gradient=False)
    torch.testing.assert_close(found.mean["angle"], wanted.mean["angle"])


def test_one_block_will_do():
    net, blocks, x, y = setup_net()
    response = resect.block_response(net, blocks[1], [(x, y)])
    assert response.cka.shape == (2, 2)
    assert response.similarity.shape == (1, 1)
    assert len(response.rows()) == 1
    assert "1.0" in str(response) or "°" in str(response)


def test_what_cannot_be_watched_is_named():
    net, blocks, x, y = setup_net()
    unseen = replace(blocks[0], end=None, reason="its end is inside a function")
    turned = replace(blocks[1], shape=(6, 4))
    response = resect.block_response(net, Blocks([unseen, turned, *blocks[2:]], example=blocks.example), [(x, y)])
    assert response.blocks.names == blocks.names[2:]
    assert response.left_out[unseen.name] == "its end is inside a function"
    assert "(6, 4), not one row per sample" in response.left_out[turned.name]
    with pytest.raises(BlocksError, match="None of the 1 blocks"):
        resect.block_response(net, Blocks([unseen]), [(x, y)])


class Skips(Net):
    def forward(self, x):
        return super().forward(x) if len(x) > 1 else self.head(self.stem(x))


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ([], {}, "no samples"),
        (iter(()), {}, "no samples"),
        ("x", {}, "no target"),
        ("xf", {}, "give loss_fn"),
        ("xy", {"loss_fn": lambda out, y: out}, "scalar"),
        ("xy", {"loss_fn": lambda out, y: out.detach().sum()}, "scalar"),
        ("xy", {"pool": "max"}, "Unknown pool 'max'"),
        ("short", {}, "did not run"),
        ([3], {"gradient": False}, "must hold tensors"),
    ],
)
def test_bad_input_is_refused(data, options, words):
    torch.manual_seed(1)
    net = Skips()
    x, y = torch.randn(6, 5), torch.arange(6) % 4
    blocks = resect.find_blocks(net, x)
    given = {"x": [x], "xf": [(x, torch.randn(6, 4))], "xy": [(x, y)], "short": [(x, y), (x[:1], y[:1])]}
    with pytest.raises(InputError, match=words):
        resect.block_response(net, blocks, given[data] if isinstance(data, str) else data, **options)
    with pytest.raises(BlocksError, match="empty"):
        resect.block_response(net, [], [(x, y)])


def test_dead_branches_have_no_direction():
    net, blocks, x, y = setup_net()
    net.layers[0].a.down.weight.data.zero_()
    net.layers[0].a.down.bias.data.zero_()
    response = resect.block_response(net, blocks, [(x, y)])
    first = response.rows()[0]
    assert (first["branch_mean"], first["ratio_mean"]) == (0.0, 0.0)
    assert first["angle_mean"] is None
    assert first["descent_mean"] is None
    assert response.similarity[0].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("shape", "module", "axis"),
    [
        ((2, 8, 5, 5), nn.Conv2d(8, 8, 3), 1),
        ((2, 5, 5, 8), nn.Linear(8, 32), -1),
        ((2, 8, 8, 8), nn.Conv2d(8, 8, 3), 1),
        ((2, 8, 8, 8), nn.Linear(8, 8), -1),
        ((2, 7, 8), nn.Linear(8, 8), -1),
        ((2, 8, 7), nn.Conv1d(8, 8, 1), 1),
        ((2, 8), nn.Linear(8, 8), 1),
    ],
)
def test_the_axis_of_the_channels(shape, module, axis):
    assert streams.channel_axis(torch.zeros(shape), module) == axis
