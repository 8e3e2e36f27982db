"""Models of transformers, cut by their own plans for tensor parallelism (`_tp_plan`), or by ours where they have none.

A plan says of each linear layer whether its outputs are cut (colwise) or its inputs (rowwise). The module around some
of the first kind and one of the second, an attention or an MLP, is run as a whole on its parts: the sum over the ranks
is made once, of what it gives. So it does not matter whether the module calls its layers or, replaced by accelerate(),
our ops.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..swap.modules import Foreign
from ..swap.parts import CUT, is_conv1d, is_plain, not_plain
from ..swap.probe import undisturbed
from ..swap.trial import inputs
from . import vocabulary
from .tensor_collectives import Ranks, Reduce, shared
from .tensor_layers import (
    ORDER,
    EveryRankStyle,
    OwnParameters,
    distribute,
    packed_order,
    replace_forward,
)
from .vocabulary import Vocabulary

COLUMNS, ROWS, PACKED, OF_HEADS = "colwise", "rowwise", "packed_heads", "replicated_with_grad_allreduce"
KNOWN = (COLUMNS, ROWS, PACKED, OF_HEADS)
# The ends of a model are cut by vocabulary, whatever a plan says of them.
ENDS = ("embedding_rowwise", "embedding_colwise", "colwise_gather_output", "colwise_rep", "rowwise_rep", "rowwise")
# Of models without a plan of their own, by the names of their classes
PLANS = {
    "GPT2LMHeadModel": {
        "transformer.h.*.attn.c_attn": PACKED,
        "transformer.h.*.attn.c_proj": ROWS,
        "transformer.h.*.mlp.c_fc": COLUMNS,
        "transformer.h.*.mlp.c_proj": ROWS,
    }
}
# Relative to the largest logit: sums in another order, and roundings of the narrow types
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def cut_model(model: Foreign, ranks: Ranks) -> None:
    """ValueError before anything has changed where the plan, or a size, does not allow it"""
    units = units_of(model, plan_of(model))
    check_sizes(model, units, ranks.size)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = isinstance(embedding, nn.Embedding) and (head is None or isinstance(head, nn.Linear))
    part = Vocabulary(ranks, embedding.num_embeddings) if ends else None
    before = logits_of(model).to(ranks.mesh.device_type)
    dist.broadcast(before, group=ranks.group, group_src=0)  # whose weights all get
    for path, styles in units.items():
        cut_unit(model.get_submodule(path), styles, ranks)
    if part is not None:
        cut_ends(embedding, head, part)
    whole_everywhere(model, ranks)
    model.generate = agreeing(model.generate, ranks)
    model.to(torch.device(ranks.mesh.device_type))  # the buffers, which nothing has cut
    after = logits_of(model).to(before.device)
    allowed = TOLERANCE.get(before.dtype, 1e-4) * float(before.abs().max())
    if not float((after - before).abs().max()) <= allowed:
        raise RuntimeError(f"model {type(model).__name__} has other logits when it is cut by its plan: load it again")


def logits_of(model: Foreign) -> Tensor:
    """Of a few tokens"""
    with torch.no_grad(), undisturbed(model):
        return model(**inputs(model), use_cache=False)["logits"].contiguous()


def plan_of(model: Foreign) -> dict[str, str]:
    name = type(model).__name__
    plan = PLANS.get(name) or getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not plan:
        raise ValueError(f"model must have a plan for tensor parallelism (_tp_plan), which {name} has not")
    return plan


def units_of(model: Foreign, plan: dict[str, str]) -> dict[str, dict[str, str]]:
    """-> by the paths of attentions and MLPs: {name of a layer in it: style}"""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    units: dict[str, dict[str, str]] = {}
    names = [*dict(model.named_modules()), *dict(model.named_parameters())]
    for path in names:
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
        if style is None:
            continue
        module = model.get_submodule(path) if path in dict(model.named_modules()) else None
        if id(module) in ends and style in ENDS:
            continue
        if style not in KNOWN or module is None:
            raise ValueError(f"model must have a plan of {', '.join(KNOWN)} for its layers, not {style} for {path}")
        if style != OF_HEADS and not is_plain(module):
            raise ValueError(f"model must have linear layers of their own weights, but {path} {not_plain(module)}")
        parent, _, name = path.rpartition(".")
        units.setdefault(parent, {})[name] = style
    for path, styles in units.items():
        if list(styles.values()).count(ROWS) != 1:
            raise ValueError(f"model must have a plan with one layer that is rowwise in {path}, not {styles}")
    return units


def check_sizes(model: Foreign, units: dict[str, dict[str, str]], ranks: int) -> None:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    sizes = {"num_attention_heads": heads, "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads}
    for path, styles in units.items():
        for name, style in styles.items():
            if style == COLUMNS:
                layer = model.get_submodule(f"{path}.{name}")
                sizes[f"{path}.{name}"] = layer.weight.shape[1 if is_conv1d(layer) else 0]
    for name, size in sizes.items():
        if size % ranks:
            raise ValueError(f"{name} must be divisible by the {ranks} ranks of tensor parallelism, not {size}")


def cut_unit(unit: Foreign, styles: dict[str, str], ranks: Ranks) -> None:
    last = next(name for name, style in styles.items() if style == ROWS)
    placements: dict[str, Placement] = {}
    for name, style in styles.items():
        layer: Foreign = unit.get_submodule(name)
        if style == PACKED:
            pack(unit, layer, ranks.size)
        if style in (COLUMNS, PACKED):
            placements[f"{name}.weight"] = Shard(1 if is_conv1d(layer) else 0)
            placements[f"{name}.bias"] = Shard(0)
            if is_conv1d(layer):
                layer.nf //= ranks.size
        elif style == ROWS:
            placements[f"{name}.weight"] = Shard(0 if is_conv1d(layer) else 1)
    distribute(unit, ranks.mesh, placements)
    every = [f"{path}.{key}".lstrip(".") for path, owner in unit.named_modules() for key in owner._parameters]
    bias = f"{last}.bias"
    own = OwnParameters(ranks, unit, of_heads=tuple(name for name in every if name != bias), once=(bias,))

    def forward(whole: Callable, *args, **kwargs) -> Any:
        if args:
            args = (shared(ranks, args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = shared(ranks, kwargs["hidden_states"])
        with own(), ranks.drawing(own=True):
            out = whole(*args, **kwargs)
        return (Reduce.apply(ranks, out[0]), *out[1:]) if isinstance(out, tuple) else Reduce.apply(ranks, out)

    replace_forward(unit, forward)


def pack(attention: Foreign, layer: Foreign, ranks: int) -> None:
    """layer: queries, keys and values of all heads, one after the other, as GPT-2 has them"""
    heads, size = attention.num_heads, attention.head_dim
    dimension = 1 if is_conv1d(layer) else 0
    order = packed_order(heads, heads, size, ranks)
    for name, parameter in list(layer._parameters.items()):
        if parameter is not None:
            index = order.to(parameter.device)
            moved = parameter.detach().index_select(dimension if name == "weight" else 0, index)
            layer._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    setattr(layer, ORDER, (order, dimension))
    attention.num_heads, attention.split_size = heads // ranks, attention.split_size // ranks


def cut_ends(embedding: Foreign, head: Foreign | None, part: Vocabulary) -> None:
    ranks, tied = part.ranks, head is not None and head.weight is embedding.weight
    distribute(embedding, ranks.mesh, {"weight": Shard(0)})

    own, rows = OwnParameters(ranks, embedding, on_rows=False), embedding.weight.to_local().shape[0]
    if embedding.padding_idx is not None:
        place = embedding.padding_idx - part.first
        embedding.padding_idx = place if 0 <= place < rows else None

    def embed(whole: Callable, tokens: Tensor) -> Tensor:
        here, row = part.own(tokens, rows)
        with own():
            return Reduce.apply(ranks, whole(row) * here)

    replace_forward(embedding, embed)
    if head is None:
        return
    if tied:
        head.weight = embedding.weight
    distribute(head, ranks.mesh, {"weight": Shard(0), "bias": Shard(0)})

    def logits(whole: Callable, x: Tensor) -> Tensor:
        if "loss_arguments" in vars(head):  # as accelerate() has them in training: our loss takes DTensors
            return whole(DTensor.from_local(x, ranks.mesh, [Replicate()], run_check=False)).to_local()
        bias = None if head.bias is None else head.bias.to_local()
        return vocabulary.logits(part, x, head.weight.to_local(), bias)

    replace_forward(head, logits)
    setattr(head.forward, CUT, True)


def whole_everywhere(model: nn.Module, ranks: Ranks) -> None:
    """What is left, in modules of its own: norms, positions"""
    ties: dict[int, nn.Parameter] = {}
    for module in model.modules():
        parameters = [x for x in module._parameters.values() if x is not None]
        if any(not isinstance(x, DTensor) for x in parameters):
            if list(module.children()):
                raise ValueError(f"model must have parameters in its innermost modules, not in {type(module).__name__}")
            distribute(module, ranks.mesh, {}, ties)
            EveryRankStyle(ranks, on_rows=False)._apply(module, ranks.mesh)


def agreeing(generate: Callable, ranks: Ranks) -> Callable:
    """model.generate, in which all ranks draw as the first one does"""

    def generated(*args, **kwargs) -> Any:
        device = torch.device(ranks.mesh.device_type)
        state = torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()
        sent = state.to(device)
        dist.broadcast(sent, group=ranks.group, group_src=0)
        (torch.cuda.set_rng_state if device.type == "cuda" else torch.set_rng_state)(sent.cpu())
        return generate(*args, **kwargs)

    return generated
