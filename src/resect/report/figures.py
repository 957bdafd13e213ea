"""All figures by name: each is a pure function from rows to an altair chart."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from resect.errors import FileError, InputError, ResectError, unknown
from resect.report import theme
from resect.report.bars import speed, table_latency
from resect.report.chain import chain
from resect.report.curves import response, training
from resect.report.cutting import cut_classes, cut_latency, cut_trade
from resect.report.depths import angular_distance, cka
from resect.report.lesion_rows import lesion_figures
from resect.report.lesions import lesion_each, lesion_random
from resect.report.measurements import FORMATS, Measurements, read_measurements
from resect.report.moments import block_gradients, gradients_by_moment
from resect.report.paths import gradients, path_lengths
from resect.report.removal import removal
from resect.report.reuse import block_response, probes
from resect.report.rows import write_file
from resect.report.strict import gate_closed, strict_identity
from resect.report.studies import lesion_many, lesion_order, lesion_pairs, lesion_parts, lesion_paths
from resect.report.units import unit_maps, unit_similarity

FIGURES: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "chain": chain,
    "speed": speed,
    "training": training,
    "lesion_each": lesion_each,
    "lesion_random": lesion_random,
    "lesion_parts": lesion_parts,
    "lesion_many": lesion_many,
    "lesion_order": lesion_order,
    "lesion_pairs": lesion_pairs,
    "lesion_paths": lesion_paths,
    "removal": removal,
    "path_lengths": path_lengths,
    "gradients": gradients,
    "gradients_by_moment": gradients_by_moment,
    "block_gradients": block_gradients,
    "response": response,
    "table_latency": table_latency,
    "unit_maps": unit_maps,
    "unit_similarity": unit_similarity,
    "block_response": block_response,
    "angular_distance": angular_distance,
    "cka": cka,
    "probes": probes,
    "strict_identity": strict_identity,
    "gate_closed": gate_closed,
    "cut_trade": cut_trade,
    "cut_classes": cut_classes,
    "cut_latency": cut_latency,
}

# The vega-lite version that the installed altair writes for, "v6.4.1" as "6.4".
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])


def specification(chart: Any) -> dict[str, Any]:
    """The vega-lite specification, with the room between two legends that altair cannot ask for."""
    # Not checked against the schema here, which takes as long as drawing: the tests do that.
    spec = chart.to_dict(validate=False)
    spec["config"]["legend"]["layout"] = {"top": {"anchor": "start", "direction": "horizontal", "margin": 26}}
    return spec


def _steady(svg: str) -> str:
    """An SVG with its clip paths and gradients numbered from 0: vega counts them through all charts of a process."""
    for kind in ("clip", "gradient_"):
        found = dict.fromkeys(re.findall(rf"\b{kind}\d+\b", svg))
        names = {name: f"{kind}{place}" for place, name in enumerate(found)}
        svg = re.sub(rf"\b{kind}\d+\b", lambda match, names=names: names[match[0]], svg)  # type: ignore[misc]
    return svg


def save(chart: Any, folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Write ``folder/name.svg`` and ``folder/name.png`` (2 pixels per px); return the specification.

    The PNG is made from the SVG, so that the chart is laid out only once.
    """
    spec = specification(chart)
    svg = _steady(vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE))
    write_file(Path(folder) / f"{name}.svg", svg)
    write_file(Path(folder) / f"{name}.png", vl_convert.svg_to_png(svg, scale=2))
    return spec


def save_as(chart: Any, path: str | os.PathLike[str]) -> Path:
    """Write one picture, of the format that the suffix says: .svg, .png (2 pixels per px) or .html.

    The HTML holds all it needs and works offline; its tooltips name the single blocks. Raises
    ``InputError`` for another suffix.
    """
    target = Path(path)
    if target.suffix == ".html":
        return write_file(target, chart.to_html(inline=True))
    svg = _steady(vl_convert.vegalite_to_svg(specification(chart), vl_version=VEGA_LITE))
    if target.suffix not in (".svg", ".png"):
        raise InputError(f"{str(target)!r} must end in .svg, .png or .html.")
    return write_file(target, svg if target.suffix == ".svg" else vl_convert.svg_to_png(svg, scale=2))


def charts_of(found: Measurements, stem: str) -> dict[str, Any]:
    """Return the charts of what measurements show: one, called ``stem``, or all those of a lesion study."""
    figures = {stem: (found.name, found.rows)}
    if found.name == "lesion":
        parts = lesion_figures(found.rows, str(found.provenance.get("model", "this model")))
        figures = {name: (name, rows) for name, rows in parts.items()}
    of = _of(found.provenance)
    return {name: theme.signed(FIGURES[figure](rows), of) for name, (figure, rows) in figures.items()}


def save_all(charts: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write charts as PNG and SVG; return the paths of the PNGs."""
    for name, chart in charts.items():
        save(chart, folder, name)
    return [folder / f"{name}.png" for name in charts]


def _of(provenance: Mapping[str, Any]) -> str:
    """Of what a figure is: the model and how many samples, as far as the measurements say."""
    parts = [str(provenance["model"])] if provenance.get("model") else []
    samples = provenance.get("samples")
    if samples and not str(samples).isdecimal():
        raise InputError(f"The figures name the number of samples: 'samples' must be a whole number, not {samples!r}.")
    if samples:
        parts.append(theme.plural(int(samples), "sample"))
    return ", ".join(parts)


def redraw_measurements(path: str | os.PathLike[str]) -> list[Path]:
    """Draw again what a file of measurements holds, or every one of a folder; return the pictures, beside them.

    Of a folder, files that are no measurements, or measurements that no figure shows, are passed over.

    Raises
    ------
    FileError: a file that is missing or damaged, or whose rows are not those of a figure; a folder without any.
    """
    path = Path(path)
    files = sorted(file for file in path.iterdir() if file.suffix[1:] in FORMATS) if path.is_dir() else [path]
    drawn = []
    for file in files:
        if path.is_dir() and file.name.partition(".")[0] not in (*FIGURES, "lesion"):
            continue
        if file.name.endswith(".provenance.json"):
            continue
        found = read_measurements(file)
        if found.name not in (*FIGURES, "lesion"):
            raise FileError(f"{file}: {unknown('figure', found.name, FIGURES)}")
        try:
            drawn += save_all(charts_of(found, file.stem), file.parent)
        except ResectError as error:
            raise FileError(f"{file}: {error}") from None
    if not drawn:
        raise FileError(f"{path} is no report folder, and holds no measurements of a figure.")
    return drawn
