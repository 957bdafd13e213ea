import pytest
import torch
from torch import nn
from torch.nn import functional

from resect.blocks import cost as blocks_cost
from resect.blocks.example import Example
from resect.errors import InputError
from resect.report import cost


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


class Clock:
    """Time that passes only when a variant runs, and a record of which did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.ran = 0.0, ""
        monkeypatch.setattr(blocks_cost, "clock", lambda: self.now)

    def variant(self, name: str, seconds: float):
        def run() -> None:
            self.now += seconds
            self.ran += name

        return run


def test_parameters_shared_by_two_modules_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert cost.count_parameters(model) == 40
    model[1].weight = model[0].weight
    assert cost.count_parameters(model) == 24


def test_flops_follow_the_formulas() -> None:
    assert cost.count_flops(nn.Linear(30, 7), torch.randn(5, 30)) == 2 * 5 * 30 * 7
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    assert cost.count_flops(conv, torch.randn(2, 3, 10, 10)) == 2 * 2 * 8 * 3 * 9 * 100
    assert cost.count_flops(Attention(), torch.randn(2, 3, 16, 8)) == 2 * (2 * 2 * 3 * 16 * 16 * 8)


def test_flops_leave_modes_and_buffers_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cost.count_flops(model, torch.randn(8, 4))
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_examples_of_every_form() -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    for example in (x, (x,), {"input": x}, Example(args=(x,), kwargs={})):
        assert cost.count_flops(model, example) == 48
        assert cost.latency({"a": (model, example)}, rounds=2, at_least_ms=0)[0]["batch"] == 3


def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rows = cost.latency(
        {"A": clock.variant("A", 0.010), "B": clock.variant("B", 0.020)}, rounds=4, warmup=1, at_least_ms=5
    )
    assert clock.ran == "AB" + "AB" + "AB" * 4  # warm-up, calibration, rounds
    assert [row["variant"] for row in rows] == ["A", "B"]
    assert rows[0]["median_ms"] == pytest.approx(10)
    assert rows[1]["low_ms"] == pytest.approx(20)
    assert rows[1]["batch"] is None


def test_short_calls_are_repeated_until_they_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    row = cost.latency({"A": clock.variant("A", 1e-4)}, rounds=3, warmup=0, at_least_ms=5)[0]
    assert row["median_ms"] == pytest.approx(0.1)
    assert len(clock.ran) >= 3 * 50  # 5 ms hold 50 calls of 0.1 ms


def test_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.009] + [0.001 * t for t in (50, 10, 30, 20, 40)])
    clock = Clock(monkeypatch)

    def run() -> None:
        clock.now += next(times)

    row = cost.latency({"A": run}, rounds=5, warmup=0)[0]
    assert [row[key] for key in ("low_ms", "median_ms", "high_ms")] == pytest.approx([20, 30, 40])


def test_batches_resize_examples_and_modes_come_back() -> None:
    seen: list[tuple[int, bool, bool]] = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((len(x), self.training, torch.is_grad_enabled()))
            return x

    model = Spy()
    rows = cost.latency({"a": (model, torch.randn(4, 2))}, rounds=2, warmup=0, at_least_ms=0, batches=(1, 6))
    assert [row["batch"] for row in rows] == [1, 6]
    assert {size for size, _, _ in seen} == {1, 6}
    assert {(training, grad) for _, training, grad in seen} == {(False, False)}
    assert model.training


def test_modes_come_back_after_an_error() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        cost.latency({"a": (model, torch.randn(2, 5))})
    assert model.training


def test_bad_options() -> None:
    with pytest.raises(InputError, match="rounds"):
        cost.latency({}, rounds=1)
    with pytest.raises(InputError, match="batches"):
        cost.latency({"a": lambda: None}, batches=(1,))


class Caches(nn.Module):
    """Keeps what its first pass computed, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(4, 4), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            self.kept = torch.arange(4.0)
        return self.linear(x) * self.kept


def test_a_model_that_was_first_run_to_be_timed_can_be_trained() -> None:
    model, x = Caches(), torch.randn(2, 4)
    cost.latency({"it": (model, x)}, rounds=2)
    model(x).sum().backward()
    assert model.linear.weight.grad is not None
