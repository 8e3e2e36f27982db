"""What `--parallel` says: over how many processes the data, the sequence and the tensors are cut, and their mesh.

none            one process
ddp, fsdp       all processes have data of their own; with fsdp also a share of the weights
fsdp,cp=4       of these, 4 neighbours at a time cut one sequence between them
ddp,tp=2,cp=2   and 2 at a time every layer's weights
cp=4, tp=4      that, and nothing else: as many processes as it says
cp, fsdp,tp     without a number: all that is left
"""

import math
from argparse import ArgumentTypeError
from dataclasses import dataclass

from ..failures import UsageError

KINDS = ("none", "ddp", "fsdp")
DIMENSIONS = ("dp", "cp", "tp")
ACCEPTED = "none, ddp or fsdp, then cp=N and tp=N, by commas (such as fsdp,cp=4)"


@dataclass(frozen=True)
class Split:
    """Processes along each dimension of the mesh; None: all that are left. kind: what holds weights and gradients
    together over dp and cp."""

    text: str = "none"
    kind: str = "none"
    dp: int | None = 1
    cp: int | None = 1
    tp: int | None = 1

    def sizes(self) -> tuple[int, int, int]:
        """Along dp, cp and tp; 1 for what is not known yet"""
        return self.dp or 1, self.cp or 1, self.tp or 1

    def fitted(self, world: int) -> "Split":
        """With every size known; UsageError where the processes do not divide like that"""
        known = math.prod(self.sizes())
        exact = None not in (self.dp, self.cp, self.tp)
        if world % known or (exact and world != known):
            wanted = str(known) if exact else f"a multiple of {known}"
            both = f"; ddp,{self.text} and fsdp,{self.text} give the rest data of their own"
            more = both if self.text.startswith(("cp", "tp")) and world % known == 0 else ""
            raise UsageError(f"--parallel {self.text} needs {wanted} processes, not {world}{more}")
        rest = world // known
        return Split(self.text, self.kind, self.dp or rest, self.cp or rest, self.tp or rest)


def parse(text: str) -> Split:
    """UsageError for what is not accepted"""
    first, *rest = words = text.split(",")
    if text in KINDS:
        return Split(text, text, dp=1 if text == "none" else None)
    sizes: dict[str, int | None] = {"dp": None if first in KINDS else 1, "cp": 1, "tp": 1}
    for word in rest if first in KINDS else words:
        name, given, number = word.partition("=")
        seen = sizes.get(name) != 1
        if first == "none" or name not in ("cp", "tp") or seen or (given and not (number.isdecimal() and int(number))):
            raise UsageError(f"--parallel must be {ACCEPTED}, not {text!r}")
        sizes[name] = int(number) if given else None
        if not given:
            sizes["dp"] = 1
    if sum(size is None for size in sizes.values()) > 1:
        raise UsageError(f"--parallel must leave one of cp and tp without a number, not both, as {text!r} does")
    return Split(text, first if first in KINDS else "ddp", **sizes)


def accepted(text: str) -> str:
    """The type of an argument: text that parse() takes"""
    try:
        parse(text)
    except UsageError as error:
        raise ArgumentTypeError(str(error).removeprefix("--parallel ")) from None
    return text


def device_mesh(split: Split, device_type: str):
    """A DeviceMesh of dp x cp x tp over all processes, tp innermost: what talks most is nearest"""
    from torch.distributed import init_device_mesh

    return init_device_mesh(device_type, split.sizes(), mesh_dim_names=DIMENSIONS)


def data_mesh(mesh):
    """mesh: of device_mesh -> its dp x cp as one dimension: the processes whose gradients are averaged"""
    return mesh["dp", "cp"]._flatten("data")
