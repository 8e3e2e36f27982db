"""Whether a variant of the CUDA MLP kernels still works."""

from pathlib import Path
from types import SimpleNamespace

import torch
from kernel_variants import using
from parity import assert_parity
from test_mlp import make

import gptkernels as gk
from gptkernels import simulator
from gptkernels.ops.mlp import reference

CPU = SimpleNamespace(device=torch.device("cpu"))


def works(library: Path) -> bool:
    # Some of what is missing shows under one seed in three.
    for seed in range(16):
        torch.manual_seed(seed)
        with using(library), simulator.use(arch=90, seed=seed):
            try:
                for save, residual in (("preact", True), ("all", False)):
                    assert_parity(
                        gk.mlp,
                        reference.mlp,
                        make(CPU, 290, 400, 520, torch.bfloat16, residual=residual),
                        kwargs={"backend": "cuda", "save": save},
                        reference_kwargs={},
                    )
            except (AssertionError, RuntimeError):
                return False
    return True
