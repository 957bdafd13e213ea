"""Real use with the libraries users bring: timm, torchvision, transformers, peft, accelerate."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Net
from torch import nn

import resect
from resect.train.own_drop import find_own_drop


def equal_everywhere(left, right):
    """Compare two models' gradients by name; what one lacks must be None in the other."""
    other = dict(right.named_parameters())
    for name, parameter in left.named_parameters():
        if name in other:
            assert torch.equal(parameter.grad, other[name].grad), name
        else:
            assert parameter.grad is None, name


# Models that drop paths or layers themselves.


def timm_vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, drop_path_rate=0.5, num_classes=5)


def test_drop_path_of_the_models_own_is_part_of_its_branch():
    net, x = timm_vit().train(), torch.randn(4, 3, 32, 32)
    before = copy.deepcopy(net.state_dict())
    blocks = resect.find_blocks(net, x)
    assert len(blocks) == 6
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    gone = blocks.select([1, 2, 5])
    small = resect.remove(net, blocks, gone)
    assert small.training
    assert not any(name.startswith("blocks.1.drop_path1") for name, _, _, _ in find_own_drop(small))
    # In train mode the kept branches draw the same numbers: what is gone draws none.
    for seed in range(3):
        torch.manual_seed(seed)
        with resect.closed(net, gone):
            closed = net(x)
        closed.square().sum().backward()
        torch.manual_seed(seed)
        removed = small(x)
        removed.square().sum().backward()
        assert torch.equal(closed, removed)
        equal_everywhere(net, small)
        net.zero_grad()
        small.zero_grad()


def test_stochastic_depth_of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.swin_transformer.SwinTransformer(
        [2, 2], 8, [2, 1], [2, 2], [2, 2], stochastic_depth_prob=0.5, num_classes=5
    ).train()
    x = torch.randn(2, 3, 16, 16)
    blocks = resect.find_blocks(net, x)
    assert len(blocks) == 6
    small = resect.remove(net, blocks, blocks.names[:3])
    torch.manual_seed(1)
    with resect.closed(net, blocks[:3]):
        closed = net(x)
    torch.manual_seed(1)
    assert torch.equal(closed, small(x))


def wav2vec(layerdrop):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        layerdrop=layerdrop, mask_time_prob=0.0, mask_feature_prob=0.0,
        hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def test_layer_drop_goes_on_throwing_its_coins_while_blocks_are_closed():
    """The whole layers that the model skips are skipped with open and with closed gates alike."""
    net, x = wav2vec(0.5).train(), torch.randn(1, 400)
    blocks = resect.find_blocks(net, x)
    assert len(blocks) == 9, "8 in the layers, and the positional convolution"
    assert net.training
    assert [found[3] for found in find_own_drop(net)] == [0.5] * len(find_own_drop(net))
    small = resect.remove(net, blocks, blocks.names[3:5])
    ran = []
    for layer in net.encoder.layers:
        layer.register_forward_hook(lambda m, args, out: ran.append(m))
    counts = set()
    for seed in range(6):
        torch.manual_seed(seed)
        with resect.closed(net, blocks[3:5]):
            closed = net(x).last_hidden_state
        counts.add(len(ran))
        ran.clear()
        torch.manual_seed(seed)
        assert torch.equal(closed, small(x).last_hidden_state)
    assert len(counts) > 1, "layers were dropped in some runs and not in others"


# PEFT.


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16,
        vocab_size=30,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


TARGETS = ("q_proj", "v_proj", "down_proj")
ADAPTERS = {
    "lora": lambda peft: peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, lora_dropout=0.1),
    "dora": lambda peft: peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "ia3": lambda peft: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "prompt": lambda peft: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_peft(adapter):
    peft = pytest.importorskip("peft")
    plain = llama()
    net = peft.get_peft_model(llama(), ADAPTERS[adapter](peft)).eval()
    batch = {"input_ids": torch.randint(30, (2, 5)), "use_cache": False}
    blocks = resect.find_blocks(net, batch)
    inside = resect.find_blocks(plain, batch).names
    assert [name.rpartition("model.layers")[2] for name in blocks.names] == [
        name.rpartition("model.layers")[2] for name in inside
    ]
    keys = list(net.state_dict())
    small = resect.remove(net, blocks, blocks.names[1:3])
    with torch.no_grad():
        with resect.closed(net, blocks[1:3]):
            assert list(net.state_dict()) == keys
            closed = net(**batch).logits
        assert torch.equal(small(**batch).logits, closed)
        assert not torch.equal(net(**batch).logits, closed)
    assert set(small.state_dict()) < set(keys)
    net.train()
    small.train()
    for model, gone in ((net, blocks[1:3]), (small, [])):
        torch.manual_seed(0)
        with resect.closed(model, gone):
            model(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    kept = {name: p for name, p in small.named_parameters() if p.requires_grad}
    assert kept
    assert all(torch.equal(p.grad, trained[name].grad) for name, p in kept.items())
    assert all(p.grad is None for name, p in trained.items() if name not in kept)


def test_adapters_are_switched_and_merged_on_a_cut_model(tmp_path):
    peft = pytest.importorskip("peft")
    net = peft.get_peft_model(llama(), ADAPTERS["lora"](peft)).eval()
    batch = {"input_ids": torch.randint(30, (2, 5)), "use_cache": False}
    blocks = resect.find_blocks(net, batch)
    small = resect.remove(net, blocks, blocks.names[:1])
    with torch.no_grad():
        with resect.closed(net, blocks[:1]), net.disable_adapter():
            without = net(**batch).logits
        with small.disable_adapter():
            assert torch.equal(small(**batch).logits, without)
        adapted = small(**batch).logits
        assert not torch.equal(adapted, without)
        assert torch.allclose(small.merge_and_unload()(**batch).logits, adapted, atol=1e-5)


# Transformers' own checkpointing, both kinds.


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(reentrant):
    net, tokens = llama(), torch.randint(30, (1, 5))
    blocks = resect.find_blocks(net, {"input_ids": tokens, "use_cache": False})
    small = resect.remove(net, blocks, blocks.names[1:2]).train()
    net.train()
    net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    net.enable_input_require_grads()
    assert resect.find_blocks(net, {"input_ids": tokens, "use_cache": False}).names == blocks.names
    with resect.closed(net, blocks[1:2]):
        net(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    small(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    other = dict(small.named_parameters())
    for name, parameter in net.named_parameters():
        if name in other:
            assert torch.allclose(parameter.grad, other[name].grad, atol=1e-6), name
        else:
            assert parameter.grad is None, name


# Large models.


def test_a_cache_in_the_example_is_left_as_it_was():
    net = llama()
    with torch.no_grad():
        cache = net(torch.randint(30, (1, 5)), use_cache=True).past_key_values
    blocks = resect.find_blocks(net, {"input_ids": torch.tensor([[3]]), "past_key_values": cache})
    assert len(blocks) == 4
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("family", ["llama", "timm"])
def test_discovery_on_the_meta_device_gives_the_names_of_the_real_model(family):
    net = llama() if family == "llama" else timm_vit()
    example = {"input_ids": torch.randint(30, (1, 5))} if family == "llama" else torch.randn(1, 3, 32, 32)
    on_meta = resect.find_blocks(copy.deepcopy(net).to("meta"), example)
    assert on_meta.names == resect.find_blocks(net, example).names
    assert not any(parameter.is_meta for parameter in net.parameters())


def test_offloaded_models_are_refused_by_name_and_take_the_names_found_before(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 5)
    blocks = resect.find_blocks(net, x)
    expected = net.head(net.stem(x))
    accelerate.disk_offload(net, str(tmp_path), execution_device=torch.device("cpu"))
    with pytest.raises(resect.ResectError, match="offloaded by accelerate"):
        resect.find_blocks(net, x)
    with resect.closed(net, blocks):
        assert torch.equal(net(x), expected)


@pytest.fixture
def accelerator():
    """One for this test alone: every Accelerator of a process shares its first one's settings."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_that_accelerate_prepared(accelerator):
    torch.manual_seed(0)
    net = accelerator.prepare(Net().eval())
    x = torch.randn(2, 5)
    blocks = resect.find_blocks(net, x)
    assert len(blocks) == 3
    with torch.no_grad(), resect.closed(net, blocks[:2]):
        closed = net(x)
    assert torch.equal(resect.remove(net, blocks, blocks.names[:2])(x), closed)


# Quantised by others, where installed.


def test_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(8, 64)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(2))

        def forward(self, x):
            x = self.stem(x)
            for layer in self.layers:
                x = x + layer(x)
            return x

    net, x = Wide().eval(), torch.randn(2, 8)
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    blocks = resect.find_blocks(net, x)
    assert len(blocks) == 2
    with resect.closed(net, blocks):
        assert torch.equal(net(x), net.stem(x))
    assert torch.equal(resect.remove(net, blocks, blocks.names)(x), net.stem(x))
