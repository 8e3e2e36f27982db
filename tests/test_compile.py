"""Every launch of the Triton LayerNorm and RMSNorm and what nvcc made of the CUDA kernels: no spills, wide loads."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from compile_gate import assert_within_limits, compiled_launches, tool
from conftest import skip_without_library

from gptkernels import cuda_library, simulator
from gptkernels.ops.layer_norm import triton_kernels
from gptkernels.ops.layer_norm.record import LayerNormCall
from gptkernels.ops.rms_norm import triton_kernels as rms_norm_kernels
from gptkernels.ops.rms_norm.record import RMSNormCall

if simulator.unavailable():
    pytest.skip(simulator.unavailable(), allow_module_level=True)

# (x, residual, dropout); each launch row is compiled with the first and with one of the others in turn
VARIANTS = [
    (torch.bfloat16, torch.bfloat16, 0.0),
    (torch.float32, torch.float32, 0.0),
    (torch.float16, torch.float32, 0.0),
    (torch.bfloat16, torch.bfloat16, 0.1),
]
ROWS = sorted({*triton_kernels.FWD_LAUNCH, *triton_kernels.BWD_LAUNCH})


def launch_layer_norm(columns: int, dtype: torch.dtype, residual_dtype: torch.dtype, dropout: float) -> None:
    x, dy = torch.empty(2, 64, columns, dtype=dtype)
    residual, dh = torch.empty(2, 64, columns, dtype=residual_dtype)
    weight, bias = torch.empty(2, columns, dtype=dtype)
    mean, rstd = torch.empty(2, 64)
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    triton_kernels.layer_norm_fwd(LayerNormCall(x, residual, weight, bias, seed, 1e-5, dropout))
    backward = LayerNormCall(residual, None, weight, None, seed, 1e-5, dropout)
    triton_kernels.layer_norm_bwd(backward, dy, dh, mean, rstd, True, True)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("columns", ROWS)
def test_triton_layer_norm(arch, columns):
    with compiled_launches(arch) as launches:
        for variant in (VARIANTS[0], VARIANTS[1 + ROWS.index(columns) % 3]):
            launch_layer_norm(columns, *variant)
    kernels = {launch.kernel for launch in launches}
    assert kernels == {"layer_norm_fwd_kernel", "layer_norm_bwd_kernel", "layer_norm_bwd_reduce_kernel"}
    for launch in launches:
        assert_within_limits(launch)
        # A thread with fewer than 8 elements of a short row has no 16 bytes to load at once.
        if columns >= 1024 and launch.kernel != "layer_norm_bwd_reduce_kernel":
            assert re.search(r"\bld\.global\S*\.v[48]\.b32", launch.ptx), launch.kernel


def library_or_skip():
    reason = cuda_library.missing() if torch.version.cuda else simulator.cuda_unavailable()
    if reason:
        skip_without_library(reason)
    return cuda_library.load()


def resource_usage(path: str, name: str) -> list[tuple[str, int, int]]:
    """(function, registers, stack bytes) of every kernel in the library whose name contains `name`."""
    text = subprocess.run(
        [str(tool("cuobjdump")), "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", text)
    return [(function, int(registers), int(stack)) for function, registers, stack in found if name in function]


def launch_rms_norm(columns: int, dtype: torch.dtype, residual_dtype: torch.dtype, dropout: float) -> None:
    """With a residual, and alone: short rows, which heads have, in groups"""
    x, dy = torch.empty(2, 64, columns, dtype=dtype)
    residual, dh = torch.empty(2, 64, columns, dtype=residual_dtype)
    weight, rstd = torch.empty(columns, dtype=dtype), torch.empty(64)
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    options = 1e-6, 0.0, True, dropout
    rms_norm_kernels.rms_norm_fwd(RMSNormCall(x, residual, weight, seed, *options))
    rms_norm_kernels.rms_norm_bwd(RMSNormCall(residual, None, weight, seed, *options), dy, dh, rstd, True)
    alone = torch.empty(32, 3, columns, dtype=dtype)[:, :2] if columns <= 256 else x
    call = RMSNormCall(alone, None, weight, None, 1e-6, 1.0, False, 0.0)
    rms_norm_kernels.rms_norm_fwd(call)
    rms_norm_kernels.rms_norm_bwd(call, alone, None, rstd, True)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_triton_rms_norm(arch, dtype):
    """The shortest rows, the longest that stay in registers, and those that do not"""
    with compiled_launches(arch) as launches:
        for columns in (64, 128, 8192) if dtype == torch.bfloat16 else (256, 65536):
            launch_rms_norm(columns, dtype, dtype, 0.0)
    for launch in launches:
        assert_within_limits(launch)


# How many there are of both norms; cross entropy: with aligned rows and without, for each dtype.
@pytest.mark.parametrize(("name", "count"), [("layer_norm", 2 * 102), ("cross_entropy", 3 * 2 * 2)])
def test_cuda_resources(name, count):
    usage = resource_usage(library_or_skip().__file__, name)
    assert len(usage) == count * len(cuda_library.built_archs())
    assert [function for function, _, stack in usage if stack] == []


# Of aligned rows: the norms' last flag forward, the one after the vectors backward, and cross entropy's only one.
MOVES_16_BYTES = r"layer_norm_fwd_kernel\S*Lb1EEv|layer_norm_bwd_kernelI\S*?Li\d+ELb1ELb|cross_entropy_kernel\S*Lb1EEv"


def test_cuda_kernels_move_16_bytes():
    """In their PTX, whose vectors the assembler neither makes nor splits."""
    path = library_or_skip().__file__
    ptx = subprocess.run([str(tool("cuobjdump")), "--dump-ptx", path], capture_output=True, text=True, check=True)
    moving = 0
    for body in re.split(r"\.entry ", ptx.stdout)[1:]:
        name = body.split("(", 1)[0]
        if re.search(MOVES_16_BYTES, name):
            moving += 1
            assert re.search(r"\bld\.global\S*\.v4\.(b|u|f)32", body), f"{name} has no 16-byte loads"
            assert re.search(r"\bst\.global\S*\.v4\.(b|u|f)32", body), f"{name} has no 16-byte stores"
    assert moving == (2 * 52 + 2 * 3) * len(cuda_library.built_archs())


def test_cuda_ptx_assembles_for_blackwell():
    """The PTX in the library is what newer GPUs get."""
    path = library_or_skip().__file__
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([str(tool("cuobjdump")), "--extract-ptx", "all", path], cwd=folder, capture_output=True)
        modules = [p for p in Path(folder).glob("*.ptx") if re.search(r"^\.target sm_80\b", p.read_text(), re.M)]
        assert any("layer_norm_fwd_kernel" in p.read_text() for p in modules)
        ptxas = tool("ptxas-blackwell") if tool("ptxas-blackwell").exists() else tool("ptxas")
        for module in modules:
            command = [str(ptxas), "--gpu-name=sm_100", str(module), "-o", str(module.with_suffix(".cubin"))]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
