"""The lists of kernel cases hold every value and every pair of values."""

from __future__ import annotations

import pytest
from kernel_cases import BANDED, BANDED_CASES, GRCA, GRCA_CASES, Case, all_pairs, pairs_of


@pytest.mark.parametrize(
    ("cases", "factors"), [(GRCA_CASES, GRCA), (BANDED_CASES, BANDED)], ids=["grca", "banded"]
)
def test_every_pair_of_values_is_in_the_list(cases: list[Case], factors: dict[str, tuple]) -> None:
    assert set().union(*map(pairs_of, cases)) == all_pairs(factors)
    assert len(cases) <= 300
    assert sum(case["L"] == 1024 for case in cases) <= 10
