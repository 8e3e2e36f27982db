from .decode import decode_attention
from .op import AttentionFunction, attention

__all__ = ["AttentionFunction", "attention", "decode_attention"]
