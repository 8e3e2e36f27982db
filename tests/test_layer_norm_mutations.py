"""Bugs planted in the CUDA LayerNorm are caught: each edit of the sources must give a wrong result under some seed.

Runs single kernels from PTX in the simulator, so that each edit compiles in seconds.
"""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from gptkernels import cuda_build, simulator

if simulator.unavailable():
    pytest.skip(simulator.unavailable(), allow_module_level=True)
if not cuda_build.find_nvcc():
    pytest.skip("needs nvcc", allow_module_level=True)

import ptxemu

SEEDS = range(12)
ROWS, COLUMNS, CTAS = 7, 1592, 2
EPS = 0.1
BLOCK = (64, 2, 1)  # row_shape(1592): up to four vectors of 8 a thread, two rows of 2 warps
SOURCE = """
#include "layer_norm/layer_norm_fwd_kernel.cuh"
#include "layer_norm/layer_norm_bwd_kernel.cuh"
template __global__ void layer_norm_fwd_kernel<float, float, false, 4, false, true>(const LayerNormFwdParams);
template __global__ void layer_norm_bwd_kernel<float, float, false, 4, true>(const LayerNormBwdParams);
template __global__ void layer_norm_bwd_reduce_kernel<float>(const LayerNormBwdParams);
"""


class NormFwdParams(ctypes.Structure):
    """NormFwdParams of csrc/layer_norm/layer_norm.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "seed", "y", "h", "rstd")),
        *((name, ctypes.c_int64) for name in ("rows", "x_stride", "residual_stride")),
        ("columns", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("eps", "keep_scale")),
        ("drop_below", ctypes.c_uint32),
        ("x_dtype", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("residual_is_float", "weight_is_float")),
    ]


class FwdParams(NormFwdParams):
    """LayerNormFwdParams"""

    _fields_ = [(name, ctypes.c_void_p) for name in ("bias", "mean")]


class BwdParams(ctypes.Structure):
    """LayerNormBwdParams of csrc/layer_norm/layer_norm.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dy", "dh", "h", "weight", "mean", "rstd", "seed", "grad_h", "grad_x")),
        *((name, ctypes.c_void_p) for name in ("partials", "grad_weight", "grad_bias")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("columns", "partial_rows")),
        *((name, ctypes.c_int64) for name in ("dy_stride", "dh_stride", "h_stride")),
        ("keep_scale", ctypes.c_float),
        ("drop_below", ctypes.c_uint32),
        ("x_dtype", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("h_is_float", "weight_is_float")),
    ]


def compile_kernels(folder: Path, edit: tuple[str, str, str] | None, kernels: str = SOURCE) -> ptxemu.Module:
    """edit: (file of csrc/layer_norm, text in it, its replacement); the text must occur exactly once."""
    overlay = folder / "layer_norm"
    overlay.mkdir()
    for path in (cuda_build.source_directory() / "layer_norm").glob("*.*h"):
        text = path.read_text()
        if edit and edit[0] == path.name:
            assert text.count(edit[1]) == 1, f"{edit[1]!r} occurs {text.count(edit[1])} times in {path.name}"
            text = text.replace(edit[1], edit[2])
        (overlay / path.name).write_text(text)
    source, ptx = folder / "kernels.cu", folder / "kernels.ptx"
    source.write_text(kernels)
    command = [cuda_build.find_nvcc(), "-std=c++17", "-O3", "-arch=compute_90a", "-ptx", f"-I{folder}"]
    command += [f"-I{cuda_build.source_directory()}", str(source), "-o", str(ptx)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ptxemu.Module(ptx.read_text())


def entry(module: ptxemu.Module, ptx: str, name: str) -> str:
    return next(found for found in re.findall(r"\.entry (\w+)", ptx) if name in found)


def is_right(folder: Path, module: ptxemu.Module, seed: int) -> bool:
    """Whether forward, backward and reduction give what float64 gives, as launched for CTAS blocks."""
    ptx = (folder / "kernels.ptx").read_text()
    torch.manual_seed(0)
    x, dy = torch.randn(2, ROWS, COLUMNS) + 2
    weight, bias = torch.randn(2, COLUMNS)
    y, grad_h = torch.full((2, ROWS, COLUMNS), torch.nan)
    mean, rstd = torch.full((2, ROWS), torch.nan)
    partials = torch.full((2, CTAS, COLUMNS), torch.nan)
    grad_weight, grad_bias = torch.full((2, COLUMNS), torch.nan)
    tensors = [x, dy, weight, bias, y, grad_h, mean, rstd, partials, grad_weight, grad_bias]

    def address(**named):
        return {name: tensor.data_ptr() for name, tensor in named.items()}

    fwd = FwdParams(
        **address(x=x, weight=weight, bias=bias, y=y, mean=mean, rstd=rstd),
        **{
            "rows": ROWS,
            "columns": COLUMNS,
            "x_stride": COLUMNS,
            "eps": EPS,
            "keep_scale": 1,
            "weight_is_float": True,
        },
    )
    bwd = BwdParams(
        **address(dy=dy, h=x, weight=weight, mean=mean, rstd=rstd, grad_h=grad_h, partials=partials),
        **address(grad_weight=grad_weight, grad_bias=grad_bias),
        **{"rows": ROWS, "columns": COLUMNS, "partial_rows": CTAS, "dy_stride": COLUMNS, "h_stride": COLUMNS},
        **{"keep_scale": 1, "h_is_float": True, "weight_is_float": True},
    )
    with ptxemu.registered(*tensors):
        module.launch(entry(module, ptx, "layer_norm_fwd_kernel"), -(-ROWS // 2), BLOCK, [bytes(fwd)], seed=seed)
        module.launch(entry(module, ptx, "layer_norm_bwd_kernel"), CTAS, BLOCK, [bytes(bwd)], seed=seed)
        reduce = entry(module, ptx, "layer_norm_bwd_reduce_kernel")
        module.launch(reduce, (-(-COLUMNS // 32), 2, 1), (32, 32, 1), [bytes(bwd)], seed=seed)

    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.nn.functional.layer_norm(leaves[0], (COLUMNS,), *leaves[1:], EPS)
    expected_grads = torch.autograd.grad(expected, leaves, dy.double())
    pairs = zip((y, grad_h, grad_weight, grad_bias), (expected, *expected_grads), strict=True)
    return all(torch.allclose(got.double(), right, atol=1e-4, rtol=1e-4) for got, right in pairs)


def test_the_kernels_as_they_are(tmp_path):
    module = compile_kernels(tmp_path, None)
    assert all(is_right(tmp_path, module, seed) for seed in SEEDS)


SHAPE, FWD, BWD = "layer_norm_shape.cuh", "layer_norm_fwd_kernel.cuh", "layer_norm_bwd_kernel.cuh"
EDITS = {
    "no barrier before reading the warps' sums": (SHAPE, "= 0.0f;\n    }\n    __syncthreads();", "= 0.0f;\n    }"),
    "no barrier after reading the warps' sums": (SHAPE, "    __syncthreads();\n}\n\n// Where", "}\n\n// Where"),
    "no barrier in the reduction": (BWD, "= sum;\n    __syncthreads();", "= sum;"),
    "a warp missing from the sum": (SHAPE, "warp < warps;", "warp < warps - 1;"),
    "a lane missing from the sum": (SHAPE, "int offset = 16; offset > 0;", "int offset = 16; offset > 1;"),
    "variance of padding": (FWD, "inside(column, j) ? h[i][j] - mean : 0.0f", "h[i][j] - mean"),
    "x_hat off": (BWD, "(h[i][j] - mean) * rstd;", "(h[i][j] - mean) * rstd + 1.0f;"),
    "mean of another row": (BWD, "p.mean[row] : 0.0f", "p.mean[first ? row - 1 : row] : 0.0f"),
    "eps outside of the root": (FWD, "rsqrtf(variance + p.eps)", "rsqrtf(variance) + p.eps"),
    "no barrier between rows of a partial sum": (BWD, "__syncthreads();\n        if (threadIdx.y", "if (threadIdx.y"),
    "a row missing from a partial sum": (BWD, "grads[i][j] + before[j]", "grads[i][j]"),
    "rows and columns mixed up": (BWD, "sums[threadIdx.x][threadIdx.y];", "sums[threadIdx.y][threadIdx.x];"),
    "rows past the end read": (BWD, "row < p.rows ? p.columns : 0", "p.columns"),
    "a vector too few": (SHAPE, "i < kVectors;", "i < kVectors - 1;"),
    "one partial row too few": (BWD, "row < p.partial_rows;", "row < p.partial_rows - 1;"),
    "bias gradient from the weight's partials": (BWD, "(blockIdx.y) * p.partial_rows", "(0) * p.partial_rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_a_planted_bug_is_caught(tmp_path, name):
    module = compile_kernels(tmp_path, EDITS[name])
    for seed in SEEDS:
        try:
            if not is_right(tmp_path, module, seed):
                return
        except ptxemu.EmulatorError:
            return
    pytest.fail(f"{name}: not caught under {len(SEEDS)} seeds")
