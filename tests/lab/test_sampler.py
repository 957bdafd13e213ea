import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resect.errors import InputError
from resect.lab.sampler import Sampler, permutation


@settings(max_examples=60, deadline=None)
@given(size=st.integers(8, 60), per_rank=st.integers(1, 4), ranks=st.integers(1, 2), drop_last=st.booleans())
@example(size=9, per_rank=2, ranks=2, drop_last=False)  # one image left for two ranks
def test_ranks_share_an_epoch_without_overlap(size, per_rank, ranks, drop_last):
    batch = per_rank * ranks
    samplers = [Sampler(size, batch, drop_last=drop_last, rank=rank, ranks=ranks) for rank in range(ranks)]
    epochs = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in epochs} == {len(samplers[0])}  # no rank waits for another
    seen = torch.cat([indices for batches in epochs for indices in batches]).tolist()
    assert len(set(seen)) == len(seen)
    missing = size % batch if drop_last or size % batch < ranks else 0
    assert len(seen) == size - missing
    if drop_last:
        assert {len(indices) for batches in epochs for indices in batches} == {per_rank}


def test_order_depends_on_seed_and_epoch_alone():
    assert torch.equal(permutation(100, 3, 7), permutation(100, 3, 7))
    orders = [tuple(permutation(100, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert sorted(orders[0]) == list(range(100))


def test_a_restored_sampler_continues_exactly():
    whole = Sampler(20, 3, seed=5)
    expected = [batch.tolist() for _ in range(3) for batch in whole]
    first, seen = Sampler(20, 3, seed=5), []
    for _ in range(2):  # one epoch and a part of the next
        for batch in first:
            seen.append(batch.tolist())
            if len(seen) == 9:
                break
    second = Sampler(20, 3, seed=5)
    second.load_state_dict(first.state_dict())
    seen += [batch.tolist() for _ in range(2) for batch in second]
    assert seen == expected
    with pytest.raises(InputError, match="seed was 5, is 6"):
        Sampler(20, 3, seed=6).load_state_dict(first.state_dict())


def test_impossible_sizes_are_refused():
    with pytest.raises(InputError, match="2 problems"):
        Sampler(3, 5, ranks=2)
