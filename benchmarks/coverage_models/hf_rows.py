"""What a row of the transformers tables holds, and the tiny inputs the rows share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .family import lively

Inputs = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One configuration: a class of transformers, what its config overrides, an example, the published number."""

    model: str
    """The class, ``LlamaForCausalLM``."""
    inputs: Inputs
    blocks: int
    """Residual blocks by the architecture's published structure; of blocks inside blocks the outermost."""
    why: str
    """How that number comes about, and where in the modeling code or paper it is read."""
    options: Mapping[str, Any] = field(default_factory=dict)
    variant: str = ""
    """What tells this row from another one with the same class."""
    trains: str = ""
    """Why the train-mode check cannot be run."""
    batch: Callable[[Any], Any] | None = None
    """Makes the example with another batch size, where repeating every tensor does not."""

    @property
    def name(self) -> str:
        """The family's name: the class, and the variant."""
        return f"{self.model}-{self.variant}" if self.variant else self.model

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """Build the model with random weights of order 1, in eval mode, and its example."""
        import transformers

        cls = getattr(transformers, self.model)
        torch.manual_seed(0)
        model = lively(spread(cls(cls.config_class(**self.options))))
        torch.manual_seed(1)
        return model, self.inputs()


def spread(model: nn.Module) -> nn.Module:
    """Draw weight matrices of order 1: the library's own standard deviation of 0.02 makes tiny branches tiny."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                constant = bool((weight == weight.flatten()[:1]).all())
                if weight.dim() < 2 or constant or name == "A_log" or not weight.is_floating_point():
                    continue  # ``lively`` sees to constants; the decay of a state space has a meaning of its own
                inputs = weight[0].numel() if isinstance(module, nn.modules.conv._ConvNd) else weight.shape[-1]
                scale = 1.0 if isinstance(module, nn.Embedding) else inputs**-0.5
                weight.normal_(std=scale, generator=generator)
    return model


def text(length: int = 8) -> Inputs:
    """Token ids ``(2, length)``, none of them special."""
    return lambda: {"input_ids": torch.randint(5, 90, (2, length))}


def text_to_text(length: int = 8) -> Inputs:
    """Token ids for an encoder ``(2, length)`` and a decoder ``(2, length - 2)``."""
    return both(text(length), answer(length - 2))


def answer(length: int = 6) -> Inputs:
    """Token ids ``(2, length)`` for a decoder."""
    return lambda: {"decoder_input_ids": torch.randint(5, 90, (2, length))}


def image(size: int = 32, channels: int = 3) -> Inputs:
    """Pixels ``(2, channels, size, size)``."""
    return lambda: {"pixel_values": torch.randn(2, channels, size, size)}


def wave(samples: int = 800) -> Inputs:
    """A raw waveform ``(2, samples)``."""
    return lambda: {"input_values": torch.randn(2, samples)}


def both(*parts: Inputs) -> Inputs:
    """Merge examples."""
    return lambda: {name: value for part in parts for name, value in part().items()}


def tensor(name: str, *shape: int) -> Inputs:
    """One named tensor of normal numbers."""
    return lambda: {name: torch.randn(*shape)}
