"""How long a step takes: products, attention, bytes through memory, and what communication is not hidden by them."""

from dataclasses import dataclass

from ..models import cost
from .rates import Rates
from .traffic import Step, Transfer, transfers

# Of AdamW per parameter: gradient, weight and moments read in float32, weight and moments written, a 16-bit copy.
OPTIMIZER_BYTES = 30


@dataclass(frozen=True)
class Times:
    """Seconds of a step"""

    compute: float
    attention: float  # of that
    exposed: float  # communication that nothing hides
    bubble: float  # of a pipeline
    optimizer: float
    transfers: tuple[Transfer, ...]

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.bubble + self.optimizer


def step_times(step: Step, rates: Rates) -> Times:
    constants, split = rates.constants, step.split
    compute, attention = computation(step, rates)
    moved = tuple(transfers(step))

    def seconds(when: str) -> float:
        return sum(each.seconds for each in moved if each.when == when) / constants.link

    beside = seconds("data")
    exposed = seconds("waits") + max(0.0, seconds("attention") - attention)
    # Nothing hides more than it lasts itself.
    exposed += max(beside * (1 - constants.hidden), beside - compute - exposed)
    micro = (compute + exposed) / step.times
    return Times(
        compute=compute,
        attention=attention,
        exposed=exposed + seconds("step") * (1 - constants.hidden),
        bubble=micro * (split.pipeline - 1) / split.interleaved,
        optimizer=optimizer_seconds(step, rates),
        transfers=moved,
    )


def optimizer_seconds(step: Step, rates: Rates) -> float:
    split = step.split
    own = step.size.parameters / split.tensor / split.pipeline / split.shards("optimizer")
    return own * OPTIMIZER_BYTES / rates.copy


def computation(step: Step, rates: Rates) -> tuple[float, float]:
    """-> seconds of a step's computation on a GPU, and of its attention in that"""
    config, again = step.config, rates.constants.again
    forward, backward = layer_seconds(step, rates)
    compute, attention = step.config.layers * (forward + backward + step.recompute * again * forward), 0.0
    if config.save == "input" and not step.recompute:
        compute += config.layers * first_products(step, rates)
    windows = step.windows()
    for window in set(windows):
        ahead, back = attention_seconds(step, rates, window)
        attention += windows.count(window) * (ahead + back + step.recompute * again * ahead)
    whole = (compute + attention + head_seconds(step, rates)) / step.split.pipeline
    return whole * step.times, attention / step.split.pipeline * step.times


def layer_seconds(step: Step, rates: Rates) -> tuple[float, float]:
    """Forward and backward of a layer without its attention"""
    config, tokens, split = step.config, step.tokens, step.split
    width, hidden = config.width, config.hidden / split.tensor
    products = [((width + 2 * config.kv_width) / split.tensor, width), (width, width / split.tensor)]
    products += [(width, hidden)]
    forward = sum(rates.product_seconds(tokens, columns, inner) for columns, inner in products)
    forward += first_products(step, rates)
    shared = (1 + 1 / split.tensor) / 2  # of what is in memory's way about half is between a pair of products
    through = [
        2 * tokens * (shared * width * of_width + hidden * of_hidden) / rates.copy
        for of_width, of_hidden in zip(step.stack.width_passes, step.stack.hidden_passes, strict=True)
    ]
    return forward + through[0], 2 * forward / rates.constants.backward + through[1]


def first_products(step: Step, rates: Rates) -> float:
    """Of the MLP, one or two"""
    hidden = step.config.hidden / step.split.tensor
    return (2 if step.config.gated else 1) * rates.product_seconds(step.tokens, hidden, step.config.width)


def attention_seconds(step: Step, rates: Rates, window: int | None) -> tuple[float, float]:
    """Forward and backward of a layer"""
    config, tokens, tensor = step.config, step.tokens, step.split.tensor
    if step.stack.score_bytes is not None:
        scores = tokens * step.length * config.heads / tensor
        forward, backward = (scores * each / rates.copy for each in step.stack.score_bytes)
        products = 4 * scores * config.head_size / rates.product * (1 + rates.half / config.head_size)
        return forward + products, backward + 2 * products
    keys = cost.keys_seen(config, step.windows().index(window), step.length)
    flops = 4 * config.width / tensor * keys * tokens
    forward, backward = rates.dense if window is None else rates.banded
    # Queries and keys are read and the result is written, whatever the window.
    least = 2 * tokens * (2 * config.width + 2 * config.kv_width) / tensor / rates.copy
    return max(flops / forward, least), max(2.5 * flops / backward, 2 * least)


def head_seconds(step: Step, rates: Rates) -> float:
    """Of the head and the loss, forward and backward"""
    vocabulary = step.config.vocabulary / step.split.tensor
    product = rates.product_seconds(step.tokens, vocabulary, step.config.embedding_rank or step.config.width)
    bytes_moved = step.tokens * vocabulary * step.stack.logit_bytes
    return product * (1 + 2 / rates.constants.backward) + bytes_moved / rates.copy
