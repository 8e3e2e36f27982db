"""Tensor parallelism: every layer of a model cut between the ranks of a mesh.

mesh = torch.distributed.init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "tp"))
gk.parallel.tensor(model, mesh["tp"])          # in place; then fully_shard(...) over mesh["dp"], as ever
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from ..models.config import GPTConfig
from ..models.gpt import GPT
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..swap.accelerate import accelerate
from ..swap.modules import is_replaced
from . import tensor_plans, vocabulary
from .tensor_collectives import Ranks
from .tensor_layers import ORDER, BlockStyle, EmbeddingStyle, EveryRankStyle, HeadStyle, MaskedHeadStyle
from .vocabulary import Vocabulary


def tensor(model: nn.Module, mesh: DeviceMesh, *, sequence: bool = True) -> nn.Module:
    """Cuts the model's layers between the ranks of the mesh, in place, and gives it back.

    model: a gptkernels GPT, or a causal language model of transformers, by its own plan (`_tp_plan`); accelerate()
        comes before, fully_shard() after.
    Attention is cut by heads, MLPs by hidden columns, the token embedding, the head and the loss by vocabulary. Every
    rank takes the same tokens, and has the same loss, logits and generated tokens. Parameters become DTensors (all
    ranks get those of the first one), for FSDP over another dimension of the mesh and for the optimizer.

    sequence: in training, our GPT's norms and what is around them work on a share of the rows on each rank; the sum
        that ends each attention and MLP is then a reduce-scatter, and an all-gather begins the next one.
    """
    check(model, mesh)
    ranks = Ranks(mesh, sequence)
    if isinstance(model, GPT):
        check_divisible(model.config, mesh.size())
        part = Vocabulary(ranks, model.config.vocabulary)
        parallelize_module(model, mesh, plan(model, part))
        cut_ends(model, part)
    else:
        tensor_plans.cut_model(model, ranks)
    return model


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The model over the ranks of the mesh for inference, in place, each with its heads' share of the caches of keys
    and values: a gptkernels GPT, or one of transformers, whose attention, norms and MLPs become ours."""
    check(model, mesh)
    if not isinstance(model, GPT) and not any(is_replaced(module) for module in model.modules()):
        accelerate(model)
    return tensor(model, mesh, sequence=False).eval()


def check(model: nn.Module, mesh: DeviceMesh) -> None:
    """Before anything has changed; the same on every rank"""
    if not isinstance(model, nn.Module) or not (isinstance(model, GPT) or hasattr(model, "get_input_embeddings")):
        raise TypeError(f"model must be a gptkernels GPT or a model of transformers, not {type(model).__name__}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f'mesh must be a DeviceMesh of one dimension, such as mesh["tp"], not {type(mesh).__name__}')
    if mesh.ndim != 1:
        raise ValueError(f'mesh must have one dimension, such as mesh["tp"], not {mesh.ndim}')
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("model must not be cut or sharded already: gk.parallel.tensor comes before fully_shard")


def check_divisible(config: GPTConfig, ranks: int) -> None:
    sizes = {"heads": config.heads, "kv_heads": config.kv_heads or config.heads, "mlp_width": config.hidden}
    for name, size in sizes.items():
        if size % ranks:
            raise ValueError(f"{name} must be divisible by the {ranks} ranks of tensor parallelism, not {size}")


def plan(model: GPT, part: Vocabulary) -> dict[str, ParallelStyle]:
    """What parallelize_module does to our GPT, by the names of modules"""
    ranks = part.ranks
    styles: dict[str, ParallelStyle] = {
        "embedding": EmbeddingStyle(part),
        "blocks.*": BlockStyle(ranks),
        "final_norm": EveryRankStyle(ranks),
        "masked_head": MaskedHeadStyle(ranks),
        "unproject": EveryRankStyle(ranks, on_rows=False),
        "head": HeadStyle(),
    }
    return {name: style for name, style in styles.items() if getattr(model, name.partition(".")[0]) is not None}


def cut_ends(model: GPT, part: Vocabulary) -> None:
    """The model's own methods: before the first layer, and after the last one."""
    ranks, whole_hidden = part.ranks, model.hidden

    @functools.wraps(whole_hidden)
    def hidden(tokens: Tensor, **options) -> Tensor:
        ranks.begin(tokens.shape)
        return ranks.collect(whole_hidden(tokens, **options))

    def token_logits(x: Tensor, bias: Tensor | None) -> Tensor:
        return vocabulary.logits(part, x, local(model.head_weight()), local(bias))

    def token_loss(x: Tensor, bias: Tensor | None, targets: Tensor, reduction: str) -> Tensor:
        options: dict[str, Any] = {"bias": local(bias), "reduction": reduction, "backend": model.config.backend}
        return part.run(linear_cross_entropy.prepare(x, local(model.head_weight()), targets, **options))

    def agreed(chosen: Tensor) -> Tensor:
        chosen = chosen.contiguous()
        dist.broadcast(chosen, group=ranks.group, group_src=0)
        return chosen

    for method in (hidden, token_logits, token_loss, agreed):
        setattr(model, method.__name__, method)


def local(parameter: Any) -> Any:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def in_model_order(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """state: whole tensors, or dicts of them, by the names of parameters, as they are gathered from a cut model -> as
    one process has them"""
    return reordered(state, {name: (torch.argsort(order), at) for name, (order, at) in orders(model).items()})


def in_rank_order(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """What in_model_order undoes"""
    return reordered(state, orders(model))


def orders(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """By the names of packed parameters, which rows they have in which place, and of which dimension"""
    found: dict[str, tuple[Tensor, int]] = {}
    for path, module in model.named_modules():
        if hasattr(module, ORDER):
            order, dimension = getattr(module, ORDER)
            found |= {f"{path}.weight": (order, dimension), f"{path}.bias": (order, 0)}
    return found


def reordered(state: dict[str, Any], orders: dict[str, tuple[Tensor, int]]) -> dict[str, Any]:
    def moved(x: Any, order: Tensor, dimension: int) -> Any:
        if isinstance(x, dict):
            return {key: moved(part, order, dimension) for key, part in x.items()}
        return x.index_select(dimension, order.to(x.device)) if isinstance(x, Tensor) and x.ndim else x

    return {name: moved(x, *orders[name]) if name in orders else x for name, x in state.items()}
