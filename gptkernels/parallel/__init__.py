"""One model over many processes, on torch.distributed's own meshes."""

from importlib import import_module
from typing import Any

# Where each name lives. It is imported when it is first used: the models ask this package which shard they have, and
# some of what is here takes models apart.
_HOMES: dict[str, str] = {"tensor": "tensor_parallel"}
__all__: list[str] = ["tensor"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
