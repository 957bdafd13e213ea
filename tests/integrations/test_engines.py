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
