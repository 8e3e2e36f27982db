"""Bugs planted in what the CUDA RMSNorm has of its own are caught: rows that share a warp, rows in groups, the weight's
offset and the order of rounding. What it shares with LayerNorm, test_layer_norm_mutations.py plants bugs in."""

import ctypes

import ptxemu
import pytest
import torch
from test_layer_norm_mutations import BwdParams as LayerNormBwdParams
from test_layer_norm_mutations import NormFwdParams, compile_kernels, entry

SEEDS = range(4)
GROUPS, GROUP_ROWS, COLUMNS, CTAS = 7, 3, 120, 2
ROWS = GROUPS * GROUP_ROWS
BLOCK = (16, 8, 1)  # row_shape(120): a vector of 8 a thread, two rows to a warp
EPS, OFFSET = 0.1, 1.0
SOURCE = """
#include "layer_norm/layer_norm_fwd_kernel.cuh"
#include "layer_norm/layer_norm_bwd_kernel.cuh"
using T = __nv_bfloat16;
template __global__ void layer_norm_fwd_kernel<T, T, true, 1, false, true>(const RMSNormFwdParams);
template __global__ void layer_norm_bwd_kernel<T, T, true, 1, true>(const RMSNormBwdParams);
"""


class FwdParams(NormFwdParams):
    """RMSNormFwdParams of csrc/layer_norm/layer_norm.h."""

    _fields_ = (
        *(("x_group_stride", ctypes.c_int64), ("group_rows", ctypes.c_int)),
        *(("offset", ctypes.c_float), ("cast_first", ctypes.c_bool)),
    )


class BwdParams(LayerNormBwdParams):
    """RMSNormBwdParams"""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dy_group_stride", "h_group_stride")),
        *(("group_rows", ctypes.c_int), ("offset", ctypes.c_float)),
    )


def is_right(folder, module: ptxemu.Module, seed: int) -> bool:
    """Whether forward has the very bits that its own 1 / rms leads to, and backward what float64 gives."""
    ptx = (folder / "kernels.ptx").read_text()
    torch.manual_seed(0)
    x, dy = torch.randn(2, GROUPS, GROUP_ROWS + 1, COLUMNS).bfloat16()[:, :, :GROUP_ROWS]
    weight = torch.randn(COLUMNS).bfloat16()
    y, grad_h = torch.full((2, GROUPS, GROUP_ROWS, COLUMNS), torch.nan).bfloat16()
    rstd, partials = torch.full((ROWS,), torch.nan), torch.full((CTAS, COLUMNS), torch.nan)
    group = x.stride(0)
    tensors = {"weight": weight.data_ptr(), "rstd": rstd.data_ptr()}
    sizes = {"rows": ROWS, "columns": COLUMNS, "keep_scale": 1}
    rms = {"group_rows": GROUP_ROWS, "offset": OFFSET}
    fwd = FwdParams(
        **{**tensors, **sizes, **rms, "x": x.data_ptr(), "y": y.data_ptr(), "x_stride": COLUMNS, "eps": EPS},
        **{"x_group_stride": group, "cast_first": True},
    )
    bwd = BwdParams(
        **{**tensors, **sizes, **rms, "dy": dy.data_ptr(), "h": x.data_ptr(), "grad_h": grad_h.data_ptr()},
        **{"partials": partials.data_ptr(), "partial_rows": CTAS, "dy_stride": COLUMNS, "h_stride": COLUMNS},
        **{"dy_group_stride": group, "h_group_stride": group},
    )
    with ptxemu.registered(x, dy, weight, y, grad_h, rstd, partials):
        module.launch(entry(module, ptx, "layer_norm_fwd_kernel"), -(-ROWS // 8), BLOCK, [bytes(fwd)], seed=seed)
        module.launch(entry(module, ptx, "layer_norm_bwd_kernel"), CTAS, BLOCK, [bytes(bwd)], seed=seed)

    right_rstd = (x.double().square().mean(-1) + EPS).rsqrt()
    normalised = (x.float() * rstd.view(GROUPS, GROUP_ROWS, 1)).bfloat16()
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    exact = leaves[0] * (leaves[0].square().mean(-1, keepdim=True) + EPS).rsqrt() * (OFFSET + leaves[1])
    grads = torch.autograd.grad(exact, leaves, dy.double())
    return (
        torch.allclose(rstd.double().view_as(right_rstd), right_rstd)
        and torch.equal(y, (normalised.float() * (weight.float() + OFFSET)).bfloat16())
        and torch.allclose(grad_h.double(), grads[0], atol=1e-2, rtol=1e-2)
        and torch.allclose(partials.double().sum(0), grads[1], atol=1e-4, rtol=1e-4)
    )


def test_the_kernels_as_they_are(tmp_path):
    module = compile_kernels(tmp_path, None, SOURCE)
    assert all(is_right(tmp_path, module, seed) for seed in SEEDS)


SHAPE, FWD, BWD = "layer_norm_shape.cuh", "layer_norm_fwd_kernel.cuh", "layer_norm_bwd_kernel.cuh"
EDITS = {
    "rows of a warp added up together": (SHAPE, "offset < threads_per_row ? other : 0.0f", "other"),
    "the group's rows not counted": (SHAPE, "(row - static_cast<int64_t>(group) * group_rows)", "row"),
    "rounded once": (FWD, "if (p.cast_first) value", "if (!p.cast_first) value"),
    "a mean taken off": (FWD, "const float mean = kRms ? 0.0f : variance;", "const float mean = variance;"),
    "no offset backward": (BWD, "if constexpr (kRms) weight += p.offset;", ""),
    "the rows of a warp not added up": (BWD, "offset >= static_cast<int>(blockDim.x)", "offset > 16"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_a_planted_bug_is_caught(tmp_path, name):
    module = compile_kernels(tmp_path, EDITS[name], SOURCE)
    for seed in SEEDS:
        try:
            if not is_right(tmp_path, module, seed):
                return
        except ptxemu.EmulatorError:
            return
    pytest.fail(f"{name}: not caught under {len(SEEDS)} seeds")
