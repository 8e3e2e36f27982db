"""Finds, loads and calls the compiled CUDA library; says why it is absent."""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from . import cuda_build, hardware

# The numbers that csrc/common/dtype.h gives these types.
DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Wraps each launch with the tensors that it may touch. The simulator, which checks every access, registers them here.
around_launch: Callable[[list[torch.Tensor]], AbstractContextManager] = lambda tensors: nullcontext()  # noqa: E731


class MissingLibraryError(RuntimeError):
    """There is no usable CUDA library; the message says why and how to get one."""


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gptkernels._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache(maxsize=1)
def _find() -> ModuleType | str:
    """The library built from the sources at hand, or why there is none."""
    packaged = importlib.util.find_spec("gptkernels._cuda")
    paths = [Path(packaged.origin)] if packaged else []
    reasons = []
    try:
        paths += cuda_build.cached_libraries()
    except cuda_build.BuildError as error:
        reasons.append(str(error))
    for path in paths:
        try:
            library = _load_file(path)
        except ImportError as error:
            reasons.append(f"{path.name} does not load: {error}")
            continue
        if library.source_hash == cuda_build.source_hash():
            sys.modules["gptkernels._cuda"] = library
            return library
        reasons.append("the library was built from other sources")
    if not paths:
        nvcc = cuda_build.find_nvcc()
        reasons.append("the CUDA library was not built" + ("" if nvcc else ", and nvcc was not found"))
    return "; ".join(reasons) + " (`gptkernels build` builds it where nvcc, ninja and pybind11 are installed)"


def load() -> ModuleType:
    library = _find()
    if isinstance(library, str):
        raise MissingLibraryError(library)
    return library


@hardware.constant_under_compile
def missing() -> str | None:
    """Why there is no library to call, or None."""
    library = _find()
    return library if isinstance(library, str) else None


def unsupported(device: torch.device, only_arch: int | None = None) -> str | None:
    """Why kernels of the library cannot run on this device's tensors, or None. only_arch: 90 for kernels made of
    Hopper's own instructions, which no other GPU has; the others run from 80 on."""
    if device.type != "cuda" and not hardware.is_simulated(device):
        return f"runs on CUDA tensors, not {device.type}"
    arch = hardware.arch(device)
    if arch < 80 or only_arch not in (None, arch):
        wanted = "8.0 or newer" if only_arch is None else f"{only_arch / 10} alone"
        return f"needs compute capability {wanted}, this device has {arch / 10}"
    if only_arch is not None and missing() is None and f"{only_arch}a" not in built_archs():
        return f"the CUDA library was built for {', '.join(built_archs())} only (GPTKERNELS_CUDA_ARCHS)"
    return missing()


@hardware.constant_under_compile
def built_archs() -> list[str]:
    """What the library was compiled for, such as ["80", "90a"]."""
    return load().archs.split(".")


def toolkit_version() -> str:
    """Of the CUDA toolkit that compiled the library, such as 13.0"""
    return f"{load().cuda_version // 1000}.{load().cuda_version % 1000 // 10}"


def not_addressable(x: torch.Tensor) -> str | None:
    """x: (..., D) of 16-bit elements, D contiguous. Why the bulk copy engine cannot read it, or None"""
    # While compiling there is no address to look at; the launchers copy what then turns out to be misaligned.
    if not torch.compiler.is_compiling() and x.data_ptr() % 16:
        return "does not start at a multiple of 16 bytes"
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size > 1 and (stride % 8 or stride == 0):
            return f"has a stride of {stride} elements, which must be a positive multiple of 8"
    return None


def addressable(x: torch.Tensor) -> torch.Tensor:
    """x: (..., D) of 16-bit elements, or a copy of it that the bulk copy engine can read"""
    return x.clone(memory_format=torch.contiguous_format) if x.stride(-1) != 1 or not_addressable(x) else x


def launch(name: str, *args) -> None:
    """Calls the library's `name`: tensors go as addresses (None as 0), the current stream is added at the end."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    device = tensors[0].device
    addresses = [
        value.data_ptr() if isinstance(value, torch.Tensor) else 0 if value is None else value for value in args
    ]
    with hardware.on_device(device), around_launch(tensors):
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        status = getattr(load(), name)(*addresses, stream)
    if status:
        raise RuntimeError(f"{name}: {load().error_string(status)}")
