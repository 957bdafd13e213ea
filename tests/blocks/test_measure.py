"""Measuring altered networks: the mean of a metric, in chunks, by the user's own function, stopped and resumed."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from nets import Net
from torch import nn

import resect
from resect.blocks import measure
from resect.blocks.measure import measure_closed, measured
from resect.errors import FileError, InputError

pytestmark = pytest.mark.core


@pytest.fixture
def setup():
    torch.manual_seed(0)
    net, x, y = Net((False, True, False)), torch.randn(20, 5), torch.randint(0, 4, (20,))
    blocks = resect.find_blocks(net, x)
    subsets = [s for k in range(5) for s in itertools.combinations(blocks.names, k)]
    return net, blocks, [(x[:12], y[:12]), (x[12:], y[12:])], subsets


def by_hand(net, subset, data):
    """The mean cross-entropy, one subset at a time."""
    losses = []
    with torch.no_grad(), resect.closed(net, subset):
        for x, y in data:
            losses.append(nn.functional.cross_entropy(net.eval()(x), y, reduction="none").double())
    return torch.cat(losses).mean().item()


def test_every_subset_has_its_own_value_whatever_the_chunks(setup, monkeypatch):
    net, blocks, data, subsets = setup
    whole, values = measure_closed(net, blocks, data, subsets, "cross_entropy")
    assert whole == values[0] == pytest.approx(by_hand(net, [], data), rel=1e-6)
    for subset, value in zip(subsets, values, strict=True):
        assert value == pytest.approx(by_hand(net, subset, data), rel=1e-6)
    monkeypatch.setattr(measure, "CHUNK", 3)
    streamed = list(measured(net, blocks, data, iter(subsets), "cross_entropy"))
    assert streamed == [((), whole), *zip(subsets, values, strict=True)]


def test_subsets_are_drawn_as_they_are_needed_and_the_model_is_whole_in_between(setup, monkeypatch):
    net, blocks, data, subsets = setup
    monkeypatch.setattr(measure, "CHUNK", 2)
    net.train()
    drawn, told = [], []
    results = measured(net, blocks, data, (drawn.append(s) or s for s in subsets), progress=lambda *a: told.append(a))
    next(results)
    assert len(drawn) == 4  # its own chunk, and the next, to know whether the data is needed again
    assert net.training
    assert torch.is_grad_enabled()
    assert type(net.layers[0].a).__name__ == type(Net().layers[0].a).__name__
    assert not any("_resect_port" in module.__dict__ for module in net.modules())
    list(results)
    assert told[0] == (1, 0)
    assert told[-1] == (16, 0)
    assert told == sorted(told)


def test_one_chunk_needs_one_pass(setup, monkeypatch):
    net, blocks, data, subsets = setup
    assert measure_closed(net, blocks, iter(data), subsets) == measure_closed(net, blocks, data, subsets)
    monkeypatch.setattr(measure, "CHUNK", 3)
    with pytest.raises(InputError, match="runs dry after one pass, and more than 3 subsets"):
        measure_closed(net, blocks, iter(data), subsets)


def test_evaluate_runs_the_model_itself(setup):
    net, blocks, data, subsets = setup

    def doubled(model, batch):
        return 2 * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    whole, values = measure_closed(net, blocks, data, subsets, evaluate=doubled)
    plain, singly = measure_closed(net, blocks, data, subsets, "cross_entropy")
    assert [whole, *values] == pytest.approx([2 * plain, *(2 * value for value in singly)])


def test_a_metric_that_is_no_number_per_sample_is_refused(setup):
    net, blocks, data, subsets = setup
    with pytest.raises(InputError, match=r"returned a tensor of shape \(\).*one number per sample"):
        measure_closed(net, blocks, data, subsets, lambda output, batch: output.mean())
    with pytest.raises(InputError, match="gave float"):
        measure_closed(net, blocks, data, subsets, evaluate=lambda model, batch: 1.0)

    with torch.no_grad():
        whole = net(data[0][0])

    def spoilt(model, batch):  # a number with the whole model alone
        same = (model(batch[0]) - whole[: len(batch[0])]).abs().amax(1) < 1e-5
        return torch.where(same, 0.0, float("nan"))

    with pytest.raises(InputError, match=r"NaN or infinite with 'layers.2/a' closed"):
        measure_closed(net, blocks, data[:1], [blocks.names[:1], blocks.names[3:]], evaluate=spoilt)


def test_a_study_that_was_stopped_goes_on_where_it_was(setup, monkeypatch, tmp_path):
    net, blocks, data, subsets = setup
    monkeypatch.setattr(measure, "KEPT", 3)
    expected = list(measured(net, blocks, data, subsets, "cross_entropy"))
    file, runs = tmp_path / "study.jsonl", []

    def counting(model, batch):
        runs.extend([1] * (len(batch[0]) > 2))  # two samples: a trial
        if len(runs) == 20:
            raise KeyboardInterrupt
        return model(batch[0])

    with pytest.raises(KeyboardInterrupt):
        list(measured(net, blocks, data, subsets, "cross_entropy", counting, store=file))
    assert len(file.read_text().splitlines()) == 1 + 8  # three chunks were finished, one with the whole model
    with file.open("a") as torn:
        torn.write('{"closed": ["layers.0/a"')
    runs[:] = [0] * 20
    assert list(measured(net, blocks, data, subsets, "cross_entropy", counting, store=file)) == expected
    assert len(runs) - 20 == 2 * (len(subsets) - 8)
    runs[:] = [0] * 20
    assert list(measured(net, blocks, data, subsets, "cross_entropy", counting, store=file)) == expected
    assert len(runs) - 20 == 2  # the baseline, for the comparison
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_a_store_of_another_study_is_refused_and_left_alone(setup, tmp_path):
    net, blocks, data, subsets = setup
    file = tmp_path / "study.jsonl"
    list(measured(net, blocks, data, subsets, "cross_entropy", store=file))
    content = file.read_text()
    with pytest.raises(InputError, match='metric was "cross_entropy", and is "top1"'):
        list(measured(net, blocks, data, subsets, store=file))
    with pytest.raises(InputError, match="blocks was"):
        list(measured(net, blocks[1:], data, [], "cross_entropy", store=file))
    with pytest.raises(InputError, match="samples was 20, and is 12; baseline was"):
        list(measured(net, blocks, data[:1], subsets, "cross_entropy", store=file))
    assert file.read_text() == content
    other = tmp_path / "other.jsonl"
    for text in ('{"a": 1}\n', "hello\n", "[]\n", ""):
        other.write_text(text)
        with pytest.raises(FileError, match="holds no measurements of a study"):
            list(measured(net, blocks, data, subsets, store=other))
        assert other.read_text() == text


@pytest.mark.parametrize("metric", ["top1", "perplexity"])
def test_scores_that_are_no_numbers_are_refused_whatever_the_metric(setup, metric):
    net, blocks, data, subsets = setup
    with torch.no_grad():
        net.head.weight[1, 2] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite on this data"):
        list(measured(net, blocks, data, subsets, metric))
    with torch.no_grad():
        net.head.weight[1, 2] = 0.0
    infinite = lambda output, batch: torch.full((len(output),), torch.inf)  # noqa: E731
    with pytest.raises(InputError, match="NaN or infinite on this data"):
        list(measured(net, blocks, data, subsets, infinite))


def test_a_store_of_other_weights_is_refused_though_they_score_alike(setup, tmp_path):
    net, blocks, data, subsets = setup
    file = tmp_path / "store.jsonl"
    same = lambda output, batch: torch.ones(len(output))  # noqa: E731  # whatever the weights
    list(measured(net, blocks, data, subsets, same, store=file))
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] += 1
    with pytest.raises(InputError, match="weights was"):
        list(measured(net, blocks, data, subsets, same, store=file))


def test_a_store_of_other_data_is_refused_though_the_model_scores_alike(setup, tmp_path):
    net, blocks, data, subsets = setup
    file = tmp_path / "store.jsonl"
    same = lambda output, batch: torch.ones(len(output))  # noqa: E731  # whatever the data
    list(measured(net, blocks, data, subsets, same, store=file))
    content = file.read_text()
    for other in ([(x + 1, y) for x, y in data], [(x, y.flip(0)) for x, y in data], data[::-1]):
        with pytest.raises(InputError, match="data was"):
            list(measured(net, blocks, other, subsets, same, store=file))
    assert file.read_text() == content
    file.write_text(content.replace("measurements-2", "measurements-1"))
    with pytest.raises(FileError, match="written by an earlier version of Resect and does not say what data"):
        list(measured(net, blocks, data, subsets, same, store=file))


def test_perplexity_is_the_exponential_of_the_mean_however_it_is_asked_for(setup):
    net, blocks, data, subsets = setup
    whole, values = measure_closed(net, blocks, data, subsets, "perplexity")
    expected, logs = measure_closed(net, blocks, data, subsets, "cross_entropy")
    assert whole == pytest.approx(math.exp(expected))
    assert values == pytest.approx([math.exp(value) for value in logs])


def test_data_of_another_pass_that_gives_nothing_is_noticed(setup, monkeypatch):
    net, blocks, data, subsets = setup
    monkeypatch.setattr(measure, "CHUNK", 3)

    class Once:
        def __init__(self):
            self.left = iter(data)

        def __iter__(self):
            yield from self.left

    with pytest.raises(InputError, match="no samples"):
        measure_closed(net, blocks, Once(), subsets)
