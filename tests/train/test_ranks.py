"""Two processes that see different data agree on what is closed, on the learning rate and on the side head."""

from __future__ import annotations

import json

import pytest
import torch
from chains import batches, chain
from torch import nn

import resect

pytestmark = pytest.mark.core


def train(rank, folder):
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net, _, blocks = chain()
    method = resect.EpsilonGate(
        net, blocks, epsilon=resect.schedules.StartAt(1.05, 3), side=0.1, skip_muted_after=2, recheck_every=4,
        muted_at_start="allow",
    )  # fmt: skip
    optimizer = torch.optim.SGD([*net.parameters(), *method.parameters()], lr=0.02)
    scheduler = resect.AdaptiveLR(optimizer, method, schedule={0: 1.0, 4: 0.1}, restart={0: 1.0, 2: 0.1}, growth=0.3)
    parallel = DistributedDataParallel(net, find_unused_parameters=True)
    closed, rates = [], []
    with method:
        for x, y in batches(24)[rank::2]:
            method.begin_step()
            closed.append([gate.is_closed for gate in method._gates])
            loss = F.cross_entropy(parallel((1 + rank) * x), y) + method.extra_loss(y)
            loss.backward()
            nn.utils.clip_grad_norm_([*net.parameters(), *method.parameters()], 0.3)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
    weights = [float(p.detach().double().sum()) for p in (*net.parameters(), *method.parameters())]
    found = {"closed": closed, "rates": rates, "weights": weights, "own": method.count.run.tolist()}
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_processes_agree(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=train, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one["closed"] == other["closed"]
    assert any(any(step) for step in one["closed"]), "some blocks are closed, or nothing is shown"
    assert one["rates"] == other["rates"]
    assert len(set(one["rates"])) > 1
    assert one["weights"] == other["weights"]
