"""How the GPUs of a run share its work."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..models.config import GPTConfig
from .facts import GPU

# What each data-parallel GPU holds a share of instead of all: "all" is FSDP, "none" DDP. The other two are known for
# published runs' sake.
SHARDINGS = ("none", "optimizer", "gradients", "all")


@dataclass(frozen=True)
class Split:
    """Ranks are numbered with the tensor dimension innermost, then context, data and pipeline."""

    data: int = 1
    tensor: int = 1
    context: int = 1
    sharding: str = "all"
    pipeline: int = 1  # only in published runs: our trainer has none
    interleaved: int = 1  # stages that each GPU of a pipeline has

    @property
    def gpus(self) -> int:
        return self.data * self.tensor * self.context * self.pipeline

    @property
    def replicas(self) -> int:
        """GPUs that have the same part of the weights, and sum up its gradient: FSDP shards over these."""
        return self.data * self.context

    def shards(self, what: str) -> int:
        """what: "weights", "gradients" or "optimizer" -> over how many GPUs those are sharded"""
        whole = {"weights": ("all",), "gradients": ("all", "gradients"), "optimizer": SHARDINGS[1:]}[what]
        return self.replicas if self.sharding in whole else 1

    @property
    def parallel(self) -> str:
        """As `gptkernels train --parallel` takes it"""
        parts = [] if self.replicas == 1 else ["fsdp" if self.sharding == "all" else "ddp"]
        parts += [f"cp={self.context}"] * (self.context > 1) + [f"tp={self.tensor}"] * (self.tensor > 1)
        return ",".join(parts) or "none"


def powers(most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= 2


def splits(gpus: int, gpu: GPU) -> Iterator[Split]:
    """All that our trainer knows, with tensor parallelism inside a node, where its links are"""
    for tensor in powers(min(gpus, gpu.per_node)):
        for context in powers(gpus // tensor):
            data, rest = divmod(gpus, tensor * context)
            if rest:
                continue
            yield Split(data, tensor, context, "all")
            if data * context > 1:
                yield Split(data, tensor, context, "none")


def does_not_fit(config: GPTConfig, length: int, split: Split) -> str | None:
    """Why the model cannot be cut so, or None"""
    kv_heads = config.kv_heads or config.heads
    if config.heads % split.tensor or kv_heads % split.tensor:
        return f"tp={split.tensor} must divide the {config.heads} heads and {kv_heads} of keys and values"
    if config.hidden % split.tensor:
        return f"tp={split.tensor} must divide the MLP's width of {config.hidden}"
    pieces = 2 * split.context if split.context > 1 else 1
    if length % (pieces * split.tensor):
        return f"cp={split.context}, tp={split.tensor} must cut the {length} tokens of a sequence into equal pieces"
    return None
