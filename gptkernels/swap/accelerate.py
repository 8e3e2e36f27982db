"""accelerate(): walks a model, replaces what it knows, and says what it did."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..dispatch import BACKENDS, explain
from ..ops.attention import attention as attention_op
from ..ops.attention.op import check_window
from ..ops.checks import check_flags
from ..ops.gated_mlp import gated_mlp as gated_mlp_op
from ..ops.layer_norm import layer_norm
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.mlp import mlp as mlp_op
from ..ops.rms_norm import rms_norm
from ..ops.rope import rope
from . import interface
from .families import PARTS
from .gated_mlps import FORMULAS
from .loss import HEAD, MODEL
from .modules import FAMILIES, Family, Foreign, Settings, is_replaced
from .parts import head_reason, head_size, is_float64
from .probe import difference
from .replacing import check_restorable, replace, restore
from .report import Left, Replaced, Report
from .rms_norms import ORDERS


def accelerate(
    model: nn.Module,
    *,
    window: int | None = None,
    layers: str | Iterable[int] | None = None,
    attention: bool = True,
    norm: bool = True,
    mlp: bool = True,
    loss: bool = True,
    backend: str = "auto",
    context_parallel=None,
) -> Report:
    """Runs the model's attention, rotary positions, norms, MLPs and loss on our kernels, in place.

    Parameters, buffers, names, hooks and wrappers stay the same objects: only classes of modules change, and for
    transformers the model's configuration (a copy of it) names the attention. The report says what became what, what
    was left and why; report.undo() takes everything back. ValueError where nothing could be replaced.

    window: how many keys a query sees, its own included, in the attention of the chosen layers; a layer that has a
        window of its own keeps the narrower. None: every layer as it was.
    layers: which attentions get the window, counted from 0: "odd", "even", indices, or None for all.
    attention, norm, mlp, loss: False leaves those as they are.
    loss: in training, with labels, transformers' causal language models give the loss without making the logits, and
        `logits` of their output is None. In evaluation both are there.
    backend: for every op: "auto", "cuda", "triton" or "eager".
    context_parallel: a DeviceMesh of one dimension, such as mesh["cp"], whose ranks cut sequences between them: the
        input_ids and labels of a causal transformers model are then this rank's shard (parallel.shard_sequence,
        contiguous). Positions and labels reach across the shards, and the mean over the ranks of the losses, and of the
        gradients, is that of the whole.
    """
    check_arguments(model, window, layers, attention, norm, mlp, loss, backend)
    enabled = {part for part, on in zip(PARTS, (attention, norm, mlp, loss), strict=True) if on}
    modules = dict(model.named_modules())
    found, left = find(modules, enabled)
    configs: dict[int, object] = {}
    if attention and interface.has_transformers(modules):
        configs = interface.find(modules, found, left)
    if not found:
        raise ValueError(f"model must have modules that gptkernels can replace, but {nothing_for(model, left)}")
    attentions = [path for path, families in found.items() if any(f.part == "attention" for f in families)]
    dense = [row for row in left if row.part == "attention"]
    if window is not None and (dense or not attentions):
        raise ValueError(f"window must be None for this model: not all of its attention can have one{listed(dense)}")
    banded = chosen_layers(attentions, layers) if window is not None else set()
    shard = None
    if context_parallel is not None:
        from . import context_parallel as cutting  # and with it torch's distributed engine and compiler

        shard = cutting.shard_for(model, context_parallel, found, left)
    rows = []
    undo_configs = interface.switch(modules, configs)
    for path, families in found.items():
        settings = Settings(window if path in banded else None, backend, shard)
        rows += [replaced_row(path, modules[path], family, settings) for family in families]
        replace(modules[path], tuple(family.name for family in families), settings)
    unhook = (lambda: None) if shard is None else cutting.add_hook(model, shard)

    def undo() -> None:
        unhook()
        for path in found:
            check_restorable(modules[path])
        for path in found:
            restore(modules[path])
        undo_configs()

    if shard is not None:
        try:
            cutting.check_tokens_apart(model)
        except Exception:
            undo()
            raise
    return Report([row for row in rows if row], left, undo)


def nothing_for(model: nn.Module, left: list[Left]) -> str:
    return f"{type(model).__name__} has none" + (listed(left) or "; gptkernels.swap.family() teaches it one")


def listed(left: list[Left]) -> str:
    return "".join(f"\n  {row.path or 'the model'} ({row.was}): {row.reason}" for row in left)


def check_arguments(model, window, layers, attention, norm, mlp, loss, backend) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    check_flags(attention=attention, norm=norm, mlp=mlp, loss=loss)
    check_window(window)
    if window is not None and not attention:
        raise ValueError("window must be None with attention=False, which leaves all attention as it is")
    if layers is not None and window is None:
        raise ValueError("layers must be None without a window: it says which layers get the window")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(('auto', *BACKENDS))}, not {backend!r}")


def find(modules: dict[str, nn.Module], enabled: set[str]) -> tuple[dict[str, list[Family]], list[Left]]:
    """-> by path: the families that replace a module; and what was recognised but has to stay."""
    found: dict[str, list[Family]] = {}
    left = []
    for path, module in modules.items():
        if type(module).__module__.startswith("gptkernels."):
            continue
        if is_replaced(module):
            left.append(Left(path, "", type(module).__name__, "it is replaced already; undo that first"))
            continue
        for part in (*PARTS, "container", "rotary"):
            # Positions are rotated in an attention's own forward.
            if part != "container" and ("attention" if part == "rotary" else part) not in enabled:
                continue
            family, reason = family_of(module, part)
            if reason:
                left.append(Left(path, part, type(module).__name__, reason))
            elif family:
                found.setdefault(path, []).append(family)
        if path in found and any(f.name == MODEL for f in found[path]):
            head = next(name for name, each in modules.items() if each is module.lm_head)
            found.setdefault(head, []).append(FAMILIES[HEAD])
    return found, left


def family_of(module: nn.Module, part: str) -> tuple[Family | None, str | None]:
    """-> the family that replaces the module, or why it has to stay, or neither."""
    for family in reversed(FAMILIES.values()):
        matched = family.matches(module) if family.part == part else False
        if not matched:
            continue
        if isinstance(matched, str):
            return None, matched
        if is_float64(module):
            return None, "it is float64, and the kernels take float32, float16 and bfloat16"
        reason = head_reason(module) if part == "attention" else None
        if family.probed and not reason:
            reason = difference(module, (family.name,), width_of(module))
        return (None, reason) if reason else (family, None)
    return None, unknown_reason(module, part)


def width_of(module: nn.Module) -> int:
    """Of the tensors that a probed module takes."""
    first = next(module.parameters())
    return first.shape[-1]


def unknown_reason(module: nn.Module, part: str) -> str | None:
    """Why a module that has a part's name is left."""
    name = type(module).__name__
    if part == "norm" and "RMSNorm" in name:
        return "it computes none of the RMSNorms that gptkernels has"
    if part == "mlp" and name.endswith("Experts"):
        return "it gives each token experts of its own, for which gptkernels has no products"
    if part == "mlp" and (hasattr(module, "gate_proj") or hasattr(module, "gate_up_proj")):
        return "it computes none of the gated MLPs that gptkernels has"
    return None


def chosen_layers(paths: list[str], layers) -> set[str]:
    if layers is None:
        return set(paths)
    if layers in ("odd", "even"):
        chosen = set(paths[layers == "odd" :: 2])
        if not chosen:
            raise ValueError(f"layers must choose an attention, but {layers!r} has none: the model's are {len(paths)}")
        return chosen
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ValueError(f'layers must be "odd", "even", indices or None, not {layers!r}')
    indices = list(layers)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"layers must be ints, not {index!r}")
        if not 0 <= index < len(paths):
            raise ValueError(f"layers must be 0 ... {len(paths) - 1} (the model's attentions), not {index}")
    return {paths[index] for index in indices}


def replaced_row(path: str, module: nn.Module, family: Family, settings: Settings) -> Replaced | None:
    if family.name == HEAD or family.part == "container":
        return None
    became = {
        "attention": "gptkernels.attention" + (f", window {settings.window}" if settings.window else ""),
        "norm": f"gptkernels.{norm_of(family).__name__}",
        "mlp": "gptkernels.gated_mlp" if family.name in FORMULAS else "gptkernels.mlp",
        "loss": "gptkernels.linear_cross_entropy, in training",
        "rotary": "gptkernels.rope",
    }[family.part]
    return Replaced(
        path or "the model", family.part, type(module).__name__, became, backend_of(module, family, settings)
    )


def norm_of(family: Family) -> Callable:
    return rms_norm if family.name in ORDERS else layer_norm


def backend_of(module: Foreign, family: Family, settings: Settings) -> str:
    """Which backend would run a call of usual size."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None or parameter.device.type == "meta":
        return "not known on the meta device"

    def tensor(*shape: int):
        return parameter.new_empty(shape)

    options = {"backend": settings.backend}
    if family.part == "attention":
        qkv = (tensor(1, 1, 256, head_size(module) or 64) for _ in range(3))
        choice = explain(attention_op, *qkv, window=settings.window, **options)
    elif family.part == "rotary":
        q, tables = tensor(1, 1, 256, head_size(module) or 64), (tensor(256, head_size(module) or 64),) * 2
        choice = explain(rope, q, q, *tables, **options)
    elif family.part == "norm":
        choice = explain(norm_of(family), tensor(256, parameter.numel()), tensor(parameter.numel()), **options)
    elif family.name in FORMULAS:
        width = parameter.shape[-1]
        first = tensor(4 * width, width)
        choice = explain(gated_mlp_op, tensor(256, width), first, first, tensor(width, 4 * width), **options)
    elif family.part == "mlp":
        width = parameter.shape[-1]
        choice = explain(
            mlp_op, tensor(256, width), tensor(4 * width, width), None, tensor(width, 4 * width), None, **options
        )
    else:
        width = module.lm_head.weight.shape[1]
        targets = torch.zeros(256, dtype=torch.int64, device=parameter.device)
        choice = explain(linear_cross_entropy, tensor(256, width), module.lm_head.weight, targets, **options)
    if choice.backend is None:
        return "none: " + "; ".join(f"{name}: {reason}" for name, reason in choice.reasons.items())
    return choice.backend
