"""The report: one self-contained page from ``report.json``, the CSV files in ``data/`` and the figures."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup, escape

from resect.errors import FileError, InputError, ResectError, check_all, unknown
from resect.report.about import ABOUT
from resect.report.figures import FIGURES, VEGA_LITE, save
from resect.report.rows import plain, read_json, read_rows, write_file, write_json, write_rows
from resect.report.schema import COLUMNS, check_rows
from resect.report.tables import table

FORMAT = "resect report 1"


@dataclass(frozen=True)
class Section:
    """One part of a report: text, at most one figure, at most one table, a closing note.

    ``text`` and ``note`` are plain text: an empty line starts a paragraph, `backticks` mark code.
    ``figure`` is a name in FIGURES, drawn from ``data/<figure>.csv``; ``table`` is a list of rows;
    ``best`` names columns of the table whose best value is marked, {"error (%)": "low"}.
    """

    title: str
    text: str
    figure: str | None = None
    table: Sequence[Mapping[str, Any]] | None = None
    note: str | None = None
    best: Mapping[str, str] = field(default_factory=dict)


def write_data(folder: str | os.PathLike[str], figure: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Check the rows of a figure and write them to ``folder/data/<figure>.csv``."""
    check_rows(figure, rows)
    return write_rows(Path(folder) / "data" / f"{figure}.csv", rows)


def write_report(
    folder: str | os.PathLike[str],
    title: str,
    summary: str,
    sections: Sequence[Section],
    provenance: Mapping[str, Any],
    highlights: Sequence[tuple[str, str]] = (),
) -> Path:
    """Draw the figures and write the page; returns the path of ``folder/report.html``.

    Writes ``report.html``, ``report.json`` and ``figures/*.{png,svg}`` from ``data/*.csv`` (``write_data``).
    ``highlights`` are a few results in large type, ("−73 %", "parameters").
    """
    # Through plain(), so that the page is the same now and when it is drawn again from report.json.
    content = plain(
        {
            "format": FORMAT,
            "title": title,
            "summary": summary,
            "highlights": [list(pair) for pair in highlights],
            "sections": [asdict(section) for section in sections],
            "provenance": dict(provenance),
        }
    )
    for section in sections:
        if section.figure is not None and section.figure not in FIGURES:
            raise unknown("figure", section.figure, FIGURES)
    return _build(Path(folder), content, keep=True)


def redraw(folder: str | os.PathLike[str]) -> Path:
    """Draw figures and page again from ``report.json`` and ``data/*.csv``; FileError if they are no report."""
    folder = Path(folder)
    source = folder / "report.json"
    if not source.is_file():
        raise FileError(f"{folder} is not a report folder: it has no report.json.")
    content = read_json(source)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FileError(f"{source} was not written by this version of Resect (expected format {FORMAT!r}).")
    known = {entry.name for entry in fields(Section)}
    try:
        check_all(
            [f"{key} is missing" for key in ("title", "summary", "sections", "provenance") if key not in content]
            + [
                f"section {i} is damaged"
                for i, s in enumerate(content.get("sections", []), start=1)
                if not _sound(s, known)
            ],
            str(source),
        )
    except InputError as error:
        raise FileError(str(error)) from None
    return _build(folder, content, keep=False)


def _sound(section: Any, known: set[str]) -> bool:
    """Whether a section read from a file can be shown."""
    if not isinstance(section, dict) or not set(section) <= known or not {"title", "text"} <= set(section):
        return False
    rows = section.get("table")
    good_table = rows is None or (isinstance(rows, list) and all(isinstance(row, dict) for row in rows))
    return good_table and section.get("figure") in (None, *FIGURES) and isinstance(section.get("best", {}), dict)


def _build(folder: Path, content: dict[str, Any], keep: bool) -> Path:
    """Read and draw everything first, then write, the page last: what cannot be drawn leaves no trace."""
    names = list(dict.fromkeys(s["figure"] for s in content["sections"] if s.get("figure")))
    rows = {name: _read(folder / "data" / f"{name}.csv", name) for name in names}
    charts = {name: FIGURES[name](rows[name]) for name in names}
    tables = [table(s["table"], s.get("best")) if s.get("table") else None for s in content["sections"]]
    figures = {name: _figure(chart, folder / "figures", name) for name, chart in charts.items()}
    page = _template().render(content=content, tables=tables, figures=figures, script=_script(), prose=_prose)
    if keep:
        write_json(folder / "report.json", content)
    return write_file(folder / "report.html", page)


def _read(path: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a figure, or a FileError that says what is wrong with its file."""
    rows = read_rows(path, COLUMNS[name])
    try:
        check_rows(name, rows, where=str(path))
    except ResectError as error:
        raise FileError(str(error)) from None
    return rows


def _figure(chart: Any, folder: Path, name: str) -> dict[str, Any]:
    """What the page shows of a figure: the chart, its title as text, and a still picture."""
    spec = save(chart, folder, name)
    # The page sets titles in its own type, where they wrap on a phone.
    title = spec.pop("title")
    subtitle = title.get("subtitle", [])
    svg = (folder / f"{name}.svg").read_bytes()
    return {
        "spec": spec,
        "title": title["text"],
        "subtitle": [subtitle] if isinstance(subtitle, str) else subtitle,
        "about": ABOUT[name],
        "still": "data:image/svg+xml;base64," + base64.b64encode(svg).decode(),
    }


def _prose(text: str | None) -> Markup:
    """Plain text as paragraphs, with `code` in backticks; everything else is escaped."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", (text or "").strip()):
        parts = re.split(r"`([^`]+)`", paragraph)
        marked = [Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts)]
        paragraphs.append(Markup("<p>{}</p>").format(Markup("").join(marked)))
    return Markup("\n").join(paragraphs)


@cache
def _script() -> Markup:
    """Vega, Vega-Lite and Vega-Embed as one script: about 0.9 MB, and 2 s to make, once per process."""
    script = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]
    # Inside a script element these two would end or confuse it.
    return Markup(script.replace("</script", "<\\/script").replace("<!--", "<\\!--"))


@cache
def _template() -> jinja2.Template:
    """The page, with everything put into it escaped unless marked safe above."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("template.html.j2")
