"""Where a measurement was made: versions, device, commit, and what the driver says of clocks, heat and power.

Everything is read; nothing is ever set.
"""

import os
import platform
import subprocess
from pathlib import Path

import torch

from .. import __version__
from ..info import driver_version, module_version

# Bits of NVML's clock event reasons that mean that the GPU ran slower than it could.
THROTTLES = {
    0x0000000000000004: "power cap",
    0x0000000000000008: "hardware slowdown",
    0x0000000000000020: "software heat limit",
    0x0000000000000040: "hardware heat limit",
    0x0000000000000080: "power brake",
}


class Nvml:
    """The driver's counters of one GPU; answers None where there is no pynvml or no such counter."""

    def __init__(self, device: torch.device):
        self.handle = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self.library = pynvml
            properties = torch.cuda.get_device_properties(device)
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        except Exception:  # absent, too old, or not allowed to look
            self.handle = None

    def ask(self, name: str, *arguments):
        if self.handle is None:
            return None
        try:
            return getattr(self.library, name)(self.handle, *arguments)
        except Exception:  # a counter that this GPU or driver does not have
            return None

    def throttles(self) -> list[str]:
        bits = self.ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = self.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return [name for bit, name in THROTTLES.items() if (bits or 0) & bit]

    def read(self) -> dict:
        power = self.ask("nvmlDeviceGetPowerUsage")
        limit = self.ask("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "sm_mhz": self.ask("nvmlDeviceGetClockInfo", 1),
            "memory_mhz": self.ask("nvmlDeviceGetClockInfo", 2),
            "temperature_c": self.ask("nvmlDeviceGetTemperature", 0),
            "power_w": None if power is None else power / 1000,
            "power_limit_w": None if limit is None else limit / 1000,
            "throttle": self.throttles(),
        }

    def energy_joules(self) -> float | None:
        """Since the driver was loaded."""
        millijoules = self.ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000


def git_state() -> dict:
    """The commit of the checkout that this package runs from, if it does."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout.strip()

    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def versions() -> dict:
    return {
        "gptkernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": module_version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "driver": driver_version() if torch.cuda.is_available() else None,
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_facts(device: torch.device) -> dict:
    if device.type != "cuda":
        return {
            "type": "cpu",
            "name": processor_name(),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / 2**20,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }
