"""Facts about the devices that tensors live on, and what it takes to launch a kernel there."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import TypeVar

import torch

# What the simulator stands in for on CPU tensors: set by gptkernels.simulator, None outside of it.
simulated_arch: int | None = None


F = TypeVar("F", bound=Callable)


def constant_under_compile(function: F) -> F:
    """torch.compiler.assume_constant_result, which would import all of torch._dynamo (as long as torch itself takes)
    only to set this."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def is_simulated(device: torch.device) -> bool:
    return device.type == "cpu" and simulated_arch is not None


@lru_cache
def _properties(index: int):
    return torch.cuda.get_device_properties(index)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


ROCM = "is for NVIDIA's GPUs; this is PyTorch for ROCm, where eager runs"


@constant_under_compile
def arch(device: torch.device) -> int:
    """Compute capability as a number: 80, 89, 90, 100; 0 where there is none, as on AMD's GPUs, which PyTorch
    calls cuda as well."""
    if device.type == "cuda" and not torch.version.hip:
        properties = _properties(_index(device))
        return properties.major * 10 + properties.minor
    return simulated_arch or 0 if device.type == "cpu" else 0


def sm_count(device: torch.device) -> int:
    if device.type == "cuda":
        return _properties(_index(device)).multi_processor_count
    # Few CTAs on the simulator, so that small tests still loop over several tiles in each.
    return 4


@constant_under_compile
def triton_unsupported(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device's tensors, or None."""
    try:
        from triton import knobs
    except ImportError:
        return "triton is not installed (pip install 'triton>=3.6,<3.9')"
    if device.type == "cuda" and torch.version.hip:
        return ROCM
    if device.type == "cuda":
        return None if arch(device) >= 80 else f"needs compute capability 8.0, this GPU has {arch(device) / 10}"
    if is_simulated(device) or (device.type == "cpu" and knobs.runtime.interpret):
        return None
    return f"runs on CUDA tensors, not {device.type} (see gptkernels.simulator for CPU tensors)"


def current_stream(device: torch.device) -> int:
    """Its handle, where launches go"""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


NOTHING = nullcontext()


def on_device(device: torch.device):
    """A context in which `device` is the current one: launches go to the current device, whatever the tensors say."""
    # torch.cuda.current_device() without a look at whether CUDA has been set up, which it has been for the tensors.
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
        return NOTHING
    return torch.cuda.device(device)


# Dense bfloat16 TFLOP/s of the vendor's data sheets, by a part of the device's name; the longer names come first.
DATA_SHEETS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "B200": 2250}


def data_sheet_tflops(device: torch.device) -> float | None:
    """What MFU is a share of, or None for a device without an entry."""
    if device.type != "cuda":
        return None
    name = _properties(_index(device)).name
    return next((float(peak) for part, peak in DATA_SHEETS.items() if part in name), None)
