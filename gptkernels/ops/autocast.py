"""What torch.autocast asks of ops that are not torch's own."""

import torch
from torch import Tensor

from .checks import DTYPES


def autocast(*tensors):
    """In autocast's dtype, where it is on, as F.linear and F.scaled_dot_product_attention take them."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in DTYPES else x for x in tensors)
