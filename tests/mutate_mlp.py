"""Removes each wait, fence, barrier and arrival from the CUDA MLP kernels, one at a time, and sees that the simulator
catches it: `python tests/mutate_mlp.py`, a few minutes."""

import argparse
import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_variants import using
from planted import Place, Planted, limit_time, removals, report, serve
from test_gated_mlp import across_the_limits, assert_gated_parity
from test_gated_mlp import make as make_gated
from test_mlp import make

import gptkernels as gk
from gptkernels import cuda_build, simulator
from gptkernels.ops.mlp import reference
from gptkernels.parity import assert_parity

FILES = ("mlp_kernel.cuh", "mlp_epilogue.cuh")
STATEMENT = re.compile(
    r"(?<!auto )\b(mbarrier_wait|mbarrier_arrive_expect|mbarrier_arrive_remote|wgmma_wait<\d>|wgmma_fence|wgmma_commit|"
    r"fence_async_proxy|fence_mbarrier_init|cluster_sync|named_barrier_sync|named_barrier_arrive|bulk_wait_read(?:<\w+>)?|"
    r"bulk_commit|release|boxes\.(?:template )?wait_stored<[^;>]*>|boxes\.wait_loaded|__syncwarp)\([^;{}]*\);"
)
# What may go without a wrong result, by how the source goes on from there, and why.
ONE_BY_ONE = "the simulator runs a warp's lanes together"
HARMLESS = {
    "fence_mbarrier_init();": "the simulator does not check it",
    "__syncwarp();": ONE_BY_ONE,
    "named_barrier_sync(kGroup + group, kWarpgroup); } };": "the group multiplies together before it writes sums again",
}
# Of a processor for each seed: beyond that a variant hangs; one that does not takes one.
CPU_LIMIT_S = 20
CPU = SimpleNamespace(device=torch.device("cpu"))


def run_mlp(library: Path) -> None:
    # Some of what is missing shows under one seed in three.
    for seed in range(16):
        limit_time(CPU_LIMIT_S)
        torch.manual_seed(seed)
        with using(library), simulator.use(arch=90, seed=seed):
            for save, residual in (("preact", True), ("all", False)):
                assert_parity(
                    gk.mlp,
                    reference.mlp,
                    make(CPU, 290, 400, 520, torch.bfloat16, residual=residual),
                    kwargs={"backend": "cuda", "save": save},
                    reference_kwargs={},
                )


def run_gated_mlp(library: Path) -> None:
    """gpt-oss's, which does all that the others do"""
    for seed in range(4):
        limit_time(CPU_LIMIT_S)
        torch.manual_seed(seed)
        tensors = across_the_limits(make_gated(CPU, 290, 136, 264, torch.bfloat16, residual=True))
        with using(library), simulator.use(arch=90, seed=seed):
            for save in ("preact", "all"):
                assert_gated_parity(tensors, "cuda", "gpt_oss", save)


RUNS = {"mlp": run_mlp, "gated_mlp": run_gated_mlp}


def assert_caught(folder: Path, op: str, bugs: dict[str, Place]) -> None:
    """Each of these bugs, where the kernels pass without any"""
    if simulator.cuda_unavailable() or not cuda_build.find_nvcc():
        pytest.skip(simulator.cuda_unavailable() or "nvcc was not found")
    with Planted(folder, op, __file__, {name: (place,) for name, place in bugs.items()}) as planted:
        assert planted.survives(None, "cases")
        assert [name for name in bugs if planted.survives(name, "cases")] == []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=Path, metavar="LIBRARY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, {"cases": RUNS[arguments.serve.stem]})
        return 0
    places, harmless = removals("mlp", FILES, STATEMENT, HARMLESS)
    bugs = {name: (place,) for name, place in places.items()}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        libraries = [stack.enter_context(Planted(folder / op, op, __file__, bugs)) for op in RUNS]
        return report(libraries, dict.fromkeys(places, "cases"), harmless)


if __name__ == "__main__":
    sys.exit(main())
