import datasets
import numpy
import pyarrow
import pytest
import torch
from pictures import cell, folder_of, picture, write
from PIL import Image

from resect.errors import FileError, InputError
from resect.lab.data import decode, load

pytestmark = pytest.mark.usefixtures("own_cache")

CLASSES = ["cat", "dog", "emu"]


def annotated(count, columns=("img", "label"), names=CLASSES, start=0):
    """A table as the hub gives it."""
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=names)})
    rows = {
        columns[0]: [cell(picture(start + n)) for n in range(count)],
        columns[1]: [n % len(names) for n in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features)


@pytest.fixture
def hub(monkeypatch):
    """What `datasets.load_dataset` was asked for, and what it answers."""
    asked = []

    def answer(splits):
        def load_dataset(name, config=None, *, streaming=False):
            asked.append((name, config, streaming))
            if isinstance(splits, Exception):
                raise splits
            return datasets.DatasetDict(splits)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return answer


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_parquet_files_hold_images_in_order(tmp_path, kind):
    count = decode.CHUNK + 3
    options = {"lossless": True} if kind == "WEBP" else {}
    images = [cell(picture(n, (6, 5)), kind, **options) for n in range(count)]
    write(tmp_path, "train", images, [n % 3 for n in range(count)])
    write(tmp_path, "test", images[:4], [2, 1, 0, 0])
    data = load("parquet", path=str(tmp_path))
    assert data.shape == (3, 5, 6)
    assert data.train.images.is_contiguous()
    for number in (0, 1, decode.CHUNK - 1, decode.CHUNK, count - 1):
        expected = torch.from_numpy(numpy.array(picture(number, (6, 5)))).permute(2, 0, 1)
        assert torch.equal(data.train.images[number], expected)
    assert data.train.labels.tolist() == [n % 3 for n in range(count)]
    assert data.test.labels.tolist() == [2, 1, 0, 0]
    assert data.classes == ("0", "1", "2")


def test_a_file_belongs_to_the_split_that_its_name_or_folder_begins_with(tmp_path):
    for name, labels in (("train-00000-of-00002", [0]), ("train-00001-of-00002", [1, 1]), ("validation-0", [0, 1, 1])):
        write(tmp_path, name, [cell()] * len(labels), labels)
    data = load("parquet", path=str(tmp_path))
    assert (len(data.train), len(data.test)) == (3, 3)
    (tmp_path / "val").mkdir()
    write(tmp_path / "val", "0", [cell()] * 2, [1, 0])
    some = [str(tmp_path / "train-00001-of-00002.parquet"), str(tmp_path / "val" / "0.parquet")]
    data = load("parquet", path=some)
    assert (len(data.train), len(data.test)) == (2, 2)
    with pytest.raises(InputError, match="Unknown split 'tset'"):
        load("parquet", path=some, test="tset")


def test_cifar10_from_parquet(tmp_path):
    annotated(20).cast_column("label", datasets.ClassLabel(names=CLASSES)).to_parquet(tmp_path / "train.parquet")
    annotated(3).to_parquet(tmp_path / "test.parquet")
    data = load("cifar10", path=str(tmp_path))
    assert data.shape == (3, 32, 32)
    assert data.train.images[1, :, 0, 0].tolist() == [1, 8, 15]
    assert data.classes == tuple(CLASSES)
    write(tmp_path, "train", [cell()], [3])
    write(tmp_path, "test", [cell()], [0])
    assert len(load("cifar10", path=str(tmp_path)).classes) == 10  # of labels without names


def test_the_named_sets_ask_the_hub_for_theirs(hub):
    asked = hub({"train": annotated(4), "test": annotated(2)})
    assert load("cifar10").name == "cifar10"
    fine = annotated(6, ("img", "fine_label")).add_column("coarse_label", [0] * 6)
    hub({"train": fine, "test": fine})
    assert load("cifar100").train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    hub({"train": annotated(4, ("image", "label")), "test": annotated(2), "extra": annotated(5, start=9)})
    assert len(load("svhn").train) == 4
    hub({"train": annotated(4), "test": annotated(2), "extra": annotated(5, start=9)})
    more = load("svhn", extra=True).train
    assert len(more) == 9
    assert more.images[4, 0, 0, 0] == 9
    assert set(asked) == {
        ("uoft-cs/cifar10", None, False),
        ("uoft-cs/cifar100", None, False),
        ("ufldl-stanford/svhn", "cropped_digits", False),
    }


def test_any_set_of_the_hub_by_its_features(hub):
    asked = hub({"train": annotated(4, ("picture", "kind")), "valid": annotated(2, ("picture", "kind"))})
    data = load("hub", dataset="me/mine", config="small")
    assert asked == [("me/mine", "small", False)]
    assert (len(data.train), len(data.test), data.classes) == (4, 2, tuple(CLASSES))
    two = annotated(4).add_column("label2", [1, 1, 0, 0])
    hub({"train": two, "test": two})
    assert load("hub", dataset="me/mine").train.labels.tolist() == [0, 1, 2, 0]  # names before plain numbers
    assert load("hub", dataset="me/mine", label="label2").train.labels.tolist() == [1, 1, 0, 0]


def test_what_a_hub_set_lacks_is_said(hub):
    both = annotated(3).add_column("other", annotated(3)["label"]).cast_column("other", datasets.ClassLabel(3))
    hub({"train": both, "test": both})
    with pytest.raises(InputError, match=r"'label', 'other' could all be labels. Choose with data.options.label"):
        load("hub", dataset="a/b")
    with pytest.raises(InputError, match=r"Unknown column 'lable'. Did you mean 'label'"):
        load("hub", dataset="a/b", label="lable")
    with pytest.raises(InputError, match="column 'img' holds no labels but Image"):
        load("hub", dataset="a/b", label="img")
    with pytest.raises(InputError, match=r"has a test split: data.options.test_share"):
        load("hub", dataset="a/b", label="label", test_share=0.2)
    texts = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    hub({"train": texts})
    with pytest.raises(InputError, match="has no column of images, but 'text', 'label'"):
        load("hub", dataset="a/b")
    hub({"train": annotated(3), "test": annotated(3, names=["x", "y", "z"])})
    with pytest.raises(InputError, match="do not have the same classes"):
        load("hub", dataset="a/b")
    hub(ConnectionError("no route\nto the hub"))
    with pytest.raises(InputError, match=r"'a/b' could not be fetched .*ConnectionError: no route") as caught:
        load("hub", dataset="a/b")
    assert "\n" not in str(caught.value)


def test_a_folder_of_images(tmp_path):
    path = folder_of(tmp_path, {"train/cat": 5, "train/dog": 4, "val/cat": 2, "val/dog": 1})
    (tmp_path / "train" / "README.txt").write_text("not an image")
    data = load("folder", path=path)
    assert data.classes == ("cat", "dog")
    assert data.shape == (3, 8, 8)
    assert sorted(data.train.images[data.train.labels == 0][:, 0, 0, 0].tolist()) == [0, 1, 2, 3, 4]
    assert data.test.labels.tolist() == [0, 0, 1]


def test_without_a_test_split_a_stratified_share_is_one(tmp_path):
    path = folder_of(tmp_path, {"cat": 40, "dog": 20})
    data = load("folder", path=path, test_share=0.25)
    assert torch.bincount(data.train.labels).tolist() == [30, 15]
    assert torch.bincount(data.test.labels).tolist() == [10, 5]
    seen = [100 * part.labels + part.images[:, 0, 0, 0] for part in (data.train, data.test)]
    assert len(torch.cat(seen).unique()) == 60
    assert torch.equal(load("folder", path=path, test_share=0.25).test.images, data.test.images)
    assert len(load("folder", path=path).test) == 6
    with pytest.raises(InputError, match="no test split, and none can be taken: ValueError"):
        load("folder", path=path, test_share=0.01)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileError, match=r"nothing at .*nowhere: data.options.path must name"):
        load("cifar10", path=str(tmp_path / "nowhere"))
    with pytest.raises(FileError, match="no parquet files in"):
        load("parquet", path=str(tmp_path))
    with pytest.raises(FileError, match=r"nothing at .*nowhere"):
        load("folder", path=str(tmp_path / "nowhere"))
    with pytest.raises(FileError, match=r"No images at .*CLASS"):
        load("folder", path=str(tmp_path))
    for split in ("train", "test"):
        write(tmp_path, split, [cell()] * 3, [0] * 3)
    whole = (tmp_path / "test.parquet").read_bytes()
    (tmp_path / "test.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match=r"test\.parquet is not a whole parquet file"):
        load("cifar10", path=str(tmp_path))


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        ([cell(), {"bytes": b"no image", "path": None}], [0, 1], r"\(test\), image 1 cannot be decoded"),
        ([cell(), {"bytes": None, "path": "/nowhere.png"}], [0, 1], "image 1 cannot be decoded"),
        ([cell(Image.new("I;16", (32, 32)))], [0], "image 0 has more than 8 bits a channel"),
        ([cell()], [10], r"labels must be 0 … 9; found \[10\]"),
        ([cell()], [-1], r"found \[-1\]"),
        ([cell()], [None], r"found \[None\]"),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path, images, labels, said):
    write(tmp_path, "train", [cell()], [0])
    write(tmp_path, "test", images, pyarrow.array(labels, pyarrow.int64()))
    with pytest.raises(FileError, match=said) as caught:
        load("cifar10", path=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_empty_split_is_refused(hub):
    hub({"train": annotated(3), "test": annotated(3).select([])})
    with pytest.raises(FileError, match=r"\(test\): labels must be .*; found none at all"):
        load("hub", dataset="a/b")


def test_images_of_unequal_size_want_a_size(tmp_path):
    tall = Image.new("RGB", (8, 16))
    tall.paste((200, 0, 0), (0, 4, 8, 12))  # the centre
    write(tmp_path, "train", [cell(picture(1, (8, 8))), cell(tall)], [0, 1])
    write(tmp_path, "test", [cell(picture(1, (12, 10)))], [0])
    with pytest.raises(InputError, match=r"image 0 is 8x8, image 1 is 8x16 pixels. Give data.options.size"):
        load("parquet", path=str(tmp_path))
    data = load("parquet", path=str(tmp_path), size=4)
    assert data.train.images.shape == (2, 3, 4, 4)
    assert (data.train.images[1, 0] > 170).all()
    assert data.test.images.shape == (1, 3, 4, 4)
    write(tmp_path, "train", [cell(picture(1, (8, 8)))], [0])
    with pytest.raises(InputError, match=r"of shapes \(3, 8, 8\) and \(3, 10, 12\)"):
        load("parquet", path=str(tmp_path))


@pytest.mark.parametrize(
    ("image", "colour", "grey"),
    [
        (Image.new("L", (4, 4), 90), [90, 90, 90], 90),
        (Image.new("1", (4, 4), 1), [255, 255, 255], 255),
        (Image.new("RGBA", (4, 4), (200, 100, 50, 0)), [0, 0, 0], 0),
        (Image.new("RGBA", (4, 4), (200, 100, 50, 255)), [200, 100, 50], 124),
        (Image.new("RGB", (4, 4), (200, 100, 50)).convert("P"), None, None),
    ],
)
def test_every_image_becomes_rgb_or_grey(image, colour, grey):
    colour = colour or list(image.convert("RGB").getpixel((0, 0)))
    assert decode.decode_image(cell(image), "x")[:, 0, 0].tolist() == colour
    one = decode.decode_image(cell(image), "x", channels=1)
    assert one.shape == (1, 4, 4)
    assert grey is None or abs(int(one[0, 0, 0]) - grey) <= 1


def test_a_photo_is_turned_upright():
    exif = Image.Exif()
    exif[274] = 6  # taken with the camera on its side
    assert decode.decode_image(cell(Image.new("RGB", (8, 4)), "JPEG", exif=exif), "x").shape == (3, 8, 4)


def test_more_than_fits_into_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MEMORY_SHARE", 0.0)
    write(tmp_path, "train", [cell()], [0])
    write(tmp_path, "test", [cell()], [0])
    with pytest.raises(InputError, match=r"0.0 GiB decoded, and .* data.name = \"stream\""):
        load("parquet", path=str(tmp_path))
