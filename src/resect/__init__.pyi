# What type checkers and editors read; __init__.py resolves the same names when they are first used.
# The imports are in the order of the story: find, train, analyse, shrink.
# isort: off
from resect import analyse as analyse
from resect import blocks as blocks
from resect import errors as errors
from resect import files as files
from resect import integrations as integrations
from resect import shrink as shrink
from resect import train as train

from resect.errors import ResectError as ResectError
from resect.blocks.example import Example as Example
from resect.blocks.block import Blocks as Blocks, ResidualBlock as ResidualBlock
from resect.blocks.find import find_blocks as find_blocks
from resect.blocks.byhand import block as block
from resect.blocks.fold import folded as folded
from resect.blocks.gate import closed as closed, detach as detach, gates as gates
from resect.blocks.compiled import compile as compile
from resect.blocks.sharding import fully_shard as fully_shard
from resect.train import schedules as schedules
from resect.train.stochastic_depth import StochasticDepth as StochasticDepth
from resect.train.residual_droppath import ResidualDroppath as ResidualDroppath
from resect.train.epsilon_gate import EpsilonGate as EpsilonGate
from resect.train.adaptive_lr import AdaptiveLR as AdaptiveLR
from resect.train.effective_paths import EffectivePaths as EffectivePaths
from resect.train.random_subset import RandomSubset as RandomSubset
from resect.train.controls import CONTROLS as CONTROLS, droppath_control as droppath_control
from resect.train.recalibrate import recalibrate as recalibrate
from resect.analyse.lesion import lesion_study as lesion_study
from resect.analyse.study import LesionStudy as LesionStudy
from resect.analyse.paths import path_lengths as path_lengths
from resect.analyse.effective import EffectiveLengths as EffectiveLengths, effective_lengths as effective_lengths
from resect.analyse.gradients import (
    PathGradients as PathGradients,
    path_gradients as path_gradients,
    path_gradients_by_state as path_gradients_by_state,
)
from resect.analyse.through import BlockGradients as BlockGradients, block_gradients as block_gradients
from resect.analyse.profile import BlockResponse as BlockResponse
from resect.analyse.response import block_response as block_response
from resect.blocks.plan import Plan as Plan
from resect.shrink.costs import BlockCosts as BlockCosts, block_costs as block_costs
from resect.shrink.rank import rank as rank
from resect.shrink.ranking import Ranking as Ranking
from resect.shrink.remove import remove as remove
from resect.shrink.replace import replace as replace
from resect.shrink.mimic import mimic as mimic
from resect.shrink.distill import Distillation as Distillation
from resect.shrink.gradual import shrink_gradually as shrink_gradually
from resect.shrink.files import load as load, save as save
from resect.report.draw import draw as draw
from resect.integrations.export import Exported as Exported, export as export

__version__: str
__all__: list[str]
