"""Compiles exactly what launchers launch, without running it, and reads what the assembler makes of it."""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from unittest import mock

import triton

from gptkernels import simulator

# Of a thread, in bytes, outside of loops: a tile reads and writes them once.
MOST_SPILLED = 1024
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
# Shared memory that one CTA may have, in bytes.
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}


@dataclass(frozen=True)
class Compiled:
    """One kernel as it would be launched on one architecture."""

    kernel: str
    arch: int
    ptx: str
    shared: int
    num_warps: int

    @property
    def machine_code(self) -> "MachineCode":
        return assemble(self.ptx, f"sm_{self.arch}" + "a" * (self.arch >= 90))


@dataclass(frozen=True)
class MachineCode:
    registers: int
    spilled_bytes: int
    stack_bytes: int
    cubin: bytes

    @cached_property
    def sass(self) -> str:
        """Takes longer than the assembling."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [str(tool("cuobjdump")), "--dump-sass", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}", self.sass))

    @property
    def spills_in_loops(self) -> int:
        """Instructions that read or write spilled registers in a loop that multiplies matrices"""
        code = [(int(m[1], 16), m[2], m[3]) for m in INSTRUCTION.finditer(self.sass)]
        index = {address: i for i, (address, _, _) in enumerate(code)}
        most = 0
        for i, (_, name, operands) in enumerate(code):
            target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
            start = index.get(int(target[1], 16), i) if target else i
            body = [other for _, other, _ in code[start:i]]
            if any(other.startswith(("HMMA", "HGMMA")) for other in body):
                most = max(most, sum(other.startswith(("LDL", "STL")) for other in body))
        return most


def tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


@cache
def assemble(ptx: str, target: str) -> MachineCode:
    """Registers, spills and code of a module with one kernel, by Triton's own assembler."""
    blackwell = tool("ptxas-blackwell")
    ptxas = blackwell if target.startswith("sm_10") and blackwell.exists() else tool("ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"--gpu-name={target}", str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        code = cubin.read_bytes()
    numbers = {
        name: max(map(int, re.findall(pattern, result.stderr)), default=0)
        for name, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("spilled_bytes", r"(\d+) bytes spill stores"),
            ("stack_bytes", r"(\d+) bytes stack frame"),
        )
    }
    return MachineCode(**numbers, cubin=code)


@contextmanager
def compiled_launches(arch: int):
    """Inside, Triton launches compile for `arch` and do not run; yields the list of what was compiled."""
    launches = []
    jit_function = triton.runtime.jit.JITFunction
    real_run = jit_function.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = real_run(self, *args, grid=grid, warmup=True, **options)
        launches.append(
            Compiled(self.__name__, arch, kernel.asm["ptx"], kernel.metadata.shared, kernel.metadata.num_warps)
        )
        return kernel

    with simulator.use(arch), mock.patch.object(jit_function, "run", compile_only):
        yield launches


def assert_within_limits(compiled: Compiled) -> None:
    code = compiled.machine_code
    where = f"{compiled.kernel} for sm_{compiled.arch}"
    if code.spilled_bytes or code.stack_bytes:
        # A few bytes before and after a loop of products cost less than smaller tiles.
        assert code.count("HG?MMA"), f"{where} spills {code.spilled_bytes} bytes"
        assert max(code.spilled_bytes, code.stack_bytes) <= MOST_SPILLED, f"{where} spills {code.spilled_bytes} bytes"
        assert not code.spills_in_loops, f"{where} spills in a loop"
    assert code.registers * compiled.num_warps * 32 <= 65536, f"{where} needs {code.registers} registers"
    assert compiled.shared <= SHARED_LIMIT[compiled.arch], f"{where} needs {compiled.shared} bytes of shared memory"
