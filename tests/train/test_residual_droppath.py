"""ResidualDroppath against a training loop written by hand, and every reading of the abstract it offers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from chains import OPTIMIZERS, batches, chain, draw_dropped, moved, same, snapshot, twin
from hypothesis import given, settings
from hypothesis import strategies as st

import resect
from resect.errors import AttachError, InputError
from resect.train.draws import draw_closed
from resect.train.phases import Alternation

pytestmark = pytest.mark.core
PROBS = [0.5 * (place + 1) / 7 for place in range(7)]


def step(net, method, optimizer, batch, *, micro=1, to_none=True, clip=None):
    method.begin_step()
    for x, y in zip(batch[0].chunk(micro), batch[1].chunk(micro), strict=True):
        (F.cross_entropy(net(x), y) / micro + method.extra_loss()).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=to_none)


def by_hand(net, make, data, *, micro=1, seed=0, update_all=False):
    """The algorithm of papers 1.4, without gates or freezing: grads and buffers are put right after the fact."""
    optimizer = make(net.parameters())
    for number, batch in enumerate(data):
        dropped = draw_closed(PROBS, seed, number - number % 2)
        plain, drop = not any(dropped), number % 2 == 0
        before = copy.deepcopy(dict(net.named_buffers()))
        for x, y in zip(batch[0].chunk(micro), batch[1].chunk(micro), strict=True):
            factors = [None if gone and drop else 1.0 for gone in dropped]
            (F.cross_entropy(net.by_hand(x, factors), y) / micro).backward()
        learning = {f"layers.{place}" for place in range(7) if dropped[place] != drop}
        if not plain and not (update_all and not drop):
            for name, parameter in net.named_parameters():
                part = ".".join(name.split(".")[:2])
                if part not in learning and not (drop and not name.startswith("layers")):
                    parameter.grad = None
            for name, buffer in net.named_buffers():
                part = ".".join(name.split(".")[:2])
                if part not in learning and not drop:
                    buffer.copy_(before[name])
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("update", ["dropped", "all"])
def test_a_training_equals_the_algorithm_written_by_hand(name, micro, update):
    net, _, blocks = chain()
    other, data = twin(net), batches(12)
    optimizer = OPTIMIZERS[name](net.parameters())
    with resect.ResidualDroppath(net, blocks, update=update, optimizer=optimizer) as method:
        for batch in data:
            step(net, method, optimizer, batch, micro=micro)
        plain = method.metrics()["plain_steps"]
    reference = by_hand(other, OPTIMIZERS[name], data, micro=micro, update_all=update == "all")
    assert plain == sum(not any(draw_closed(PROBS, 0, n - n % 2)) for n in range(12))
    assert same(net, other)
    assert not moved(snapshot(net, optimizer), snapshot(other, reference))


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("given_optimizer", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_frozen_stays_bit_identical(name, given_optimizer, micro, clip, to_none):
    net, _, blocks = chain()
    optimizer = OPTIMIZERS[name](net.parameters())
    for batch in batches(2):  # momentum everywhere, or freezing would be easy
        F.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    with resect.ResidualDroppath(net, blocks, seed=1, optimizer=optimizer if given_optimizer else None) as method:
        for number, batch in enumerate(batches(8)):
            dropped = {f"layers.{i}" for i, gone in enumerate(draw_closed(PROBS, 1, number - number % 2)) if gone}
            before = snapshot(net, optimizer)
            step(net, method, optimizer, batch, micro=micro, to_none=to_none, clip=clip)
            now = moved(before, snapshot(net, optimizer))
            everything = {".".join(key.split(".")[:2]) for key in net.state_dict()}
            if not dropped:
                assert now == everything
            elif number % 2 == 0:
                assert now == everything - dropped
            else:
                assert now == dropped, "only what was dropped learns"
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_gradient_of_a_dropped_block_is_that_in_the_fully_trainable_net():
    net, _, blocks = chain()
    other = twin(net)
    data = batches(2)
    with resect.ResidualDroppath(net, blocks, drop_prob=1.0, rule=[0, 0, 1, 0, 0, 1, 0]) as method:
        method.begin_step()
        net(data[0][0])
        method.begin_step()
        F.cross_entropy(net(data[1][0]), data[1][1]).backward()
    other.by_hand(data[0][0], [1.0, 1.0, None, 1.0, 1.0, None, 1.0])
    F.cross_entropy(other(data[1][0]), data[1][1]).backward()
    learned = [name for name, parameter in net.named_parameters() if parameter.grad is not None]
    assert {name.split(".")[1] for name in learned} == {"2", "5"}
    wanted = dict(other.named_parameters())
    assert all(
        torch.equal(parameter.grad, wanted[name].grad) for name, parameter in net.named_parameters() if name in learned
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_drop_prob_zero_is_plain_training(name):
    net, _, blocks = chain()
    other, data = twin(net), batches(6)
    optimizer, reference = OPTIMIZERS[name](net.parameters()), OPTIMIZERS[name](other.parameters())
    with resect.ResidualDroppath(net, blocks, drop_prob=0.0, optimizer=optimizer) as method:
        for batch in data:
            step(net, method, optimizer, batch)
    for x, y in data:
        F.cross_entropy(other(x), y).backward()
        reference.step()
        reference.zero_grad()
    assert same(net, other)
    assert method.metrics() == {"open_blocks": 7.0, "plain_steps": 6.0}


@given(warmup=st.integers(0, 5), drop_steps=st.integers(1, 4), period=st.integers(1, 5), steps=st.integers(1, 60))
@settings(deadline=None)
def test_phases_equal_a_list_written_out(warmup, drop_steps, period, steps):
    alternation = Alternation(warmup, drop_steps, period)
    wanted, number = [("plain", step) for step in range(warmup)], warmup
    while len(wanted) < steps:
        drops = list(range(number, number + drop_steps * period))
        wanted += [("drop", step) for step in drops]
        wanted += [("dropped-only", step) for step in drops[drop_steps - 1 :: drop_steps]]
        number += (drop_steps + 1) * period
    assert [tuple(alternation.phase(step)) for step in range(steps)] == wanted[:steps]


def run(net, blocks, steps=4, data=None, **options):
    """What moved in each step, and how the net's output in train mode compares with a pass by hand."""
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    method = resect.ResidualDroppath(net, blocks, optimizer=optimizer, **options)
    seen = []
    with method:
        for batch in method.batches(data or batches(steps)):
            before = snapshot(net, optimizer)
            step(net, method, optimizer, batch)
            seen.append((method.kind, moved(before, snapshot(net, optimizer)), method.open_blocks))
    return seen, method


TWO = {"drop_prob": 1.0, "rule": [0, 0, 1, 0, 0, 1, 0]}


def test_the_dropped_run_alone():
    net, _, blocks = chain()
    seen, _ = run(net, blocks, **TWO, forward="dropped")
    assert [(kind, count) for kind, _, count in seen] == [("drop", 5), ("dropped-only", 2)] * 2
    assert seen[1][1] == {"layers.2", "layers.5"}


def test_a_fresh_mask_comes_from_the_step_itself():
    net, _, blocks = chain()
    seen, _ = run(net, blocks, steps=8, mask="fresh")
    for number, (kind, changed, _) in enumerate(seen):
        if kind == "dropped-only":
            assert changed == {f"layers.{i}" for i, gone in enumerate(draw_closed(PROBS, 0, number)) if gone}


def test_the_rest_trained_and_all_trained():
    net, _, blocks = chain()
    seen, _ = run(net, blocks, **TWO, rest="trained")
    assert seen[1][1] == {"layers.2", "layers.5", "stem.0", "stem.1", "head.weight", "head.bias"}
    seen, _ = run(net, blocks, **TWO, update="all")
    assert {f"layers.{i}" for i in range(7)} < seen[1][1]


def test_gradients_past_the_frozen_branches_alone():
    net, _, blocks = chain()
    other, (x, y) = twin(net), batches(1)[0]
    with resect.ResidualDroppath(net, blocks, **TWO, backward="shortcuts") as method:
        method.begin_step()
        method.begin_step()
        F.cross_entropy(net(x), y).backward()
    stream = other.stem(x)
    for place, layer in enumerate(other.layers):
        branch = layer.branch(stream)
        stream = stream + (branch if place in (2, 5) else branch.detach())
    F.cross_entropy(other.head(stream), y).backward()
    for place in (2, 5):
        assert torch.equal(net.layers[place].up.weight.grad, other.layers[place].up.weight.grad)


def test_norms_of_frozen_parts():
    net, _, blocks = chain()
    seen, _ = run(net, blocks, **TWO, norms="moving")
    assert seen[1][1] == {"stem.1", *(f"layers.{i}" for i in range(7))}, "a bare requires_grad=False lets them move"
    net, _, blocks = chain()
    other, (x, _) = twin(net), batches(1)[0]
    with resect.ResidualDroppath(net, blocks, **TWO, norms="eval") as method:
        method.begin_step()
        method.begin_step()
        other.eval()
        other.layers[2].train()
        other.layers[5].train()
        assert torch.equal(net(x), other(x))
        assert not net.stem[1].training
    assert all(module.training for module in net.modules())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with resect.ResidualDroppath(net, blocks, **TWO, norms="eval", optimizer=optimizer) as method:
        for _ in range(2):
            method.begin_step()
        net.train()
        net(x).sum().backward()
        with pytest.raises(AttachError, match="called after begin_step"):
            optimizer.step()


def test_the_same_batch_twice():
    net, _, blocks = chain()
    data = batches(3)
    method = resect.ResidualDroppath(net, blocks, data="same", drop_steps=2, warmup=1)
    seen = []
    with method:
        for x, _ in method.batches(data):
            method.begin_step()
            seen.append((next(i for i, (other, _) in enumerate(data) if other is x), method.kind))
        with pytest.raises(AttachError, match=r"method\.batches\(loader\)"):
            method.begin_step()
    kinds = ["drop", "drop", "dropped-only"]
    drawn = [kind for _, kind in seen[1:]]
    assert [number for number, _ in seen] == [0, 1, 1, 1, 2, 2, 2]
    assert all(kind in (wanted, "plain") for kind, wanted in zip(drawn, kinds * 2, strict=True))


def test_zeros_instead_of_none_let_momentum_and_decay_go_on():
    net, _, blocks = chain()
    seen, _ = run(net, blocks, steps=4, **TWO, stillness="zero")
    assert {f"layers.{i}" for i in range(7)} <= seen[2][1], "dropped blocks decay in the drop step too"


def test_the_learning_rate_of_dropped_only_steps():
    net, _, blocks = chain()
    other, data = twin(net), batches(2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with resect.ResidualDroppath(net, blocks, **TWO, lr_scale=0.25, optimizer=optimizer) as method:
        for batch in data:
            step(net, method, optimizer, batch)
            assert optimizer.param_groups[0]["lr"] == 0.1
    reference = torch.optim.SGD(other.parameters(), lr=0.1)
    with resect.ResidualDroppath(other, resect.find_blocks(other, data[0][0]), **TWO, optimizer=reference) as method:
        step(other, method, reference, data[0])
        reference.param_groups[0]["lr"] = 0.025
        step(other, method, reference, data[1])
    assert same(net, other)


def test_the_consistency_term():
    net, _, blocks = chain()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = resect.ResidualDroppath(net, blocks, **TWO, data="same", consistency=2.0, optimizer=optimizer)
    outputs, terms = [], []
    with method:
        for x, y in method.batches(batches(2)):
            method.begin_step()
            outputs.append(net(x))
            terms.append(method.extra_loss())
            (F.cross_entropy(outputs[-1], y) + terms[-1]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert terms[0] == terms[2] == 0
    teacher, student = outputs[2].softmax(1), outputs[3].softmax(1)
    assert torch.allclose(terms[3], 2 * (teacher * (teacher / student).log()).sum(1).mean(), atol=1e-6)


def test_per_sample_gradients_come_from_the_samples_that_dropped_the_block():
    net, _, blocks = chain()
    # Without batch norm samples do not meet, so the rule can be checked sample by sample.
    for layer in net.layers:
        layer.norm = torch.nn.Identity()
    net.stem[1] = torch.nn.Identity()
    (x, y), other = batches(1)[0], twin(net)
    blocks = resect.find_blocks(net, x)
    with resect.ResidualDroppath(net, blocks, per="sample", rule="uniform") as method:
        method.begin_step()
        method.begin_step()
        output = net(x)
        F.cross_entropy(output, y, reduction="sum").backward()
    assert torch.equal(output, other(x))
    dropped = draw_dropped([0.5] * 7, 16, 0, 0)
    for place in range(7):
        other.zero_grad()
        mine = dropped[place]
        F.cross_entropy(other(x[mine]), y[mine], reduction="sum").backward()
        wanted = other.layers[place].up.weight.grad
        assert torch.allclose(net.layers[place].up.weight.grad, wanted, atol=1e-5)
    assert net.head.weight.grad is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_per_sample_a_block_that_no_sample_dropped_stands_still(name):
    net, _, blocks = chain()
    optimizer = OPTIMIZERS[name](net.parameters())
    for x, y in batches(2, 2):
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with resect.ResidualDroppath(net, blocks, per="sample", drop_prob=0.5, optimizer=optimizer) as method:
        seen = set()
        for number, batch in enumerate(batches(10, 2)):
            before = snapshot(net, optimizer)
            step(net, method, optimizer, batch)
            masks = draw_dropped(PROBS, 2, 0, number - number % 2)
            some = {f"layers.{i}" for i in range(7) if masks[i].any()}
            every = {f"layers.{i}" for i in range(7) if masks[i].all()}
            after = snapshot(net, optimizer)
            if number % 2:
                assert moved(before, after) == some
            else:
                weights = {key: value for key, value in after.items() if "running" not in key and "num_" not in key}
                still = {f"layers.{i}" for i in range(7)} - {
                    m for m in moved(before, weights) if m.startswith("layers")
                }
                assert still == every
                seen |= every
        assert seen


def test_a_parameter_frozen_by_the_user_stays_so():
    net, _, blocks = chain()
    net.layers[2].up.weight.requires_grad_(False)
    run(net, blocks, **TWO)
    assert not net.layers[2].up.weight.requires_grad
    assert net.layers[3].up.weight.requires_grad


def fail_in_a_dropped_only_step(net, blocks):
    with resect.ResidualDroppath(net, blocks, **TWO) as method:
        method.begin_step()
        method.begin_step()
        net(batches(1)[0][0])
        raise ZeroDivisionError


def test_an_exception_in_the_middle_of_a_step_leaves_nothing_frozen():
    net, _, blocks = chain()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    before = snapshot(net, optimizer)
    with pytest.raises(ZeroDivisionError):
        fail_in_a_dropped_only_step(net, blocks)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert moved(before, snapshot(net, optimizer)) == {"layers.2", "layers.5"}, "frozen statistics are put back"


def test_replaced_parameters_are_noticed():
    net, _, blocks = chain()
    with resect.ResidualDroppath(net, blocks) as method:
        method.begin_step()
        net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
        with pytest.raises(AttachError, match="parameters were replaced"):
            method.begin_step()


def test_every_wrong_option_at_once():
    net, _, blocks = chain()
    wrong = {
        "forward": "ful",
        "mask": "x",
        "data": "same",
        "period": 2,
        "warmup": -1,
        "lr_scale": -0.1,
        "norms": "evil",
    }
    with pytest.raises(InputError) as caught:
        resect.ResidualDroppath(net, blocks, drop_prob=2, consistency=1.0, per="sample", **wrong)
    for part in (
        "drop_prob",
        "Did you mean 'full'",
        "mask",
        "period must be 1",
        "warmup",
        "lr_scale",
        "'eval'",
        "consistency",
    ):
        assert part in str(caught.value), part


@pytest.mark.parametrize("keep", [0, 3, 7])
def test_the_control_with_a_random_subset_updated(keep):
    from resect.train.draws import draw_subset

    net, _, blocks = chain()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    with resect.RandomSubset(net, blocks, keep=keep, optimizer=optimizer) as method:
        for number, batch in enumerate(batches(4)):
            before, plain = snapshot(net, optimizer), twin(net)
            method.begin_step()
            assert torch.equal(net(batch[0]), plain(batch[0])), "the whole net runs"
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            learning = {f"layers.{i}" for i, stays in enumerate(draw_subset(keep, 7, 0, number)) if stays}
            rest = {"stem.0", "stem.1", "head.weight", "head.bias"}
            assert moved(before, snapshot(net, optimizer)) == learning | rest


def test_per_sample_blocks_that_cannot_drop_learn_in_drop_steps():
    net, _, blocks = chain()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rule = [1.0, 0, 0, 0, 0, 0, 0]
    with resect.ResidualDroppath(net, blocks, drop_prob=1.0, rule=rule, per="sample", optimizer=optimizer) as method:
        before = twin(net)
        step(net, method, optimizer, batches(1)[0])
    still = [torch.equal(a.up.weight, b.up.weight) for a, b in zip(net.layers, before.layers, strict=True)]
    assert still == [True, *[False] * 6]


def test_per_sample_a_block_in_eval_mode_is_left_whole():
    net, _, blocks = chain()
    net.train()
    net.layers[3].eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with resect.ResidualDroppath(
        net, blocks, drop_prob=0.9, rule="uniform", per="sample", optimizer=optimizer
    ) as method:
        for batch in batches(6, 2):
            before = net.layers[3].up.weight.detach().clone()
            step(net, method, optimizer, batch)
            assert not torch.equal(net.layers[3].up.weight, before)


def test_closed_blocks_of_a_dropped_run_stand_still_without_gradients_of_none_too():
    net, _, blocks = chain()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with resect.ResidualDroppath(net, blocks, **TWO, forward="dropped", update="all", optimizer=optimizer) as method:
        for number, batch in enumerate(batches(4)):
            before = snapshot(net, optimizer)
            step(net, method, optimizer, batch, to_none=False)
            changed = {name for name in moved(before, snapshot(net, optimizer)) if name.startswith("layers")}
            if number % 2:
                assert changed == {"layers.2", "layers.5"}


def test_a_loop_left_in_the_warmup_leaves_nothing_out():
    net, _, blocks = chain()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with resect.ResidualDroppath(net, blocks, data="same", warmup=8, optimizer=optimizer) as method:
        for _ in range(8):
            for batch in method.batches(batches(2)):
                step(net, method, optimizer, batch)
                break
        assert method.steps == 8


def test_a_loop_left_in_the_middle_of_a_batch_is_known_to_a_resume():
    def kinds(method, net, optimizer):
        for batch in method.batches(batches(2)):
            step(net, method, optimizer, batch)
            yield method.kind
            if len(seen) == 3:
                break

    options = {**TWO, "data": "same"}
    net, _, blocks = chain()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with resect.ResidualDroppath(net, blocks, **options, optimizer=optimizer) as method:
        seen = []
        for kind in kinds(method, net, optimizer):
            seen.append(kind)
        assert seen == ["drop", "dropped-only", "drop"]
        state = method.state_dict()
    with resect.ResidualDroppath(net, blocks, **options, optimizer=optimizer) as method:
        method.load_state_dict(copy.deepcopy(state))
        seen = []
        for kind in kinds(method, net, optimizer):
            seen.append(kind)
        assert seen == ["drop", "dropped-only", "drop"]


def test_micro_batches_of_another_size_are_told():
    net, _, blocks = chain()
    method = resect.ResidualDroppath(net, blocks, **TWO, data="same", consistency=1.0)
    with method:
        for number, (x, _) in enumerate(method.batches(batches(1))):
            method.begin_step()
            net(x[: 8 + 8 * number])
            if number:
                with pytest.raises(InputError, match=r"gives logits \(16, 3\), its drop step \(8, 3\)"):
                    method.extra_loss()
