"""What torch.autocast asks of ops that are not torch's own."""

import torch
from torch import Tensor

from .checks import DTYPES


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on this device; None where it is off, as it always is on meta."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast(*tensors):
    """In autocast's dtype, where it is on, as F.linear and F.scaled_dot_product_attention take them."""
    dtype = autocast_dtype(tensors[0].device) if isinstance(tensors[0], Tensor) else None
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in DTYPES else x for x in tensors)
