"""How each part of our GPT is cut between ranks: torch's ParallelStyles, which parallelize_module applies.

Every parameter becomes a DTensor: cut where a rank needs only a part, the same on all ranks elsewhere. In a forward
pass each rank computes on its own parts, as plain tensors, with the very modules that one process has.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..models.gpt import Block, Embedding, MaskedHead
from ..nn import CausalSelfAttention, GatedMLP
from .tensor_collectives import Once, Ranks, Share
from .vocabulary import Vocabulary, embedded

# Where a packed projection keeps which rows of one process's it has in which place, and in which dimension
ORDER = "_gptkernels_rows"


class OwnParameters:
    """This rank's parts of a module's parameters. A parameter that all ranks have got a gradient of its own on each of
    them, to be summed, where it works on cut rows, or, those in `of_heads`, on cut heads. once: what is added to one
    rank's part of a sum only"""

    def __init__(
        self,
        ranks: Ranks,
        module: nn.Module,
        *,
        on_rows: bool = True,
        of_heads: tuple[str, ...] = (),
        once: tuple[str, ...] = (),
    ):
        self.ranks = ranks
        self.places = [
            (owner, key, f"{path}.{key}".lstrip("."))
            for path, owner in module.named_modules()
            for key in owner._parameters
            if owner._parameters[key] is not None
        ]
        self.on_rows, self.of_heads, self.once = on_rows, of_heads, once

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the module has its parts as plain tensors."""
        before = [owner._parameters[key] for owner, key, _ in self.places]
        parts = [x.to_local() if isinstance(x, DTensor) else x for x in before]
        if torch.is_grad_enabled():
            places = [
                i for i, x in enumerate(before) if parts[i].requires_grad and self.is_summed(self.places[i][2], x)
            ]
            for i, part in zip(places, Share.apply(self.ranks, *(parts[i] for i in places)), strict=True):
                parts[i] = part
        for (owner, key, path), part in zip(self.places, parts, strict=True):
            owner._parameters[key] = Once.apply(part) if path in self.once and self.ranks.rank else part
        try:
            yield
        finally:
            for (owner, key, _), parameter in zip(self.places, before, strict=True):
                owner._parameters[key] = parameter

    def is_summed(self, path: str, parameter: Tensor) -> bool:
        if isinstance(parameter, DTensor) and parameter.placements[-1] != Replicate():
            return False
        return path in self.of_heads or (self.on_rows and self.ranks.cut)


def distribute(
    module: nn.Module,
    mesh: DeviceMesh,
    placements: dict[str, Placement],
    ties: dict[int, nn.Parameter] | None = None,
) -> None:
    """placements: of the parameters, by their names in the module, that are not the same on all ranks; ties: what those
    of other modules, by id, have become"""
    ties = {} if ties is None else ties
    for path, owner in module.named_modules():
        for key, parameter in list(owner._parameters.items()):
            if parameter is None or isinstance(parameter, DTensor):
                continue
            if id(parameter) not in ties:
                placement = placements.get(f"{path}.{key}".lstrip("."), Replicate())
                cut = distribute_tensor(parameter.detach(), mesh, [placement])
                ties[id(parameter)] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
            owner._parameters[key] = ties[id(parameter)]


def replace_forward(module: nn.Module, forward: Callable) -> None:
    """forward: takes the one that it replaces, and what that takes"""
    module.forward = functools.partial(forward, module.forward)


def packed_order(heads: int, kv_heads: int, size: int, ranks: int) -> Tensor:
    """Which rows of a packed projection, queries, keys and values of all heads, each rank in turn has, packed alike:
    ((heads + 2 kv_heads) size,)"""
    q, k, v = (heads * size, kv_heads * size, kv_heads * size)
    rows = torch.arange(q + k + v).split((q, k, v))
    return torch.cat([part.view(ranks, -1) for part in rows], 1).flatten()


class HeadsStyle(ParallelStyle):
    """Attention of some of the heads, and the output projection's rows of weight that read those."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, CausalSelfAttention)
        ranks, size = self.ranks, self.ranks.size
        order = packed_order(module.heads, module.kv_heads, module.head_size, size)
        for name, parameter in list(module.qkv._parameters.items()):
            if parameter is not None:
                packed = nn.Parameter(parameter.detach()[order.to(parameter.device)], parameter.requires_grad)
                module.qkv._parameters[name] = packed
        setattr(module.qkv, ORDER, (order, 0))
        distribute(module, device_mesh, {"qkv.weight": Shard(0), "qkv.bias": Shard(0), "out.weight": Shard(1)})
        module.heads, module.kv_heads = module.heads // size, module.kv_heads // size

        def attend(forward: Callable, x: Tensor, **context) -> Tensor:
            with ranks.drawing(own=True):
                return forward(ranks.enter(x), **context)

        def project(_, x: Tensor) -> Tensor:
            return ranks.leave(F.linear(x, module.out.weight), module.out.bias)

        replace_forward(module, attend)
        replace_forward(module.out, project)
        return module


class HiddenStyle(ParallelStyle):
    """An MLP, gated or not, of some of the hidden columns."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = self.ranks
        first = ("gate", "up") if isinstance(module, GatedMLP) else ("fc",)
        columns: dict[str, Placement] = {f"{name}.{key}": Shard(0) for name in first for key in ("weight", "bias")}
        last_name = "down" if isinstance(module, GatedMLP) else "proj"
        distribute(module, device_mesh, {**columns, f"{last_name}.weight": Shard(1)})
        last: nn.Module = getattr(module, last_name)

        def forward(whole: Callable, x: Tensor, residual: Tensor | None = None) -> Tensor:
            bias = last._parameters["bias"]
            last._parameters["bias"] = None  # added once, to the sum
            try:
                out = whole(ranks.enter(x))
            finally:
                last._parameters["bias"] = bias
            out = ranks.leave(out, bias)
            return out if residual is None else out + residual

        replace_forward(module, forward)
        return module


class BlockStyle(ParallelStyle):
    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Block)
        HeadsStyle(self.ranks)._apply(module.attention, device_mesh)
        HiddenStyle(self.ranks)._apply(module.mlp, device_mesh)
        norms = ("attention.q_norm.weight", "attention.k_norm.weight")
        return EveryRankStyle(self.ranks, of_heads=norms)._apply(module, device_mesh)


class EveryRankStyle(ParallelStyle):
    """What all ranks have whole. on_rows: whether it works on rows that may be cut"""

    def __init__(self, ranks: Ranks, *, on_rows: bool = True, of_heads: tuple[str, ...] = ()):
        self.ranks, self.on_rows, self.of_heads = ranks, on_rows, of_heads

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, device_mesh, {})
        ranks = self.ranks
        own = OwnParameters(ranks, module, on_rows=self.on_rows, of_heads=self.of_heads)

        def forward(whole: Callable, *args, **kwargs):
            with own(), ranks.drawing(own=self.on_rows and ranks.cut):
                return whole(*args, **kwargs)

        replace_forward(module, forward)
        return module


class EmbeddingStyle(ParallelStyle):
    """Some rows of the token embedding. Positions and token types are whole everywhere, and looked up for own rows."""

    def __init__(self, part: Vocabulary):
        self.part = part

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Embedding)
        part, ranks = self.part, self.part.ranks
        distribute(module, device_mesh, {"token.weight": Shard(0)})

        def tokens(_, x: Tensor) -> Tensor:
            return ranks.leave(embedded(part, x, module.token.weight))

        def own_rows(whole: Callable, x: Tensor) -> Tensor:
            """x: what broadcasts to (B, T)"""
            return whole(ranks.own(x.expand(ranks.shape).reshape(-1)) if ranks.cut else x)

        def drop(whole: Callable, x: Tensor) -> Tensor:
            if not module.dropout.training or not module.dropout.p:
                return x
            # As one process would, which draws for all rows at once
            mask = whole(x.new_ones((*ranks.shape, x.shape[-1])))
            if ranks.cut:
                return x * ranks.own(mask.flatten(0, 1))
            dist.broadcast(mask, group=ranks.group, group_src=0)
            return x * mask

        replace_forward(module.token, tokens)
        for lookup in (module.position, module.token_type):
            if lookup is not None:
                replace_forward(lookup, own_rows)
        replace_forward(module.dropout, drop)
        return EveryRankStyle(ranks)._apply(module, device_mesh)


class MaskedHeadStyle(ParallelStyle):
    """Whole everywhere but for the bias of the vocabulary's logits"""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, MaskedHead)
        distribute(module, device_mesh, {"vocabulary_bias": Shard(0)})
        own, order = OwnParameters(self.ranks, module, on_rows=False), module.order_logits

        def order_logits(first: Tensor) -> Tensor:
            with own():
                return order(first)

        module.order_logits = order_logits  # type: ignore[method-assign]
        return EveryRankStyle(self.ranks, on_rows=False)._apply(module, device_mesh)


class HeadStyle(ParallelStyle):
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, device_mesh, {"weight": Shard(0)})
        return module
