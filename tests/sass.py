"""The machine code of the CUDA library's kernels, read as a graph: what its loops do, and with how many registers."""

import fcntl
import os
import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from compile_gate import tool

from gptkernels import cuda_library

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    address: int
    conditional: bool
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where it may go on instead of at the next one."""
        if self.name.split(".")[0] not in ("BRA", "BSSY", "CALL", "WARPSYNC"):
            return None
        # The first number that stands alone: the address; those of BRA.DIV follow a register.
        numbers = re.findall(r"(?<![\w\[])0x([0-9a-f]+)\b", self.operands)
        return int(numbers[-1], 16) if numbers and not self.name.startswith("WARPSYNC.ALL") else None

    @property
    def ends(self) -> bool:
        """Whether the next one is never reached from here."""
        name = self.name.split(".")[0]
        return not self.conditional and (name in ("EXIT", "RET", "BSYNC") or (name == "BRA" and not self._may_fall))

    @property
    def _may_fall(self) -> bool:
        return ".DIV" in self.name or ".ANY" in self.name or bool(re.match(r"\s*!?U?P\d", self.operands))

    @property
    def registers(self) -> int:
        """One more than the highest register named in it."""
        width = 4 if ".128" in self.name else 2 if ".64" in self.name else 1
        if self.name.startswith("HGMMA"):
            columns = int(re.search(r"HGMMA\.64x(\d+)x", self.name).group(1))
            accumulator, *others = re.findall(r"\bR(\d+)\b", self.operands)
            return max([int(accumulator) + columns // 2, *(int(r) + 4 for r in others)])
        return max((int(r) + width for r in re.findall(r"\bR(\d+)\b", self.operands)), default=0)


@dataclass
class Kernel:
    name: str
    code: list[Instruction] = field(repr=False)

    def __post_init__(self):
        self.at = {instruction.address: i for i, instruction in enumerate(self.code)}

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, i.name)) for i in self.code)

    @property
    def loads_under_way(self) -> int:
        """The most loads of 16 bytes from global memory one after another, before any of their results is used"""
        most, pending = 0, []
        for one in self.code:
            named = [int(r) for r in re.findall(r"\bR(\d+)\b", one.operands)]
            load = one.name.startswith("LDG.E.128")
            used = named[1:] if load else named
            if one.target is not None or any(first <= r < first + 4 for first in pending for r in used):
                pending = []
            if load:
                pending.append(named[0])
            most = max(most, len(pending))
        return most

    def reachable(self, start: int) -> list[Instruction]:
        """From the start-th instruction on."""
        seen, todo = set(), [start]
        while todo:
            i = todo.pop()
            if i in seen or i >= len(self.code):
                continue
            seen.add(i)
            instruction = self.code[i]
            if instruction.target is not None:
                todo.append(self.at[instruction.target])
            if not instruction.ends:
                todo.append(i + 1)
        return [self.code[i] for i in sorted(seen)]

    def multiplying_loops(self) -> list[list[Instruction]]:
        """Of each loop that has products, what stands from the first of them to the last."""
        spans = []
        for i, instruction in enumerate(self.code):
            if instruction.name.startswith("BRA") and instruction.target is not None:
                body = self.code[self.at[instruction.target] : i + 1]
                products = [j for j, one in enumerate(body) if one.name.startswith("HGMMA")]
                if products:
                    spans.append(body[products[0] : products[-1] + 1])
        return spans

    def budgets(self) -> list[tuple[int, int]]:
        """-> (registers granted, registers used from there on) of each setmaxnreg"""
        found = []
        for i, instruction in enumerate(self.code):
            if instruction.name.startswith("USETMAXREG"):
                granted = int(re.findall(r"0x([0-9a-f]+)", instruction.operands)[-1], 16)
                found.append((granted, max(one.registers for one in self.reachable(i))))
        return found


@cache
def listing(what: str) -> dict[str, str]:
    """What cuobjdump says of each kernel of the library, by (mangled name, place in the library)."""
    parts = re.split(r"Function\s*:?\s*(_Z\w*)", dumped(what))
    return {f"{name}#{i}": part for i, (name, part) in enumerate(zip(parts[1::2], parts[2::2], strict=True))}


def dumped(what: str) -> str:
    """Half a minute's work, which the processes that run the tests do once between them."""
    kept = Path(os.environ["GPTKERNELS_TESTS_SHARE"]) / f"listing{what}"
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            command = [str(tool("cuobjdump")), what, cuda_library.load().__file__]
            kept.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return kept.read_text()


def parse(name: str, text: str) -> Kernel:
    found = INSTRUCTION.findall(text)
    return Kernel(name, [Instruction(int(at, 16), bool(guard), op, rest) for at, guard, op, rest in found])


@cache
def kernels(name: str) -> tuple[Kernel, ...]:
    """Those of the library with this in their name."""
    return tuple(parse(key, text) for key, text in listing("--dump-sass").items() if name in key)
