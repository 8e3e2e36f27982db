"""The kinds of modules that accelerate() knows, and the way to teach it another."""

from collections.abc import Callable

from torch import nn

from . import gated_mlps, interface, loss, rms_norms, rotary, shape_families, transformers_families
from .modules import FAMILIES, Family

PARTS = ("attention", "norm", "mlp", "loss")

shape_families.add_last_resorts()
transformers_families.add_all()
loss.add_all()
interface.add_family()
shape_families.add_all()
rms_norms.add_all()
rotary.add_all()
gated_mlps.add_all()


def family(name: str, part: str, matches: type | Callable[[nn.Module], bool | str], **methods: Callable) -> None:
    """Teaches accelerate() a kind of module.

    name: in reports, and in pickles of models: the same family has to be there when one is loaded.
    part: "attention", "norm", "mlp" or "loss": which argument of accelerate() switches it off.
    matches: a class, or a function of a module -> True, False, or a string that says why it has to stay as it is.
        What accelerate() has been taught last is asked first.
    methods: what replaces the module's methods, mostly forward=; called with the module and its arguments.
        settings_of(module) has the window and the backend to take, original(module, "forward") what it did before.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, not {part!r}")
    if name in FAMILIES:
        raise ValueError(f"name must be new, but there is a family {name!r}")
    if not methods:
        raise ValueError("methods must not be empty: give forward=, the function that replaces the module's own")
    if isinstance(matches, type):
        cls = matches
        unknown = [method for method in methods if not hasattr(cls, method)]
        if unknown:
            raise ValueError(f"methods must be of {cls.__name__}, which has no {unknown[0]}")
        matches = lambda module: isinstance(module, cls)  # noqa: E731
    elif not callable(matches):
        raise TypeError(f"matches must be a class or a function of a module, not {type(matches).__name__}")
    FAMILIES[name] = Family(name, part, matches, dict(methods))
