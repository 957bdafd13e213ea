"""Small transformers models with random weights of order 1, so that every branch shows in the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_DECODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 39}
_PAIR = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


def language_model(family: str, layers: int, **options: Any) -> nn.Module:
    """Build a small model of a family: a decoder (``gemma3`` has sliding windows), an encoder, or both."""
    import transformers as hf

    torch.manual_seed(0)
    if family == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(num_hidden_layers=layers, **_DECODER, **_TOKENS, **options))
    elif family == "qwen3":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(num_hidden_layers=layers, **_DECODER, **_TOKENS, **options))
    elif family == "mixtral":
        options = {"num_local_experts": 3, **options}
        model = hf.MixtralForCausalLM(hf.MixtralConfig(num_hidden_layers=layers, **_DECODER, **_TOKENS, **options))
    elif family == "gemma3":
        types = [("full" if layer % 3 == 1 else "sliding") + "_attention" for layer in range(layers)]
        options = {"num_hidden_layers": layers, "layer_types": types, "sliding_window": 4, **options}
        model = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_DECODER, **_TOKENS, **options))
    elif family == "gpt2":
        sizes = {"n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 64}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=layers, **sizes, **_TOKENS, **options))
    elif family in ("bart", "pegasus"):
        name = family.capitalize()
        sizes = {"encoder_layers": layers, "decoder_layers": layers, **_PAIR, **_TOKENS, **options}
        model = getattr(hf, f"{name}ForConditionalGeneration")(getattr(hf, f"{name}Config")(**sizes))
    elif family == "bert":
        sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
        model = hf.BertModel(hf.BertConfig(num_hidden_layers=layers, **sizes, **options))
    else:
        sizes = {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 16,
            "patch_size": 4,
        }
        model = hf.ViTForImageClassification(hf.ViTConfig(num_hidden_layers=layers, **sizes, **options))
    return _order_one(model).eval()


def _order_one(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.3 / parameter.shape[-1] ** 0.5, generator=generator)
            elif "weight" in name:
                parameter.uniform_(0.5, 1.0, generator=generator)
            else:
                parameter.uniform_(-0.2, 0.2, generator=generator)
    return model


def tokens(length: int, seed: int = 0) -> Tensor:
    """Return (2, length) token ids."""
    return torch.randint(2, 38, (2, length), generator=torch.Generator().manual_seed(seed))
