"""Find, train, analyse and cut the residual blocks of any PyTorch model."""

import importlib
import sys

__version__ = "0.1.0"

# The public names in the order of the story: find, train, analyse, shrink. Each module is imported when one of
# its names is first used, so that `resect --help` need not wait for torch. `__init__.pyi` says the same to type
# checkers and editors; a test compares the two.
_STORY = {
    "errors": ["ResectError"],
    "blocks.example": ["Example"],
    "blocks.block": ["Blocks", "ResidualBlock"],
    "blocks.find": ["find_blocks"],
    "blocks.byhand": ["block"],
    "blocks.gate": ["closed", "detach", "gates"],
    "blocks.compiled": ["compile"],
    "blocks.sharding": ["fully_shard"],
    "blocks.fold": ["folded"],
    "train.schedules": ["schedules"],
    "train.stochastic_depth": ["StochasticDepth"],
    "train.residual_droppath": ["ResidualDroppath"],
    "train.epsilon_gate": ["EpsilonGate"],
    "train.adaptive_lr": ["AdaptiveLR"],
    "train.effective_paths": ["EffectivePaths"],
    "train.random_subset": ["RandomSubset"],
    "train.controls": ["CONTROLS", "droppath_control"],
    "train.recalibrate": ["recalibrate"],
    "analyse.lesion": ["lesion_study"],
    "analyse.study": ["LesionStudy"],
    "analyse.paths": ["path_lengths"],
    "analyse.effective": ["EffectiveLengths", "effective_lengths"],
    "analyse.gradients": ["PathGradients", "path_gradients", "path_gradients_by_state"],
    "analyse.through": ["BlockGradients", "block_gradients"],
    "analyse.profile": ["BlockResponse"],
    "analyse.response": ["block_response"],
    "blocks.plan": ["Plan"],
    "shrink.costs": ["BlockCosts", "block_costs"],
    "shrink.rank": ["rank"],
    "shrink.ranking": ["Ranking"],
    "shrink.remove": ["remove"],
    "shrink.replace": ["replace"],
    "shrink.mimic": ["mimic"],
    "shrink.distill": ["Distillation"],
    "shrink.gradual": ["shrink_gradually"],
    "shrink.files": ["load", "save"],
    "report.draw": ["draw"],
    "integrations.export": ["Exported", "export"],
}
_ROOMS = ("errors", "files", "blocks", "train", "analyse", "shrink", "integrations")
_HOME = {name: f"resect.{module}" for module, names in _STORY.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return importlib.import_module(f"resect.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'resect' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    home = importlib.import_module(_HOME[name])
    globals()[name] = value = getattr(home, name, home)  # `schedules` is a module itself
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
