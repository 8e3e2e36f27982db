"""Finds, loads and calls the compiled CUDA library; says why it is absent."""

import hashlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from pathlib import Path
from types import ModuleType

import torch

from . import cuda_build, hardware

# The numbers that csrc/common/dtype.h gives these types.
DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Wraps each launch with the tensors that it may touch: the simulator, which checks every access, registers them here.
around_launch: Callable[[list[torch.Tensor]], AbstractContextManager] | None = None


class MissingLibraryError(RuntimeError):
    """There is no usable CUDA library; the message says why and how to get one."""


def load_file(path: Path) -> ModuleType:
    # Under a name of its own: of a name that it has seen, pybind11 hands out the module it made before.
    unique = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    loader = ExtensionFileLoader(f"gptkernels.library_{unique}._cuda", str(path))
    spec = ModuleSpec(loader.name, loader, origin=str(path))
    spec.has_location = True  # the module then has a __file__
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@lru_cache(maxsize=1)
def _find() -> ModuleType | str:
    """The library built from the sources at hand, or why there is none."""
    packaged = importlib.util.find_spec("gptkernels._cuda")
    paths = [Path(packaged.origin)] if packaged and packaged.origin else []
    reasons = []
    try:
        paths += cuda_build.cached_libraries()
    except cuda_build.BuildError as error:
        reasons.append(str(error))
    for path in paths:
        try:
            library = load_file(path)
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
    if device.type == "cuda" and torch.version.hip:
        return hardware.ROCM
    arch = hardware.arch(device)
    if arch < 80 or only_arch not in (None, arch):
        wanted = "8.0 or newer" if only_arch is None else f"{only_arch / 10} alone"
        return f"needs compute capability {wanted}, this device has {arch / 10}"
    if only_arch is not None and missing() is None and f"{only_arch}a" not in built_archs():
        return f"the CUDA library was built for {', '.join(built_archs())} only (GPTKERNELS_CUDA_ARCHS)"
    return missing() or driver_too_old()


@hardware.constant_under_compile
def driver_too_old() -> str | None:
    return _driver_too_old()


@lru_cache(maxsize=1)
def _driver_too_old() -> str | None:
    """Why the driver cannot run the library, or None: a driver is good for all minor versions of its CUDA."""
    library, driver = load().cuda_version, load().driver_version()
    if driver // 1000 >= library // 1000:
        return None
    found = f"the driver is for CUDA {version_name(driver)}" if driver else "there is no CUDA driver"
    return (
        f"{found}, the CUDA library was built with {version_name(library)} (update the driver, or build with its CUDA)"
    )


def version_name(version: int) -> str:
    """Of a number of CUDA's own, such as 13.0 of 13000"""
    return f"{version // 1000}.{version % 1000 // 10}"


@hardware.constant_under_compile
def built_archs() -> list[str]:
    """What the library was compiled for, such as ["80", "90a"]."""
    return load().archs.split(".")


def toolkit_version() -> str:
    """Of the CUDA toolkit that compiled the library, such as 13.0"""
    return version_name(load().cuda_version)


def not_addressable(x: torch.Tensor) -> str | None:
    """x: (..., D) of 16-bit elements, D contiguous. Why the bulk copy engine cannot read it, or None"""
    # While compiling there is no address to look at; the launchers copy what then turns out to be misaligned.
    if not torch.compiler.is_compiling() and x.data_ptr() % 16:
        return "does not start at a multiple of 16 bytes"
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size > 1 and (stride % 8 or stride == 0):
            return f"has a stride of {stride} elements, which must be a positive multiple of 8"
    return None


class Copies:
    """Which of several tensors (..., D) of 16-bit elements the bulk copy engine cannot read: they are copied for it."""

    def __init__(self, *tensors: torch.Tensor | None):
        self.which = tuple(x is not None and (x.stride(-1) != 1 or bool(not_addressable(x))) for x in tensors)
        self.any = any(self.which)

    def __call__(self, *tensors: torch.Tensor | None) -> tuple:
        """tensors: those, or like them"""
        if not self.any:
            return tensors
        return tuple(
            x.clone(memory_format=torch.contiguous_format) if x is not None and copy else x
            for x, copy in zip(tensors, self.which, strict=True)
        )


# Words that kernels find as zeros and leave as zeros, by device and stream: launches on a stream follow each other.
_counters: dict[tuple, torch.Tensor] = {}


def zeroed_counters(device: torch.device) -> torch.Tensor:
    """-> (2,) int32 zeros for the next launch on the current stream, which must leave them as zeros"""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A graph may be replayed on any stream: it has its own, which it clears itself.
        return torch.zeros(2, dtype=torch.int32, device=device)
    stream = hardware.current_stream(device)
    # cudaStreamPerThread: one handle for a stream of every thread.
    key = (device.index, stream, threading.get_ident() if stream == 2 else 0)
    counters = _counters.get(key)
    if counters is None:
        counters = _counters[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return counters


class Launch:
    """One of the library's launchers for calls like one before: with all that it takes but the tensors' addresses."""

    def __init__(self, name: str, device: torch.device, tensors: tuple[str, ...], numbers: dict):
        """tensors, numbers: the launcher's parameters, by the names that they have in csrc"""
        self.name, self.device = name, device
        self._run = getattr(load(), name)(tensors, numbers)

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """On the current stream. tensors: in the order of their names, None for those that are absent"""
        with hardware.on_device(self.device):
            try:
                if around_launch is None:
                    return self._run(tensors, hardware.current_stream(self.device))
                with around_launch([x for x in tensors if x is not None]):
                    return self._run(tensors, hardware.current_stream(self.device))
            except RuntimeError as error:
                _counters.clear()  # it may have stopped half-way
                raise RuntimeError(f"{self.name}: {error}") from None
