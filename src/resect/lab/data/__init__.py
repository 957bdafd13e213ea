"""Images to train on: by name, resident in memory as uint8 tensors, or streamed."""

from resect.lab.data.byname import data_by_name
from resect.lab.data.images import ImageData, Split, batches, in_batches, mean_std, normalize
from resect.lab.data.named import load, open_data
from resect.lab.data.source import Data, Resident, Source, open_source
from resect.lab.data.stream import StreamedData
from resect.lab.data.streamed import Streamed

__all__ = [
    "Data",
    "ImageData",
    "Resident",
    "Source",
    "Split",
    "Streamed",
    "StreamedData",
    "batches",
    "data_by_name",
    "in_batches",
    "load",
    "mean_std",
    "normalize",
    "open_data",
    "open_source",
]
