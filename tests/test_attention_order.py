"""What a fixed order of the sums of dq costs, in the model of benchmarks/attention_order.py."""

from pathlib import Path

import pytest


@pytest.fixture
def order(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import attention_order

    return attention_order


def test_the_fixed_order_costs_little(order):
    """Queries from the last to the first, as the kernels take them; the other way round bands would crawl."""
    for case in order.BANDED:
        assert order.cost(case, "descending") < 1.01, case
    for case in order.DENSE:
        assert order.cost(case, "descending") < 1.035, case
    for case in order.FEW:
        assert order.cost(case, "descending") < 1.065, case
    for case in (order.BANDED[0], *order.FEW):
        assert order.cost(case, "ascending") > 1.4, case
