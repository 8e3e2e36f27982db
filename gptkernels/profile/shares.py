"""Which part of a model each microsecond belongs to, forward and backward, from torch.profiler.

Modules announce themselves while they run, the innermost one counts. A backward function belongs to the part whose
forward operation made it: autograd numbers both alike.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("attention", "projections", "mlp", "norm", "embedding", "loss", "optimizer", "communication", "rest")
PREFIX = "gptkernels."
EVALUATE = "autograd::engine::evaluate_function: "


def part_of(module: nn.Module, inside: str | None) -> str | None:
    """The part that a module is, given the one that it is in; None: whatever that one is."""
    name = type(module).__name__.lower()
    if "norm" in name:
        return "norm"
    if "attention" in name or name.endswith("attn"):
        return "attention"
    if "mlp" in name or "feedforward" in name:
        return "mlp"
    if "embedding" in name:
        return "embedding"
    if inside == "attention" and ("linear" in name or "conv1d" in name):
        return "projections"
    if "block" in name or "layer" in name or isinstance(module, nn.ModuleList):
        return "rest"
    return None


def parts_of(module: nn.Module, inside: str | None = None) -> Iterable[tuple[nn.Module, str]]:
    """Every module that is a part of its own"""
    for child in module.children():
        part = part_of(child, inside)
        if part is not None and part != inside:
            yield child, part
        yield from parts_of(child, part or inside)


@contextmanager
def announced(model: nn.Module):
    """Within, what runs in a part of the model does so under its name; what runs in none of them is the loss."""
    running, handles = [], []

    def enter(part: str) -> Callable:
        def hook(module, args):
            running.append(record_function(PREFIX + part))
            running[-1].__enter__()

        return hook

    def leave(module, args, output):
        running.pop().__exit__(None, None, None)

    for module, part in [(model, "loss"), *parts_of(model)]:
        handles.append(module.register_forward_pre_hook(enter(part)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def profiled(model: nn.Module, step: Callable[[], object], steps: int, device: torch.device):
    """-> (microseconds of one step by part, the profiler, which can write a trace)"""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some builds of torch announce every start and stop
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with announced(model):
        step()
        with profile(activities=activities, acc_events=True) as profiler:
            for _ in range(steps):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    totals = by_part(profiler.events(), device.type == "cuda")
    return {part: totals[part] / steps for part in PARTS if totals[part]}, profiler


def by_part(events: Iterable, on_gpu: bool) -> dict[str, float]:
    """Microseconds of kernels, or of the CPU's own time, by part"""
    totals = dict.fromkeys(PARTS, 0.0)
    makers: dict[int, str] = {}  # autograd's number -> the part that ran when it was given out
    parts: dict[int, str] = {}
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    for event in sorted(host, key=lambda event: (event.time_range.start, -event.time_range.end)):
        parent = event.cpu_parent
        part = parts.get(id(parent), "rest") if parent is not None else "rest"
        if event.name.startswith(PREFIX):
            part = event.name.removeprefix(PREFIX)
        elif event.name.startswith(EVALUATE):
            part = makers.get(event.sequence_nr, "rest")
        elif event.name.startswith(("nccl:", "c10d::", "gloo:")) or "FSDP::all" in event.name:
            part = "communication"
        elif event.sequence_nr >= 0 and part != "rest":
            # The last operation that sees a number before it is given out is the one that makes the function.
            makers[event.sequence_nr] = part
        parts[id(event)] = part if part in totals else "rest"
        totals[parts[id(event)]] += own_time(event, on_gpu)
    return totals


def own_time(event, on_gpu: bool) -> float:
    if not on_gpu:
        return event.self_cpu_time_total
    # The profiler shows a name that was announced as if it were a kernel.
    return sum(kernel.duration for kernel in event.kernels if not kernel.name.startswith(PREFIX))
