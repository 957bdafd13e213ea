"""The public names: resolved when first used, the same for people, type checkers and errors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resect
from resect.errors import nearest, unknown

pytestmark = pytest.mark.core


def test_type_checkers_see_the_public_names():
    stub = ast.parse((Path(resect.__file__).parent / "__init__.pyi").read_text())
    found = {}
    for node in stub.body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname: node.module for alias in node.names}
    rooms = {name for name, module in found.items() if module == "resect"}
    assert set(found) - rooms == set(resect.__all__)
    assert rooms == set(resect._ROOMS)
    for name in resect.__all__:
        value = getattr(resect, name)
        assert value is not None
        module = value.__module__ if hasattr(value, "__module__") else getattr(value, "__name__", found[name])
        assert found[name] in (module, module.rpartition(".")[0]), name


def test_importing_resect_waits_for_torch_until_it_is_needed():
    absent, there = "assert 'torch' not in sys.modules", "assert 'torch' in sys.modules"
    code = f"import sys, resect, resect.errors; {absent}; resect.Blocks; {there}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_not_there_gets_the_nearest():
    with pytest.raises(AttributeError, match="no attribute 'find_block'"):
        resect.find_block  # noqa: B018
    assert set(resect.__all__) <= set(dir(resect))


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("timm:resnt50", ["timm:vit_base", "timm:resnet50", "timm:xcit"], ["timm:resnet50"]),
        ("timm:ViT-Base", ["timm:vit_base", "timm:vit_base_r50"], ["timm:vit_base"]),
        ("timm:conv", ["timm:convnext_tiny", "timm:conv_a", "timm:vit"], ["timm:conv_a", "timm:convnext_tiny"]),
        ("timm:qqqq", ["timm:vit_base", "timm:xcit"], []),
        ("layer1.7", ["layer4.1/conv2", "layer2.3/conv2", "layer1.0/conv2"], ["layer1.0/conv2", "layer4.1/conv2"]),
        ("layer2.1/conv1", ["layer2.1/conv2", "layer4.1/fc"], ["layer2.1/conv2"]),
        ("hiden_size", ["hidden_size", "hidden_act", "output_hidden_states"], ["hidden_size"]),
        ("x", ["ax", "xb"], []),
    ],
)
def test_the_nearest_names(name, known, found):
    assert nearest(name, known) == found


def test_many_names_are_not_all_listed():
    assert "(+96 more)" in str(unknown("model", "qqqq", [f"m{i}" for i in range(100)]))
    assert str(unknown("model", "q", [])).endswith("There are none.")
