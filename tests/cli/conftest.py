"""The command, run in this process."""

from __future__ import annotations

import pytest

from resect import cli


@pytest.fixture
def resect(monkeypatch, capsys, tmp_path):
    """Run ``resect …`` in an empty folder; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str):
        monkeypatch.setattr("sys.argv", ["resect", *arguments])
        cli.out.file = cli.err.file = None
        try:
            cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
