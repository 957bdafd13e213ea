import os
import random
import signal
from pathlib import Path

import datasets
import numpy
import pyarrow
import pytest
import torch
from pictures import cell, folder_of, picture, write
from tiny_runs import tiny
from torch import nn

from resect.errors import FileError, InputError
from resect.lab.config.train import TrainConfig
from resect.lab.data import decode, load, open_data, open_source
from resect.lab.data.streamed import seeded
from resect.lab.evaluate import evaluate
from resect.lab.interrupt import Interrupted
from resect.lab.open import open_model
from resect.lab.recipe import parse
from resect.lab.trainer import train

pytestmark = pytest.mark.usefixtures("own_cache")

CPU = torch.device("cpu")
CONFIG = TrainConfig(batch_size=6, seed=1)


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    """`datasets` sleeps 5 seconds wherever it stops reading several parts at once (apache/arrow#45214)."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def shards(tmp_path):
    """43 training images in row groups of 7, 9 test images; the label is the image's number."""
    write(tmp_path, "train", [cell(picture(n, (12, 10))) for n in range(43)], list(range(43)), row_group_size=7)
    write(tmp_path, "test", [cell(picture(n, (12, 10))) for n in range(9)], list(range(9)), row_group_size=4)
    return str(tmp_path)


def stream(path, **options):
    return open_data("stream", path=path, **({"size": 8, "workers": 0, "buffer": 5, "classes": 50} | options))


def labels_of(source):
    return [y.tolist() for _, y in source]


def test_an_epoch_has_every_image_once_in_an_order_of_its_own(shards):
    source = open_source(stream(shards), CONFIG, CPU)
    assert len(source) == 7
    first, second = ([n for batch in labels_of(source) for n in batch] for _ in range(2))
    assert (source.epoch, source.position) == (2, 0)
    assert len(set(first)) == len(set(second)) == 42
    assert first != second
    assert first != sorted(first)
    again = open_source(stream(shards), CONFIG, CPU)
    assert [n for batch in labels_of(again) for n in batch] == first
    other = open_source(stream(shards), TrainConfig(batch_size=6, seed=2), CPU)
    assert [n for batch in labels_of(other) for n in batch] != first


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_a_resume_continues_to_the_bit(tmp_path, shards, kind, workers):
    path = shards if kind == "parquet" else folder_of(tmp_path / "images", {"train/a": 22, "train/b": 21, "val/a": 3})
    options = {"workers": workers, "auto_augment": "rand-m9-mstd0.5", "erase": 0.5}
    whole = open_source(stream(path, **options), CONFIG, CPU)
    expected = [batch for _ in range(2) for batch in whole]
    assert len(expected) == 14
    first = open_source(stream(path, **options), CONFIG, CPU)
    batches = iter(first)
    seen = [next(batches) for _ in range(3)]
    second = open_source(stream(path, **options), CONFIG, CPU)
    random.random(), torch.rand(1), numpy.random.rand()  # other random numbers than the first time
    second.load_state_dict(first.state_dict())
    seen += [batch for _ in range(2) for batch in second]
    for (x, y), (u, v) in zip(seen, expected, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    assert not torch.equal(expected[0][0], expected[7][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_the_images(shards, workers):
    sources = [open_source(stream(shards, workers=workers), CONFIG, CPU, rank, 2) for rank in range(2)]
    numbers = [[n for batch in labels_of(source) for n in batch] for source in sources]
    assert [len(part) for part in numbers] == [21, 21]
    assert not set(numbers[0]) & set(numbers[1])


def test_the_test_split_comes_whole_and_unshuffled(shards):
    source = open_source(stream(shards), CONFIG, CPU)
    images, labels = zip(*source.test(4), strict=True)
    assert [y.tolist() for y in labels] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert images[0].shape == (4, 3, 8, 8)
    expected = torch.tensor([[2, 15, 28]]) / 255 - torch.tensor([[0.485, 0.456, 0.406]])
    torch.testing.assert_close(images[0][2, :, 0, 0], (expected / torch.tensor([[0.229, 0.224, 0.225]]))[0])
    two = open_source(stream(shards, workers=2), CONFIG, CPU)
    assert sorted(n for _, y in two.test(4) for n in y.tolist()) == list(range(9))
    example, answers = source.example(3)
    assert answers.tolist() == [0, 1, 2]
    torch.testing.assert_close(example, stream(shards).sample("train", 3)[0])


def test_a_folder_is_shuffled_as_a_whole(tmp_path):
    path = folder_of(tmp_path, {"train/a": 30, "train/b": 30, "val/a": 1, "val/b": 1})
    data = open_data("imagenet", path=path, size=8, workers=0)
    assert (data.images, data.classes, data.shape) == (60, ("a", "b"), (3, 8, 8))
    batches = [sum(y) for y in labels_of(open_source(data, TrainConfig(batch_size=20), CPU))]
    assert sum(batches) == 30
    assert all(3 < count < 17 for count in batches)  # a sorted order has batches of one class


def test_a_net_trains_on_a_stream_goes_on_to_the_bit_and_opens_again(tmp_path):
    path = folder_of(tmp_path / "images", {"train/a": 20, "train/b": 20, "val/a": 3, "val/b": 4})
    options = {"path": path, "size": 8, "workers": 2}
    tables = {
        "model": {"name": "cifar-preresnet-8", "options": {"widths": [4, 4, 8]}},
        "data": {"name": "imagenet", "options": options},
        "train": {"epochs": 2, "batch_size": 10, "tensorboard": False},
    }
    whole = train(parse(tables), tmp_path / "whole")

    def stop(now):
        if now.step == 6 and not now.row:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(parse(tables), tmp_path / "parts", interruptible=True, progress=stop)
    parts = train(parse(tables), tmp_path / "parts", resume=True)
    for one, other in zip(whole.model.state_dict().values(), parts.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert [row["test_error"] for row in whole.history] == [row["test_error"] for row in parts.history]
    opened = open_model(str(tmp_path / "whole"))
    images, labels = opened.images()
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert evaluate(opened.model, images, labels) == whole.history[-1]["test_error"]
    assert opened.example().shape == (40, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_takes_no_random_number_of_the_training(shards, workers):
    source = open_source(stream(shards, workers=workers), CONFIG, CPU)
    before = torch.get_rng_state()
    assert len(list(source)) == 7
    assert len(list(source.test(4))) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_a_net_with_dropout_goes_on_within_an_epoch_to_the_bit(tmp_path):
    path = folder_of(tmp_path / "images", {"train/a": 12, "train/b": 12, "val/a": 1, "val/b": 1})
    data = stream(path, classes=None)
    recipe = tiny(epochs=2, batch_size=8, shift=0)

    def net():
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Dropout(0.5), nn.Linear(16, 2))

    def stop(now):
        if now.step == 1 and not now.row:
            signal.raise_signal(signal.SIGTERM)

    whole = train(recipe, tmp_path / "whole", model=net(), data=data)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "parts", model=net(), data=data, interruptible=True, progress=stop)
    parts = train(recipe, tmp_path / "parts", model=net(), data=data, resume=True)
    assert torch.equal(whole.model[1].weight, parts.model[1].weight)


def test_transforms_are_those_of_timm(shards):
    transforms = str(stream(shards, auto_augment="rand-m9", flip=0.25, crop=0.5).transform(True))
    assert all(name in transforms for name in ("RandomResizedCrop", "RandAugment", "Flip(p=0.25)"))
    assert "ColorJitter" in str(stream(shards).transform(True))
    assert "ColorJitter" not in str(stream(shards, color_jitter=0.0).transform(True))
    assert "Resize(size=16" in str(stream(shards, crop=0.5).transform(False))
    plain, erased = (next(iter(open_source(stream(shards, erase=p), CONFIG, CPU)))[0] for p in (0.0, 1.0))
    changed = (plain != erased).any(1)
    assert changed.flatten(1).any(1).all()
    assert not erased.permute(0, 2, 3, 1)[changed].any()  # the mean colour


def test_random_numbers_of_the_training_stay_as_they_were(shards):
    def draws():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    expected = draws()
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    with seeded("x", 0, 0):
        inside = draws()
    assert draws() == expected
    with seeded("x", 0, 0):
        assert draws() == inside


def test_the_hub_is_read_as_a_stream(monkeypatch):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": [cell()] * 12, "label": [0, 1] * 6}, features)
    asked = []

    def load_dataset(name, config=None, *, streaming=False):
        asked.append((name, config, streaming))
        streams = {
            "train": rows.to_iterable_dataset(num_shards=3),
            "test": None,
            "validation": rows.to_iterable_dataset(),
        }
        streams["train"].info.splits = known
        return streams

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    known = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=12)})
    data = open_data("imagenet", size=8, workers=0)
    assert asked == [("ILSVRC/imagenet-1k", None, True)]
    assert data.images == 12
    source = open_source(data, CONFIG, CPU)
    assert sorted(n for batch in labels_of(source) for n in batch) == [0] * 6 + [1] * 6
    known = None
    with pytest.raises(InputError, match=r"does not say how many images .* data.options.images"):
        open_data("stream", dataset="a/b", test="validation")
    assert open_data("stream", dataset="a/b", test="validation", images=7).images == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_decoded_is_one_sentence(tmp_path, workers):
    bad = [cell() for _ in range(11)] + [{"bytes": b"no image", "path": "n0/3.png"}]
    write(tmp_path, "train", bad, [0] * 12, row_group_size=6)
    write(tmp_path, "test", [cell()], [0])
    with pytest.raises(FileError, match=r"image n0/3.png cannot be decoded") as caught:
        list(open_source(stream(str(tmp_path), workers=workers), CONFIG, CPU))
    assert "\n" not in str(caught.value)
    write(tmp_path, "train", [cell()] * 6, pyarrow.array([0] * 5 + [50]))
    with pytest.raises(FileError, match=r"labels must be 0 … 49; found \[50\]"):
        list(open_source(stream(str(tmp_path), workers=workers), CONFIG, CPU))


def test_a_stream_that_breaks_off_is_one_sentence(shards):
    data, file = stream(shards), Path(shards) / "train.parquet"
    whole = bytearray(file.read_bytes())
    whole[100 : len(whole) // 2] = bytes(len(whole) // 2 - 100)  # the footer stays whole
    file.write_bytes(whole)
    with pytest.raises(FileError, match="cannot be read any further") as caught:
        list(open_source(data, CONFIG, CPU))
    assert "\n" not in str(caught.value)


def test_a_sample_that_does_not_fit_into_memory_is_refused(shards, monkeypatch):
    data = stream(shards)
    monkeypatch.setattr(decode, "MEMORY_SHARE", 0.0)
    with pytest.raises(InputError, match=r"\(test\) takes 0.0 GiB decoded, .* Use fewer images"):
        data.sample("test")


def test_impossible_streams_are_refused(tmp_path, shards):
    with pytest.raises(InputError, match="3 problems"):
        open_source(stream(shards), TrainConfig(batch_size=45, shift=1), CPU, 0, 8)
    with pytest.raises(InputError, match=r"data.options.classes"):
        stream(shards, classes=None)
    with pytest.raises(InputError, match="'stream' is streamed, and this needs all images in memory"):
        load("stream", path=shards, classes=50)
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(InputError, match=r"no test split. Name one .* data.options.test"):
        stream(shards)
    state = {"epoch": 0, "position": 1, "seed": 5, "size": 43}
    write(tmp_path, "test", [cell()], [0])
    with pytest.raises(InputError, match="seed was 5, is 1"):
        open_source(stream(shards), CONFIG, CPU).load_state_dict(state)
