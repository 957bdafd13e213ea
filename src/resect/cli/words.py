"""Errors of the library in the words of the command line: ``keep='layer1.0'`` is ``--keep layer1.0`` there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from typer.core import TyperGroup

from resect.errors import ResectError


class Commands(TyperGroup):
    """Commands whose options are called as the library's arguments are, and whose errors name the options."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what the library raises says ``--keep`` where it says ``keep=``."""
        try:
            return super().invoke(ctx)
        except ResectError as error:
            command = self.commands.get(ctx.invoked_subcommand or "")
            params = command.params if command is not None else []
            spelt = {param.name: option for param in params for option in param.opts[:1] if option.startswith("--")}
            error.args = (in_options(str(error), {name: option for name, option in spelt.items() if name}),)
            raise


def in_options(text: str, options: Mapping[str, str]) -> str:
    """Replace arguments, ``n=3`` or ``choose(n=3)``, by options, {argument: option}; quoted text is the user's own."""
    if not options:
        return text
    names = "|".join(map(re.escape, options))

    def said(found: re.Match[str]) -> str:
        value = found[2].strip("'")
        return options[found[1]] if value in ("", "True") else f"{options[found[1]]} {value}"

    text = re.sub(rf"\b\w+\(((?:{names})=[^()=]*)\)", r"\1", text)
    return re.sub(rf"(?<![\w.'\"-])({names})=('[^']*'|-?\d+\.\d+|\w+|)", said, text)
