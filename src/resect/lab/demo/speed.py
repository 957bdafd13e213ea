"""Latency of models with random weights: whole, with half the blocks closed, with those removed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import resect
from resect.blocks.block import Blocks
from resect.lab import registry
from resect.lab.demo.findings import Display, Findings
from resect.report.chain import chain_rows
from resect.report.cost import latency

SPEED_MODELS = ("timm:resnet50", "timm:vit_small_patch16_224")


def measure_speed(found: Findings, display: Display) -> None:
    """Time models with random weights: as they are, with every second block closed, with those removed."""
    chain, speed = [], []
    for count, name in enumerate(SPEED_MODELS):
        display.steps("models timed", count, len(SPEED_MODELS))
        torch.manual_seed(0)
        model = registry.build(name).eval()
        example = torch.randn(1, *registry.input_size(name, model))
        blocks = resect.find_blocks(model, example)
        chain += chain_rows(name.partition(":")[2], blocks)
        half = blocks[1::2]
        small = resect.remove(model, blocks, half)
        with resect.gates(model, blocks) as gates:

            def closed(
                gates: Any = gates, model: nn.Module = model, half: Blocks = half, example: Tensor = example
            ) -> Tensor:
                for block in half:
                    gates[block.name].close()
                output = model(example)
                for block in half:
                    gates[block.name].open()
                return output

            variants: dict[str, Any] = {
                "full": (model, example), "half closed": closed, "half removed": (small, example)
            }  # fmt: skip
            rows = latency(variants)
        speed += [row | {"model": name.partition(":")[2], "batch": 1} for row in rows]
    display.steps("models timed", len(SPEED_MODELS), len(SPEED_MODELS))
    found.figures["chain"], found.figures["speed"] = chain, speed
