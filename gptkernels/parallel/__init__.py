"""One model over many processes, on torch.distributed's own meshes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .scope import context
    from .sequence import gather_sequence, shard_sequence
    from .tensor_parallel import shard, tensor

# Where each name lives, in modules of other names: importing one would put it in the name's place. It is
# imported when it is first used: the models ask this package which shard they have, and some of it takes them apart.
_HOMES = {
    "context": "scope",
    "gather_sequence": "sequence",
    "shard": "tensor_parallel",
    "shard_sequence": "sequence",
    "tensor": "tensor_parallel",
}
__all__ = ["context", "gather_sequence", "shard", "shard_sequence", "tensor"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
