"""The maps of units: what is drawn where, in which colour, and what cannot be drawn."""

import base64
import io
import json

import pytest
from PIL import Image

from resect.errors import InputError
from resect.report.figures import FIGURES


def line(place: int, responses: str, unit: int = 1) -> dict:
    return {"net": "plain", "block": 4, "unit": unit, "line": place, "responses": responses}


def pictures(rows: list[dict]) -> dict[int, Image.Image]:
    """The images of a figure with one panel, by unit."""
    spec = FIGURES["unit_maps"](rows).to_dict()
    found = {}
    for row in json.loads(spec["data"]["values"]):  # of a single panel, altair moves the data up
        content = base64.b64decode(row["map"].removeprefix("data:image/png;base64,"))
        found[row["unit"]] = Image.open(io.BytesIO(content)).convert("RGB")
    return found


def test_a_map_is_drawn_from_the_top_left_on_one_scale_for_all() -> None:
    rows = [line(1, "0 0.2 0"), line(0, "-4 0 4"), line(0, "2 2 2", unit=2), line(1, "-2 -2 -2", unit=2)]
    drawn = pictures(rows)
    first, second = drawn[1], drawn[2]
    assert first.size == (3, 2)
    assert first.getpixel((0, 0)) == (0, 90, 160)  # the most negative: blue
    assert first.getpixel((2, 0)) == (213, 94, 0)  # the most positive: vermilion
    assert first.getpixel((1, 0)) == first.getpixel((0, 1)) == (250, 250, 250)
    for pixel, full in ((second.getpixel((0, 0)), (213, 94, 0)), (second.getpixel((2, 1)), (0, 90, 160))):
        assert pixel == pytest.approx([(250 + end) / 2 for end in full], abs=1)


def test_maps_without_any_response_are_blank() -> None:
    assert pictures([line(0, "0 0"), line(1, "0 -0.0")])[1].getcolors() == [(4, (250, 250, 250))]


@pytest.mark.parametrize("bad", ["0.5 x", "0.5 nan", " "])
def test_what_is_no_map_is_named(bad: str) -> None:
    with pytest.raises(InputError, match="not numbers"):
        FIGURES["unit_maps"]([line(0, bad)])
    with pytest.raises(InputError, match="not equally long"):
        FIGURES["unit_maps"]([line(0, "1 2"), line(1, "1")])


def test_a_heading_tells_the_mean_of_blocks_that_are_no_neighbours() -> None:
    values = {(1, 1): 1.0, (1, 2): 0.9, (2, 1): 0.9, (1, 3): 0.2, (3, 1): 0.4}
    rows = [{"net": "a", "block": i, "other": j, "similarity": value} for (i, j), value in values.items()]
    (panel,) = FIGURES["unit_similarity"](rows).to_dict()["hconcat"]
    assert panel["title"]["text"] == "a 0.30"
    (panel,) = FIGURES["unit_similarity"](rows[:3]).to_dict()["hconcat"]
    assert panel["title"]["text"] == "a"
