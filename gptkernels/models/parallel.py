"""One process or many: torch's own DistributedDataParallel and FSDP2 behind the few things that training asks for."""

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ..failures import UsageError
from ..parallel.mesh import KINDS, Split, data_mesh, device_mesh, parse
from ..parallel.scope import context
from ..parallel.sequence import shard_sequence
from ..parallel.tensor_parallel import in_model_order, in_rank_order, tensor
from .gpt import GPT

__all__ = ["KINDS", "Workers"]

# After which a process that waits for another one gives up.
TIMEOUT = timedelta(minutes=10)


class Workers:
    """The processes of a run, of which this is number `rank` of `world`; `mesh` has them by dp, cp and tp."""

    def __init__(self, parallel: str = "none", device: str = "auto"):
        split = parse(parallel)
        if split.kind != "none" and "RANK" not in os.environ:
            raise UsageError(
                f"--parallel {parallel} needs torchrun: "
                f"torchrun --nproc-per-node N -m gptkernels ... --parallel {parallel}"
            )
        if split.kind == "none" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UsageError("several processes need --parallel ddp or fsdp: without, each would do the same")
        self.kind = split.kind
        self.rank, self.world = (int(os.environ[x]) for x in ("RANK", "WORLD_SIZE")) if self.kind != "none" else (0, 1)
        self.split: Split = split.fitted(self.world)
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if name == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch sees no GPU here")
        if name == "cuda" and self.kind != "none":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = torch.device(name)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.mesh = None
        if self.kind != "none":
            if not dist.is_initialized():
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=TIMEOUT)
            self.mesh = device_mesh(self.split, self.device.type)

    def close(self) -> None:
        if self.kind != "none" and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def data_parallel(self) -> int:
        """How many shares a batch's rows are cut into"""
        return self.split.sizes()[0]

    @property
    def context_parallel(self) -> int:
        """How many workers cut a sequence between them"""
        return self.split.sizes()[1]

    @property
    def shares(self) -> int:
        """How many workers have data of their own: rows, or a part of a sequence"""
        dp, cp, _ = self.split.sizes()
        return dp * cp

    @property
    def places(self) -> tuple[int, int, int]:
        """This worker's place along dp, cp and tp"""
        dp, cp, tp = (0, 0, 0) if self.mesh is None else self.mesh.get_coordinate()
        return dp, cp, tp

    @property
    def own_data(self) -> int:
        """This worker's number among the shares"""
        dp, cp, _ = self.places
        return dp * self.split.sizes()[1] + cp

    def wrap(self, model: nn.Module, blocks: list[nn.Module], dtype: torch.dtype) -> nn.Module:
        """The model on this worker's device; blocks: what FSDP gathers one at a time."""
        if self.split.tp != 1:
            model = self.cut(model)  # before any device has to hold all of it
        model = model.to(self.device)
        if self.mesh is None:
            return model
        mesh = data_mesh(self.mesh)
        if self.kind == "ddp" and mesh.size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=ids, process_group=mesh.get_group())
        if self.kind == "fsdp":
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            policy = MixedPrecisionPolicy() if dtype == torch.float32 else narrow
            for block in blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)  # in place
        return model

    def cut(self, model: nn.Module, sequence: bool = True) -> nn.Module:
        """Its layers between the workers along tp. sequence: see gptkernels.parallel.tensor"""
        assert self.mesh is not None
        if self.kind == "ddp" and self.shares > 1:
            raise UsageError(f"--parallel {self.split.text} must be fsdp,...: ddp has no room for cut parameters")
        if not isinstance(model, GPT):
            raise UsageError(
                f"--parallel {self.split.text} must have no tp for --task, which tensor parallelism has not"
            )
        try:
            return tensor(model, self.mesh["tp"], sequence=sequence)
        except ValueError as error:
            raise UsageError(f"--parallel {self.split.text}: {error}") from None

    def own_share(self, batch: dict[str, Tensor], layout: str = "contiguous") -> dict[str, Tensor]:
        """This worker's rows of a batch, which all of them have drawn alike, and of those its shard of the tokens.
        batch: (rows, ...), where sequences are cut (rows, tokens)"""
        rows = {name: x.chunk(self.data_parallel)[self.places[0]] for name, x in batch.items()}
        if self.mesh is None or self.context_parallel == 1:
            return rows
        return {name: shard_sequence(x, self.mesh["cp"], 1, layout) for name, x in rows.items()}

    def cutting(self, layout: str) -> AbstractContextManager:
        """In which the model's tokens are this worker's shard"""
        if self.mesh is None or self.context_parallel == 1:
            return nullcontext()
        return context(self.mesh["cp"], layout)

    def micro_batch(self, model: nn.Module, last: bool) -> AbstractContextManager:
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
        weights = get_model_state_dict(model, options=options)
        moments: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
        if "state" in moments:  # as it is on the first worker
            moments["state"] = in_model_order(model, moments["state"])
        return in_model_order(model, weights), moments

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
        options = StateDictOptions(full_state_dict=True)
        if self.split.tp != 1:
            # torch scatters whole tensors to parts of the same size, which those of a vocabulary need not be.
            options = StateDictOptions()
            state = state | {"state": as_parameters(model, in_rank_order(model, state["state"]))}
        set_optimizer_state_dict(model, optimizer, state, options=options)


def as_parameters(model: nn.Module, moments: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """moments: whole, by the names of parameters -> cut as those are, by what each worker has at hand"""

    def part(x: Tensor, like: Tensor) -> Tensor:
        if not x.ndim or not isinstance(like, DTensor):
            return x
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    parameters = dict(model.named_parameters())
    return {name: {key: part(x, parameters[name]) for key, x in each.items()} for name, each in moments.items()}
