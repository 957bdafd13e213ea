import pytest
import torch

from resect.errors import InputError
from resect.lab.augment import augment
from resect.lab.config.train import TrainConfig
from resect.lab.data import load, mean_std, normalize, open_source
from resect.lab.sampler import permutation
from resect.train import draws

CPU = torch.device("cpu")
CONFIG = TrainConfig(batch_size=300, seed=3, shift=1, flip=True)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(one, other, strict=True)
    )


def test_a_batch_is_indexed_augmented_and_normalised(digits):
    source = open_source(digits, CONFIG, CPU)
    assert len(source) == 4
    next(batches := iter(source))
    images, labels = next(batches)
    assert (source.epoch, source.position) == (0, 2)
    indices = permutation(len(digits.train), 3, 0)[300:600]
    moved = augment(digits.train.images[indices], shift=1, flip=True, generator=draws.generator("augment-0", 3, 1))
    assert torch.equal(images, normalize(moved, *mean_std(digits.train)))
    assert torch.equal(labels, digits.train.labels[indices])


def test_a_restored_source_continues_to_the_bit(digits):
    whole = open_source(digits, CONFIG, CPU)
    expected = [batch for _ in range(2) for batch in whole]
    first = open_source(digits, CONFIG, CPU)
    for batch, _ in zip(first, range(3), strict=False):
        seen = batch
    assert same([seen], expected[2:3])
    second = open_source(digits, CONFIG, CPU)
    second.load_state_dict({**first.state_dict(), "position": 3})
    assert same([batch for _ in range(2) for batch in second], expected[3:])
    assert not same(expected[:1], expected[4:5])


def test_ranks_share_the_training_split_and_each_sees_the_whole_test_split(digits):
    sources = [open_source(digits, CONFIG, CPU, rank, 2) for rank in range(2)]
    labels = [torch.cat([y for _, y in source]) for source in sources]
    assert [len(part) for part in labels] == [600, 600]
    indices = permutation(len(digits.train), 3, 0)[:1200]
    assert torch.equal(labels[1], digits.train.labels[indices[1::2]])
    images, tests = zip(*sources[1].test(100), strict=True)
    assert [len(y) for y in tests] == [100, 100, 100, 60]
    torch.testing.assert_close(torch.cat(images), digits.sample("test")[0])
    example, answers = sources[1].example(7)
    torch.testing.assert_close(example, digits.sample("train", 7)[0])
    assert torch.equal(answers, digits.train.labels[:7])


def test_a_state_of_another_run_is_refused(digits):
    state = open_source(digits, CONFIG, CPU).state_dict()
    with pytest.raises(InputError, match="seed was 3, is 4"):
        open_source(digits, TrainConfig(batch_size=300, seed=4), CPU).load_state_dict(state)
