"""The shape that a cut leaves, trained from new weights: the control that every cut net stands beside."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import resect
from resect.blocks.plan import Plan
from resect.lab import runs
from resect.lab.data import open_data
from resect.lab.progress import Tell
from resect.lab.recipe import Recipe, parse
from resect.lab.trainer import train


def scratch_folder(cut: Path) -> Path:
    """Where the run of a cut model's shape goes: beside the cut model."""
    return cut.with_name(f"{cut.name}-from-scratch")


def from_scratch(recipe: Recipe, plan: Plan, folder: Path, progress: Tell | None = None) -> nn.Module:
    """Train the recipe's net without the plan's blocks into ``folder``, a new one; returns it in eval mode.

    As long as the recipe says, from its seed, without its method, teacher or start.
    """
    tables = recipe.dump()
    plain = parse(tables | {"method": None, "distill": None, "model": tables["model"] | {"start": None}})
    return train(plain, folder, model=cut_shape(plain, plan), progress=progress).model.eval()


def cut_shape(recipe: Recipe, plan: Plan) -> nn.Module:
    """Return the recipe's net with fresh weights, drawn from its seed, and the plan's blocks taken out."""
    data = open_data(recipe.data.name, **recipe.data.options)
    with torch.random.fork_rng([]):
        torch.manual_seed(recipe.train.seed)
        model = runs.build_model(recipe, data)
    return resect.remove(model, resect.find_blocks(model, data.sample("train", 8)[0]), plan.names)
