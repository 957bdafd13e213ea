import json
import math
from pathlib import Path

import pytest
import vl_convert
from PIL import Image
from report_fakes import ALL, gradients, response

from resect.errors import InputError
from resect.report.about import ABOUT
from resect.report.figures import FIGURES, VEGA_LITE
from resect.report.measure_axis import spread
from resect.report.schema import COLUMNS, NEEDS_ONE, check_rows


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


def title(chart) -> tuple[str, str]:
    spec = chart.to_dict()["title"]
    return spec["text"], " ".join(spec.get("subtitle", []))


def test_block_gradients_says_largest_share_and_how_large() -> None:
    rows = [{"index": i, "name": f"b{i}", "through": t, "past": 1.0, "full": 1.0} for i, t in enumerate((0.2, 0.46))]
    assert title(FIGURES["block_gradients"](rows))[0] == "The largest share of the gradient comes through b1 (46 %)"


def many(study: str, values: dict[int, list[float]], **more) -> list[dict]:
    common = {"study": study, "metric": "top1", "baseline": 0.0} | more
    return [common | {"k": k, "value": value} for k, found in values.items() for value in found]


def test_lesion_many_names_counts_that_were_measured_and_series_that_are_there() -> None:
    greedy, random = many("greedy", {1: [1.0], 5: [41.0], 6: [80.0]}), many("random", {2: [5.0, 9.0], 4: [60.0, 70.0]})
    text, notes = title(FIGURES["lesion_many"](greedy + random))
    assert text == "The top-1 error passes 40.0 % with 5 blocks closed best first, with 4 at random"
    assert "Best first" in notes
    assert "95 %" in notes
    text, notes = title(FIGURES["lesion_many"](many("random", {1: [5.0, 9.0]}, every=True)))
    assert text == "The top-1 error passes 3.5 % with 1 block closed at random"
    assert notes == ""
    chart = FIGURES["lesion_many"](many("runs", {2: [5.0, 9.0], 3: [20.0, 30.0]}))
    assert title(chart) == ("The top-1 error passes 12.5 % with 3 blocks closed in a row", "")
    assert "every run of k neighbours: mean" in json.dumps(chart.to_dict())
    assert title(FIGURES["lesion_many"](many("greedy", {1: [0.0]})))[0].startswith("The top-1 error does not rise")


def test_lesion_random_one_block() -> None:
    rows = [{"k": k, "draw": d, "error": 0.1 * k + 0.01 * d, "every": k == 1} for k in (1, 2) for d in range(3)]
    chart = FIGURES["lesion_random"](rows)
    assert title(chart)[0] == "Mean error 11.0 % with 1 block deleted, 21.0 % with 2"
    bands = [row for view in chart.to_dict()["layer"] for row in data(view) if "low" in row]
    assert {row["k"]: row["low"] < row["high"] for row in bands} == {1: False, 2: True}


def test_the_spread_of_draws_is_students() -> None:
    mean, low, high = spread([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert high - mean == pytest.approx(3.182 * 1.2909944 / 2, abs=1e-4)
    assert mean - low == pytest.approx(high - mean)
    assert spread([0.3]) == (0.3, 0.3, 0.3)


def test_the_trade_is_of_means_and_its_title_counts_from_the_whole_net() -> None:
    def row(choice: str, removed: int, error: float, ms: float | None, draw: int = 0) -> dict:
        return {"choice": choice, "removed": removed, "draw": draw, "error": error, "ms": ms, "flops": 100.0 - removed}

    rows = [row("lesion", 0, 0.10, 10.0), row("lesion", 2, 0.109, 6.0), row("lesion", 4, 0.2, 4.0)]
    rows += [row("random", 2, error, 7.0, draw) for draw, error in enumerate((0.2, 0.3, 0.4))]
    rows += [row("recovered", 4, 0.11, None)]
    chart = FIGURES["cut_trade"](rows).to_dict()
    assert chart["title"]["text"] == "Chosen by “lesion”: 40 % of the time goes for at most 1 point more error"
    time, flops = chart["hconcat"]
    drawn = [row for layer in time["layer"] for row in data(layer)]
    assert [row["error"] for row in drawn if row["choice"] == "random"] == pytest.approx([0.3])
    assert not [row for row in drawn if row["choice"] == "recovered"]
    assert [row["cost"] for layer in flops["layer"] for row in data(layer) if row["choice"] == "recovered"] == [96.0]


def test_classes_that_lose_most_come_first_and_few_of_many_are_drawn() -> None:
    rows = [
        {"label": f"class {i}", "net": net, "error": 0.1 + change}
        for i in range(50)
        for net, change in {"uncut": 0.0, "cut": 0.002 * (i - 10)}.items()
    ]
    chart = FIGURES["cut_classes"](rows).to_dict()
    assert chart["title"]["text"] == "The class that the cut costs most: class 49, +7.8 points"
    order = [row["label"] for row in data(chart["layer"][0])]
    assert order == [f"class {i}" for i in (*range(49, 29, -1), *range(9, -1, -1))]


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ((-0.2, -0.1), "Every class gains by the cut; class 1 gains least: −10.0 points"),
        ((-0.2, 0.0), "The cut costs no class"),
    ],
)
def test_a_cut_that_costs_no_class_is_not_said_to(changes, title) -> None:
    rows = [
        {"label": f"class {i}", "net": net, "error": 0.3 + (change if net == "cut" else 0.0)}
        for i, change in enumerate(changes)
        for net in ("uncut", "cut")
    ]
    assert FIGURES["cut_classes"](rows).to_dict()["title"]["text"] == title


def test_one_lucky_draw_is_no_saving() -> None:
    row = {"choice": "ours", "removed": 0, "draw": 0, "ms": 10.0, "flops": None, "error": 0.1}
    rows = [row] + [row | {"removed": 1, "draw": i, "ms": 5.0, "error": e} for i, e in enumerate((0.05, 0.5, 0.6))]
    assert FIGURES["cut_trade"](rows).to_dict()["title"]["text"] == "Error against time as blocks go"


def test_a_chain_counts_what_is_gone_and_draws_it_empty() -> None:
    rows = [row | {"gone": row["index"] in (1, 2)} for row in ALL["chain"]() if row["model"] == "cifar-resnet-110"]
    chart = FIGURES["chain"](rows).to_dict()
    assert chart["title"]["text"].startswith("2 of 54 residual blocks gone: ")
    layers = chart["vconcat"][0]["layer"]
    empty = [layer for layer in layers if isinstance(layer["mark"], dict) and layer["mark"].get("strokeDash")]
    filled = [layer for layer in layers if isinstance(layer["mark"], dict) and layer["mark"].get("opacity") == 0.92]
    assert [row["index"] for row in data(empty[0])] == [1, 2]
    assert len(data(filled[0])) == 52
