"""What fills a GPU in a training step, by kind."""

from dataclasses import dataclass, fields

from ..models import cost
from ..models.config import GPTConfig
from ..ops.linear_cross_entropy.chunks import chunk_rows
from .model import ModelSize
from .split import Split
from .traffic import Step

# Of CUDA, its libraries and NCCL's buffers; and what the allocator can make use of.
FIXED = 1.5e9
USABLE = 0.95


@dataclass(frozen=True)
class Memory:
    """Bytes"""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    halo: float
    loss: float
    workspace: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def step_memory(step: Step) -> Memory:
    """Of our trainer in mixed precision: float32 weights, gradients and moments, 16 bits in between."""
    config, split = step.config, step.split
    own, tokens = step.size.parameters / split.tensor, int(step.tokens)
    return Memory(
        weights=4 * own / split.shards("weights"),
        gradients=4 * own / split.shards("gradients"),
        optimizer=8 * own / split.shards("optimizer"),
        activations=activation_bytes(config, tokens, split),
        halo=kept_halos(step),
        loss=loss_bytes(config, tokens, split),
        workspace=FIXED + copies(step.size, split) + other_keys(step),
    )


def activation_bytes(config: GPTConfig, tokens: int, split: Split) -> float:
    """tokens: that a GPU has at once. The residual stream is in 16 bits under FSDP, as the weights are, and in float32
    under autocast."""
    stream, layer = cost.activation_elements(config, config.save)
    # What the norms give to the products is whole on every tensor-parallel rank; norms themselves and what is between
    # two products are shared.
    whole = 2 * config.width * config.layers
    own = (layer - whole) / split.tensor + whole
    return tokens * ((4 if autocasts(split) else 2) * stream / split.tensor + 2 * own)


def autocasts(split: Split) -> bool:
    """Whether weights are float32 and cast for each use"""
    return split.sharding != "all" or split.replicas == 1


def kept_halos(step: Step) -> float:
    if step.split.context == 1:
        return 0.0
    return sum(step.halo(window) for window in step.windows() if window is not None)


def other_keys(step: Step) -> float:
    """Keys and values of others that one dense layer has at a time, and their gradients in float32"""
    if step.split.context == 1 or None not in step.windows():
        return 0.0
    others = step.split.context - 1
    # Around a ring one other rank's are there and the next one's on their way.
    return (3 + 3 * step.in_ring) * step.gathered / (others if step.in_ring else 1)


def loss_bytes(config: GPTConfig, tokens: int, split: Split) -> float:
    """A chunk of logits, and the gradients that the loss has made early: of hidden states, in float32 of the head"""
    rows = chunk_rows(tokens)
    vocabulary = config.vocabulary / split.tensor
    head = vocabulary * (config.embedding_rank or config.width)
    return 2 * rows * vocabulary + 2 * tokens * config.width + 4 * head


def copies(size: ModelSize, split: Split) -> float:
    """Of weights in 16 bits, and of gradients on their way"""
    if autocasts(split):
        buckets = 4 * size.parameters if split.replicas > 1 else 0
        return (2 * size.parameters + buckets) / split.tensor
    # FSDP has the block at work and the next one, and what is outside of blocks all the time; a block's gradient is
    # there in 16 bits and, to be summed up, in float32.
    return (2 * (2 * size.block + size.outside) + 6 * size.block + 2 * size.outside) / split.tensor
