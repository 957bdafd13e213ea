"""What an analysis found, on disk: its measurements with their provenance, and every figure of them."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

from resect.analyse.gradients import PathGradients
from resect.analyse.profile import BlockResponse
from resect.analyse.study import LesionStudy
from resect.analyse.through import BlockGradients
from resect.errors import InputError, check_all, unknown
from resect.report.figures import charts_of, save_all
from resect.report.measurements import Measurements, write_measurements
from resect.report.provenance import provenance
from resect.report.rows import plain
from resect.report.schema import has_values

Rows = dict[str, list[dict[str, Any]]]


def draw(
    found: Any,
    folder: str | os.PathLike[str],
    *,
    format: str = "csv",
    seeds: Sequence[int] = (),
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Path]:
    """Write what an analysis found to ``folder``, and draw every figure of it as PNG and SVG; return all those paths.

    Parameters
    ----------
    found: what ``lesion_study``, ``path_gradients``, ``block_gradients``, ``block_response`` or ``path_lengths``
        returned; or a mapping from a label to several ``PathGradients`` (moments of a training) or ``BlockResponse``
        (nets), which share figures.
    format: of the measurements: ``"csv"``, ``"json"`` or ``"parquet"``; ``resect report`` draws them again.
    seeds, about: for the provenance. The figures name ``about["model"]`` and ``about["samples"]``.
    options: of ``BlockResponse`` alone: ``epsilon`` (2.5) and ``batch_sizes`` (1, 16, 64, 256) of a gate.

    Raises
    ------
    InputError: something else than these, nothing in it that could be shown, another format, an option that its
        figures do not have, or ``about`` that is no provenance; nothing is written then.
    FileError: the place cannot be written.

    >>> resect.draw(study, "figures", about={"model": "ResNet-20"})
    """
    folder, about = Path(folder), dict(about or {})
    found = {str(about.get("model", "this model")): found} if isinstance(found, BlockResponse) else found
    _check_options(found, options)
    check_all(_mistakes(about), "about")
    # Every chart is made before the first file is written: what cannot be drawn leaves nothing behind.
    drawn = [(name, rows, charts_of(Measurements(name, rows, about), name))
             for name, rows in rows_by_figure(found, **options).items()]  # fmt: skip
    if not drawn:
        raise InputError("draw(): nothing was found that a figure could show, no value that is finite.")
    paths = []
    for name, rows, charts in drawn:
        paths.append(write_measurements(folder, name, rows, format, provenance(seeds, **about)))
        paths += save_all(charts, folder)
    return paths


def _mistakes(about: Mapping[str, Any]) -> Iterator[str]:
    """Say what cannot go into the provenance."""
    for key, value in about.items():
        if not isinstance(key, str):
            yield f"the key {key!r} is no text"
        elif key == "seeds":
            yield "the seeds have an argument of their own: draw(…, seeds=[0])"
        else:
            try:
                json.dumps(plain(value))
            except TypeError as error:
                yield f"{key!r} cannot be written as JSON: {error}"


def _check_options(found: Any, options: Mapping[str, Any]) -> None:
    kinds = {type(one) for one in (found.values() if isinstance(found, Mapping) else [found])}
    known = list(inspect.signature(_response).parameters)[1:] if kinds == {BlockResponse} else []
    what = f"option of the figures of a {' and a '.join(sorted(kind.__name__ for kind in kinds))}"
    check_all((str(unknown(what, option, known)) for option in options if option not in known), "draw()")


@singledispatch
def rows_by_figure(found: Any) -> Rows:
    """Return the rows of each figure that something found is enough for; figures without a value are left out."""
    kinds = "LesionStudy, PathGradients, BlockGradients, BlockResponse, the numbers of path_lengths, or a mapping"
    raise InputError(f"draw(): there is no figure of {type(found).__name__}. It takes what an analysis found: {kinds}.")


@rows_by_figure.register
def _(found: Measurements) -> Rows:
    return {found.name: found.rows}


@rows_by_figure.register
def _(found: LesionStudy) -> Rows:
    return {"lesion": found.rows()}


@rows_by_figure.register
def _(found: PathGradients) -> Rows:
    whole = {} if found.max_length is not None else rows_by_figure(found.paths)
    return {"gradients": found.rows()} | whole


@rows_by_figure.register
def _(found: BlockGradients) -> Rows:
    return {"block_gradients": found.rows()}


@rows_by_figure.register(tuple)
@rows_by_figure.register(list)
def _(found: Sequence[int]) -> Rows:
    if not found or any(not isinstance(count, int) for count in found):
        raise InputError("draw() takes a sequence only as path_lengths gives it: a whole number per length.")
    total = sum(found)
    return {"path_lengths": [{"length": k, "share": count / total} for k, count in enumerate(found)]}


def _response(found: BlockResponse, epsilon: float = 2.5, batch_sizes: Sequence[int] = (1, 16, 64, 256)) -> Rows:
    pairs = found.depth_rows()
    blocks = [row | {name: row.pop(f"{name}_mean") for name in ("ratio", "angle", "descent")} for row in found.rows()]
    rows = {
        "block_response": blocks,
        "angular_distance": [{key: row[key] for key in ("depth", "other", "distance")} for row in pairs],
        "cka": [{key: row[key] for key in ("depth", "other", "cka")} for row in pairs],
        "unit_similarity": found.unit_rows(),
        "probes": found.probe_rows(),
        "strict_identity": found.strict_rows(epsilon),
        "gate_closed": found.closed_rows(epsilon, batch_sizes),
    }
    return {figure: own for figure, own in rows.items() if own and has_values(figure, own)}


@rows_by_figure.register(Mapping)
def _(found: Mapping[Any, Any], **options: Any) -> Rows:
    kinds = {type(one) for one in found.values()}
    if kinds == {PathGradients}:
        *_, last = found.values()
        moments = _labelled("when", {when: one.rows() for when, one in found.items()})
        return rows_by_figure(last) | ({"gradients_by_moment": moments} if len(found) > 1 else {})
    if kinds != {BlockResponse}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise InputError(f"draw(): a mapping holds PathGradients by moment or BlockResponse by net, not {names}.")
    each = {net: _response(one, **options) for net, one in found.items()}
    figures = dict.fromkeys(figure for rows in each.values() for figure in rows)
    return {figure: _labelled("net", {net: rows.get(figure, ()) for net, rows in each.items()}) for figure in figures}


def _labelled(column: str, each: Mapping[str, Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{column: label} | row for label, rows in each.items() for row in rows]
