"""All single lesions by other tools, where they are installed: captum's layer ablation, nnsight's `skip`.

captum puts 0 in the place of a layer's whole output, so that the shortcut goes too. nnsight leaves a module out and
takes what it is told for the output: here what comes in, through the block's own shortcut and last ReLU. Whoever writes
that knows the model's code.

    pip install captum nnsight
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from lesion_net import Images
from timing import clock, in_turns, shown
from torch import Tensor, nn

Lesion = Callable[[nn.Module, str, Images], Tensor]


def captum(net: nn.Module, name: str, batch: Images) -> Tensor:
    """Logits with the block's whole output at 0: those of the last forward pass that captum makes."""
    from captum.attr import LayerFeatureAblation

    (x, y), block = batch, net.get_submodule(name)
    outputs: list[Tensor] = []
    hook = block.register_forward_hook(lambda _, args, output: outputs.append(output))
    net(x[:1])
    hook.remove()
    whole = torch.zeros_like(outputs[0], dtype=torch.long)  # a mask of one feature: the layer goes as a whole
    hook = net.register_forward_hook(lambda _, args, output: outputs.append(output))
    LayerFeatureAblation(net, block).attribute(x, target=y, layer_mask=whole)
    hook.remove()
    return outputs[-1]


def nnsight(net: nn.Module, name: str, batch: Images) -> Tensor:
    """Logits with the block skipped."""
    from nnsight import NNsight

    traced, block = NNsight(net), net.get_submodule(name)
    with traced.trace(batch[0]):
        place = traced.get(name)
        x = place.input
        place.skip(F.relu(x if block.shortcut is None else block.shortcut(x)))
        logits = traced.output.save()
    return logits


@torch.no_grad()
def accuracies(lesion: Lesion, net: nn.Module, names: list[str], data: list[Images]) -> list[float]:
    """Accuracy in % with each block lesioned in turn."""
    found = []
    for name in names:
        right = sum(int((lesion(net, name, batch).argmax(dim=1) == batch[1]).sum()) for batch in data)
        found.append(100 * right / sum(len(y) for _, y in data))
    return found


def beside(
    own: Mapping[str, Callable[[list[Images]], list[float]]],
    net: nn.Module,
    names: list[str],
    data: list[Images],
    rounds: int,
) -> None:
    """Time these sides, which give the whole net's accuracy first, and the tools in turns; tell what each finds."""
    sides = {name: functools.partial(lambda side, on: side(on)[1:], side) for name, side in own.items()}
    for lesion in (captum, nnsight):
        tool = lesion.__name__
        try:
            lesion(net, names[0], (data[0][0][:1], data[0][1][:1]))
        except ImportError as error:
            print(f"{tool} is left out: {error}", flush=True)
        else:
            sides[tool] = functools.partial(accuracies, lesion, net, names)
    found: dict[str, list[float]] = {}
    works = {name: functools.partial(lambda name: found.update({name: sides[name](data)}), name) for name in sides}
    times = in_turns(works, rounds, 0, clock)
    truth = found["by hook"]
    for name, values in found.items():
        shown(
            f"{name}, {sum(len(y) for _, y in data)} images", [s / len(names) for s in times[name]], "s a lesion", True
        )
        gap = max(abs(a - b) for a, b in zip(values, truth, strict=True))
        span = f"{min(values):.1f} … {max(values):.1f} %, median {statistics.median(values):.1f} %"
        print(f"  accuracy {span}; at most {gap:.1f} points from closing the branch by hook")
