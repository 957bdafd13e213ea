"""A random sample of the families in docs/coverage.md goes through the same checks, another one every day.

The test's name tells the family. ``RESECT_COVERAGE_SEED=739876 pytest tests/blocks/test_coverage.py`` draws the
sample of that day again; the seed of a failure stands in its message.
"""

from __future__ import annotations

import datetime
import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from coverage_checks import check
from coverage_models import SOURCES, Family, families, is_installed
from coverage_models.quick import QUICK

SEED = int(os.environ.get("RESECT_COVERAGE_SEED", datetime.date.today().toordinal()))
KNOWN = {
    "stack([x, f(x)]).sum(0)": "a sum over a stack is not seen as an addition",
    "U-Net": "its innermost level, alone, looks like a residual block",
}
EACH = {"handwritten": 3, "torch": 1, "torchvision": 1, "timm": 1, "transformers": 1}


def sample() -> list[Family]:
    """Draw a few families of every source that is installed, without the slow ones; of transformers from few."""
    draw = random.Random(SEED)
    drawn = {source: [f for f in families(source) if not f.slow and (f.published or 0) <= 12] for source in SOURCES}
    # Until all of its families are verified: docs/coverage.md says which are.
    drawn["transformers"] = [f for f in drawn["transformers"] if f.name in QUICK["transformers"]]
    chosen = {source: draw.sample(found, EACH[source]) for source, found in drawn.items()}
    return [family for source in SOURCES if is_installed(source) for family in chosen[source]]


@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")  # timm keeps the old names
@pytest.mark.parametrize("family", sample(), ids=lambda family: f"{family.source}-{family.name}")
def test_a_random_family_passes_every_check(family: Family) -> None:
    if family.name in KNOWN:
        pytest.xfail(KNOWN[family.name])
    case, problems = check(family)
    assert not problems, f"RESECT_COVERAGE_SEED={SEED}: {problems}"
    if family.published is not None:
        assert len(case.blocks) == family.published, f"RESECT_COVERAGE_SEED={SEED}: {case.blocks.refused}"


def test_the_quick_list_names_forty_families_that_exist() -> None:
    assert sum(len(names) for names in QUICK.values()) == 40
    for source, names in QUICK.items():
        assert not set(names) - {family.name for family in families(source)}
        assert len(set(names)) == len(names)


def test_every_family_is_listed_once_and_says_where_its_number_is_from() -> None:
    for source in SOURCES:
        names = [family.name for family in families(source)]
        assert len(set(names)) == len(names)
        for family in families(source):
            assert family.where
            assert family.residual == (family.published != 0)
