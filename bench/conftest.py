"""Options of the benchmarks and the collecting of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import measure
import pytest
import results
import table
import torch

ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastory")
    group.addoption("--compare", metavar="REV", help="time this tree and REV side by side")
    group.addoption("--save", action="store_true", help="write bench/results/")
    group.addoption("--note", help="a remark that is stored with the results")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """The measured cells of this run, for the verdict at its end."""
    return ROWS


@pytest.fixture(autouse=True)
def written(request: pytest.FixtureRequest, device: str) -> Iterator[None]:
    """Writes what there is after every cell: a run that is cut off keeps its rows."""
    yield
    if ROWS and request.config.getoption("--save"):
        results.write(ROWS, device, note=request.config.getoption("--note"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    terminalreporter.section("fastory: our operator and its peers")
    terminalreporter.write_line(table.render({"kind": "measured", "rows": ROWS}))
    ratios = [row["ratio"] for row in ROWS]
    mean, worst = measure.geometric_mean(ratios), min(ratios)
    terminalreporter.write_line(f"\nbest peer / fastory: geometric mean {mean:.2f}, worst {worst:.2f}")
