"""FlashAttention-3's own kernels, built from a checkout of flash-attention and recorded."""

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

import torch

from .. import cuda
from . import Recorded, recording


class Call(ctypes.Structure):
    """fa3.cu's Call"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "q k v out lse dout dq dk dv dq_accum delta lse_log2 counter".split()),
        *((name, ctypes.c_int) for name in "batch heads tokens sms".split()),
    ]


def cutlass_headers() -> Path:
    try:
        import cutlass_library
    except ImportError:
        raise FileNotFoundError(
            "CUTLASS's headers are missing: pip install --no-deps nvidia-cutlass==4.2.0.0"
        ) from None
    return Path(cutlass_library.__file__).parent / "source" / "include"


class FlashAttention3:
    """checkout: a clone of Dao-AILab/flash-attention. Libraries are built once, into its hopper/build-clock."""

    def __init__(self, checkout: str | os.PathLike):
        self.hopper = Path(checkout) / "hopper"
        if not (self.hopper / "flash_fwd_launch_template.h").exists():
            raise FileNotFoundError(
                f"{checkout} is no checkout of flash-attention: it has no hopper/flash_fwd_launch_template.h"
            )

    def library(self, backward: bool, head_dim: int, causal: bool) -> Path:
        built_from = hashlib.sha256(Path(__file__).with_name("fa3.cu").read_bytes()).hexdigest()[:8]
        name = f"fa3_{'bwd' if backward else 'fwd'}_hd{head_dim}_{'causal' if causal else 'full'}_{built_from}.so"
        path = self.hopper / "build-clock" / name
        if path.exists():
            return path
        path.parent.mkdir(exist_ok=True)
        command = [
            "nvcc",
            "-std=c++17",
            "-O3",
            "--use_fast_math",
            "--expt-relaxed-constexpr",
            "--expt-extended-lambda",
            "-DNDEBUG",
        ]
        command += [
            "-DCUTLASS_ENABLE_GDC_FOR_SM90",
            "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED",
            f"-DFA3_{'BACKWARD' if backward else 'FORWARD'}",
        ]
        command += [
            f"-DFA3_HEAD_DIM={head_dim}",
            f"-DFA3_CAUSAL={str(causal).lower()}",
            f"-I{cutlass_headers()}",
            f"-I{self.hopper}",
        ]
        command += [
            "-gencode",
            "arch=compute_90a,code=compute_90a",
            "-cudart",
            "shared",
            "-shared",
            "-Xcompiler",
            "-fPIC",
        ]
        command += [str(Path(__file__).with_name("fa3.cu")), "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return path

    def record(
        self,
        batch: int,
        heads: int,
        tokens: int,
        head_dim: int,
        causal: bool = True,
        backward: bool = False,
        sms: int = 1,
    ) -> list[Recorded]:
        """The launches of one pass in float16, on a device of `sms` SMs."""
        shape = (batch, tokens, heads, head_dim)
        padded = tokens + 128  # at least what the kernels round up to

        def random(*shape):
            return torch.randn(*shape).to(torch.float16)

        tensors = {name: random(*shape) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")}
        tensors["lse"] = torch.full((batch, heads, tokens), 3.0)
        tensors["dq_accum"] = torch.zeros(batch, heads, padded * head_dim)
        tensors["delta"], tensors["lse_log2"] = torch.zeros(batch, heads, padded), torch.zeros(batch, heads, padded)
        tensors["counter"] = torch.zeros(1, dtype=torch.int32)
        with cuda.use(seed=0) as device:
            library = device.load(self.library(backward, head_dim, causal))
            call = Call(**{name: device.pointer(x).value for name, x in tensors.items()}, batch=batch, heads=heads,
                        tokens=tokens, sms=sms)  # fmt: skip
            with recording() as launches:
                device.check(library.fa3_run(ctypes.byref(call)))
        return launches
