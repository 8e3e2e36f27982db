"""The machine code that ptxas makes of a module's PTX, each instruction with the PTX line that it came from."""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

# The order is that of src/timing/sass.hpp's Op.
OPERATIONS = (
    "control fma fma_heavy alu xu uniform branch shuffle shared_load shared_store global_load global_store atomic hgmma "
    "warpgroup_arrive warpgroup_wait barrier mbarrier_arrive mbarrier_wait mbarrier_init tma_load tma_store tma_commit "
    "async_copy async_commit async_wait mma constant_load fence exit special registers local"
).split()

# By the longest prefix of the mnemonic.
MNEMONICS = {
    "FFMA": "fma", "FMUL": "fma", "FADD": "fma", "HFMA2": "fma", "HADD2": "fma", "HMUL2": "fma", "HMNMX2": "alu",
    "FSWZADD": "fma", "DADD": "xu", "DFMA": "xu", "DMUL": "xu",
    "IMAD": "fma_heavy", "IMAD.MOV": "fma", "IDP": "fma_heavy",
    "MUFU": "xu", "I2F.": "xu", "F2I": "xu", "F2F": "xu", "F2FP": "alu", "I2FP": "alu", "FRND": "xu", "POPC": "xu", "FLO": "xu", "BREV": "xu", "I2I": "xu",
    "BRA": "branch", "BRX": "branch", "JMP": "branch", "JMX": "branch", "EXIT": "exit", "RET": "exit", "KILL": "exit",
    "SHFL": "shuffle", "REDUX": "shuffle",
    "LDS": "shared_load", "STS": "shared_store", "ATOMS": "shared_store",
    "LDGSTS": "async_copy", "LDGDEPBAR": "async_commit", "DEPBAR": "async_wait",
    "LDG": "global_load", "LD.": "global_load", "STG": "global_store", "ST.": "global_store",
    "LDL": "local", "STL": "local", "ATOM": "atomic", "RED": "atomic", "ATOMG": "atomic",
    "HGMMA": "hgmma", "QGMMA": "hgmma", "IGMMA": "hgmma", "WARPGROUP.ARRIVE": "warpgroup_arrive",
    "WARPGROUP.DEPBAR": "warpgroup_wait", "HMMA": "mma", "IMMA": "mma", "QMMA": "mma",
    "BAR.": "barrier", "ARRIVES": "mbarrier_arrive", "SYNCS.ARRIVE": "mbarrier_arrive", "SYNCS.PHASECHK": "mbarrier_wait", "SYNCS.EXCH": "mbarrier_init",
    "UTMALDG": "tma_load", "UBLKCP": "tma_load", "UTMASTG": "tma_store", "UTMAREDG": "tma_store", "UBLKRED": "tma_store",
    "UTMACMDFLUSH": "tma_commit", "UTMAPF": "control", "UTMACCTL": "control",
    "LDC": "constant_load", "MEMBAR.ALL.GPU": "fence", "MEMBAR.SC.GPU": "fence", "MEMBAR.SC.SYS": "fence",
    "MEMBAR": "control", "FENCE": "fence", "S2R": "special", "S2UR": "special", "USETMAXREG": "registers",
    "NOP": "control", "BSSY": "control", "BSYNC": "control", "BREAK": "control", "CALL": "control", "YIELD": "control",
    "WARPSYNC": "control", "ENDCOLLECTIVE": "control", "ERRBAR": "control", "CGAERRBAR": "control", "CCTL": "control",
    "NANOSLEEP": "control", "BMOV": "control", "UCGABAR": "control", "ACQBULK": "control", "PREEXIT": "control",
    "DEPBAR.": "async_wait", "BPT": "exit", "ACQSHMINIT": "control",
}  # fmt: skip
MMA_CYCLES = {"16816": 8, "1688": 4, "16832": 8}  # mma.sync runs at about half of wgmma's rate on Hopper


class SassStruct(ctypes.Structure):
    """src/timing/sass.hpp's Sass"""

    _fields_ = [
        ("line", ctypes.c_uint32),
        ("op", ctypes.c_uint16),
        ("stall", ctypes.c_uint8),
        ("yields", ctypes.c_uint8),
        ("write", ctypes.c_uint8),
        ("read", ctypes.c_uint8),
        ("wait", ctypes.c_uint8),
        ("guarded", ctypes.c_uint8),
        ("reads", ctypes.c_uint8),
        ("target", ctypes.c_int32),
        ("argument", ctypes.c_uint32),
    ]


@dataclass
class Sass:
    """One kernel's machine code."""

    kernel: str
    texts: list[str] = field(default_factory=list)
    code: list[tuple] = field(default_factory=list)  # as SassStruct's fields
    jumps: list[tuple[int, int]] = field(default_factory=list)  # of branches with several targets
    registers: int = 0
    unknown: set[str] = field(default_factory=set)  # mnemonics taken for ALU instructions

    def table(self) -> ctypes.Array:
        return (SassStruct * len(self.code))(*(SassStruct(*row) for row in self.code))


def find_tool(name: str) -> str:
    """ptxas from the PATH; nvdisasm from there or from Triton's wheel"""
    found = shutil.which(name)
    if found:
        return found
    try:
        import triton
    except ImportError:
        raise FileNotFoundError(f"{name} is not in the PATH and Triton, which brings one, is not installed") from None
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def mark_lines(ptx: str) -> str:
    """Says, before each instruction of an entry, on which line of this text it stands."""
    lines, depth, fresh, skipping = [], 0, True, False
    for number, line in enumerate(ptx.split("\n"), 1):
        code = line.split("//")[0].strip()
        if code.startswith(".section"):
            skipping = True  # debug information, which .loc would contradict
        if skipping or code.startswith((".loc", ".file")):
            skipping = skipping and not code.endswith("}")
            continue
        if depth and fresh and code and code[0] not in ".{}$()" and not re.match(r"[\w$]+:", code):
            lines.append(f".loc 1 {number} 0")
        lines.append(line)
        if code:
            fresh = code.endswith((";", "{", "}", ":"))
        depth += code.count("{") - code.count("}")
    return "\n".join([*lines, '.file 1 "k.ptx"', ""])


def _operation(mnemonic: str) -> str | None:
    for end in range(len(mnemonic), 0, -1):
        if mnemonic[:end] in MNEMONICS:
            return MNEMONICS[mnemonic[:end]]
    return "uniform" if mnemonic.startswith("U") else None


ALU = re.compile(
    r"(IADD|LOP|PLOP|LEA|SHF|SHL|SHR|ISETP|FSETP|HSETP|DSETP|FMNMX|IMNMX|VIMNMX|VIADD|VABSDIFF|SEL|FSEL|PRMT|SGXT|BMSK|IABS|"
    r"MOV|P2R|R2P|CS2R|R2UR|F2FP|I2FP|VOTE|MATCH|ELECT|FCHK|BITEXTRACT|LEPC|GETLMEMBASE|VHMNMX|HSET|FSET|PSETP|R2B|B2R|"
    r"I2IP|IADD3|CSMTEST|VOTEU|ISCADD|TEX|MOVM)"
)


def _argument(op: str, text: str) -> int:
    if op == "hgmma":
        n = int(re.search(r"GMMA\.64x(\d+)x", text)[1])
        operands = text.split(",")
        registers = operands[1].strip().startswith("R")
        return n | registers << 9 | ("gsb0" in text) << 10
    if op == "warpgroup_wait":
        return int(re.search(r"gsb0, (0x[0-9a-f]+)", text)[1], 16)
    if op == "mma":
        return next((cycles for shape, cycles in MMA_CYCLES.items() if shape in text), 8)
    if op == "fence":
        return int("MEMBAR" in text)
    return 0


_SECTION = re.compile(r"\s*\.section\s+\.text\.([\w$.]+)")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_BRANCH_TARGETS = re.compile(r"\(\*\"BRANCH_TARGETS (.*?)\"\*\)")
_SECOND_WORD = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_LINE = re.compile(r'\s*//## File "k\.ptx", line (\d+)')
_LABEL = re.compile(r"\s*(\.L[\w$]+):")


def parse(listing: str) -> dict[str, Sass]:
    """Of `nvdisasm -g -c -hex`: each instruction's text with the first half of its bits, then the second half alone."""
    sections: dict[str, list[str]] = {}
    for text in listing.split("\n"):
        if match := _SECTION.match(text):
            lines = sections.setdefault(match[1], [])
        if sections:
            lines.append(text)
    return {kernel: _parse_section(kernel, lines) for kernel, lines in sections.items()}


def _parse_section(kernel: str, lines: list[str]) -> Sass:
    sass, labels, line, text = Sass(kernel), {}, 0, ""
    for row in lines:
        if match := _LINE.match(row):
            line = int(match[1])
        elif match := _LABEL.match(row):
            labels[match[1]] = len(sass.texts)
        elif match := _INSTRUCTION.match(row):
            text = match[1]
        elif text and (match := _SECOND_WORD.match(row)):
            sass.code.append(_fields(sass, text, int(match[1], 16) >> 41, line))
            sass.texts.append(text)
            text = ""
    for at, text in enumerate(sass.texts):
        if OPERATIONS[sass.code[at][1]] in ("tma_load", "tma_store"):
            # A loop around it makes one copy for each lane; without one the warp makes a single copy.
            each_lane = any("BRA.U.ANY" in later for later in sass.texts[at + 1 : at + 10])
            sass.code[at] = (*sass.code[at][:-1], int(each_lane))
        if OPERATIONS[sass.code[at][1]] != "branch":
            continue
        if match := re.search(r"`\((\.L[\w$]+)\)", text):
            *fields, _, argument = sass.code[at]
            sass.code[at] = (*fields, labels[match[1]], argument)
        elif match := _BRANCH_TARGETS.search(text):
            sass.jumps += [(at, labels[label]) for label in match[1].split(",")]
    return sass


def _register_reads(sass: Sass, op: str, body: str) -> int:
    """Registers fetched: those that the instruction before kept for reuse are not."""
    operands = body.split(" ", 1)[1].split(",") if " " in body else []
    if operands and op not in ("shared_store", "global_store", "branch") and re.match(r"\s*R\d", operands[0]):
        operands = operands[1:]
    kept = re.findall(r"\bR(\d+)\.reuse", sass.texts[-1]) if sass.texts else []
    wide = 4 if ".128" in body and "store" in op else 2 if ".64" in body and "store" in op else 1
    count = 0
    for operand in operands:
        for register in re.findall(r"\bR(\d+)", operand):
            if register not in kept:
                count += wide if "[" not in operand else 1
    return count


def _fields(sass: Sass, text: str, control: int, line: int) -> tuple:
    """As SassStruct's, but for a branch's target. control: bits 105 and up"""
    guard, _, body = text.partition(" ") if text.startswith("@") else ("", "", text)
    body = body.strip()
    mnemonic = body.split(" ")[0].rstrip(",")
    op = _operation(mnemonic)
    if op is None:
        op = "alu"
        if not ALU.match(mnemonic):
            sass.unknown.add(mnemonic)
    guarded = bool(guard) and guard not in ("@PT", "@UPT")
    if op == "branch":
        guarded |= ".DIV" in mnemonic or ".CONV" in mnemonic or bool(re.match(r"\S+ !?U?P\d", body))
    stall, yields, write, read, wait = (
        control & 15,
        control >> 4 & 1,
        control >> 5 & 7,
        control >> 8 & 7,
        control >> 11 & 63,
    )
    reads = _register_reads(sass, op, body)
    return line, OPERATIONS.index(op), stall, yields, write, read, wait, guarded, reads, -1, _argument(op, body)


@functools.lru_cache(maxsize=64)
def assemble(ptx: str, kernel: str, arch: str = "sm_90a") -> Sass:
    """One kernel's machine code, as ptxas makes it without the marks too."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        source.write_text(mark_lines(ptx))
        command = [
            find_tool("ptxas"),
            f"-arch={arch}",
            "-lineinfo",
            "-v",
            "--entry",
            kernel,
            str(source),
            "-o",
            str(cubin),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas refused {kernel}: {done.stderr.strip()}")
        listing = subprocess.run(
            [find_tool("nvdisasm"), "-g", "-c", "-hex", str(cubin)], check=True, capture_output=True, text=True
        ).stdout
    sass = parse(listing)[kernel]
    sass.registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
    return sass
