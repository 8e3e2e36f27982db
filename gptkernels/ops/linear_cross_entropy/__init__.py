from .op import LinearCrossEntropyFunction, linear_cross_entropy, linear_log_probs

__all__ = ["LinearCrossEntropyFunction", "linear_cross_entropy", "linear_log_probs"]
