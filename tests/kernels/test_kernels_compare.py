"""bench/compare.py times two versions, each from its own code: a slower commit must not be measured as this tree."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    import compare

    monkeypatch.setattr(compare, "ROUNDS", 1)
    yield compare
    compare._processes.cache_clear()
    for name in ("compare", "cells"):
        sys.modules.pop(name, None)


def test_two_versions_are_timed_side_by_side(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other version here is this tree with an operator that takes 50 ms longer."""
    from cells import cpu_matrix

    other = compare.checkout(None)
    api = other / "fastory" / "kernels" / "grca" / "api.py"
    api.write_text(
        api.read_text().replace(
            "    chosen = backends.pick(q, backend)\n",
            "    chosen = backends.pick(q, backend)\n    time.sleep(0.05)\n",
        )
    )
    api.write_text(api.read_text().replace("import torch\n", "import time\n\nimport torch\n", 1))
    checkout = compare.checkout
    monkeypatch.setattr(compare, "checkout", lambda revision: other if revision else checkout(None))
    here, there = compare.side_by_side(cpu_matrix()[0], "cpu", "the slower one")
    assert there["p50"] > 50_000 > here["p50"]


def test_version_that_is_not_imported_is_refused(compare: ModuleType, tmp_path: Path) -> None:
    """An empty folder: Python would fall back to what is installed and time that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "checkout", lambda revision: tmp_path)
        with pytest.raises(RuntimeError, match="wanted its own kernels"):
            compare._process("HEAD")
