import io

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from resect.errors import FileError, InputError
from resect.lab.data import Split, batches, load, mean_std, normalize


def png(color=(10, 20, 30), size=(32, 32)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write(folder, split, images, labels, columns=("img", "label")):
    pyarrow.parquet.write_table(
        pyarrow.table(dict(zip(columns, (images, labels), strict=True))), folder / f"{split}.parquet"
    )


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


def test_cifar10_from_parquet(tmp_path):
    write(tmp_path, "train", [png(), png((1, 2, 3))], [3, 9])
    write(tmp_path, "test", [png()], [0])
    data = load("cifar10", path=str(tmp_path))
    assert data.shape == (3, 32, 32)
    assert data.train.images[1, :, 0, 0].tolist() == [1, 2, 3]
    assert data.train.labels.tolist() == [3, 9]
    assert data.classes[9] == "truck"


@pytest.mark.parametrize(
    ("images", "labels", "columns", "said"),
    [
        ([png(size=(28, 28))], [0], ("img", "label"), r"image 0 has shape \(3, 28, 28\), not \(3, 32, 32\)"),
        ([png(), {"bytes": b"no image", "path": None}], [0, 1], ("img", "label"), "image 1 cannot be decoded"),
        ([{"bytes": None, "path": "a.png"}], [0], ("img", "label"), "image 0 cannot be decoded"),
        ([png()], [10], ("img", "label"), r"labels must be 0 … 9; found \[10\]"),
        ([png()], [0], ("image", "label"), "no columns img and label, but"),
        ([], [], ("img", "label"), "test.parquet: labels"),
    ],
)
def test_bad_tables_are_one_sentence(tmp_path, images, labels, columns, said):
    write(tmp_path, "train", [png()], [0])
    write(tmp_path, "test", images, labels, columns)
    with pytest.raises(FileError, match=said) as caught:
        load("cifar10", path=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(FileError, match="must name their folder"):
        load("cifar10", path=str(tmp_path / "nowhere"))
    for split in ("train", "test"):
        write(tmp_path, split, [png()] * 3, [0] * 3)
    whole = (tmp_path / "test.parquet").read_bytes()
    (tmp_path / "test.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match=r"test\.parquet is not a whole parquet file"):
        load("cifar10", path=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("digit", {}, "'digits'"),
        ("digits", {"flods": 3}, "'folds'"),
        ("digits", {"fold": 5}, "folds=5, fold=5"),
        ("digits", {"folds": 2.5}, "folds=2.5"),
        ("cifar10", {"pth": "."}, "'path'"),
    ],
)
def test_unknown_names_and_options(name, options, said):
    with pytest.raises(InputError, match=said):
        load(name, **options)
