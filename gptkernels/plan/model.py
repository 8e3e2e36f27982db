"""How large a model is, in the parts that are sharded and gathered one by one."""

from dataclasses import dataclass, replace

from ..models import cost
from ..models.config import GPTConfig


@dataclass(frozen=True)
class ModelSize:
    """Parameters"""

    block: int
    blocks: int  # that have weights of their own
    outside: int  # embeddings, head and last norm

    @property
    def parameters(self) -> int:
        return self.block * self.blocks + self.outside


def model_size(config: GPTConfig) -> ModelSize:
    one = cost.parameter_count(replace(config, layers=1))
    block = cost.parameter_count(replace(config, layers=2, share_layers=False)) - one
    return ModelSize(block, 1 if config.share_layers else config.layers, one - block)
