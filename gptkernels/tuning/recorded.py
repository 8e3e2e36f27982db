"""gk.tune(model, batch): what a model of the user's calls."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..dispatch import recording
from . import choices, store
from .classes import CallClass
from .model_cases import distinct
from .tune import Tuner, report


def tune(model: nn.Module, batch: Any, *, budget: float = 120.0) -> dict[CallClass, dict]:
    """Runs the model once on `batch` (its argument, or several by name), and measures every op of ours that it calls:
    which backend is fastest on this machine, and with which launch settings. From then on `auto` goes by that, here and
    in other processes of this user.

    budget: seconds in all. Returns what is known by now, by class of calls, and prints what was found. Of the processes
    of a host that torchrun started the first one measures, and the others wait.
    """
    with recording() as calls, torch.no_grad():
        model(**batch) if isinstance(batch, Mapping) else model(batch)
    if not calls:
        raise ValueError("model calls no op of gptkernels: accelerate(model) first")
    device = calls[0][1].first.device
    try:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            with store.writing(device) as writer:
                tuner = Tuner(writer, device.type, budget)
                tuner.run(distinct(calls), Console())
            Console().print(report(tuner.done))
    finally:  # the other processes of this host wait, as long as torch.distributed does
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        choices.reload()
    return store.load(device)
