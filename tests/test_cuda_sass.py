"""What the machine code of every Hopper kernel must not have: fences of the whole GPU between products, products that
the assembler serialised, more registers than were granted."""

import itertools
import re

import pytest
import sass
from conftest import skip_without_library

from gptkernels import cuda_library, simulator

HOPPER_KERNELS = ("attention_fwd_kernel", "attention_bwd_kernel", "mlp_kernel")


@pytest.fixture(scope="module", autouse=True)
def library():
    reason = simulator.cuda_unavailable() if cuda_library.missing() else None
    if reason:
        skip_without_library(reason)


def multiplying() -> list[sass.Kernel]:
    return [kernel for name in HOPPER_KERNELS for kernel in sass.kernels(name)]


def test_these_are_all_the_kernels_with_products():
    found = [key for key, text in sass.listing("--dump-sass").items() if "HGMMA" in text]
    assert sorted(found) == sorted(kernel.name for kernel in multiplying())
    assert all(sass.kernels(name) for name in HOPPER_KERNELS)


def test_no_fence_of_the_whole_gpu_between_products():
    """One costs about as much as a step of the main loop; barriers within a cluster need none."""
    for kernel in multiplying():
        loops = kernel.multiplying_loops()
        assert loops, f"{kernel.name} multiplies in no loop"
        for loop in loops:
            for one in loop:
                fence = one.name.startswith(("ERRBAR", "CGAERRBAR", "CCTL")) or (
                    one.name.startswith("MEMBAR") and not one.name.endswith(".CTA")
                )
                assert not fence, f"{kernel.name} has {one.name} at {one.address:#x} between products"


def test_registers_after_setmaxnreg_are_within_budget():
    """Used within what is granted; granted within what a CTA is launched with, else a warpgroup waits for ever."""
    usage = sass.listing("--dump-resource-usage")
    launched = {key.split("#")[0]: int(re.search(r"REG:(\d+)", text).group(1)) for key, text in usage.items()}
    for kernel in multiplying():
        budgets = kernel.budgets()
        assert len(budgets) == 2, kernel.name
        for granted, used in budgets:
            assert used <= granted, f"{kernel.name} uses {used} registers where {granted} are granted"
        consumer, producer = max(budgets)[0], min(budgets)[0]
        # Three consumers have 160 each, two have more.
        consumers = 3 if consumer <= 160 else 2
        registers = launched[kernel.name.split("#")[0]]
        assert producer + consumers * consumer <= (consumers + 1) * registers, f"{kernel.name}: {budgets}, {registers}"


def test_the_assembler_serialises_no_product():
    """Where it does, each product is followed by a wait of its own."""
    for kernel in multiplying():
        assert kernel.count("WARPGROUP.DEPBAR") * 2 <= kernel.count("HGMMA"), kernel.name


def test_loads_are_under_way_together():
    """Whole rows, of 16 bits: cross entropy has four loads of 16 bytes at a time, a norm all of a thread's share."""
    aligned = [k for k in sass.kernels("cross_entropy_kernel") if "ELb1EEv" in k.name]
    assert len(aligned) >= 6
    assert all(kernel.loads_under_way >= 4 for kernel in aligned)
    # <T, H, RMSNorm, vectors, residual, whole>: of x, and of the residual beside it.
    for rms, vectors, residual in itertools.product((0, 1), (1, 2, 4), (0, 1)):
        flags = f"Lb{rms}ELi{vectors}ELb{residual}ELb1E"
        found = [k for k in sass.kernels("layer_norm_fwd_kernel") if flags in k.name]
        assert len(found) >= 3
        assert all(k.loads_under_way >= vectors * (1 + residual) for k in found), flags
