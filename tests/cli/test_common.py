"""What all commands share."""

from __future__ import annotations

from resect.cli.common import remark, say


def test_lines_are_told_whole_and_brackets_are_no_markup(capsys):
    line = f"The cut model is in {'long/' * 40}[bold]runs[/nothing]/1."
    say(line)
    remark(line, "yellow")
    assert capsys.readouterr() == (line + "\n", line + "\n")
