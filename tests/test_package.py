"""The wheel and the sdist are whole, and the core runs with nothing but torch and safetensors around it."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def needed(*names: str) -> set[str]:
    """Return the distributions that these ones need, themselves included."""
    done: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in done:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        done.add(name)
        waiting += [re.match(r"[\w.-]+", line).group() for line in requires if "extra ==" not in line]
    return done


def test_wheel_and_sdist_hold_what_they_must(built):
    wheel, sdist = built
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "resect/py.typed",
        "resect/lab/recipes/digits-plain.toml",
        "resect/report/template.html.j2",
        "resect/cli/__init__.py",
        "resect/__init__.pyi",
    ):
        assert wanted in names
    assert not any(name.startswith(("tests/", "src/")) for name in names)
    with tarfile.open(sdist) as archive:
        inside = archive.getnames()
    assert any(name.endswith("/README.md") for name in inside)
    assert any("/tests/" in name for name in inside)
    assert any(name.endswith("/examples/feature_reuse.py") for name in inside)


def test_the_core_runs_in_a_bare_environment(built, tmp_path):
    """Links to torch, safetensors and what they need, the wheel unpacked, and nothing else."""
    site = tmp_path / "site"
    zipfile.ZipFile(built[0]).extractall(site)
    # numpy is optional for torch, but its absence costs a warning; safetensors' torch side needs packaging.
    for name in needed("torch", "safetensors") | {"numpy", "packaging"}:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []}:
            source, link = Path(str(distribution.locate_file(top))), site / top
            if top not in ("..", "__pycache__") and source.exists() and not link.exists():
                link.symlink_to(source)
    code = (
        "import torch, resect\n"
        "net = torch.nn.Sequential(torch.nn.Linear(3, 3))\n"
        "assert len(resect.find_blocks(net, torch.randn(2, 3))) == 0\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('typer') is None and importlib.util.find_spec('timm') is None\n"
        "print('bare', resect.__version__)\n"
    )
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(site)!r})\n{code}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("bare")
