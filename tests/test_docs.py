"""Every command and every Python block in the README and the docs runs as written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run_in_an_empty_folder(page, tmp_path):
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    codes = blocks(page, "python")
    if any("runs/vit" in code for code in codes):  # the command that the README gives before the block, shortened
        command = [sys.executable, "-m", "resect", "train", "digits-vit", "train.epochs=1", "--out", "runs/vit"]
        subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
    # Names are a block's own; what was imported is shared, which saves most of the time.
    run = "import json, sys\nfor code in json.load(sys.stdin): exec(code, {'__name__': '__main__'})"
    result = subprocess.run(
        [sys.executable, "-c", run],
        input=json.dumps(codes), cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_commands_in_the_readme_exist():
    import typer.main

    from resect.cli import app

    known = set(typer.main.get_command(app).commands)
    text = (ROOT / "README.md").read_text()
    used = set(re.findall(r"^resect (\w+)", text, re.MULTILINE))
    assert used <= known
    assert known - {"demo"} <= used
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)) <= targets


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_public_name_is_documented():
    import resect

    text = "".join(page.read_text() for page in PAGES)
    for name in resect.__all__:
        assert getattr(resect, name).__doc__, name
        if name[0].islower() or name in ("EpsilonGate", "Plan", "Blocks"):
            assert name in text, f"{name} is in no page of the docs"
