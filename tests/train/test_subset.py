"""Drop path on the samples that keep a branch alone, against the mask: same draws, same values, same gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from chains import chain, draw_dropped
from handwritten import MODELS, WIDTH, Layers, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import resect
from resect.errors import AttachError, InputError
from resect.train.masks import SampleMasks

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore:.*dropping branches tends to hurt")]


def still(model):
    """Without random numbers of the model's own: two ways of computing then draw the same, none."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()


def method(model, blocks, compute, **options):
    options = {"per": "sample", "rule": "uniform", "own_drop": "replace", **options}
    return resect.StochasticDepth(model, blocks, compute=compute, **options)


def run(model, blocks, compute, call, **options):
    """One step: output, gradients of parameters and inputs, buffers."""
    model = copy.deepcopy(model)
    inputs = [t.clone().requires_grad_() if t.is_floating_point() else t for t in call.tensors()]
    tensors = iter(inputs)
    call = torch.utils._pytree.tree_map_only(torch.Tensor, lambda _: next(tensors), (call.args, dict(call.kwargs)))
    with method(model, blocks, compute, **options) as attached:
        attached.begin_step()
        torch.manual_seed(0)
        output = model(*call[0], **call[1])
        leaves = [leaf for leaf in resect.blocks.template.tensors_in(output) if leaf.is_floating_point()]
        sum((leaf * torch.arange(leaf.numel()).view(leaf.shape).sin()).sum() for leaf in leaves).backward()
    gradients = [t.grad for t in (*model.parameters(), *inputs)]
    return attached.computes, leaves, gradients, list(model.buffers())


def alike(a, b, tolerance=1e-4):
    if a is None or b is None:
        return a is b
    a, b = a.double(), b.double()
    return bool((a - b).norm() <= tolerance * a.norm() + 1e-6)


def check(model, blocks, call, compute="auto", tolerance=1e-4, **options):
    """Both ways agree; return how the blocks were computed."""
    call = resect.Example.of(call)
    found, *some = run(model, blocks, compute, call, **options)
    _, *all_of_them = run(model, blocks, "mask", call, **options)
    for mine, theirs in zip(some, all_of_them, strict=True):
        assert all(alike(a, b, tolerance) for a, b in zip(mine, theirs, strict=True))
    return found


# name -> why no branch of it can be computed on some samples; the others all can.
MASKED = {
    "torch.add(x, f, out=)": "don't support automatic differentiation",
    "raw weights": "no modules",
    "raw weights, three calls": "no modules",
    "part of the channels": "some samples",
    "lambda shortcut": "BatchNorm2d",
    "U-Net": "BatchNorm2d",
}
SCALABLE = [name for name in MODELS if MODELS[name][2] and name != "stack([x, f(x)]).sum(0)"] + ["U-Net"]
SCALABLE.remove("stochastic depth by hand")  # it may not even run where it is tried
TRAINABLE = [name for name in SCALABLE if name not in ("torch.add(x, f, out=)", "F.dropout between")]


def batch_of(name, samples):
    """A batch of that many samples for a hand-written model."""
    _, example = build(name)
    torch.manual_seed(samples)
    call = resect.Example.of(example)
    resized = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: torch.randn(samples, *t.shape[1:]), (call.args, dict(call.kwargs))
    )
    return resect.Example(*resized)


@pytest.fixture(scope="module")
def found():
    kept = {}

    def find(name):
        if name not in kept:
            model, x = build(name)
            blocks = resect.find_blocks(model, x)
            kept[name] = still(model), blocks.select([block for block in blocks if block.scalable])
        return kept[name]

    return find


@pytest.mark.parametrize("name", SCALABLE)
def test_every_way_to_write_a_branch_is_computed_on_some_samples_or_masked_with_a_reason(name, found):
    model, blocks = found(name)
    with method(model, blocks, "auto") as attached:
        for how in attached.computes.values():
            assert how == "subset" if name not in MASKED else MASKED[name] in how


@given(name=st.sampled_from(TRAINABLE), samples=st.integers(2, 9), p=st.floats(0.1, 0.95), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_the_hand_written_models_come_to_the_same(name, samples, p, seed, found):
    model, blocks = found(name)
    scaling = "none" if seed % 2 else "inverted"
    check(model, blocks, batch_of(name, samples), drop_prob=p, seed=seed, scaling=scaling)


def vit(**options):
    import timm

    return timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=5, **options
    )


def families():
    """name -> model, batch, how many blocks are computed on some samples, and all."""
    import timm
    import torchvision
    from language_models import language_model, tokens

    picture = torch.randn(6, 3, 32, 32)
    small = picture[..., :16, :16]
    ids = torch.cat([tokens(7, seed) for seed in range(3)])
    padded = torch.ones(6, 7, dtype=torch.long)
    padded[1::2, 4:] = 0
    text = {"input_ids": ids, "attention_mask": padded}
    tiny = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
    swin = {"image_size": 32, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
    import transformers as hf

    return {
        "timm ViT": lambda: (vit(), small, 6, 6),
        "DeiT III": lambda: (vit(init_values=0.1, class_token=True, no_embed_class=True), small, 6, 6),
        "parallel ViT": lambda: (
            timm.models.VisionTransformer(
                img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5,
                block_fn=timm.models.vision_transformer.ParallelThingsBlock,
            ), small, 4, 4,
        ),
        "timm Swin": lambda: (timm.models.SwinTransformer(**tiny, drop_path_rate=0.0), picture, 6, 6),
        "timm Swin V2, windows before the branch": lambda: (
            timm.models.SwinTransformerV2(**tiny, drop_path_rate=0.0), picture, 6, 6,
        ),
        "MLP-Mixer": lambda: (
            timm.models.MlpMixer(img_size=32, patch_size=8, embed_dim=16, num_blocks=2), picture, 4, 4,
        ),
        "ConvNeXt": lambda: (timm.models.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 16, 16)), picture, 5, 5),
        "timm ResNet": lambda: (timm.create_model("resnet18"), picture, 0, 8),
        "torchvision ViT": lambda: (torchvision.models.VisionTransformer(16, 4, 2, 2, 32, 64), small, 4, 4),
        "torch encoder, post-norm, padding": lambda: (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
            ),
            resect.Example((torch.randn(6, 7, 16),), {"src_key_padding_mask": padded == 0}), 4, 4,
        ),
        "BERT": lambda: (language_model("bert", 2), text, 4, 4),
        "Llama": lambda: (language_model("llama", 2), {**text, "use_cache": False}, 4, 4),
        "GPT-2": lambda: (language_model("gpt2", 2), {**text, "use_cache": False}, 4, 4),
        "transformers ViT": lambda: (language_model("vit", 2), small, 4, 4),
        "transformers Swin, views with the batch": lambda: (
            hf.SwinModel(hf.SwinConfig(**swin, drop_path_rate=0.0)), picture, 3, 6,
        ),
    }  # fmt: skip


FAMILIES = [
    "timm ViT", "DeiT III", "parallel ViT", "timm Swin", "timm Swin V2, windows before the branch", "MLP-Mixer",
    "ConvNeXt", "timm ResNet", "torchvision ViT", "torch encoder, post-norm, padding", "BERT", "Llama", "GPT-2",
    "transformers ViT", "transformers Swin, views with the batch",
]  # fmt: skip


@pytest.mark.parametrize("family", [pytest.param(name, marks=()) for name in FAMILIES])
def test_families_come_to_the_same(family):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, x, some, count = families()[family]()
    blocks = resect.find_blocks(model.eval(), x)
    found = check(still(model), blocks, x, drop_prob=0.5)
    assert len(found) == count
    assert sum(how == "subset" for how in found.values()) == some, found


def test_nothing_is_computed_of_the_samples_that_drop_a_branch():
    torch.manual_seed(0)
    net, x = Layers(Each, 6).train(), torch.randn(10, 5)
    blocks = resect.find_blocks(net.eval(), x)
    net.train()

    def flops(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    def step():
        net(x).sum().backward()

    whole = flops(step)
    with resect.closed(net, blocks):
        around = flops(step)
    with method(net, blocks, "auto") as attached:
        attached.begin_step()
        kept = (~draw_dropped([0.5] * 6, 10, 0, 0)).sum().item()
        assert flops(step) == around + (whole - around) * kept // 60
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            net(x)
    weights = {p.data_ptr() for p in net.parameters()}

    def rows(width):
        """Rows of that width kept for the backward pass."""
        found = {t.data_ptr(): len(t) for t in seen if t.ndim == 2 and t.shape[1] == width}
        return sum(length for pointer, length in found.items() if pointer not in weights)

    assert rows(4 * WIDTH) == 2 * kept, "the inputs of the GELU and of the last Linear"
    assert rows(WIDTH) == 2 * kept + 10, "of the norm and of the first Linear, and all samples' of the head; no sum"


class Each(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def six(layer):
    torch.manual_seed(0)
    return Layers(layer, 6).eval()


def test_at_least_one_sample_runs_and_all_dropped_gives_zeros():
    net = six(Each)
    blocks = resect.find_blocks(net, torch.randn(4, 5))
    x = torch.randn(2, 5)
    dropped = draw_dropped([0.8] * 6, 2, 3, 0)
    assert dropped.all(1).any()
    _, _, gradients, _ = run(net.train(), blocks, "auto", resect.Example.of(x), drop_prob=0.8, seed=3)
    assert all(gradient is not None for gradient in gradients), "every parameter is used, on every rank"
    check(net.train(), blocks, x, drop_prob=0.8, seed=3)


def test_rows_are_drawn_as_the_mask_is():
    probs = [0.2, 0.5, 0.9]
    masks = SampleMasks(probs, None)
    masks.begin(probs, 5, 7, scaled=True)
    for place, dropped in enumerate(draw_dropped(probs, 11, 5, 7)):
        rows = masks.rows(place, 11, torch.device("cpu"))
        assert rows.index.tolist() == (~dropped).nonzero().squeeze(1).tolist()
        assert (rows.samples, rows.count, rows.factor) == (11, len(rows.index), 1 / (1 - probs[place]))
        assert rows is masks.rows(place, 11, torch.device("cpu")), "one object for a whole forward pass"
    masks.begin([0.5, 1 - 1e-9, 0.5], 5, 7, scaled=True)
    rows = masks.rows(1, 11, torch.device("cpu"))
    assert (rows.count, rows.index.tolist(), rows.factor.tolist()) == (1, [0], [0.0])


def test_batch_norm_is_masked_unless_asked_and_then_sees_the_kept_samples_alone():
    net, x, blocks = chain()
    with method(net, blocks, "auto") as attached:
        assert set(attached.computes.values()) == {
            'mask: a BatchNorm1d takes statistics of the batch (compute="subset" asks for it all the same)'
        }
    by_hand = copy.deepcopy(net)
    with method(net, blocks, "subset") as attached:
        assert set(attached.computes.values()) == {"subset"}
        attached.begin_step()
        output = net(x)
    stream = by_hand.stem(x)
    for layer, dropped in zip(by_hand.layers, draw_dropped([0.5] * 7, 16, 0, 0), strict=True):
        stream = stream.index_add(0, (~dropped).nonzero().squeeze(1), 2 * layer.branch(stream[~dropped]))
    assert torch.allclose(output, by_hand.head(stream), atol=1e-5)
    buffers = zip(net.buffers(), by_hand.buffers(), strict=True)
    assert all(torch.allclose(a, b) for a, b in buffers), "the trial at attach moved no statistics"


def test_batch_norm_is_never_given_a_single_sample():
    net, x, blocks = chain()
    with method(net, blocks, "subset", drop_prob=0.9) as attached:
        for _ in range(4):
            attached.begin_step()
            assert net(x[:3]).isfinite().all()


def test_batch_norm_in_eval_mode_is_no_hindrance_where_it_is_asked_for():
    net, x, blocks = chain()
    for layer in net.layers:
        layer.norm.eval()
    check(net, blocks, x, compute="subset")


# --- what could go silently wrong -----------------------------------------------------------------------------------


class Conditioned(nn.Module):
    """Tensors from outside meet the branch in a module's arguments and between its modules."""

    def __init__(self):
        super().__init__()
        self.first, self.mix, self.scale = self.First(), self.Mix(), nn.Parameter(torch.ones(WIDTH))

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x, tokens):
            return self.norm(x) * tokens.cos()

    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(WIDTH, WIDTH)

        def forward(self, h, table, *, extra=None):
            (tokens,) = extra["tokens"]
            return self.f(h * tokens) @ table, {"seen": tokens}

    def forward(self, x, table, tokens):
        h = self.first(x, tokens) * tokens.sigmoid()
        return x + self.scale * self.mix(h, table, extra={"tokens": (tokens,)})[0]


class ConditionedNet(nn.Module):
    """``table`` is (WIDTH, WIDTH), whatever the batch; ``tokens`` one row per sample, or one for all."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Conditioned() for _ in range(6))

    def forward(self, x, table, tokens):
        for layer in self.layers:
            x = layer(x, table, tokens)
        return x


@pytest.mark.parametrize("samples", [2, 3, WIDTH])
@pytest.mark.parametrize("rows", [None, 1])
def test_a_first_dimension_that_equals_the_batch_by_accident_is_left_alone(samples, rows):
    torch.manual_seed(0)
    net = ConditionedNet()
    table = torch.randn(WIDTH, WIDTH) / 4

    def call(n):
        return torch.randn(n, WIDTH), table, torch.randn(rows or n, WIDTH)

    blocks = resect.find_blocks(net.eval(), call(samples))
    for n in (2, 5, WIDTH):
        (how,) = set(check(net.train(), blocks, call(n), seed=n).values())
        assert how == "subset" if samples != WIDTH else "cannot be tried" in how, "then the example cannot be resized"


@pytest.mark.parametrize("first", [1, 3])
def test_what_was_one_row_on_the_example_may_be_one_per_sample_later_and_the_reverse(first):
    torch.manual_seed(0)
    net, table = ConditionedNet(), torch.randn(WIDTH, WIDTH) / 4
    blocks = resect.find_blocks(net.eval(), (torch.randn(3, WIDTH), table, torch.randn(first, WIDTH)))
    for n in (2, 5, 7):
        then = torch.randn(n if first == 1 else 1, WIDTH)
        found = check(net.train(), blocks, (torch.randn(n, WIDTH), table, then), seed=n)
        assert set(found.values()) == {"subset"}


class MeetsMask(nn.Module):
    """The example comes without a table, the training with one that is as long as the batch, by accident."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, table=None):
        h = self.norm(x)
        if table is not None:
            h = h @ table
        return x + self.mix(h)


class MaskedNet(ConditionedNet):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(MeetsMask() for _ in range(6))

    def forward(self, x, table=None):
        for layer in self.layers:
            x = layer(x, table)
        return x


def test_a_tensor_that_the_example_did_not_show_is_right_whatever_it_is():
    torch.manual_seed(0)
    net = MaskedNet()
    blocks = resect.find_blocks(net.eval(), torch.randn(3, WIDTH))
    for seed in range(4):
        check(net.train(), blocks, (torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)), seed=seed, drop_prob=0.8)


class OwnLength(Each):
    """Tensors of as many rows as the branch's own value has, or as the stream has."""

    def forward(self, x):
        h = self.norm(x)
        h = h + h.new_full((len(h), WIDTH), 0.5)
        h = torch.cat([h, torch.zeros(len(h), 1)], 1)[:, :WIDTH]
        noise = torch.linspace(0, 1, len(x))[:, None].expand(len(x), WIDTH)
        return x + self.down(F.gelu(self.up(h * noise)))


class ViewsWithTheBatch(Each):
    def forward(self, x):
        h = self.norm(x).view(x.shape[0], 2, -1)
        return x + self.down(F.gelu(self.up(h.reshape(len(x), -1))))


class Coupled(Each):
    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.gelu(self.up(h - h.mean(0))))


class Closure(nn.Module):
    """The branch reads a tensor of the batch off another module: one row would broadcast against it."""

    def __init__(self):
        super().__init__()
        self.f = self.Reads()

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.context = None

        def forward(self, x):
            return self.b(self.a(x) + self.context[0]).sum(0, keepdim=True).expand(len(x), -1) + self.a(x)

    def forward(self, x):
        self.f.context = [x]
        return x + self.f(x)


class KeepsCount(Each):
    """A codebook that moves with what it sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.norm = self.Norm(self)

    class Norm(nn.Module):
        def __init__(self, holder):
            super().__init__()
            self.holder = [holder]

        def forward(self, x):
            if self.training:
                self.holder[0].mean.add_(x.detach().sum(0))
            return x * 2


class InPlaceInside(Each):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        h = self.norm(x) * 2
        h.mul_(h.new_tensor(0.5))
        h = self.down(F.gelu(self.up(h)))
        h.add_(self.shift)  # an addition in the branch whose result is dropped
        return x + h


class InPlace(Each):
    def forward(self, x):
        out = 2 * x
        out += self.down(F.gelu(self.up(self.norm(x))))
        return out


class OnlyInEval(Each):
    def forward(self, x):
        return x if self.training else super().forward(x)


class InPlaceMinus(Each):
    def forward(self, x):
        out = 2 * x
        out -= self.down(F.gelu(self.up(self.norm(x))))
        return out


class AsksWhetherTheSame(nn.Module):
    """As attention does of its query and key."""

    def __init__(self):
        super().__init__()
        self.f = self.Asks()

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, query, key):
            return self.a(query) if query is key else self.b(query)

    def forward(self, x):
        return x + self.f(x, x)


class OneForAll(Each):
    """The branch has one position where the stream has many; the shortcut is the same for all samples."""

    def forward(self, x):
        x = x.unsqueeze(1).expand(len(x), 3, WIDTH)
        return (x + self.down(F.gelu(self.up(self.norm(x[:, :1]))))).mean(1)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (OwnLength, None),
        (InPlaceInside, None),
        (InPlace, None),
        (InPlaceMinus, None),
        (AsksWhetherTheSame, None),
        (OneForAll, None),
        (ViewsWithTheBatch, "shape"),
        (Coupled, "is not what the mask gives"),
        (Closure, "some samples"),
        (KeepsCount, "buffer"),
        (OnlyInEval, "did not run"),
    ],
)
def test_hostile_branches_are_right_or_masked_with_a_reason(layer, reason):
    net = six(layer)
    blocks = resect.find_blocks(net, torch.randn(3, 5))
    blocks = blocks.select([block for block in blocks if block.scalable])
    for samples in (2, 4, 5):
        found = check(net.train(), blocks, torch.randn(samples, 5), seed=samples)
        assert all(how == "subset" if reason is None else reason in how for how in found.values()), found


def test_asking_for_what_cannot_be_had_names_every_block():
    net = six(ViewsWithTheBatch)
    blocks = resect.find_blocks(net, torch.randn(3, 5))
    with pytest.raises(AttachError) as caught:
        method(net.train(), blocks, "subset").attach()
    assert all(block.name in str(caught.value) for block in blocks)
    assert 'compute="auto" masks them instead' in str(caught.value)
    with pytest.raises(InputError, match='needs per="sample"'):
        resect.StochasticDepth(net, blocks, compute="subset")
    with pytest.raises(InputError, match="compute 'some'"):
        method(net, blocks, "some")


def test_without_an_example_or_with_a_single_sample_everything_is_masked():
    net = six(Each)
    found = resect.find_blocks(net, torch.randn(3, 5))
    blocks = resect.blocks.block.Blocks(list(found))
    with method(net, blocks, "auto") as attached:
        assert all("no example" in how for how in attached.computes.values())
    blocks = resect.find_blocks(net, torch.randn(1, 5))
    with method(net, blocks, "auto") as attached:
        assert all("1 sample" in how for how in attached.computes.values())


def test_the_trial_leaves_gradients_modes_and_random_numbers_alone():
    net = six(Each)
    blocks = resect.find_blocks(net, torch.randn(3, 5))
    net.train()
    net.layers[2].eval()
    net(torch.randn(3, 5)).sum().backward()
    gradients = [p.grad for p in net.parameters()]
    before = [g.clone() for g in gradients]
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    with method(net, blocks, "auto"):
        assert [m.training for m in net.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        assert all(
            p.grad is g and torch.equal(g, b) for p, g, b in zip(net.parameters(), gradients, before, strict=True)
        )


# --- what else may stand around a model -----------------------------------------------------------------------------


class Checkpoints(nn.Module):
    reentrant = False

    def __init__(self):
        super().__init__()
        self.stem, self.layers = nn.Linear(5, WIDTH), nn.ModuleList(Each() for _ in range(6))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if self.training else layer(x)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_sees_the_same_samples(reentrant):
    torch.manual_seed(0)
    net = Checkpoints()
    net.reentrant = reentrant
    blocks = resect.find_blocks(net.eval(), torch.randn(3, 5))
    assert set(check(net.train(), blocks, torch.randn(7, 5)).values()) == {"subset"}
    with method(net, blocks, "auto") as attached:
        attached.begin_step()
        loss = net(torch.randn(7, 5)).sum()
        attached.begin_step()
        with pytest.raises(AttachError, match="changed between a forward pass and its recomputation"):
            loss.backward()


def test_autocast_and_channels_last():
    torch.manual_seed(0)

    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(nn.GroupNorm(1, WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))

        def forward(self, x):
            return x + self.f(x)

    net, x = nn.Sequential(*[Conv() for _ in range(6)]), torch.randn(5, WIDTH, 6, 6)
    blocks = resect.find_blocks(net.eval(), x)
    x = x.to(memory_format=torch.channels_last)
    net = net.train().to(memory_format=torch.channels_last)
    assert set(check(net, blocks, x).values()) == {"subset"}
    with torch.autocast("cpu", torch.bfloat16):
        check(net, blocks, x, tolerance=0.05)
    with method(net, blocks, "subset") as attached:
        attached.begin_step()
        assert net(x).is_contiguous(memory_format=torch.channels_last)


def test_copies_lesions_other_functions_and_eval_mode():
    net = six(Each)
    x = torch.randn(8, 5)
    blocks = resect.find_blocks(net, x)
    whole = net(x)
    net.train()
    plain = [type(module) for module in net.modules()]
    with method(net, blocks, "subset") as attached:
        attached.begin_step()
        expected = net(x)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301 - our own bytes
            assert torch.equal(twin(x), expected)
        with resect.closed(net, blocks[2:]):
            lesioned = net(x)
        with method(resect.detach(copy.deepcopy(net)), blocks[:2], "mask") as other:
            other.begin_step()
        assert not torch.equal(lesioned, expected)
        with resect.closed(net, blocks):
            assert torch.equal(net(x), net.head(net.stem(x)))
        with resect.gates(net, blocks) as gates:  # looks at whole branch ends
            seen = resect.blocks.response.watch(gates, len)
            assert torch.allclose(net(x), expected, atol=1e-6)
            assert set(seen.values()) == {8}
        assert torch.equal(net.eval()(x), whole)
    assert [type(module) for module in net.modules()] == plain


def test_the_drop_step_of_residual_droppath_does_the_same():
    net = six(Each)
    x = torch.randn(8, 5)
    blocks = resect.find_blocks(net, x)
    results = []
    for compute in ("subset", "mask"):
        twin = copy.deepcopy(net).train()
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        options = {"per": "sample", "rule": "uniform", "compute": compute, "optimizer": optimizer}
        with resect.ResidualDroppath(twin, blocks, **options) as attached:
            for _ in range(4):
                attached.begin_step()
                twin(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append(list(twin.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def test_small_probabilities_are_masked_where_it_is_left_open():
    net = six(Each)
    blocks = resect.find_blocks(net, torch.randn(3, 5))
    for compute, expected in (("auto", [False] * 3 + [True] * 3), ("subset", [True] * 6)):
        with method(net, blocks, compute, drop_prob=0.16, rule="linear") as attached:
            attached.begin_step()
            assert [gate.axes is not None for gate in attached._gates] == expected


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_code_uses_the_mask_and_says_so():
    net = six(Each)
    x = torch.randn(8, 5)
    blocks = resect.find_blocks(net, x)
    for layer in net.layers[:3]:
        layer.compile(backend="eager")
    with method(net.train(), blocks, "auto") as attached:
        assert ["compiled" in how for how in attached.computes.values()] == [True] * 3 + [False] * 3
    with pytest.raises(AttachError, match="compiled"):
        method(net, blocks, "subset").attach()
    late = six(Each).train()
    with method(late, blocks, "auto") as attached:
        attached.begin_step()
        expected = late(x)
        for layer in late.layers:
            layer.compile(backend="eager")
        torch._dynamo.reset()
        assert torch.allclose(late(x), expected, atol=1e-6)
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(3):
                attached.begin_step()
                late(x)
