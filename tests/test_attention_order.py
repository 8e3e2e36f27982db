"""What a fixed order of the sums of dq costs, in the model of benchmarks/attention_order.py."""

from pathlib import Path

import pytest


@pytest.fixture
def order(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import attention_order

    return attention_order


def test_fixed_orders_cost_little_where_they_are_used(order):
    """Descending with a window, the default there, ascending without; the other way round bands would crawl."""
    for case in order.CASES:
        cost = {name: order.steps(case, name) / order.steps(case, "any") for name in ("ascending", "descending")}
        assert cost["ascending" if case.window is None else "descending"] < (1.1 if case.window is None else 1.04), case
    assert order.steps(order.CASES[0], "ascending") > 3 * order.steps(order.CASES[0], "descending")
