"""In every engine a training is the plain loop's, and goes on exactly from the engine's own checkpoint."""

from __future__ import annotations

import engines
import pytest
import torch
from engines import ENGINES, METHODS

import resect
from resect.errors import AttachError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]
every_engine = pytest.mark.parametrize("engine", ENGINES)
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(autouse=True)
def afresh():
    """Forget what accelerate keeps for the whole process."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@every_engine
@every_method
def test_a_training_equals_the_plain_loop_and_goes_on_exactly(engine, name, tmp_path):
    expected, by_hand = engines.plain(name, tmp_path, False)
    whole, method = ENGINES[engine](name, tmp_path / engine if engine != "plain" else tmp_path, False)
    assert method.steps == engines.EPOCHS * engines.STEPS
    assert not method.attached
    for (key, mine), wanted in zip(whole.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, wanted, msg=lambda message, key=key: f"{key}: {message}")
    assert method.metrics() == by_hand.metrics()
    assert name != "EpsilonGate" or method.metrics()["muted"] > 0
    again, resumed = ENGINES[engine](name, tmp_path / engine if engine != "plain" else tmp_path, True)
    assert resumed.steps == method.steps
    for (key, mine), wanted in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(mine, wanted), key
    for mine, wanted in zip(resumed.parameters(), method.parameters(), strict=True):
        assert torch.equal(mine, wanted)


def same(one, other):
    for (key, mine), wanted in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, wanted), key


@every_method
def test_transformers_trainer_goes_on_in_the_middle_of_an_epoch(name, tmp_path):
    options = {"save_steps": 3, "train_sampling_strategy": "random", "seed": 3, "max_grad_norm": 0.5}
    whole, _ = engines.transformers(name, tmp_path, 0, **options)
    # a Trainer told to restore callbacks makes them anew
    again, method = engines.transformers(name, tmp_path, 3, restore_callback_states_from_checkpoint=True, **options)
    assert method.steps == 10
    same(again, whole)
    again, _ = engines.transformers(name, tmp_path, 6, **options)
    same(again, whole)


@every_method
def test_transformers_trainer_evaluates_between_steps(name, tmp_path):
    plain, _ = engines.transformers(name, tmp_path / "a", 0)
    evaluated, _ = engines.transformers(name, tmp_path / "b", 0, eval_strategy="steps", eval_steps=1)
    same(evaluated, plain)


def test_transformers_trainer_is_told_what_is_wrong_before_it_trains(tmp_path):
    net, method, optimizer = engines.made("StochasticDepth")
    trainer = engines.trainer(net, method, optimizer, tmp_path)
    with pytest.raises(AttachError, match=r"Write `with method: trainer.train\(\)`"):
        trainer.train()
    _, other, _ = engines.made("ResidualDroppath")
    trainer = engines.trainer(net, other, optimizer, tmp_path)
    with other, pytest.raises(AttachError, match="is on another model"):
        trainer.train()
    engines.trainer(net, None, optimizer, tmp_path).train()
    trainer = engines.trainer(net, method, optimizer, tmp_path)
    with method, pytest.raises(AttachError, match="The checkpoint has no state of this StochasticDepth"):
        trainer.train(str(tmp_path / "checkpoint-5"))
    assert not method.attached


@pytest.mark.filterwarnings("ignore:.*dropping branches tends to hurt")
def test_two_methods_in_one_transformers_trainer(tmp_path):
    finals = []
    for resume in (None, str(tmp_path / "checkpoint-5")):
        net, _, optimizer = engines.made("StochasticDepth")
        blocks = resect.find_blocks(net, torch.randn(8, 3))
        first = resect.EffectivePaths(net, blocks[:2], keep=1)
        second = resect.EffectivePaths(net, blocks[2:], keep=2, seed=1)
        trainer = engines.trainer(net, first, optimizer, tmp_path)
        trainer.add_callback(resect.integrations.transformers.callback(second))
        with first, second:
            trainer.train(resume)
        assert (first.steps, second.steps) == (10, 10)
        finals.append(net)
    same(*finals)


class Boom(Exception):
    pass


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_detaches_whatever_happens(package, tmp_path, monkeypatch):
    import importlib

    importlib.import_module(package)
    net, method, optimizer = engines.made("ResidualDroppath")
    for error in (Boom, KeyboardInterrupt):

        def on_before_zero_grad(self, optimizer, error=error):
            assert method.attached
            if method.steps % 10 == 4:
                raise error

        module = engines.module(package, net, method, optimizer, on_before_zero_grad=on_before_zero_grad)
        with pytest.raises((Boom, SystemExit)):
            engines.fitter(package, method, tmp_path).fit(module, engines.loader())
        assert not method.attached
        assert all(parameter.requires_grad for parameter in net.parameters())
        assert all(type(part).__module__.startswith(("torch.", "engines")) for part in net.modules())
        method.steps = 0
    with method:  # who attaches, detaches
        engines.fitter(package, method, tmp_path).fit(engines.module(package, net, method, optimizer), engines.loader())
        assert method.attached


def test_lightning_is_told_what_is_wrong_before_it_trains(tmp_path):
    package = "lightning.pytorch"
    net, method, optimizer = engines.made("StochasticDepth")
    _, other, _ = engines.made("StochasticDepth")
    with pytest.raises(AttachError, match="is on another model"):
        engines.fitter(package, other, tmp_path).fit(engines.module(package, net, None, optimizer), engines.loader())
    engines.fitter(package, None, tmp_path).fit(engines.module(package, net, None, optimizer), engines.loader())
    with pytest.raises(AttachError, match="The checkpoint has no state of this StochasticDepth"):
        engines.fitter(package, method, tmp_path).fit(
            engines.module(package, net, None, optimizer), engines.loader(), ckpt_path=tmp_path / "step=5.ckpt"
        )
    assert not method.attached


@every_method
def test_lightning_validates_clips_and_skips_steps(name, tmp_path):
    """As a loop by hand with the same clipping, in which the steps with infinite losses are lost."""
    package, lost = "lightning.pytorch", (3, 7)
    from lightning.pytorch.plugins.precision import MixedPrecision

    expected, by_hand, optimizer = engines.made(name)
    with by_hand:
        for step, micro in enumerate(batch for _ in range(2) for batch in engines.loader()):
            by_hand.begin_step()
            loss = torch.nn.functional.cross_entropy(expected(micro[0]), micro[1]) + by_hand.extra_loss(micro[1])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.3)
            if step not in lost:
                optimizer.step()

    net, method, optimizer = engines.made(name)

    def training_step(self, batch, number):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]) + method.extra_loss(batch[1])
        return loss * float("inf") if method.steps - 1 in lost else loss

    module = engines.module(
        package, net, method, optimizer, training_step=training_step,
        validation_step=lambda self, batch, number: self.net(batch[0]).sum(),
    )  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    precision.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    trainer = engines.fitter(
        package, method, tmp_path, plugins=precision, gradient_clip_val=0.3, accumulate_grad_batches=1,
        val_check_interval=2,
    )  # fmt: skip
    trainer.fit(module, engines.loader(), engines.loader())
    for (key, mine), wanted in zip(net.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, wanted, msg=lambda message, key=key: f"{key}: {message}")
    assert method.steps == by_hand.steps == 20


def test_lightning_with_manual_optimization(tmp_path):
    package = "lightning.pytorch"
    net, method, optimizer = engines.made("ResidualDroppath")

    def training_step(self, batch, number, begin=True):
        if begin:
            method.begin_step()
        self.manual_backward(torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        self.optimizers().step()
        self.optimizers().zero_grad()

    module = engines.module(package, net, method, optimizer, training_step=training_step)
    module.automatic_optimization = False
    engines.fitter(package, method, tmp_path, accumulate_grad_batches=1).fit(module, engines.loader())
    assert method.steps == 20
    forgotten = lambda self, batch, number: training_step(self, batch, number, begin=False)  # noqa: E731
    module = engines.module(package, net, method, optimizer, training_step=forgotten)
    module.automatic_optimization = False
    with pytest.raises(AttachError, match=r"optimizer steps? without"):
        engines.fitter(package, method, tmp_path, accumulate_grad_batches=1).fit(module, engines.loader())


@every_method
def test_wrapped_optimizers_are_the_optimizers_they_wrap(name, monkeypatch):
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from lightning.pytorch.core.optimizer import LightningOptimizer

    Accelerator(cpu=True)
    for wrap in (AcceleratedOptimizer, LightningOptimizer):
        net, method, inner = engines.made(name)
        method.optimizer = outer = wrap(inner)
        looks, look = [], method._before_optimizer_step
        monkeypatch.setattr(method, "_before_optimizer_step", lambda which: looks.append(which) or look(which))  # noqa: B023
        if wrap is LightningOptimizer:
            outer.step = inner.step  # its own needs a running trainer
        with method:
            for x, y in engines.loader():
                method.begin_step()
                (torch.nn.functional.cross_entropy(net(x), y) + method.extra_loss(y)).backward()
                outer.step()
                inner.zero_grad()
        assert looks == [inner] * 10
    method.optimizer = wrap(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1))
    with pytest.raises(AttachError, match="holds no parameter of the model"):
        method.attach()


@every_method
def test_accelerates_scaler_skips_steps(name):
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    net, method, inner = engines.made(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    skipped = []
    with method:
        for step, (x, y) in enumerate(engines.loader()):
            method.begin_step()
            loss = torch.nn.functional.cross_entropy(net(x), y) + method.extra_loss(y)
            scaler.scale(loss * float("inf") if step in (2, 5) else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            skipped += [step] if optimizer.step_was_skipped else []
    assert skipped == [2, 5]
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_timms_average_made_while_attached(tmp_path):
    from timm.utils import ModelEmaV3

    net, method, optimizer = engines.made("StochasticDepth")
    early, late = ModelEmaV3(net, decay=0.5), None
    x, _ = next(iter(engines.loader()))
    with method:
        for x, y in engines.loader():
            method.begin_step()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if late is None:
                late = ModelEmaV3(net, decay=0.5)
                late.module.load_state_dict(early.module.state_dict())
            early.update(net)
            late.update(net)
    assert torch.equal(late.module(x), early.module(x)), "in eval mode its gates do nothing"
    resect.detach(late.module)
    assert torch.equal(late.module.train()(x), early.module.train()(x))
