"""`gptkernels info`: versions, hardware, and which backend of which op runs here, or why not."""

import json
import platform
import subprocess
from argparse import ArgumentParser, Namespace

import torch
from rich.console import Console
from rich.table import Table

from . import __version__, cuda_build, cuda_library, dispatch, simulator
from .ops.attention import attention, decode_attention
from .ops.gated_mlp import gated_mlp
from .ops.layer_norm import add_layer_norm, layer_norm
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.linear_kl_div import linear_kl_div
from .ops.mlp import mlp
from .ops.rms_norm import add_rms_norm, rms_norm
from .ops.rope import rope
from .tuning import choices

AVAILABLE = "available"


def module_version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def driver_version() -> str | None:
    try:
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.split("\n")[0].strip() or None if result.returncode == 0 else None


def gpu_facts(index: int) -> dict:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def samples(device: torch.device) -> dict:
    """A small ordinary call of each op: (op, arguments)."""
    x, weight = torch.zeros(128, 64, device=device, dtype=torch.bfloat16), torch.zeros(64, device=device)
    fc_weight, proj_weight = x.new_zeros(256, 64), x.new_zeros(64, 256)
    q = torch.zeros(1, 2, 16, 64, device=device, dtype=torch.bfloat16)
    return {
        "layer_norm": (layer_norm, (x, weight)),
        "add_layer_norm": (add_layer_norm, (x, x, weight)),
        "rms_norm": (rms_norm, (x, weight)),
        "add_rms_norm": (add_rms_norm, (x, x, weight)),
        "rope": (rope, (q, q, q[0, 0], q[0, 0])),
        "attention": (attention, (q, q, q)),
        "decode_attention": (decode_attention, (q, q, q, torch.full((1,), 16, dtype=torch.int32, device=device))),
        "mlp": (mlp, (x, fc_weight, None, proj_weight, None)),
        "gated_mlp": (gated_mlp, (x, fc_weight, fc_weight, proj_weight)),
        "linear_cross_entropy": (linear_cross_entropy, (x, x, torch.zeros(128, dtype=torch.int64, device=device))),
        "linear_kl_div": (linear_kl_div, (x, x, x, x)),
    }


def backends(device: torch.device) -> dict[str, dict[str, str]]:
    """op -> backend -> "available" or the reason why it is not."""
    found = {}
    for name, (op, arguments) in samples(device).items():
        choices = {backend: dispatch.explain(op, *arguments, backend=backend) for backend in dispatch.BACKENDS}
        found[name] = {
            backend: AVAILABLE if choice.backend else choice.reasons[backend] for backend, choice in choices.items()
        }
    return found


def gather() -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nvcc = cuda_build.find_nvcc()
    return {
        "gptkernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": module_version("triton"),
        "nvcc": f"{cuda_build.toolkit_version(nvcc)} ({nvcc})" if nvcc else None,
        "driver": driver_version(),
        "gpus": [gpu_facts(i) for i in range(torch.cuda.device_count())],
        "cuda_library": cuda_library.missing()
        or f"built for {', '.join(cuda_library.built_archs())} by CUDA " + cuda_library.toolkit_version(),
        "tuned": choices.age(device),
        "simulator": simulator.unavailable() or "installed",
        "ops": backends(device),
    }


def print_backends(console: Console, ops: dict[str, dict[str, str]]) -> None:
    """A table of marks, and each reason once, below it."""
    reasons = dict.fromkeys(reason for found in ops.values() for reason in found.values() if reason != AVAILABLE)
    numbers = {reason: number for number, reason in enumerate(reasons, 1)}
    table = Table("op", *dispatch.BACKENDS, box=None)
    for op, found in ops.items():
        table.add_row(op, *("[green]yes" if r == AVAILABLE else f"no ({numbers[r]})" for r in found.values()))
    console.print(table)
    for reason, number in numbers.items():
        console.print(f"({number}) {reason}", highlight=False, markup=False)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(options: Namespace) -> int:
    facts = gather()
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    console = Console()
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if name == "gpus":
            value = "; ".join(f"{g['name']} (sm_{g['compute_capability'].replace('.', '')})" for g in value)
            value = value or "none that torch sees"
        if name != "ops":
            table.add_row(name.replace("_", " "), str(value or "not found"))
    console.print(table)
    print_backends(console, facts["ops"])
    if not facts["nvcc"] and cuda_library.missing():
        console.print(
            "For the CUDA backend: install the CUDA toolkit (nvcc), then run: gptkernels build", soft_wrap=True
        )
    elif cuda_library.missing() and facts["gpus"]:
        console.print("For the CUDA backend: run gptkernels build", soft_wrap=True)
    return 0
