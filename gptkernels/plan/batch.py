"""How large a batch pays: the gradient noise scale, and what lies on either side of it."""

from dataclasses import dataclass

from ..models.config import GPTConfig
from .facts import read
from .model import ModelSize


@dataclass(frozen=True)
class Cost:
    """Of training to some loss in batches of one size, beside the fewest steps and the fewest tokens that reach it"""

    batch: float  # tokens
    steps: float  # S / S_min
    tokens: float  # E / E_min


def cost_of(batch: float, critical: float) -> Cost:
    return Cost(batch, 1 + critical / batch, 1 + batch / critical)


def critical_batch(loss: float) -> float:
    """Tokens, at a loss in nats per token"""
    facts = read("facts.json")["batch"]
    return facts["b_star_tokens"] / loss ** (1 / facts["alpha_b"])


def expected_loss(config: GPTConfig, size: ModelSize, tokens: float) -> float:
    """Kaplan's L(N, D), whose N leaves embeddings out"""
    facts = read("facts.json")["batch"]
    parameters = size.block * config.layers
    of_size = (facts["n_c"] / parameters) ** (facts["alpha_n"] / facts["alpha_d"])
    return (of_size + facts["d_c"] / tokens) ** facts["alpha_d"]
