"""Find, train, analyse and cut the residual blocks of any PyTorch model."""

__version__ = "0.1.0"

# The imports are in the order of the story: find, train, analyse, shrink.
# isort: off
from resect.errors import ResectError
from resect.blocks.example import Example
from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.find import find_blocks
from resect.blocks.gate import closed, detach, gates
from resect.train import schedules
from resect.train.stochastic_depth import StochasticDepth
from resect.train.residual_droppath import ResidualDroppath
from resect.train.epsilon_gate import EpsilonGate
from resect.train.adaptive_lr import AdaptiveLR
from resect.train.effective_paths import EffectivePaths
from resect.train.random_subset import RandomSubset
from resect.train.controls import CONTROLS, droppath_control
from resect.train.recalibrate import recalibrate
from resect.analyse.lesion import LesionStudy, lesion_study
from resect.analyse.paths import path_lengths
from resect.analyse.gradients import PathGradients, path_gradients
from resect.blocks.plan import Plan
from resect.shrink.rank import Ranking, rank
from resect.shrink.remove import remove
from resect.shrink.files import load, save
# isort: on

__all__ = [
    "CONTROLS",
    "AdaptiveLR",
    "Blocks",
    "EffectivePaths",
    "EpsilonGate",
    "Example",
    "LesionStudy",
    "PathGradients",
    "Plan",
    "RandomSubset",
    "Ranking",
    "ResectError",
    "ResidualBlock",
    "ResidualDroppath",
    "StochasticDepth",
    "closed",
    "detach",
    "droppath_control",
    "find_blocks",
    "gates",
    "lesion_study",
    "load",
    "path_gradients",
    "path_lengths",
    "rank",
    "recalibrate",
    "remove",
    "save",
    "schedules",
]
