"""What GPUs say to each other in a step, collective by collective."""

from dataclasses import dataclass

from ..models.config import GPTConfig
from .facts import GPU
from .model import ModelSize
from .split import Split
from .stacks import OURS, Stack

# Context parallelism gathers the keys and values of a dense layer up to so many bytes; larger ones go around in a ring.
RING_ABOVE = 2**28


@dataclass(frozen=True)
class Transfer:
    """Bytes that a GPU receives in a step, and how long its links take, before the share of their rate that is reached.
    when: "data", beside the computation as far as it can be hidden, "step", once at its end, "waits", in its way, or
    "attention", beside the attention of rows that need none of it."""

    name: str
    when: str
    nvlink: float
    network: float
    seconds: float


def transfer(
    name: str, when: str, gpu: GPU, size: int, inner: int, received: float, one_port: bool = False
) -> Transfer:
    """size: of the group; inner: ranks between two neighbours of it; received: bytes of each of its GPUs; one_port: by
    messages between neighbours, not by a collective"""
    inside = min(size, max(1, gpu.per_node // inner))  # ranks of the group in one node
    if size <= inside:
        return Transfer(name, when, received, 0.0, received / gpu.nvlink)
    # NCCL's rings enter a node through every GPU's port that the group has there; of neighbours who take turns the one
    # in the next node makes all others wait.
    rate = gpu.network if one_port else min(gpu.nvlink, inside * gpu.network)
    return Transfer(name, when, received * (inside - 1) / inside, received / inside, received / rate)


def halo_bytes(config: GPTConfig, sequences: int, window: int, length: int, split: Split, pieces: int = 1) -> int:
    """Of the keys and values that a rank of a banded layer gets from others. pieces: of a sequence, that it has"""
    seen = min(pieces * (window - 1), length - length // split.context)
    return 2 * sequences * seen * (config.kv_width // split.tensor) * 2


def gathered_bytes(config: GPTConfig, sequences: int, length: int, split: Split) -> float:
    """Of the keys and values that a rank of a dense layer gets from all others"""
    others = (split.context - 1) / split.context
    return 2 * sequences * length * others * (config.kv_width // split.tensor) * 2


@dataclass(frozen=True)
class Step:
    """A step of a run: what the model, its batch and the split of it are"""

    config: GPTConfig
    size: ModelSize
    length: int  # tokens of a sequence
    micro: int  # sequences that a data-parallel rank has at once
    times: float  # micro-batches
    split: Split
    gpu: GPU
    stack: Stack = OURS
    recompute: bool = False  # every layer, in backward

    @property
    def tokens(self) -> float:
        """That a GPU has at once"""
        return self.micro * self.length / self.split.context

    @property
    def layers(self) -> float:
        """That a GPU computes"""
        return self.config.layers / self.split.pipeline

    @property
    def pieces(self) -> int:
        """Of a sequence that a rank has: where a layer is dense one from each end, so that all have as much to do"""
        return 2 if self.split.context > 1 and None in self.windows() else 1

    def halo(self, window: int) -> int:
        """Bytes for a layer of this window"""
        return halo_bytes(self.config, self.micro, window, self.length, self.split, self.pieces)

    @property
    def gathered(self) -> float:
        """Bytes for a dense layer"""
        return gathered_bytes(self.config, self.micro, self.length, self.split)

    @property
    def in_ring(self) -> bool:
        return self.gathered > RING_ABOVE

    def windows(self) -> list[int | None]:
        """Of each layer, None where it is dense"""
        found = [self.config.layer_window(layer) for layer in range(self.config.layers)]
        return [None if window is None or window >= self.length else window for window in found]


def transfers(step: Step) -> list[Transfer]:
    found = [*data_transfers(step), *tensor_transfers(step), *context_transfers(step), *pipeline_transfers(step)]
    return [each for each in found if each.nvlink or each.network]


def data_transfers(step: Step) -> list[Transfer]:
    split, stack, times = step.split, step.stack, step.times
    ranks, inner = split.replicas, split.tensor
    parameters = step.size.parameters / split.tensor / split.pipeline * (ranks - 1) / ranks

    def one(name: str, when: str, bytes_each: float) -> Transfer:
        return transfer(name, when, step.gpu, ranks, inner, parameters * bytes_each)

    gather, reduce = stack.gather_bytes, stack.reduce_bytes
    if split.sharding == "none":
        return [one("all-reduce of gradients", "step", 2 * reduce)]
    if split.sharding == "optimizer":
        return [one("reduce-scatter of gradients", "step", reduce), one("all-gather of weights", "step", gather)]
    gathers = 2 if split.sharding == "all" else 1
    return [
        one("all-gather of weights", "data", gathers * gather * times),
        one("reduce-scatter of gradients", "data", reduce * times),
    ]


def tensor_transfers(step: Step) -> list[Transfer]:
    """Four products a layer of which two need what the ranks have between them, and their gradients: as all-gathers and
    reduce-scatters around sequence-parallel norms, or as all-reduces, the bytes are the same."""
    tensor = step.split.tensor
    each = 2 * step.tokens * step.config.width * step.stack.tensor_bytes * (tensor - 1) / tensor
    moved = (4 + 2 * step.recompute) * each * step.layers * step.times
    return [transfer("all-gather, reduce-scatter in layers", "waits", step.gpu, tensor, 1, moved)]


def context_transfers(step: Step) -> list[Transfer]:
    split, windows = step.split, step.windows()
    if split.context == 1:
        return []
    # Forward gathers keys and values, backward again, and scatters their gradients; around a ring these travel with
    # them, in float32. A halo is kept, and only its gradients go back.
    dense = windows.count(None) * step.gathered * (4 if step.in_ring else 3) * step.times
    halo = 2 * sum(step.halo(window) for window in windows if window is not None) * step.times
    name, when = ("ring", "attention") if step.in_ring else ("all-gather", "waits")
    around = split.context, split.tensor
    return [
        transfer(f"{name} of keys and values", when, step.gpu, *around, dense, one_port=step.in_ring),
        transfer("halo of banded layers", "attention", step.gpu, *around, halo, one_port=True),
    ]


def pipeline_transfers(step: Step) -> list[Transfer]:
    """Activations to the next stage and their gradients back, each tensor-parallel rank a part"""
    split = step.split
    if split.pipeline == 1:
        return []
    moved = 2 * step.tokens * step.config.width * 2 / split.tensor * split.interleaved * step.times
    return [transfer("activations between stages", "waits", step.gpu, split.pipeline, step.gpu.per_node, moved)]
