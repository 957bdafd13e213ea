"""Low-rank adapters on a cut language model: merged they compute what they did unmerged, and leave no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resect
from resect.errors import InputError

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

CONFIG = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "head_dim": 8,
          "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


@pytest.fixture
def cut():
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**CONFIG)).eval()
    example = {"input_ids": torch.randint(50, (4, 10))}
    blocks = resect.find_blocks(model, example)
    layer = [block for block in blocks if block.owner == "model.layers.2"]
    return model, resect.remove(model, blocks, layer, compact=True), example


def test_merged_is_unmerged_and_saves_as_before(cut, tmp_path):
    model, small, example = cut
    before, attributes, seen = copy.deepcopy(small.state_dict()), set(vars(small)), {}

    def train(adapted: nn.Module) -> None:
        learning = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        assert learning
        assert all("lora_" in name for name in learning)
        optimizer = torch.optim.AdamW(learning.values(), lr=1e-2)
        losses = []
        with resect.Distillation(small, model) as distil:
            adapted.train()
            for _ in range(12):
                adapted(**example)
                loss = distil.extra_loss()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        with torch.no_grad():
            seen["output"] = adapted.eval()(**example).logits

    assert resect.integrations.peft.heal(small, train) is small
    assert torch.allclose(small(**example).logits, seen["output"], atol=1e-5)
    assert set(vars(small)) == attributes
    assert list(small.state_dict()) == list(before)
    assert all(parameter.requires_grad for parameter in small.parameters())
    assert not any(module.training for module in small.modules())
    changed = {name for name, value in small.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed)

    resect.integrations.transformers.save(small, tmp_path / "short", example)  # proves the standard class equal
    resect.save(small, tmp_path / "cut")
    fresh = transformers.Qwen3ForCausalLM(model.config).eval()
    assert torch.equal(resect.load(tmp_path / "cut", fresh)(**example).logits, small(**example).logits)


def test_a_training_that_fails_leaves_the_model_as_it_was(cut):
    _, small, example = cut
    before, output = copy.deepcopy(small.state_dict()), small(**example).logits

    def train(adapted: nn.Module) -> None:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(0.3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resect.integrations.peft.heal(small, train)
    assert list(small.state_dict()) == list(before)
    assert torch.equal(small(**example).logits, output)
    with pytest.raises(InputError, match=r"peft finds no layer to adapt"):
        resect.integrations.peft.heal(small, train, targets=["nothing"])
    assert torch.equal(small(**example).logits, output)
