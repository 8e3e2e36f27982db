"""Builds variants of the CUDA MLP kernels, with edits made to their source, for bfloat16 and the simulator."""

import ctypes
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from parity import assert_parity
from test_mlp import make

import gptkernels as gk
from gptkernels import cuda_build, cuda_library, simulator
from gptkernels.ops.mlp import reference

CPU = SimpleNamespace(device=torch.device("cpu"))
ENTRY = """
#include "mlp/mlp_kernel.cuh"
cudaError_t mlp_fwd(const MlpFwdParams& p, cudaStream_t stream) { return mlp_fwd_launch<__nv_bfloat16>(p, stream); }
cudaError_t mlp_bwd(const MlpBwdParams& p, cudaStream_t stream) { return mlp_bwd_launch<__nv_bfloat16>(p, stream); }
using Address = uintptr_t;
template <typename T> T* pointer(Address address) { return reinterpret_cast<T*>(address); }
"""
C_TYPES = {"Address": ctypes.c_uint64, "int": ctypes.c_int, "int64_t": ctypes.c_int64}


def source() -> str:
    return (cuda_build.source_directory() / "mlp" / "mlp_kernel.cuh").read_text()


def bindings() -> list[tuple[str, str, str]]:
    """-> code, name and parameters of each of the MLP's functions in bindings.cpp"""
    text = (cuda_build.source_directory() / "bindings.cpp").read_text()
    return re.findall(r"^(int (mlp_\w+)_binding\((.*?)\) \{.*?^\})", text, re.M | re.S)


def build(folder: Path, name: str, text: str) -> Path:
    """text: takes the place of mlp_kernel.cuh -> the library"""
    (folder / "mlp").mkdir(exist_ok=True)
    (folder / "mlp" / "mlp_kernel.cuh").write_text(text)
    (folder / f"{name}.cu").write_text(ENTRY + "".join(f'extern "C" {code}\n' for code, _, _ in bindings()))
    command = [cuda_build.find_nvcc(), "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "shared"]
    command += [f"-I{folder}", f"-I{cuda_build.source_directory()}", "-gencode", "arch=compute_90a,code=compute_90a"]
    library = folder / f"{name}.so"
    subprocess.run([*command, str(folder / f"{name}.cu"), "-o", str(library)], check=True)
    return library


def load(library: Path) -> SimpleNamespace:
    """What cuda_library.load() returns, of the MLP alone"""
    loaded, functions = ctypes.CDLL(str(library)), {}
    for _, function, parameters in bindings():
        functions[function] = getattr(loaded, f"{function}_binding")
        functions[function].argtypes = [C_TYPES[p.split()[0]] for p in parameters.split(",")]
    return SimpleNamespace(**functions, error_string=str, archs="90a")


def works(module: SimpleNamespace) -> bool:
    for seed in range(4):
        torch.manual_seed(seed)
        with mock.patch.object(cuda_library, "_find", return_value=module), simulator.use(arch=90, seed=seed):
            try:
                for save in ("preact", "all"):
                    assert_parity(
                        gk.mlp,
                        reference.mlp,
                        make(CPU, 290, 400, 520, torch.bfloat16, residual=True),
                        kwargs={"backend": "cuda", "save": save},
                        reference_kwargs={},
                    )
            except (AssertionError, RuntimeError):
                return False
    return True
