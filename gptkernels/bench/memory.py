"""How many bytes tensors hold, and how many a forward pass keeps for backward."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def local(x: Tensor) -> Tensor:
    """FSDP's tensors are shares of larger ones."""
    return x.to_local() if hasattr(x, "to_local") else x


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once, however many tensors view it."""
    sizes = {(s := local(x).untyped_storage()).data_ptr(): s.nbytes() for x in tensors}
    return sum(sizes.values())


@contextmanager
def kept_for_backward(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Collects what operations inside save for backward, but for the parameters themselves."""
    own = {local(x).untyped_storage().data_ptr() for x in parameters}
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        if local(x).untyped_storage().data_ptr() not in own:
            kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept
