"""What the Triton kernels do, counted in the simulator: tensor FLOPs, bytes, bank conflicts. No GPU, no clock."""

import pytest
import torch

from gptkernels import simulator
from gptkernels.ops.attention import triton_kernels
from gptkernels.ops.attention.record import AttentionCall
from gptkernels.ops.attention.triton_launch import launch_row
from gptkernels.ops.attention.visibility import sides

if simulator.unavailable():
    pytest.skip(simulator.unavailable(), allow_module_level=True)

# Products of (tile of queries) x (tile of keys) that a kernel makes.
PRODUCTS = {"fwd": 2, "dq": 3, "dkdv": 4}


def count(arch, length, window, head_size=64, causal=True):
    """-> {kernel: stats} of one head's forward and backward"""
    q, k, v, dout = torch.randn(4, 1, 1, length, head_size, dtype=torch.bfloat16)
    stats, kernels = {}, ("attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel")
    with simulator.use(arch) as driver, pytest.MonkeyPatch.context() as patch:
        for name, kernel in zip(PRODUCTS, kernels, strict=True):
            patch.setattr(triton_kernels, kernel, Counting(getattr(triton_kernels, kernel), driver, stats, name))
        left, right = sides(causal, window)
        call = AttentionCall(q, k, v, left=left, right=right, scale=0.125)
        out, lse = triton_kernels.attention_fwd(call)
        triton_kernels.attention_bwd(call, dout, out, lse)
    return stats


class Counting:
    """A kernel that notes what its launches did."""

    def __init__(self, kernel, driver, stats, name):
        self.kernel, self.driver, self.stats, self.name = kernel, driver, stats, name

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.kernel[grid](*args, **options)
            self.stats[self.name] = self.driver.last_launch.stats

        return launch


def tile_flops(kernel, arch, length, window, head_size):
    """Tensor FLOPs when exactly the tiles with a visible pair are computed, whole."""
    launch = launch_row(kernel, arch, 2, head_size, True)
    m, n = launch["BLOCK_M"], launch["BLOCK_N"]
    tiles = 0
    for i in range(0, length, m):
        for j in range(0, length, n):
            last_query, last_key = min(i + m, length) - 1, min(j + n, length) - 1
            tiles += j <= last_query and (window is None or i - last_key < window)
    return tiles * m * n * head_size * 2 * PRODUCTS[kernel]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("window", [None, 64, 100])
def test_only_visible_tiles_are_computed(arch, window):
    stats = count(arch, 384, window)
    for kernel in PRODUCTS:
        exact = tile_flops(kernel, arch, 384, window, 64)
        assert exact <= stats[kernel].tensor_flops <= 1.15 * exact, f"{kernel}: {stats[kernel].tensor_flops} of {exact}"


@pytest.mark.parametrize("arch", [80, 90])
def test_cost_of_a_band_is_linear(arch):
    """Each further 256 tokens cost the same, in arithmetic and in memory; dense attention does not pass this."""
    short, middle, long = (count(arch, length, 64) for length in (256, 512, 768))
    for kernel in PRODUCTS:
        for measure in ("tensor_flops", "global_load_sectors", "global_store_sectors", "warp_instructions"):
            a, b, c = (getattr(s[kernel], measure) + (s[kernel].tma_load_bytes // 32 if "load" in measure else 0)
                       for s in (short, middle, long))  # fmt: skip
            assert abs((c - b) - (b - a)) <= 0.05 * (b - a), f"{kernel}: {measure} {a}, {b}, {c}"


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("arch", [80, 90])
def test_shared_memory_without_conflicts(arch, head_size):
    for window in (None, 100):
        for kernel, stats in count(arch, 256, window, head_size).items():
            assert stats.bank_conflict_factor <= 1.05, (
                f"{kernel}: {stats.bank_conflict_factor:.3f} times the wavefronts"
            )
