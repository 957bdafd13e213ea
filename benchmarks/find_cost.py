"""What finding and intercepting cost: finding blocks, an open gate at every call, half of a net closed.

Four claims, on one thread, in processor time, which other work on the machine disturbs least:

- finding with joint verification takes at most 12 forward passes, and the time of 12 and one second more, up to
  200 blocks. The images are small, so that the search itself counts most;
- an open gate costs less than 2 µs for every intercepted module it serves, with and without gradients;
- ResNet-50 at 224 px with every second block closed saves at least 95 % of the time that removing them saves: the
  removed net is what a user would write by hand, without the branches' modules;
- a model with open gates on every block computes bit-identical outputs and gradients.

Sides take turns in every round; medians and quartiles; a claim whose spread exceeds half its margin fails.

    python benchmarks/find_cost.py --quick
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics

import timm
import torch
from timing import clock, holds, quartiles, shown
from torch import Tensor, nn

import resect
from resect.lab.registry import build

PASSES, SECONDS, MICROSECONDS, SHARE = 12, 1.0, 2.0, 0.95


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return {
        "resnet50": (timm.create_model("resnet50").eval(), torch.randn(2, 3, 64, 64)),
        "cifar-resnet-110": (
            build("cifar-resnet-110", num_classes=10, in_channels=3).eval(),
            torch.randn(2, 3, 32, 32),
        ),
        "vit, 100 layers": (
            timm.create_model("vit_tiny_patch16_224", img_size=32, depth=100).eval(),
            torch.randn(2, 3, 32, 32),
        ),
    }


@torch.no_grad()
def finding(name: str, model: nn.Module, x: Tensor, rounds: int) -> dict[str, object]:
    """Finding beside forward passes: seconds more than 12 of them take."""
    runs: list[int] = []
    count = model.register_forward_pre_hook(lambda *_: runs.append(1))
    blocks = resect.find_blocks(model, x)
    count.remove()
    passes, seconds, beyond = [], [], []
    for _ in range(rounds):
        passes.append(clock(lambda: model(x), best_of=3))
        gc.collect()  # earlier garbage is not this work's
        seconds.append(clock(lambda: resect.find_blocks(model, x)))
        beyond.append(seconds[-1] - PASSES * passes[-1])
    good = holds(beyond, SECONDS) and len(runs) <= PASSES
    shown(f"{name}, {len(blocks)} blocks found in {len(runs)} passes and", seconds, "s", good)
    return {
        "blocks": len(blocks),
        "passes": len(runs),
        "pass_seconds": [round(value, 4) for value in quartiles(passes)],
        "find_seconds": [round(value, 4) for value in quartiles(seconds)],
        "beyond_12_passes": [round(value, 4) for value in quartiles(beyond)],
        "kept": good,
    }


class Small(nn.Module):
    """The smallest residual block there is: next to it an open gate weighs most."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + f(x)``."""
        return x + self.f(x)


def interception(grad: bool, rounds: int, blocks: int = 50, repeat: int = 10) -> list[float]:
    """Microseconds that an open gate adds to one call of one module."""
    net, x = nn.Sequential(*(Small() for _ in range(blocks))).eval(), torch.randn(2, 1)
    found = resect.find_blocks(net, x)

    def work() -> None:
        for _ in range(repeat):
            net(x)

    added = []
    with torch.set_grad_enabled(grad):
        work()
        for _ in range(rounds):
            plain = clock(work, best_of=15)
            with resect.gates(net, found):
                added.append((clock(work, best_of=15) - plain) / repeat / blocks * 1e6)
    return added


@torch.no_grad()
def closing(rounds: int, tries: int) -> list[float]:
    """What closing half of ResNet-50 at 224 px saves, as a share of what removing it saves."""
    torch.manual_seed(0)
    model, x = timm.create_model("resnet50").eval(), torch.randn(1, 3, 224, 224)
    blocks = resect.find_blocks(model, x)
    half = blocks[1::2]
    small = resect.remove(model, blocks, half)
    whole, closed, removed = [], [], []
    for _ in range(rounds):
        took: list[list[float]] = [[], [], []]
        for _ in range(tries):  # pass by pass in turn, so that a slow moment meets all three
            took[0].append(clock(lambda: model(x)))
            took[1].append(clock(lambda: small(x)))
            with resect.closed(model, half):
                took[2].append(clock(lambda: model(x)))
        for times, each in zip((whole, removed, closed), took, strict=True):
            times.append(min(each))
    saved = statistics.median(whole) - statistics.median(removed)
    return [1 - (shut - gone) / saved for shut, gone in zip(closed, removed, strict=True)]


def identical(model: nn.Module, x: Tensor) -> bool:
    """Whether open gates leave the output and every gradient as they are, to the bit."""
    blocks = resect.find_blocks(model, x)

    def run() -> list[Tensor]:
        output = model(x)
        return [output, *torch.autograd.grad(output.square().sum(), [p for p in model.parameters() if p.requires_grad])]

    plain = run()
    with resect.gates(model, blocks):
        gated = run()
    return all(torch.equal(a, b) for a, b in zip(plain, gated, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: 5 of finding, 15 of gates and closing")
    quick = parser.parse_args().quick
    rounds, more = (5, 15) if quick else (15, 30)
    torch.set_num_threads(1)
    made = nets()
    found = {name: finding(name, *net, rounds) for name, net in made.items()}
    result: dict[str, object] = {"rounds": [rounds, more], "find": found}
    kept = [bool(row["kept"]) for row in found.values()]
    for name, grad in (("without gradients", False), ("with gradients", True)):
        added = interception(grad, more)
        kept.append(holds(added, MICROSECONDS))
        result[f"open_us_{name.replace(' ', '_')}"] = shown(f"an open gate, {name}", added, "µs a module", kept[-1])
    shares = closing(more, 2 if quick else 7)
    kept.append(holds(shares, SHARE, at_least=True))
    result["closed_saves_of_removed"] = shown("half of ResNet-50 closed saves, of removing,", shares, "", kept[-1])
    result["identical"] = all(identical(*net) for net in made.values())
    kept.append(bool(result["identical"]))
    print("open gates: outputs and gradients " + ("identical to the bit" if kept[-1] else "DIFFER"))
    result["kept"] = all(kept)
    print(json.dumps(result))
    if not all(kept):
        raise SystemExit("a claim is not kept, or its spread is too wide to say")


if __name__ == "__main__":
    main()
