"""Models of transformers whose attention is looked up by name in their configuration."""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .modules import FAMILIES, Family, is_replaced
from .parts import head_reason
from .report import Left
from .trial import disagreement, refusal

NAME = "transformers attention"
# Of the attention module or its configuration: the keyword by which attention functions are told of it, and why it has
# to stay where they are not.
FEATURES = {
    "attn_logit_softcapping": (
        "softcap",
        "its scores are soft-capped, of which it does not tell its attention function",
    ),
    "sinks": ("s_aux", "it has attention sinks, of which it does not tell its attention function"),
    "attention_chunk_size": (None, "it attends within chunks, which gptkernels.attention does not do"),
}
# These have no such look-up, but take the masks that the configuration chooses.
MASKS_ONLY = ("GPT-Neo attention", "GPT-J attention")


def add_family() -> None:
    FAMILIES[NAME] = Family(NAME, "attention", lambda module: False)


def has_transformers(modules: dict[str, nn.Module]) -> bool:
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    return any(isinstance(module, PreTrainedModel) for module in modules.values())


def uses_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def find(modules: dict[str, nn.Module], found: dict[str, list[Family]], left: list[Left]) -> dict[int, object]:
    """Adds the attentions to found or left. -> by id, the configurations that have to name our attention."""
    candidates: dict[int, list[str]] = {}  # by configuration: its attentions
    reasons: dict[int, str] = {}
    configs: dict[int, object] = {}
    for path, module in modules.items():
        if is_replaced(module) or "Attention" not in type(module).__name__:
            continue
        config, names = getattr(module, "config", None), [family.name for family in found.get(path, ())]
        if config is None or not (uses_interface(module) or "attn_dropout" in module._modules):
            continue
        configs[id(config)] = config
        candidates.setdefault(id(config), []).append(path)
        reason = reason_against(modules, path, names)
        if reason:
            reasons.setdefault(id(config), reason)
    for key in set(candidates) - set(reasons):
        # Whose methods are still to be replaced cannot be tried yet; the families know what they do.
        if any(family.name in MASKS_ONLY for path in candidates[key] for family in found.get(path, ())):
            continue
        reason = reason_by_trying(modules, candidates[key][0], {key: configs[key]})
        if reason:
            reasons[key] = reason
    left += not_looked_up(modules, found, candidates)
    for key, paths in candidates.items():
        for path in paths:
            if key in reasons:
                kept = [family for family in found.pop(path, ()) if family.part != "attention"]
                found.update({path: kept} if kept else {})
                left.append(Left(path, "attention", type(modules[path]).__name__, reasons[key]))
            elif not any(family.part == "attention" for family in found.get(path, ())):
                found.setdefault(path, []).insert(0, FAMILIES[NAME])
    in_order(found, modules)
    return {key: config for key, config in configs.items() if key not in reasons}


def in_order(found: dict[str, list[Family]], modules: dict[str, nn.Module]) -> None:
    """As the model has them: layers are counted by that."""
    families = dict(found)
    found.clear()
    found.update({path: families[path] for path in modules if path in families})


def reason_against(modules: dict[str, nn.Module], path: str, families: list[str]) -> str | None:
    module = modules[path]
    for feature, (keyword, reason) in FEATURES.items():
        if has(module, feature) and keyword not in keywords_of(module):
            return reason
    if "position_bias" in inspect.unwrap(type(module).forward).__code__.co_varnames:
        return "its scores have a position bias, which gptkernels.attention does not add"
    if head_reason(module):
        return head_reason(module)
    if any(name in MASKS_ONLY for name in families):
        return None
    if not uses_interface(module):
        return f"{type(module).__name__} does not look its attention up in transformers' AttentionInterface"
    return None


def has(module: Any, feature: str) -> bool:
    return getattr(module, feature, None) is not None or getattr(module.config, feature, None) is not None


def keywords_of(module: nn.Module) -> set[str]:
    """By which the module's forward passes anything on"""
    constants = inspect.unwrap(type(module).forward).__code__.co_consts
    return {name for names in constants if isinstance(names, tuple) for name in names if isinstance(name, str)}


def reason_by_trying(modules: dict[str, nn.Module], path: str, configs: dict[int, Any]) -> str | None:
    """Why the attentions of that configuration cannot be ours. A model that says itself that they can must not be
    refused when it runs; of another the outputs must be the same."""
    from transformers import PreTrainedModel

    whole = next(module for module in modules.values() if isinstance(module, PreTrainedModel))

    @contextmanager
    def ours() -> Iterator[None]:
        undo = switch(modules, configs)
        try:
            yield
        finally:
            undo()

    supported = getattr(owner_of(modules, path), "_supports_attention_backend", False)
    added = any(has(modules[path], feature) for feature in FEATURES)
    return refusal(whole, ours) if supported and not added else disagreement(whole, ours)


def not_looked_up(modules: dict[str, nn.Module], found: dict[str, list[Family]], candidates: dict) -> list[Left]:
    """Attentions of transformers that are written out in their modules, and that no family knows."""
    known = {path for paths in candidates.values() for path in paths}
    known |= {path for path, families in found.items() if any(family.part == "attention" for family in families)}
    left = []
    for path, module in modules.items():
        name = type(module).__name__
        inner = [each for each in module.modules() if each is not module and "Attention" in type(each).__name__]
        around = [other for other in known if path == other or path.startswith(f"{other}.")]
        ours = type(module).__module__.startswith("transformers.") and not is_replaced(module)
        if "Attention" in name and ours and not inner and not around:
            left.append(Left(path, "attention", name, missing_in(module)))
    return left


def missing_in(module: nn.Module) -> str:
    """What an attention has that gptkernels.attention does not do, by its own code"""
    names = inspect.unwrap(type(module).forward).__code__
    words = {*names.co_varnames, *names.co_names, *vars(module), *module._parameters}
    if words & {"alibi", "position_bias"}:
        return "it adds ALiBi or a position bias to its scores in code of its own, which is no family here"
    if words & {"r_w_bias", "rel_attn_core"}:
        return "it adds relative positions to its scores, which gptkernels.attention does not do"
    return "it writes its attention out, where transformers' AttentionInterface would find ours, and is no family here"


def owner_of(modules: dict[str, nn.Module], path: str) -> nn.Module | None:
    """The innermost model of transformers around a module."""
    from transformers import PreTrainedModel

    while path:
        path = path.rpartition(".")[0]
        if isinstance(modules[path], PreTrainedModel):
            return modules[path]
    return None


def switch(modules: dict[str, nn.Module], configs: dict[int, Any]) -> Callable[[], None]:
    """Gives the modules copies of those configurations that name our attention: another model may have the same ones.
    -> what undoes it"""
    if not configs:
        return lambda: None
    from transformers import PreTrainedConfig

    from . import attention_interface

    attention_interface.ensure_registered()
    memo: dict[int, Any] = {}
    before = []
    for module in modules.values():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                before.append((module, name, value))
                vars(module)[name] = copy.deepcopy(value, memo)
    for key in configs:
        memo[key]._attn_implementation_internal = attention_interface.NAME

    def undo() -> None:
        for module, name, value in before:
            vars(module)[name] = value

    return undo
