"""Runs the kernels on CPU tensors in the PTX simulator (tests/ptxemu: pip install ./tests/ptxemu).

with simulator.use(arch=90, seed=1):
    gk.layer_norm(x, weight, backend="triton")      # CPU tensors, the PTX that a GPU would get
"""

from contextlib import contextmanager

import torch

from . import cuda_library, hardware


def unavailable() -> str | None:
    """Why the simulator cannot run here, or None."""
    try:
        import ptxemu.triton_driver  # noqa: F401
    except ImportError as error:
        return f"the simulator is not installed ({error}): pip install ./tests/ptxemu in a checkout"
    return None


def cuda_unavailable() -> str | None:
    """Why the compiled CUDA library cannot run in the simulator here, or None."""
    if unavailable():
        return unavailable()
    if torch.version.cuda:
        return f"torch {torch.__version__} has a CUDA runtime of its own; with the simulator's only a CPU torch will do"
    import ptxemu.cuda

    ptxemu.cuda.load_runtime()
    if isinstance(cuda_library._find(), str):
        # It may have been looked for before there was a CUDA runtime to load it with.
        cuda_library._find.cache_clear()
    return cuda_library.missing()


@contextmanager
def use(arch: int = 90, seed: int = 0, idle: bool = False):
    """Triton and the CUDA library run on CPU tensors, as `arch`, on a schedule drawn from `seed`. Yields ptxemu's
    Triton driver, whose `last_launch.stats` count what the last Triton kernel did. idle: kernels are launched, and do
    nothing: what a call takes is then the host's time."""
    import ptxemu
    from ptxemu import triton_driver

    saved = hardware.simulated_arch, cuda_library.around_launch
    driver = triton_driver.install(arch=arch, seed=seed)
    driver.idle = idle
    hardware.simulated_arch = arch
    try:
        if cuda_unavailable():
            yield driver
        else:
            import ptxemu.cuda

            with ptxemu.cuda.use(seed=seed, idle=idle):
                cuda_library.around_launch = None if idle else lambda tensors: ptxemu.registered(*tensors)
                yield driver
    finally:
        hardware.simulated_arch, cuda_library.around_launch = saved
        triton_driver.uninstall()
