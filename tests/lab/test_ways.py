import pytest
import torch
from torch import nn

from resect.lab.shrink import ways
from resect.report.costs import eager


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x).relu()


def test_every_way_gives_what_the_model_gives() -> None:
    net, x = Net().eval(), torch.randn(2, 3)
    found, missing = ways.usable(net, x)
    assert set(found) | set(missing) == {"eager", "compiled", "onnxruntime"}
    assert "eager" in found
    with torch.no_grad():
        whole = net(x)
        for name, way in found.items():
            got = way(net, ways.Example.of(x))()
            got = torch.as_tensor(got[0]) if isinstance(got, list) else got
            assert torch.allclose(got, whole, atol=1e-6), name


def test_a_way_that_fails_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **options):
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(ways.torch, "compile", lambda net, *, dynamic, isolate_recompiles: broken)
    monkeypatch.setattr(ways.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else True)
    found, missing = ways.usable(Net(), torch.randn(2, 3))
    assert found == {"eager": eager}
    assert missing == {"compiled": "no C++ compiler", "onnxruntime": "needs onnxscript"}
