"""Path gradients of models of many kinds against a polynomial reference; batches of every form; what is refused."""

from __future__ import annotations

import pytest
import torch
from handwritten import MODELS
from nets import Net
from path_nets import by_weighing
from torch import nn
from torch.nn.functional import cross_entropy

import resect
from resect.errors import BlocksError, InputError

X, Y = torch.linspace(-2, 2, 15, dtype=torch.float64).reshape(3, 5).sin(), torch.tensor([0, 1, 2])


def summed(output, target):
    return cross_entropy(output, target, reduction="sum")


def reference(model, blocks, start, loss, lengths):
    """Mean norms by length of the gradient at what the module ``start`` returns."""
    kept = []
    hook = model.get_submodule(start).register_forward_hook(lambda _, args, output: kept.append(output))
    try:
        with resect.gates(model, blocks) as handle:

            def gradient():
                kept.clear()
                return torch.autograd.grad(loss(), kept[0])[0]

            return by_weighing(gradient, handle, lengths).flatten(2).norm(dim=2).mean(dim=1)
    finally:
        hook.remove()


HANDWRITTEN = [
    "x += f(x)", "f += x", "x - f(x)", "x + gamma * f(x)", "highway", "parallel", "parallel, identity last",
    "raw weights", "part of the channels", "one layer, three calls", "shared MLP",
]  # fmt: skip


@pytest.mark.core
@pytest.mark.parametrize("name", HANDWRITTEN)
def test_every_way_to_write_a_block(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().double().eval()
    blocks = resect.find_blocks(model, X)
    at = "input" if name == "part of the channels" else "first"
    found = resect.path_gradients(model, blocks, (X, Y), summed, at=at, samples=0)
    if at == "input":
        x = X.clone().requires_grad_()
        with resect.gates(model, blocks) as handle:
            full = by_weighing(lambda: torch.autograd.grad(summed(model(x), Y), x)[0], handle, len(found.paths))
        expected = full.norm(dim=2).mean(dim=1)
    else:
        expected = reference(model, blocks, "stem", lambda: summed(model(X), Y), len(found.paths))
    assert torch.allclose(found.norm_of_sum, expected, rtol=1e-7, atol=1e-12)
    if name == "part of the channels":
        with pytest.raises(InputError, match="cannot be seen"):
            resect.path_gradients(model, blocks, (X, Y), summed, samples=0)
        with pytest.raises(InputError, match=r"Single paths cannot be drawn: operations .*samples=0"):
            resect.path_gradients(model, blocks, (X, Y), summed, at="input", samples=2)
    else:
        drawn = resect.path_gradients(model, blocks, (X, Y), summed, samples=3)
        assert (drawn.sum_of_norms >= 0).all()


@pytest.mark.core
def test_what_enters_a_block_that_shares_its_modules():
    """Which call of the module is the block's: along identity shortcuts alone, the gradient is one at all of them."""
    torch.manual_seed(0)
    model = MODELS["one layer, three calls"][0]().double().eval()
    blocks = resect.find_blocks(model, X)
    found = [resect.path_gradients(model, blocks, (X, Y), summed, at=name, samples=0) for name in blocks.names]
    assert [one.paths for one in found] == [(1, 3, 3, 1), (1, 2, 1), (1, 1)]
    assert [float(one.norm_of_sum[0]) for one in found] == pytest.approx([float(found[0].norm_of_sum[0])] * 3)


def test_windows_and_checkpointing():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1), num_heads=(1, 2, 4), embed_dim=12, num_classes=4
    )
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_classes=4)
    vit.set_grad_checkpointing()
    for model, start, size in ((swin, "patch_embed", 56), (vit, "norm_pre", 32)):
        model.double().eval()
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        blocks = resect.find_blocks(model, x)
        found = resect.path_gradients(model, blocks, (x, Y[:2]), cross_entropy, samples=2)
        expected = reference(model, blocks, start, lambda m=model, x=x: summed(m(x), Y[:2]), len(found.paths))
        assert torch.allclose(found.norm_of_sum, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_language_models_at_the_embeddings(family):
    from language_models import language_model

    model = language_model(family, 2).double().eval()
    ids = torch.randint(2, 39, (3, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    blocks = resect.find_blocks(model, {"input_ids": ids})
    found = resect.path_gradients(model, blocks, batch, at="input", samples=2)
    embedding = "model.embed_tokens" if family == "llama" else "transformer.wte"
    expected = reference(model, blocks, embedding, lambda: 3 * model(**batch).loss, len(found.paths))
    assert found.rescaled
    assert torch.allclose(found.norm_of_sum, expected, rtol=1e-5)
    given = resect.path_gradients(
        model, blocks, batch, lambda output, batch: 3 * output.loss * len(batch["labels"]) / 3, at="input", samples=0,
        chunk=2,
    )  # fmt: skip
    assert given.norm_of_sum.shape == found.norm_of_sum.shape


def test_a_mean_over_tokens_in_parts():
    from language_models import language_model

    model = language_model("llama", 1).eval()
    ids = torch.randint(2, 39, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone()}
    blocks = resect.find_blocks(model, {"input_ids": ids})
    whole, parts = (resect.path_gradients(model, blocks, batch, samples=0, chunk=chunk) for chunk in (4, 2))
    assert torch.allclose(whole.norm_of_sum, parts.norm_of_sum, rtol=1e-4)
    batch["labels"][0, 3:] = -100
    with pytest.raises(InputError, match=r"3 to 6, so that parts .* chunk=4"):
        resect.path_gradients(model, blocks, batch, samples=0, chunk=2)
    assert resect.path_gradients(model, blocks, batch, samples=0).norm_of_sum.isfinite().all()
    del batch["labels"]
    with pytest.raises(InputError, match="returned no loss"):
        resect.path_gradients(model, blocks, batch)


def test_a_decoder_that_reads_an_encoder_is_counted_as_it_is():
    from language_models import language_model

    model = language_model("bart", 1).double().eval()
    ids = torch.randint(2, 39, (2, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    blocks = resect.find_blocks(model, batch)
    found = resect.path_gradients(model, blocks, batch, samples=0)
    # From the encoder: through the one cross-attention; before it two encoder blocks or none, then the decoder's MLP.
    assert found.paths == (0, 1, 3, 3, 1)
    start = "model.encoder.layernorm_embedding"
    expected = reference(model, blocks, start, lambda: 2 * model(**batch).loss, len(found.paths))
    assert torch.allclose(found.norm_of_sum, expected, rtol=1e-7, atol=1e-12)
    with pytest.raises(InputError, match="more than one stream"):
        resect.path_gradients(model, blocks, batch, samples=2)


class Coupled(nn.Module):
    """Every block sees the mean over the batch."""

    def __init__(self):
        super().__init__()
        self.stem, self.f, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.f(x.mean(dim=0, keepdim=True).expand_as(x)))


@pytest.mark.core
def test_samples_that_are_coupled():
    torch.manual_seed(0)
    model = Coupled().double()
    blocks = resect.find_blocks(model, X)
    with pytest.raises(InputError, match=r"couples samples .*samples=0"):
        resect.path_gradients(model, blocks, (X, Y), summed, at="input")
    found = resect.path_gradients(model, blocks, (X, Y), summed, at="input", samples=0)
    x = X.clone().requires_grad_()
    with resect.gates(model, blocks) as handle:
        expected = by_weighing(lambda: torch.autograd.grad(summed(model(x), Y), x)[0], handle, 2)
    assert torch.allclose(found.norm_of_sum, expected.norm(dim=2).mean(dim=1), rtol=1e-9)
    alone = resect.path_gradients(model, blocks, (X[:1], Y[:1]), summed, at="input", samples=2)
    assert alone.coherence.tolist() == pytest.approx([1, 1])


class SequenceFirst(nn.Module):
    """The stream is (positions, samples, channels), with as many positions as samples."""

    def __init__(self):
        super().__init__()
        self.stem, self.f, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x).transpose(0, 1)
        return self.head((x + self.f(x)).mean(dim=0))


@pytest.mark.core
def test_samples_are_told_from_positions():
    torch.manual_seed(0)
    model, x = SequenceFirst().double(), torch.randn(3, 3, 5, dtype=torch.float64)
    blocks = resect.find_blocks(model, x)
    found = resect.path_gradients(model, blocks, (x, Y), summed, samples=0)
    one = [resect.path_gradients(model, blocks, (x[i : i + 1], Y[i : i + 1]), summed, samples=0) for i in range(3)]
    assert torch.allclose(found.norm_of_sum, torch.stack([each.norm_of_sum for each in one]).mean(dim=0))
    with pytest.raises(InputError, match=r"has|adds has the shape .* batch of one sample"):
        resect.path_gradients(model, blocks, (x, Y), summed, samples=2)


def net():
    torch.manual_seed(3)
    model = Net((False, False)).double()
    return model, resect.find_blocks(model, X)


BAD = {
    "no scalar": (lambda o, t: o.sum(dim=1), {}, r"must be a scalar tensor, the sum over samples, but is \(3,\)"),
    "no tensor": (lambda o, t: 1.0, {}, "is float"),
    "a constant": (lambda o, t: t.sum() * 1.0, {}, "does not depend on the model"),
    "NaN": (lambda o, t: o.sum() * float("nan"), {}, "The loss is nan"),
    "neither": (lambda o, t: o.sum() ** 2, {}, "neither a sum nor a mean"),
    "no mean": (lambda o, t: ((o**2).mean() + 1e-3).sqrt(), {}, "neither a sum nor a mean.*on the first one"),
    "infinite gradient": (lambda o, t: (o - o.detach()).abs().sqrt().sum(), {}, "length 0 is not finite"),
    "place": (summed, {"at": "layers.7"}, "Unknown residual block"),
    "samples": (summed, {"samples": -1}, "samples must be a whole number of at least 0"),
    "fraction": (summed, {"samples": 1.5}, "samples must be a whole number"),
    "chunk": (summed, {"chunk": 0}, "chunk must be a whole number of at least 1"),
    "length": (summed, {"max_length": -1}, "max_length must be a whole number of at least 0"),
}


@pytest.mark.core
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused(what):
    loss_fn, options, message = BAD[what]
    model, blocks = net()
    with pytest.raises(InputError, match=message):
        resect.path_gradients(model, blocks, (X, Y), loss_fn, **{"samples": 2, **options})
    assert all(type(module).__name__ != "Intercepted" for module in model.modules())
    assert not any("_resect_port" in module.__dict__ for module in model.modules())


class Dropping(Net):
    """Drops in eval mode too."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.3)


@pytest.mark.parametrize("samples", [0, 2])
def test_a_model_that_is_random_in_eval_mode_is_refused(samples):
    model = Dropping((False, False)).double()
    blocks = net()[1]
    with pytest.raises(InputError, match="something random is on"):
        resect.path_gradients(model, blocks, (X, Y), summed, samples=samples)
    with pytest.raises(InputError, match="something random is on"):
        resect.block_gradients(model, blocks, (X, Y), summed)


@pytest.mark.core
@pytest.mark.parametrize(
    ("batch", "message"),
    [(X, "need a batch"), ((X[:0], Y[:0]), "number of samples"), ((X, None), "number of samples")],
)
def test_bad_batches_are_refused(batch, message):
    model, blocks = net()
    with pytest.raises(InputError, match=message):
        resect.path_gradients(model, blocks, batch, summed)


@pytest.mark.core
def test_bad_blocks_are_refused():
    model, blocks = net()
    with pytest.raises(BlocksError, match="selection is empty"):
        resect.path_gradients(model, blocks[:0], (X, Y), summed)
    other = Coupled().double()
    with pytest.raises(BlocksError, match="do not belong to this Coupled"):
        resect.path_gradients(other, blocks, (X, Y), summed)
    unable = resect.Blocks([resect.ResidualBlock.from_json(blocks[0].to_json() | {"end": None, "reason": "it splits"})])
    for analysis in (resect.path_gradients, resect.block_gradients):
        with pytest.raises(InputError, match=r"'layers\.0/a': it splits"):
            analysis(model, unable, (X, Y), summed)


@pytest.mark.core
def test_one_block_alone():
    model, blocks = net()
    found = resect.path_gradients(model, blocks[1:], (X, Y), summed, samples=5)
    assert found.paths == (1, 1)
    assert found.effective().paths == 1
    assert resect.block_gradients(model, blocks[1:], (X, Y), summed).names == ("layers.1/a",)


@pytest.mark.core
def test_a_block_that_does_not_run_is_named():
    class Maybe(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.f, self.g, self.head = (nn.Linear(5, 5) for _ in range(4))

        def forward(self, x):
            x = self.stem(x)
            x = x + self.f(x).tanh()
            if x.shape[1] == 5 and x.shape[0] == 3 and not torch.is_grad_enabled():
                x = x + self.g(x).tanh()
            return self.head(x)

    model = Maybe().double()
    blocks = resect.find_blocks(model, X)
    assert len(blocks) == 2
    for analysis in (resect.path_gradients, resect.block_gradients):
        with pytest.raises(InputError, match="'g' did not run on this batch"):
            analysis(model, blocks, (X, Y), summed)
