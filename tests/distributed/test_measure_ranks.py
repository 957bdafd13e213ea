"""Measuring altered networks on several processes: each takes its share, all get everything, as one process would."""

from __future__ import annotations

import itertools

import small
import torch
import torch.distributed as dist

from resect.blocks import measure
from resect.blocks.measure import measured
from resect.errors import InputError


def study(store=None):
    net, blocks = small.chain(4)
    runs = []

    def counting(model, batch):
        runs.extend([1] * (len(batch[0]) > 2))  # two samples: a trial
        return model(batch[0])

    subsets = [s for k in range(5) for s in itertools.combinations(blocks.names, k)]
    data = [small.batch(0), small.batch(1, 5)]
    size, measure.CHUNK = measure.CHUNK, 3
    try:
        return list(measured(net, blocks, data, iter(subsets), "cross_entropy", counting, store=store)), len(runs)
    finally:
        measure.CHUNK = size


def test_the_subsets_are_shared_out_and_the_values_are_those_of_one_process(several, tmp_path):
    alone, runs = study()
    everyones = several(study, tmp_path / "study.jsonl")
    assert all(found == alone for found, _ in everyones)
    assert all(count < 0.7 * runs for _, count in everyones)
    assert study(tmp_path / "study.jsonl") == (alone, 2)  # a store of several processes serves one


def differing(kind):
    net, blocks = small.chain(3)
    rank = dist.get_rank()
    data, subsets = [small.batch(0)], [blocks.names[:1], blocks.names[1:]]
    if kind == "data":
        data = [small.mine(small.batch(0))]
    if kind == "subsets" and rank:
        subsets *= 200
    if kind == "blocks" and rank:
        blocks = blocks[:2]
        subsets = [blocks.names[:1]]
    metric = "top1" if kind == "metric" and rank else "cross_entropy"

    def evaluate(model, batch):
        raise RuntimeError("mine")

    try:
        list(measured(net, blocks, data, subsets, metric, evaluate=evaluate if kind == "error" and rank else None))
    except (InputError, RuntimeError) as error:
        return str(error)


def test_processes_that_differ_raise_everywhere_and_say_what(two):
    for kind, expected in {
        "data": "do not measure the same: baseline ",
        "subsets": "do not measure the same: subsets ",
        "blocks": "do not measure the same: blocks ['layers.0/up', 'layers.1/up', 'layers.2/up']",
        "metric": "do not measure the same: metric cross_entropy, baseline",
    }.items():
        own, other = two(differing, kind)
        assert expected in str(own), kind
        assert own == other
    assert two(differing, "error") == ["Another process could not go on. process 1: RuntimeError: mine", "mine"]


def sharded():
    from resect import fully_shard

    net, blocks = small.chain(3)
    fully_shard(net, blocks)
    data = [small.batch(0)]
    return list(measured(net, blocks, data, [(name,) for name in blocks.names], "cross_entropy"))


def test_a_sharded_model_is_measured_by_all_in_step(two):
    net, blocks = small.chain(3)
    alone = list(measured(net, blocks, [small.batch(0)], [(name,) for name in blocks.names], "cross_entropy"))
    one, other = two(sharded)
    assert one == other
    torch.testing.assert_close([value for _, value in one], [value for _, value in alone])
