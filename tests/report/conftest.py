"""One report for all tests that read it: drawing it takes a few seconds."""

from pathlib import Path

import pytest
from report_fakes import ALL, HOSTILE, chain


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report folder with every figure, a table, and hostile names wherever a name can stand."""
    from resect.report.html import Section, write_data, write_report

    folder = tmp_path_factory.mktemp("report")
    for name, rows in ALL.items():
        write_data(folder, name, rows())
    names = chain()
    names[0] |= {"name": HOSTILE, "owner": f"{HOSTILE}.0"}
    write_data(folder, "chain", names)
    rows = [
        {"net": HOSTILE, "error (%)": 2.0, "latency (ms)": 11.5, "note": None},
        {"net": "cut", "error (%)": 1.8, "latency (ms)": 1234.5, "note": "x"},
    ]
    sections = [Section(f"About {name}", "One.\n\nTwo, `code`.", figure=name) for name in ALL]
    sections.append(Section(HOSTILE, HOSTILE, table=rows, note=f"`{HOSTILE}`", best={"error (%)": "low"}))
    write_report(folder, f"Title {HOSTILE}", "Summary.", sections, {"seeds": HOSTILE}, [("−73 %", HOSTILE)])
    return folder
