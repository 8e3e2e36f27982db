"""What ops share that PyTorch's own ops answer where nothing is gained over them."""

import torch
from torch import Tensor
from torch.nn import Parameter

PLAIN = (Tensor, Parameter)  # and no subclass, which may have ideas of its own


def is_plain(x, dtype: torch.dtype) -> bool:
    """Whether x, which may be anything, is a dense tensor of this dtype on a CPU."""
    return type(x) in PLAIN and x.dtype is dtype and x.is_cpu and x.layout is torch.strided
