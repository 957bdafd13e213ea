"""The table `method`: a training method by name, and its options, those of the class in `resect`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from resect.lab.config.base import Config, Seed

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class AnyMethod(Config):
    """What every method has: the blocks it acts on, all of them or those with an identity shortcut.

    ``seed``: of the method's draws; None is that of the training, see `Recipe.settled`.
    """

    blocks: Literal["all", "identity"] = "all"
    seed: Seed | None = None

    def options(self) -> dict[str, Any]:
        """The options for the method's class; of a `Recipe.settled`, for the class has no seed that is None."""
        return self.model_dump(exclude={"name", "blocks", "recalibrate"})


class Dropping(AnyMethod):
    """What the methods that close random branches share.

    ``recalibrate``: training batches from which the batch statistics of the full net are renewed at the end; those
    of the training describe the thinned nets that it ran.
    """

    recalibrate: int = Field(default=0, ge=0)
    scaling: Literal["none", "inverted", "paper"] = "none"
    own_drop: Literal["refuse", "replace"] = "refuse"


class Drawn(Dropping):
    """A drop probability per block; it grows from 0 over the first ``ramp_steps`` steps."""

    drop_prob: Share = 0.5
    rule: Literal["uniform", "linear", "linear-from-zero"] = "linear"
    per: Literal["batch", "sample"] = "batch"
    ramp_steps: int = Field(default=0, ge=0)

    def options(self) -> dict[str, Any]:
        """The options for the method's class, the ramp as a schedule."""
        from resect.train.schedules import Ramp

        options = super().options()
        steps = options.pop("ramp_steps")
        if steps:
            options["drop_prob"] = Ramp(0.0, self.drop_prob, steps)
        return options


class StochasticDepthConfig(Drawn):
    """`resect.StochasticDepth`."""

    name: Literal["stochastic-depth"]
    scaling: Literal["none", "inverted", "paper"] = "inverted"


class ResidualDroppathConfig(Drawn):
    """`resect.ResidualDroppath`, on the next batch: same-batch steps need a loop of one's own."""

    name: Literal["residual-droppath"]
    forward: Literal["full", "dropped"] = "full"
    mask: Literal["same", "fresh"] = "same"
    drop_steps: Count = 1
    period: Count = 1
    warmup: int = Field(default=0, ge=0)
    update: Literal["dropped", "all"] = "dropped"
    rest: Literal["frozen", "trained"] = "frozen"
    backward: Literal["through", "shortcuts"] = "through"
    norms: Literal["batch", "moving", "eval"] = "batch"
    stillness: Literal["skip", "zero"] = "skip"
    lr_scale: float = Field(default=1.0, ge=0)


class EpsilonGateConfig(AnyMethod):
    """`resect.EpsilonGate`; the gate acts from ``start_step`` on."""

    name: Literal["epsilon-gate"]
    epsilon: float = Field(default=2.5, ge=0)
    start_step: int = Field(default=0, ge=0)
    units: Literal["absolute", "stream"] = "absolute"
    sync: Literal["ranks", "none"] = "ranks"
    side: float = Field(default=0.0, ge=0)
    side_at: str | None = None
    skip_muted_after: Count | None = None
    recheck_every: int = Field(default=0, ge=0)
    settle_after: Count | None = None

    def options(self) -> dict[str, Any]:
        """The options for the method's class, the late start as a schedule."""
        from resect.train.schedules import StartAt

        options = super().options()
        start = options.pop("start_step")
        if start:
            options["epsilon"] = StartAt(self.epsilon, start)
        return options


class EffectivePathsConfig(Dropping):
    """`resect.EffectivePaths`."""

    name: Literal["effective-paths"]
    keep: int = Field(ge=0)


class RandomSubsetConfig(AnyMethod):
    """`resect.RandomSubset`."""

    name: Literal["random-subset"]
    keep: int = Field(ge=0)


MethodConfig = Annotated[
    StochasticDepthConfig | ResidualDroppathConfig | EpsilonGateConfig | EffectivePathsConfig | RandomSubsetConfig,
    Field(discriminator="name"),
]
METHODS: dict[str, type[AnyMethod]] = {
    "stochastic-depth": StochasticDepthConfig,
    "residual-droppath": ResidualDroppathConfig,
    "epsilon-gate": EpsilonGateConfig,
    "effective-paths": EffectivePathsConfig,
    "random-subset": RandomSubsetConfig,
}
