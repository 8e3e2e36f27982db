"""One process or many: torch's own DistributedDataParallel and FSDP2 behind the four things that training asks for."""

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ..failures import UsageError

KINDS = ("none", "ddp", "fsdp")


class Workers:
    """The processes of a run, of which this is number `rank` of `world`."""

    def __init__(self, kind: str = "none", device: str = "auto"):
        if kind not in KINDS:
            raise UsageError(f"--parallel must be one of {', '.join(KINDS)}, not {kind!r}")
        if kind != "none" and "RANK" not in os.environ:
            raise UsageError(
                f"--parallel {kind} needs torchrun: torchrun --nproc-per-node N -m gptkernels ... --parallel {kind}"
            )
        if kind == "none" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UsageError("several processes need --parallel ddp or fsdp: without, each would do the same")
        self.kind = kind
        self.rank, self.world = (int(os.environ[x]) for x in ("RANK", "WORLD_SIZE")) if kind != "none" else (0, 1)
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if name == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch sees no GPU here")
        if name == "cuda" and kind != "none":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = torch.device(name)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if kind != "none" and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def close(self) -> None:
        if self.kind != "none" and dist.is_initialized():
            dist.destroy_process_group()

    def wrap(self, model: nn.Module, blocks: list[nn.Module], dtype: torch.dtype) -> nn.Module:
        """The model on this worker's device; blocks: what FSDP gathers one at a time."""
        model = model.to(self.device)
        if self.kind == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=ids)
        if self.kind == "fsdp":
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            mesh = dist.init_device_mesh(self.device.type, (self.world,))
            narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            policy = MixedPrecisionPolicy() if dtype == torch.float32 else narrow
            for block in blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)  # in place
        return model

    def own_rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each worker's share of a batch, which all of them have drawn alike."""
        return {name: x.chunk(self.world)[self.rank] for name, x in batch.items()}

    def micro_batch(self, model: nn.Module, last: bool):
        """DDP sums the gradients of all workers once per step; FSDP has no room to wait."""
        if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def mean(self, x: Tensor) -> Tensor:
        """x: () -> its mean over the workers"""
        if self.kind != "none":
            x = x.clone()
            dist.all_reduce(x)
            x = x / self.world
        return x

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
        """-> whole state dicts on the CPU, the same for every kind; all workers call it, the first one gets them"""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(model, options=options), get_optimizer_state_dict(model, optimizer, options=options)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
