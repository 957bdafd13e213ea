import re
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from resect.errors import InputError
from resect.lab.data import Split, batches, load, mean_std, normalize, open_data
from resect.lab.data.named import LOADERS


def test_digits_are_the_scans_times_fifteen_and_the_folds_cover_them_once():
    folds = [load("digits", folds=3, fold=fold) for fold in range(3)]
    scans = load_digits()
    everything = torch.cat([data.test.images for data in folds])
    assert everything.shape == (1797, 1, 8, 8)
    assert everything.dtype == torch.uint8
    rows = sorted((everything // 15).flatten(1).tolist())
    assert rows == sorted(torch.from_numpy(scans.data).long().tolist())
    for data in folds:
        assert len(data.train) + len(data.test) == 1797
        share = torch.bincount(data.test.labels) / torch.bincount(data.train.labels)
        assert ((share - 0.5).abs() < 0.02).all()
    assert torch.equal(load("digits", folds=3, fold=1).test.images, folds[1].test.images)
    assert len(load("digits").test) == 360


def test_statistics_are_exact_and_normalise():
    images = torch.randint(0, 256, (300, 3, 5, 4)).to(torch.uint8)
    images[:, 2] = 7
    mean, std = mean_std(Split(images, torch.zeros(300, dtype=torch.int64)))
    torch.testing.assert_close(mean, images.double().mean((0, 2, 3)).float())
    torch.testing.assert_close(std, images.double().std((0, 2, 3), correction=0).float(), atol=1e-3, rtol=1e-5)
    out = normalize(images, mean, std)
    torch.testing.assert_close(out[:, :2].mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, :2].std((0, 2, 3)), torch.ones(2), atol=1e-3, rtol=0)
    assert not out[:, 2].any()
    data = load("digits")
    parts = batches(data, data.test, 100)
    assert [len(labels) for _, labels in parts] == [100, 100, 100, 60]
    torch.testing.assert_close(parts[3][0], normalize(data.test.images[300:], *mean_std(data.train)))
    torch.testing.assert_close(data.sample("test", 5)[0], parts[0][0][:5])


def test_normalising_is_float_minus_mean_over_std_to_the_bit():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    before = images.clone()
    mean, std = torch.tensor([125.3, 0.1, 255.0]), torch.tensor([63.0, 0.3, 77.7])
    expected = (images.float() - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    result = normalize(images, mean, std)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("digit", {}, "'digits'"),
        ("digits", {"flods": 3}, "'folds'"),
        ("digits", {"fold": 5}, "folds=5, fold=5"),
        ("digits", {"folds": 2.5, "fold": -1}, "2 problems\n.*fold: .*, not -1\n.*folds: .*, not 2.5"),
        ("digits", {"folds": True}, "folds: .*, not True"),
        ("cifar10", {"pth": "."}, "'path'"),
        ("hub", {}, "'dataset' must be given"),
        ("folder", {"path": ".", "size": 0, "channels": 2, "tset": "val"}, "3 problems"),
        ("parquet", {"path": 3}, "path: .*, not 3"),
        ("parquet", {"path": ".", "test_share": 1.0}, "test_share: .*, not 1.0"),
        ("imagenet", {"path": ".", "workers": -1}, "workers: .*, not -1"),
        ("stream", {}, "either data.options.dataset"),
        ("stream", {"dataset": "a", "path": "b"}, "either data.options.dataset"),
    ],
)
def test_unknown_names_and_options(name, options, said):
    with pytest.raises(InputError, match=said):
        load(name, **options)


@pytest.mark.parametrize("text", ["the docstring of open_data", "docs/data.md"])
def test_every_name_is_documented_and_every_option_in_the_docs(text):
    page = Path(__file__).parents[2] / "docs" / "data.md"
    shown = open_data.__doc__ if text.startswith("the") else page.read_text()
    for name, loader in LOADERS.items():
        assert re.search(rf"\b{name}\b", shown), name
        for option in set(loader.__annotations__) - {"return"}:
            assert f"`{option}`" in page.read_text(), f"{name}: {option}"
