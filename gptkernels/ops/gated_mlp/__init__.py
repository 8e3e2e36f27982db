from .op import GatedMlpFunction, gated_mlp

__all__ = ["GatedMlpFunction", "gated_mlp"]
