"""Heal a cut language model with low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), through peft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from resect.blocks.gate import check_detached
from resect.errors import InputError


def heal(
    small: nn.Module,
    train: Callable[[Any], object],
    *,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
) -> nn.Module:
    """Train low-rank adapters of a cut model's linear layers, and merge them into its weights, in place.

    The merged model has the keys, classes and size it had: ``resect.save``, ``save_pretrained`` and
    ``resect.integrations.transformers.save`` take it as before.

    Parameters
    ----------
    small: a model cut by ``remove`` or ``replace``; its other weights stay as they are.
    train: is given the adapted model, a ``peft.PeftModel``, and trains it however it likes: transformers' ``Trainer``,
        a loop with ``Distillation``. Only the adapters have ``requires_grad``.
    rank, alpha, dropout: of the adapters, W + alpha / rank · B·A; ``alpha`` as in the paper.
    targets: which layers get one: as peft's ``target_modules``; by default all linear ones but the head.

    Raises
    ------
    InputError: peft is missing, no layer is a target; the model is then as it was. If ``train`` fails, the adapters are
        taken off again.

    >>> def train(adapted):
    ...     transformers.Trainer(adapted, arguments, train_dataset=texts).train()
    >>> resect.integrations.peft.heal(small, train)
    """
    try:
        import peft
    except ImportError as error:
        raise InputError("LoRA needs peft: pip install 'resect[heal]'.") from error
    check_detached(small)
    learning = {name: parameter.requires_grad for name, parameter in small.named_parameters()}
    modes = {name: module.training for name, module in small.named_modules()}
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    try:
        adapted = peft.get_peft_model(small, config)
    except ValueError as error:
        raise InputError(f'peft finds no layer to adapt: {error} Name some: targets=["q_proj", …].') from error
    merged = False
    try:
        train(adapted)
        adapted.merge_and_unload(safe_merge=True)
        merged = True
    finally:
        if not merged:
            adapted.unload()
        for name, parameter in small.named_parameters():
            parameter.requires_grad_(learning[name])
        for name, module in small.named_modules():
            module.training = modes[name]
        for left in ("peft_config", "_hf_peft_config_loaded"):
            small.__dict__.pop(left, None)
    return small
