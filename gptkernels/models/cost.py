"""What a model costs: FLOPs per token and bytes of memory, by formulas that the tests hold to what is measured.

FLOPs count multiplications and additions of matrix products. A causal query sees (T + 1) / 2 keys on average, a banded
one w - w (w - 1) / (2 T). Training costs three times the forward pass; what is computed twice to save memory is not
counted.
"""

from dataclasses import dataclass

from .config import GPTConfig


def keys_seen(config: GPTConfig, layer: int, length: int, window_aware: bool = True) -> float:
    """How many keys a query of this layer sees on average in a sequence of `length`."""
    window = config.layer_window(layer) if window_aware else None
    window = length if window is None else min(window, length)
    if config.causal:
        return window - window * (window - 1) / (2 * length)
    return 2 * window - 1 - window * (window - 1) / length


def forward_flops_per_token(config: GPTConfig, length: int, window_aware: bool = True) -> float:
    """window_aware=False counts banded layers as dense ones, for comparison with reports that do."""
    attention = 2 * config.width + 2 * config.kv_width  # queries and output, keys and values
    layer = 2 * config.width * (attention + (3 if config.gated else 2) * config.hidden)
    scores = sum(keys_seen(config, i, length, window_aware) for i in range(config.layers))
    rank = config.embedding_rank or config.width
    outside = 2 * config.vocabulary * rank
    if config.embedding_rank:
        outside += 4 * config.width * rank  # into the width and out of it
    return config.layers * layer + 4 * config.width * scores + outside


def training_flops_per_token(config: GPTConfig, length: int, window_aware: bool = True) -> float:
    return 3 * forward_flops_per_token(config, length, window_aware)


def parameter_count(config: GPTConfig) -> int:
    import torch

    from .gpt import GPT

    with torch.device("meta"):
        return GPT(config).parameter_count()


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step, by what fills them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def activation_elements(config: GPTConfig, save: str) -> tuple[int, int]:
    """save: of the MLP, or "torch" where that is PyTorch's own ops -> elements kept for backward per token, (of the
    residual stream's dtype, of the others')"""
    width, kv_width = config.width, config.kv_width
    first = 2 if config.gated else 1  # products of the MLP's first layer
    mlp = {"torch": 2 * first, "all": first + 1, "preact": first, "input": 0}[save] * config.hidden
    # A norm's sum and its output (which the projection and the MLP keep as their input), q, k, v and the attended.
    stream, layer = 2 * width, 4 * width + 2 * kv_width + mlp
    if config.rotary is not None:
        layer += width + kv_width  # q and k as they were, in one tensor with v
    if config.norm == "post":
        stream, layer = 0, stream + layer
    final = 0 if config.norm == "post" else width
    return config.layers * stream + final, config.layers * layer


def training_memory(config: GPTConfig, tokens: int, *, mixed: bool = True, on_cpu: bool = False) -> Memory:
    """Of a step over `tokens` with AdamW: float32 weights, gradients and moments; activations in 16 bits where mixed,
    with the residual stream in float32, as autocast does. Without allocator's overhead and work buffers."""
    parameters = parameter_count(config)
    # The MLPs that keep their hidden layer are PyTorch's on a CPU, but not under autocast.
    save = "torch" if on_cpu and not mixed and config.save != "input" else config.save
    stream, layer = activation_elements(config, save)
    size = 2 if mixed else 4
    # The loss keeps its gradients, of the hidden states and of the head's weight; autocast a copy of the weights.
    loss = tokens * config.width * size + config.vocabulary * (config.embedding_rank or config.width) * 4
    copies = 2 * parameters if mixed else 0
    return Memory(4 * parameters, 4 * parameters, 8 * parameters, tokens * (4 * stream + size * layer) + loss + copies)
