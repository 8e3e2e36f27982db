"""The cases of `gptkernels bench` under pytest-benchmark, for its statistics, histories and comparisons:

    pytest benchmarks/bench_ops.py [--suite quick|headline|full] [--benchmark-json FILE] [-k attention]

A call ends when the device is done with it, so a time here has the host's share in it; `gptkernels bench` tells the two
apart. Each contender is compared with the float64 reference before it is timed.
"""

import time

import pytest
import torch

from gptkernels import dispatch
from gptkernels.bench import measure, peers, suites, truth

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronised_clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_generate_tests(metafunc):
    suite = metafunc.config.getoption("--suite")
    combinations = [
        pytest.param(case, which, contender, id=f"{case.op} {case.label} {case.dtype}-{which}-{contender.name}")
        for case in suites.suite(suite, DEVICE)
        for contender in peers.chosen(case, DEVICE, (), None)
        if contender.kind != "peer" or contender.missing() is None
        for which in case.passes
    ]
    metafunc.parametrize(("case", "which", "contender"), combinations)


@pytest.mark.benchmark(timer=synchronised_clock, warmup=False)
def test_speed(benchmark, case, which, contender):
    benchmark.group = f"{case.op} {case.label} {case.dtype} {which}"
    benchmark.extra_info |= {"flops": case.flops(which), "bytes": case.bytes(which)}
    tensors = case.tensors(DEVICE, 0, truth.wants_gradients(case))
    try:
        call = contender.make(case, DEVICE)
        if contender.kind != "yardstick":
            facts = truth.truth_of(case, tensors)
            ours = contender.kind == "ours"
            benchmark.extra_info["error_ratio"] = truth.check(case, call, tensors, facts, ours)
    except (peers.UnfitError, dispatch.UnsupportedError) as error:
        pytest.skip(str(error).splitlines()[-1].strip())
    thunk = measure.make_thunk(call, case, which, tensors)
    benchmark.pedantic(thunk, rounds=10, warmup_rounds=2)
