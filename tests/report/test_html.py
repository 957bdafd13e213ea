import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_fakes import ALL, HOSTILE

from resect.errors import FileError, InputError
from resect.report.html import Section, redraw, write_data, write_report
from resect.report.provenance import provenance
from resect.report.rows import write_rows
from resect.report.tables import table

FEW = ("response", "table_latency")  # bars have clip paths, which vega numbers by what it drew before
LOADS = {"src", "srcset", "data", "poster", "action", "formaction", "background", "ping", "manifest"}


class Page(HTMLParser):
    """Elements with their attributes, and the text of styles, scripts and everything else apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {"style": [], "script": [], "other": []}
        self.inside = "other"
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        self.inside = tag if tag in ("style", "script") else "other"

    def handle_endtag(self, tag: str) -> None:
        self.inside = "other"

    def handle_data(self, data: str) -> None:
        self.texts[self.inside].append(data)


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / "report.html").read_text())


def test_everything_is_in_place(report: Path) -> None:
    for name in ALL:
        assert (report / "figures" / f"{name}.png").stat().st_size > 10_000
        assert (report / "figures" / f"{name}.svg").stat().st_size > 2_000
    assert not list(report.rglob(".*"))  # no temporary files


def test_page_loads_nothing(page: Page) -> None:
    assert not [tag for tag, _ in page.elements if tag in ("link", "iframe", "object", "embed", "base")]
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in LOADS:
                assert value.startswith("data:"), (tag, name, value[:80])
            if name in ("href", "xlink:href"):
                assert re.match(r"#|figures/\w+\.(png|svg)$|data/\w+\.csv$", value), value
    style = "".join(page.texts["style"])
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy  # so that default-src holds for it
    specs = [text for text in page.texts["script"] if text.lstrip().startswith("{")]
    assert len(specs) == len(ALL)
    # An image's address is a column of the data, and the image itself.
    channel = '"url": {"field": "map", "type": "nominal"}'
    assert not [text for text in specs if '"url"' in text.replace(channel, "")]
    addresses = [found for text in specs for found in re.findall(r'"map\\": \\"(.*?)\\"', text)]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)


def test_names_stay_text(page: Page, report: Path) -> None:
    assert "alert(1)" in "".join(page.texts["other"])
    scripts = [tag for tag, _ in page.elements if tag == "script"]
    assert len(scripts) == len(ALL) + 2  # one per chart, the library, our own
    assert HOSTILE not in (report / "report.html").read_text()
    spec = next(text for text in page.texts["script"] if "alert(1)" in text)
    assert HOSTILE in json.dumps(json.loads(spec))  # and it is still there for the tooltip


def test_contents_and_table(page: Page) -> None:
    hrefs = [a["href"] for tag, a in page.elements if tag == "a" and a["href"].startswith("#")]
    ids = {a["id"] for _, a in page.elements if "id" in a}
    assert hrefs
    assert {href[1:] for href in hrefs} <= ids
    best = [a for tag, a in page.elements if tag == "td" and "best" in a.get("class", "")]
    assert len(best) == 1


def test_redraw_repeats_the_page_from_data_alone(tmp_path: Path) -> None:
    sections = [Section("A", "b", figure=name) for name in FEW]
    sections.append(Section("C", "d", table=[{"x": float("nan"), "y": 1.5}], best={"y": "high"}))
    for name in FEW:
        write_data(tmp_path, name, ALL[name]())
    before = write_report(tmp_path, "t", "s", sections, {"a": 1}).read_text()
    shutil.rmtree(tmp_path / "figures")
    (tmp_path / "report.html").unlink()
    assert redraw(tmp_path).read_text() == before
    assert (tmp_path / "figures" / "response.png").is_file()


def test_redraw_refuses_what_is_no_report(report: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="not a report folder"):
        redraw(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(FileError, match="cannot be read as JSON"):
        redraw(tmp_path)
    (tmp_path / "report.json").write_text('{"format": "other"}')
    with pytest.raises(FileError, match="was not written by this version"):
        redraw(tmp_path)
    content = json.loads((report / "report.json").read_text())
    content["sections"][0]["figure"] = "none"
    del content["title"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(FileError, match=r"title is missing(.|\n)*section 1 is damaged"):
        redraw(tmp_path)


def test_damaged_data_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    section = [Section("A", "b", figure="path_lengths")]
    with pytest.raises(FileError, match=r"path_lengths.csv does not exist"):
        write_report(tmp_path, "t", "s", section, {})
    write_rows(tmp_path / "data" / "path_lengths.csv", [{"length": 0, "part": 1.0}])
    with pytest.raises(FileError, match=r"path_lengths.csv: missing column 'share'"):
        write_report(tmp_path, "t", "s", section, {})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["path_lengths.csv"]
    with pytest.raises(InputError, match="Did you mean 'path_lengths'"):
        write_report(tmp_path, "t", "s", [Section("A", "b", figure="path_length")], {})
    with pytest.raises(InputError, match="missing column"):
        write_data(tmp_path, "path_lengths", [{"length": 0}])


def test_tables_line_up() -> None:
    made = table([{"net": "a", "t (ms)": 1234.5, "n": 1200}, {"net": "b", "t (ms)": 0.51, "n": -3}], {"t (ms)": "low"})
    assert made["heads"][1] == {"name": "t", "unit": "ms", "right": True}
    assert not made["heads"][0]["right"]
    assert [row[1]["text"] for row in made["rows"]] == ["1\u202f234.500", "0.510"]
    assert [row[2]["text"] for row in made["rows"]] == ["1\u202f200", "−3"]
    assert [row[1]["best"] for row in made["rows"]] == [False, True]
    with pytest.raises(InputError, match="Unknown column 'T'"):
        table([{"t": 1}], {"T": "low"})


def test_provenance_says_where_it_comes_from() -> None:
    entries = provenance(seeds=[0, 1], command="resect demo", data_set="digits")
    assert entries["seeds"] == "0, 1"
    assert entries["data set"] == "digits"
    assert {"Resect", "torch", "threads", "processor", "date", "command"} <= set(entries)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_charts_appear_in_a_browser(report: Path, tmp_path: Path) -> None:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=15000"]
    command += [f"--user-data-dir={tmp_path}", "--dump-dom", (report / "report.html").as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
    assert len(re.findall(r'<svg[^>]*class="marks"', page)) == len(ALL)
    assert page.count("could not be drawn") == 1  # in the script itself
