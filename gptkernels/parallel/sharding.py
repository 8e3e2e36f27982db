"""Our ops on DTensors: which placements an op takes, and what placements its results have.

An op has strategies, each for one dimension of the mesh: a placement for every tensor, with which each rank computes
its part of the result on its own. Of those the one is taken that moves the least, and the tensors are redistributed to
it, as DTensor does for torch's own ops. So every placement is right, and those of the strategies cost nothing. What
they are: batch and sequence for norms and rope, batch and heads for attention, rows or hidden columns for MLPs, rows
or vocabulary for the losses.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..ops import dropout
from .tensor_collectives import Once, Ranks
from .vocabulary import Vocabulary

REPLICATE, PARTIAL = Replicate(), Partial()


@dataclass(frozen=True)
class Strategy:
    """inputs: of the tensors that are not the same on all ranks; outputs: of each result"""

    inputs: dict[str, Placement] = field(default_factory=dict)
    outputs: tuple[Placement, ...] = (REPLICATE,)

    @property
    def shares_work(self) -> bool:
        return bool(self.inputs)


Arguments = dict[str, Any]


def run_sharded(op: Callable, args: tuple, kwargs: Arguments) -> Any:
    """A call of a public op with DTensors among its arguments"""
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    op.prepare(**bound.arguments).check()  # type: ignore[attr-defined]
    return Call(op, bound.arguments).run()


class Call:
    def __init__(self, op: Callable, arguments: Arguments):
        self.op, self.name, self.arguments = op, op.__name__, arguments
        self.tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        distributed = {name: x for name, x in self.tensors.items() if isinstance(x, DTensor)}
        self.mesh = mesh_of(distributed)
        for name, x in self.tensors.items():
            if name not in distributed and x.requires_grad:
                raise TypeError(f"{name} must be a DTensor like {', '.join(distributed)}, or require no gradient")
        self.strategies = [self.chosen(dimension) for dimension in range(self.mesh.ndim)]

    def chosen(self, dimension: int) -> Strategy:
        ranks = self.mesh.size(dimension)
        possible = [each for each in STRATEGIES[self.name](self.arguments, ranks) if self.fits(each, ranks)]
        possible.append(Strategy(outputs=(REPLICATE,) * RESULTS.get(self.name, results_of)(self.arguments)))
        return min(possible, key=lambda strategy: self.moved(strategy, dimension))

    def fits(self, strategy: Strategy, ranks: int) -> bool:
        """Whether no rank is left without a part"""
        cut = [(self.tensors[name], each) for name, each in strategy.inputs.items() if isinstance(each, Shard)]
        return all(x.shape[each.dim] > (ranks - 1) * -(-x.shape[each.dim] // ranks) for x, each in cut)

    def moved(self, strategy: Strategy, dimension: int) -> float:
        """Elements that each rank receives, and a little for what it only cuts"""
        ranks = self.mesh.size(dimension)
        costs = {"cut": 1e-3, "gather": 1.0, "sum": 2.0}
        total = 0.0
        for name, x in self.tensors.items():
            now = x.placements[dimension] if isinstance(x, DTensor) else REPLICATE
            wanted = strategy.inputs.get(name, REPLICATE)
            if now == wanted:
                continue
            if now == REPLICATE:
                total += costs["cut"] * x.numel() / ranks
            else:
                total += costs["sum" if now.is_partial() else "gather"] * x.numel()
        return total

    def run(self) -> Any:
        wanted = {name: [each.inputs.get(name, REPLICATE) for each in self.strategies] for name in self.tensors}
        check_heads(self, wanted)
        local = {name: self.part(name, x, wanted[name]) for name, x in self.tensors.items()}
        with dropout.changing_seeds(self.seed_of):
            results = self.computed({**self.arguments, **local})
        several = isinstance(results, tuple)
        shapes = SHAPES[self.name](self.arguments)
        wrapped = []
        for number, result in enumerate(results if several else (results,)):
            placements = [each.outputs[number] for each in self.strategies]
            shape = torch.Size(shapes[number])
            stride = strides_like(result, shape)
            wrapped.append(
                DTensor.from_local(result, self.mesh, placements, run_check=False, shape=shape, stride=stride)
            )
        return tuple(wrapped) if several else wrapped[0]

    def part(self, name: str, x: Tensor, wanted: list[Placement]) -> Tensor:
        """This rank's, whose gradient is one of many where only others are cut"""
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, [REPLICATE] * self.mesh.ndim, run_check=False)
        # What is wanted once in a sum, and there on every rank, is taken from the first one.
        once = [w.is_partial() and not now.is_partial() for w, now in zip(wanted, x.placements, strict=True)]
        placements = [REPLICATE if only else each for each, only in zip(wanted, once, strict=True)]
        shared = name == "residual" and x.is_leaf
        if list(x.placements) != placements:
            x = x.redistribute(placements=placements)
        gradients = [self.gradient(*each) for each in zip(wanted, self.strategies, strict=True)]
        local = x.to_local(grad_placements=gradients)
        if shared and local.requires_grad:
            # It is x's gradient too, which two leaves cannot share: in a DTensor nobody sees that they do.
            local.register_hook(torch.clone)
        places = self.mesh.get_coordinate()
        assert places is not None
        return Once.apply(local) if any(only and at for only, at in zip(once, places, strict=True)) else local

    def gradient(self, placement: Placement, strategy: Strategy) -> Placement:
        if isinstance(placement, Shard):
            return placement
        whole = placement.is_partial() or not strategy.shares_work or is_vocabulary(strategy)
        return REPLICATE if whole else PARTIAL

    def seed_of(self, seed: Tensor) -> Tensor:
        """Masks differ where work is shared, and are the same where it is not."""
        for dimension, strategy in enumerate(self.strategies):
            if not strategy.shares_work:
                dist.broadcast(seed, group=self.mesh.get_group(dimension), group_src=0)
        for dimension, strategy in enumerate(self.strategies):
            if strategy.shares_work:
                seed = dropout.apart(seed, self.mesh.get_local_rank(dimension) * 64**dimension)
        return seed

    def computed(self, local: Arguments) -> Any:
        op, rows = self.op, [number for number, each in enumerate(self.strategies) if each.shares_work]
        cut = [number for number, each in enumerate(self.strategies) if is_vocabulary(each)]
        if len(cut) > 1:
            raise ValueError(f"weight must be cut by vocabulary in one dimension of the mesh, not in {len(cut)}")
        for number in cut:
            rows.remove(number)
            op = functools.partial(self.loss_of_vocabulary, number)
        if local.get("reduction") == "mean" and rows:
            return mean_loss(op, local, [self.mesh.get_group(dimension) for dimension in rows])
        return op(**local)

    def loss_of_vocabulary(self, dimension: int, **local) -> Any:
        part = Vocabulary(Ranks(one_dimension(self.mesh, dimension)), self.tensors["weight"].shape[0])
        return part.run(self.op.prepare(**local))  # type: ignore[attr-defined]


def mean_loss(op: Callable, local: Arguments, groups: list) -> Any:
    """Of rows that ranks have between them: each has its share of the mean"""
    counted, weights = local["targets"] != local["ignore_index"], local["class_weight"]
    if weights is not None:
        inside = (local["targets"] >= 0) & (local["targets"] < weights.shape[0])
        counted = weights.detach().float()[local["targets"].where(inside & counted, 0)] * counted
    total = counted.sum(dtype=torch.float32)
    for group in groups:
        dist.all_reduce(total, group=group)
    found = op(**{**local, "reduction": "sum"})
    return tuple(each / total for each in found) if isinstance(found, tuple) else found / total


def mesh_of(tensors: dict[str, DTensor]) -> DeviceMesh:
    (first, x), *others = tensors.items()
    for name, other in others:
        if other.device_mesh != x.device_mesh:
            raise ValueError(f"{name} must be on the mesh of {first}, {x.device_mesh}, not on {other.device_mesh}")
    for name, each in tensors.items():
        for placement in each.placements:
            if type(placement) not in (Shard, Replicate) and not placement.is_partial():
                raise ValueError(f"{name} must have placements of Shard, Replicate or Partial, not {placement}")
    return x.device_mesh


def one_dimension(mesh: DeviceMesh, dimension: int) -> DeviceMesh:
    if mesh.ndim == 1:
        return mesh
    if mesh.mesh_dim_names is None:
        raise ValueError(
            "the mesh must have names for its dimensions where the vocabulary is one of several that are cut"
        )
    return mesh[mesh.mesh_dim_names[dimension]]


def strides_like(local: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Of a tensor of that shape whose dimensions are in memory in the local one's order"""
    strides, step = [0] * len(shape), 1
    for dimension in sorted(range(len(shape)), key=lambda d: (local.stride(d), -d)):
        strides[dimension] = step
        step *= max(1, shape[dimension])
    return tuple(strides)


def check_heads(call: Call, wanted: dict[str, list[Placement]]) -> None:
    """Groups of queries stay with their keys only where both divide by all ranks that cut heads."""
    key = {"attention": "k", "decode_attention": "k_cache"}.get(call.name)
    if key is None:
        return
    ranks = 1
    for dimension, placement in enumerate(wanted["q"]):
        ranks *= call.mesh.size(dimension) if placement == Shard(1) else 1
    kv_heads = call.tensors[key].shape[1]
    if kv_heads % ranks:
        raise ValueError(f"{key} must have heads that divide by the {ranks} ranks that cut them, not {kv_heads}")


def is_vocabulary(strategy: Strategy) -> bool:
    return "weight" in strategy.inputs


def given(arguments: Arguments, **placements: Placement) -> dict[str, Placement]:
    """Of the optional tensors that there are"""
    return {name: each for name, each in placements.items() if isinstance(arguments[name], Tensor)}


def rows(arguments: Arguments, *names: str, results: int = 1) -> list[Strategy]:
    """Any dimension but the last of the tensors with those names"""
    leading = range(arguments[names[0]].ndim - 1)
    return [Strategy(given(arguments, **{name: Shard(d) for name in names}), (Shard(d),) * results) for d in leading]


def of_norm(arguments: Arguments, ranks: int) -> list[Strategy]:
    return rows(arguments, "x")


def of_add_norm(arguments: Arguments, ranks: int) -> list[Strategy]:
    return rows(arguments, "x", "residual", results=2)


def of_rope(arguments: Arguments, ranks: int) -> list[Strategy]:
    tables = arguments["cos"].ndim
    cuts: list[dict[str, Placement]] = [{"cos": Shard(0), "sin": Shard(0)} if tables == 3 else {}, {}]
    cuts.append({"cos": Shard(tables - 2), "sin": Shard(tables - 2)})
    return [Strategy({"q": Shard(d), "k": Shard(d), **cut}, (Shard(d),) * 2) for d, cut in enumerate(cuts)]


def of_attention(arguments: Arguments, ranks: int) -> list[Strategy]:
    slopes, packed = arguments["alibi_slopes"], arguments["cu_seqlens"] is not None
    names = ("q", "k", "v")
    found = []
    if arguments["k"].shape[1] % ranks == 0:
        columns = {"sinks": Shard(0), "alibi_slopes": Shard(0 if slopes is None else slopes.ndim - 1)}
        inputs = dict.fromkeys(names, Shard(1)) | given(arguments, **columns)
        found.append((inputs, (Shard(1), Shard(0 if packed else 1))))
    if not packed:
        inputs = dict.fromkeys(names, Shard(0)) | given(arguments, key_start=Shard(0))
        if slopes is not None and slopes.ndim == 2:
            inputs["alibi_slopes"] = Shard(0)
        found.append((inputs, (Shard(0), Shard(0))))
    return [Strategy(inputs, outputs[: results_of(arguments)]) for inputs, outputs in found]


def of_decode(arguments: Arguments, ranks: int) -> list[Strategy]:
    names, found = ("q", "k_cache", "v_cache"), []
    if arguments["k_cache"].shape[1] % ranks == 0:
        found.append(Strategy(dict.fromkeys(names, Shard(1)) | given(arguments, sinks=Shard(0)), (Shard(1),)))
    if arguments["block_table"] is None:
        of_rows = given(arguments, lengths=Shard(0), key_start=Shard(0))
        found.append(Strategy(dict.fromkeys(names, Shard(0)) | of_rows, (Shard(0),)))
    return found


def of_mlp(arguments: Arguments, ranks: int) -> list[Strategy]:
    columns: dict[str, Placement] = {"fc_weight": Shard(0), "fc_bias": Shard(0), "proj_weight": Shard(1)}
    once: dict[str, Placement] = {"proj_bias": PARTIAL, "residual": PARTIAL}
    return [Strategy(given(arguments, **columns, **once), (PARTIAL,)), *rows(arguments, "x", "residual")]


def of_gated_mlp(arguments: Arguments, ranks: int) -> list[Strategy]:
    columns: dict[str, Placement] = {
        f"{name}_{kind}": Shard(0) for name in ("gate", "up") for kind in ("weight", "bias")
    }
    once: dict[str, Placement] = {"down_bias": PARTIAL, "residual": PARTIAL}
    cut = given(arguments, **columns, down_weight=Shard(1), **once)
    return [Strategy(cut, (PARTIAL,)), *rows(arguments, "x", "residual")]


def of_loss(arguments: Arguments, ranks: int) -> list[Strategy]:
    reduction, results = arguments.get("reduction", "none"), results_of(arguments)
    found = []
    if arguments.get("class_weight") is None:
        found.append(Strategy(given(arguments, weight=Shard(0), bias=Shard(0)), (REPLICATE,) * results))
    # Their means are over different sums.
    if reduction == "mean" and arguments["z_loss"] and arguments["class_weight"] is not None:
        return found
    for d in range(arguments["x"].ndim - 1):
        outputs = (Shard(d) if reduction == "none" else PARTIAL,) * results
        found.append(Strategy({"x": Shard(d), "targets": Shard(d)}, outputs))
    return found


def of_kl_div(arguments: Arguments, ranks: int) -> list[Strategy]:
    if arguments["reduction"] == "mean":  # of rows that count, which no rank knows of the others'
        return []
    found = []
    for d in range(arguments["x"].ndim - 1):
        outputs = (Shard(d) if arguments["reduction"] == "none" else PARTIAL,)
        found.append(Strategy(given(arguments, x=Shard(d), teacher_x=Shard(d), targets=Shard(d)), outputs))
    return found


def results_of(arguments: Arguments) -> int:
    return 1 + bool(arguments.get("return_lse") or arguments.get("return_z_loss"))


def shapes_of_attention(arguments: Arguments) -> list[tuple[int, ...]]:
    q = arguments["q"].shape
    return [q, q[:-1] if len(q) == 4 else (q[1], q[0])]


def shapes_of_loss(arguments: Arguments) -> list[tuple[int, ...]]:
    return [arguments["targets"].shape if arguments.get("reduction", "none") == "none" else ()] * 2


STRATEGIES: dict[str, Callable[[Arguments, int], list[Strategy]]] = {
    "layer_norm": of_norm,
    "rms_norm": of_norm,
    "add_layer_norm": of_add_norm,
    "add_rms_norm": of_add_norm,
    "rope": of_rope,
    "attention": of_attention,
    "decode_attention": of_decode,
    "mlp": of_mlp,
    "gated_mlp": of_gated_mlp,
    "linear_cross_entropy": of_loss,
    "linear_log_probs": of_loss,
    "linear_kl_div": of_kl_div,
}
RESULTS: dict[str, Callable[[Arguments], int]] = dict.fromkeys(("add_layer_norm", "add_rms_norm", "rope"), lambda _: 2)
SHAPES: dict[str, Callable[[Arguments], list]] = {
    **dict.fromkeys(("layer_norm", "rms_norm"), lambda a: [a["x"].shape]),
    **dict.fromkeys(("add_layer_norm", "add_rms_norm"), lambda a: [a["x"].shape] * 2),
    "rope": lambda a: [a["q"].shape, a["k"].shape],
    "attention": shapes_of_attention,
    "decode_attention": lambda a: [a["q"].shape],
    "mlp": lambda a: [(*a["x"].shape[:-1], a["proj_weight"].shape[0])],
    "gated_mlp": lambda a: [(*a["x"].shape[:-1], a["down_weight"].shape[0])],
    "linear_cross_entropy": shapes_of_loss,
    "linear_log_probs": shapes_of_loss,
    "linear_kl_div": lambda a: [a["x"].shape[:-1] if a["reduction"] == "none" else ()],
}
