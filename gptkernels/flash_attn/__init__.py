"""flash-attn's functions, by their names and with their arguments in their order, on gptkernels' attention:

    from gptkernels.flash_attn import flash_attn_func        # was: from flash_attn import flash_attn_func

Tensors are laid out as there, (batch, tokens, heads, head size), and seen as (batch, heads, tokens, head size) without
a copy. What an argument means there it means here, on every device and in float32 too; the log-sum-exp has gradients,
and is -inf (not inf) for queries that see no key.
"""

from .functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .kvcache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
