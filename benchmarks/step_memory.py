"""A training step with what it frees kept for the next one, beside the same step with the C library's own settings.

ResNet-20, batch 128, bf16 with channels_last, SGD, one thread; two processes, one of each kind, in turns of two steps.

    python benchmarks/step_memory.py --quick
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from timing import holds, quartiles, shown

from resect.lab.memory import keep_freed_memory
from resect.lab.registry import build

BATCH = 128
STEPS = 2
"""Of a turn."""


def side(keeps: bool, line: Connection) -> None:
    """Train a turn whenever asked to; answer with seconds of processor time, pages found, and the most memory (MB)."""
    torch.set_num_threads(1)
    if keeps and not keep_freed_memory():
        raise SystemExit("This C library is not glibc: there is nothing to measure.")
    torch.manual_seed(0)
    model = build("cifar-resnet-20", num_classes=10, in_channels=3).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    while line.recv():
        pages, begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        took, used = time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF)
        line.send((took / STEPS, (used.ru_minflt - pages) / STEPS, used.ru_maxrss / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="15 rounds instead of 60")
    rounds = 15 if parser.parse_args().quick else 60
    names, lines, processes = ("default", "kept"), [], []
    context = multiprocessing.get_context("spawn")
    for name in names:
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=side, args=(name == "kept", theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a process that ends is noticed
        lines.append(mine)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for turn in range(-2, rounds):  # the first two warm up
        for place in (0, 1) if turn % 2 else (1, 0):
            lines[place].send(True)
            answer = lines[place].recv()
            if turn >= 0:
                found[names[place]].append(answer)
    for line, process in zip(lines, processes, strict=True):
        line.send(False)
        process.join()
    seconds = {name: [row[0] for row in found[name]] for name in names}
    ratio = [kept / default for default, kept in zip(*seconds.values(), strict=True)]
    result: dict[str, object] = {"rounds": rounds}
    for name in names:
        result[f"{name}_step_seconds"] = shown(f"{name}, seconds a step", seconds[name], "s", True)
        result[f"{name}_pages"] = quartiles([row[1] for row in found[name]])[1]
        result[f"{name}_most_mb"] = round(found[name][-1][2])
    result["ratio"] = shown("kept / default", ratio, "", good := holds(ratio, 1.0))
    print(json.dumps(result | {"faster": good}))
    if not good:
        raise SystemExit("keeping memory is not faster here, or the spread is too wide to say")


if __name__ == "__main__":
    main()
