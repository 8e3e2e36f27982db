"""The cost model of the Hopper attention kernels: close to what is published of the kernels it is fitted to."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def model():
    path = Path(__file__).parents[1] / "benchmarks" / "attention_model.py"
    spec = importlib.util.spec_from_file_location("attention_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_is_near_the_published_figures(model, direction):
    errors = [abs(error) for error in model.errors(direction, model.fit(direction)).values()]
    assert sum(errors) / len(errors) < 0.08
    assert max(errors) < 0.21


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 700])
@pytest.mark.parametrize("tokens", [512, 1000])
def test_counts_what_a_mask_shows(model, backward, window, tokens):
    kernel = model.Kernel("any", 64, 192, 128, backward, 0)
    own, other = (kernel.n, kernel.m) if backward else (kernel.m, kernel.n)
    seen = {(i, j) for i in range(tokens) for j in range(max(0, i - (window or tokens) + 1), i + 1)}
    visited = {((j // own, i // other) if backward else (i // own, j // other)) for i, j in seen}
    assert model.blocks_and_pairs(kernel, tokens, True, window) == (-(-tokens // own), len(visited), len(seen))


def test_counts_products_in_full(model):
    """No shape may cost fewer cycles than its FLOPs take, 4 or 10 per pair of a query and a key and column."""
    for (direction, head), kernel in model.OURS.items():
        flops = (10 if direction == "bwd" else 4) * kernel.m * kernel.n * head
        assert sum(2 * r * c * d for r, c, d, _ in kernel.products) == flops
        assert kernel.tensor >= flops / model.FLOPS_PER_CYCLE


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
