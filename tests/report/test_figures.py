import json
import math
from pathlib import Path

import pytest
import vl_convert
from PIL import Image
from report_fakes import ALL, gradients, response

from resect.errors import InputError
from resect.report.figures import FIGURES, VEGA_LITE
from resect.report.measure_axis import spread
from resect.report.schema import ABOUT, COLUMNS, NEEDS_ONE, check_rows


def drawn(name: str, rows: list[dict]) -> str:
    """The SVG of a figure, after a check against the vega-lite schema."""
    return vl_convert.vegalite_to_svg(FIGURES[name](rows).to_dict(), vl_version=VEGA_LITE)


def data(view: dict) -> list[dict]:
    """The rows of one layer or panel."""
    return json.loads(view.get("data", {}).get("values", "[]"))


def test_every_figure_has_columns_a_sentence_and_a_fake() -> None:
    assert list(FIGURES) == list(COLUMNS) == list(ABOUT) == list(ALL)


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_a_valid_picture(name: str, report: Path) -> None:
    FIGURES[name](ALL[name]()).to_dict()  # checks the schema
    image = Image.open(report / "figures" / f"{name}.png").convert("L")
    assert 1100 < image.width < 1520  # at 2 pixels per px, so about 720 px wide
    assert image.height > 400
    ink = sum(image.histogram()[:200])
    assert ink > 0.005 * image.width * image.height
    svg = (report / "figures" / f"{name}.svg").read_text()
    assert svg.startswith("<svg")
    assert "NaN" not in svg


@pytest.mark.parametrize("name", FIGURES)
def test_figure_of_a_single_row(name: str) -> None:
    assert "NaN" not in drawn(name, ALL[name]()[:1])


@pytest.mark.parametrize(("name", "column"), [(n, c) for n in COLUMNS for c in COLUMNS[n]])
def test_a_missing_column_is_named_if_it_is_needed(name: str, column: str) -> None:
    rows = [{key: value for key, value in row.items() if key != column} for row in ALL[name]()]
    if column in NEEDS_ONE.get(name, []) and len(NEEDS_ONE[name]) == 1:
        with pytest.raises(InputError, match=rf"no value at all in '{column}'"):
            FIGURES[name](rows)
    elif COLUMNS[name][column].endswith("?"):
        check_rows(name, rows)
    else:
        with pytest.raises(InputError, match=rf"missing column '{column}'"):
            FIGURES[name](rows)


def test_percent_instead_of_fraction_is_an_error() -> None:
    with pytest.raises(InputError, match=r"row 2: 'error' is 2.1, not a fraction"):
        FIGURES["lesion_random"]([{"k": 0, "draw": 0, "error": 0.5}, {"k": 1, "draw": 0, "error": 2.1}])


def test_all_problems_come_at_once() -> None:
    with pytest.raises(InputError, match=r"2 problems(.|\n)*'k' is 'x'(.|\n)*'error' is nan"):
        check_rows("lesion_random", [{"k": "x", "draw": 0, "error": math.nan}])
    with pytest.raises(InputError, match="Did you mean 'gradients'"):
        check_rows("gradient", [])
    with pytest.raises(InputError, match="there are none"):
        check_rows("gradients", [])


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_values_without_a_logarithm_do_not_break_the_log_scale(value: float) -> None:
    rows = gradients(12)
    for row in rows[3:6]:
        row |= {"norm_of_sum": value, "sum_of_norms": value, "low": value, "high": value}
    assert "NaN" not in drawn("gradients", rows)
    # What has no logarithm is left out of the log panels, not drawn at their floor as if it were small.
    for panel in FIGURES["gradients"](rows).to_dict()["concat"][2:]:
        views = [panel, *panel["layer"]]  # altair moves data that all layers share up to the panel
        lengths = {row["length"] for view in views for row in data(view) if "length" in row}
        assert lengths
        assert not lengths & {3, 4, 5}
    small = [row | {"response": value} if row["index"] > 2 else row for row in response()]
    assert "NaN" not in drawn("response", small)


def test_gradients_keeps_the_two_quantities_apart() -> None:
    spec = FIGURES["gradients"](gradients()).to_dict()
    titles = [layer["encoding"]["y"]["title"] for view in spec["concat"] for layer in view["layer"][-1:]]
    assert titles == [
        "norm of the sum, linear scale",
        "sum of the norms, linear scale",
        "norm of the sum, log scale",
        "sum of the norms, log scale",
    ]


def test_the_spread_of_draws_is_students() -> None:
    mean, low, high = spread([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert high - mean == pytest.approx(3.182 * 1.2909944 / 2, abs=1e-4)
    assert mean - low == pytest.approx(high - mean)
    assert spread([0.3]) == (0.3, 0.3, 0.3)
