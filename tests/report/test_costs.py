import pytest
import torch
from torch import nn

from resect.blocks import cost as clocks
from resect.errors import InputError
from resect.report.cost import count_flops
from resect.report.costs import costs, eager
from resect.report.memory import activation_memory


class Branching(nn.Module):
    """x + f(x): the shortcut is held while the branch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return x + self.down(self.up(x))


def test_activation_memory_by_hand() -> None:
    x = torch.randn(3, 4)
    outputs = [4 * 3 * width for width in (8, 8, 2)]  # bytes: float32, 3 samples
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert activation_memory(plain, x) == max(outputs[0] + outputs[1], outputs[1] + outputs[2])
    in_place = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    assert activation_memory(in_place, x) == outputs[0] + outputs[2]
    stem, up, down = (4 * 3 * width for width in (4, 16, 4))
    assert activation_memory(Branching(), x) == stem + up + down
    assert activation_memory(nn.Flatten(), torch.randn(3, 2, 2)) == 0  # a view takes none


def test_activation_memory_forgets_earlier_passes_and_leaves_modes_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    first = activation_memory(model, torch.randn(8, 4))
    assert activation_memory(model, torch.randn(8, 4)) == first == 4 * 8 * 4 * 2
    assert model.training
    assert activation_memory(model, torch.randn(16, 4)) == 2 * first


def test_a_row_per_model_batch_and_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

    def waits(seconds: float):
        def ready(model: nn.Module, example) -> object:
            def call() -> None:
                Clock.now += seconds * len(example.args[0]) * model.out_features

            return call

        return ready

    monkeypatch.setattr(clocks, "clock", lambda: Clock.now)
    models, x = {"whole": nn.Linear(4, 2), "cut": nn.Linear(4, 1)}, torch.randn(2, 4)
    rows = costs(models, x, batches=(1, 3), ways={"eager": waits(0.01), "fast": waits(0.005)}, rounds=2)
    assert [(row["batch"], row["net"], row["way"]) for row in rows] == [
        (batch, net, way) for batch in (1, 3) for net in ("whole", "cut") for way in ("eager", "fast")
    ]
    assert [row["parameters"] for row in rows] == [10, 10, 5, 5] * 2
    assert [row["flops"] for row in rows] == [16, 16, 8, 8, 48, 48, 24, 24]
    assert [row["activation_bytes"] for row in rows] == [8, 8, 4, 4, 24, 24, 12, 12]
    assert [row["median_ms"] for row in rows] == pytest.approx([20, 10, 10, 5, 60, 30, 30, 15])
    assert [row["per_second"] for row in rows] == pytest.approx([50, 100, 100, 200] * 2)
    assert models["whole"].training


def test_eager_runs_the_model_and_costs_leave_it_alone() -> None:
    seen: list[tuple[bool, bool]] = []

    class Spy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    model = Spy(4, 2)
    (row,) = costs({"a": model}, torch.randn(2, 4), batches=(2,), ways={"eager": eager}, rounds=2)
    assert seen[-1] == (False, False)
    assert {training for training, _ in seen} == {False}
    assert model.training
    assert row["low_ms"] <= row["median_ms"] <= row["high_ms"]
    assert row["flops"] == count_flops(model, torch.randn(2, 4))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="at least one model"):
        costs({}, torch.randn(1, 4))
    with pytest.raises(InputError, match="rounds"):
        costs({"a": nn.Linear(4, 2)}, torch.randn(1, 4), rounds=1)
