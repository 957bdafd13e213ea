"""Small images, and parquet files and folders of them."""

import io

import numpy
import pyarrow
import pyarrow.parquet
from PIL import Image


def picture(number=0, size=(32, 32), mode="RGB"):
    """One that differs from those of other numbers in every pixel."""
    color = (number % 256, (number * 7 + 1) % 256, (number * 13 + 2) % 256, 255)
    return Image.new("RGBA", size, color).convert(mode)


def cell(image=None, kind="PNG", **options):
    """As a parquet file holds it."""
    file = io.BytesIO()
    (image or picture()).save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def write(folder, split, images, labels, columns=("img", "label"), **options):
    """A parquet file without the hub's notes on its columns."""
    images = pyarrow.array(images, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
    table = pyarrow.table(dict(zip(columns, (images, labels), strict=True)))
    pyarrow.parquet.write_table(table, folder / f"{split}.parquet", **options)


def folder_of(root, counts, size=(8, 8)):
    """``counts`` is split/class -> number of images; image n of a class has the red value n."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            noise = numpy.full((*size, 3), number, numpy.uint8)
            noise[..., 1] = numpy.arange(size[1])  # so that a flip shows
            Image.fromarray(noise).save(root / name / f"{number:03}.png")
    return str(root)
