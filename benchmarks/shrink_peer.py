"""Torch-Pruning as its own examples use it: channels taken out everywhere alike, by the size of their weights.

Groups of coupled channels from the dependency graph, L2 norms, one ratio for all layers, channels rounded to multiples
of 8; the ratio is found by halving intervals, until the FLOPs are at most those asked for. ViT: widths, and dimensions
inside heads. Llama: widths and whole heads, since rotary embeddings fix the dimensions of a head.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch_pruning
from torch import nn

from resect.report.cost import count_flops

warnings.filterwarnings("ignore", "Unwrapped parameters detected")  # class token, positions, RMSNorms: dealt with well


def pruned(model: nn.Module, example: Any, flops: float, steps: int = 7, **options: Any) -> nn.Module:
    """A copy with at most ``flops``, as close to them as ``steps`` halvings come; ``options`` as of ``prune``."""
    low, high, best = 0.0, 0.95, None
    for _ in range(steps):
        ratio = (low + high) / 2
        small = prune(model, example, ratio, **options)
        if count_flops(small, example) <= flops:
            best, high = small, ratio
        else:
            low = ratio
    if best is None:
        raise ValueError(f"No ratio up to {high:.2f} brings the FLOPs down to {flops:.3g}.")
    return best


def prune(
    model: nn.Module, example: Any, ratio: float, keep: Sequence[str] = (), round_to: int | None = 8
) -> nn.Module:
    """A copy with ``ratio`` of the channels of every layer gone; the classes stay, and the outputs of ``keep``."""
    small = copy.deepcopy(model).eval()
    language = hasattr(small, "lm_head")
    heads: dict[nn.Module, int] = {}
    for module in small.modules():
        if hasattr(module, "qkv"):
            heads[module.qkv] = module.num_heads
        elif hasattr(module, "q_proj"):
            heads |= dict.fromkeys((module.q_proj, module.k_proj, module.v_proj), module.config.num_attention_heads)
    pruner = torch_pruning.pruner.BasePruner(
        small,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[[module for module in small.modules() if isinstance(module, nn.Linear)][-1]]
        + [small.get_submodule(name) for name in keep],
        num_heads=heads,
        prune_num_heads=language,
        prune_head_dims=not language,
        head_pruning_ratio=ratio if language else 0.0,
        round_to=round_to,
    )
    pruner.step()
    for module in small.modules():
        if hasattr(module, "qkv"):
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim
    if language:
        small.config.hidden_size = small.lm_head.in_features
    return small
