"""The ``resect`` command, one file per group of commands.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Annotated

# isort: off
from resect.cli.common import app, err, out  # first: it says what to install where typer is missing
import typer
from rich.text import Text

import resect
from resect.cli import find, train, analyse, paths, reuse, shrink, report  # noqa: F401 (the order of the help)

# isort: on
from resect.errors import ResectError

__all__ = ["app", "err", "main", "out"]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"resect {resect.__version__}")
        raise typer.Exit


@app.callback()
def _resect(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Find, train, analyse and cut the residual blocks of PyTorch models."""


def main() -> None:
    """Run the command; a mistake of the user's ends in one message and exit code 1, Ctrl-C in 130."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_: err.print("[yellow]Warning:[/yellow]", Text(str(message)))
    try:
        app()
    except ResectError as error:
        _fail(error)
    except SystemExit as leaving:
        if leaving.code == 130:  # Ctrl-C, which typer turns into this
            err.print("Interrupted.")
        raise
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else error)


def _fail(error: object) -> None:
    err.print("[bold red]Error:[/bold red]", Text(str(error)), highlight=False, soft_wrap=True)
    sys.exit(1)
