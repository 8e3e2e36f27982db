from .op import LinearCrossEntropyFunction, linear_cross_entropy

__all__ = ["LinearCrossEntropyFunction", "linear_cross_entropy"]
