"""Launches of Triton kernels for calls like one before: what Triton's JIT finds out about the arguments of each launch
takes longer than a small kernel runs, and is the same for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from . import hardware

_collected: list[CompiledKernel] | None = None


@contextmanager
def compiling() -> Iterator[list[CompiledKernel]]:
    """Inside, kernels are compiled and not launched: what was compiled, in the order of the launches"""
    global _collected
    before, _collected = _collected, []
    try:
        yield _collected
    finally:
        _collected = before


class Launch:
    """A kernel with its grid and all its arguments but the first ones: tensors, descriptors and None."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], scalars: tuple = (), **constants):
        """scalars: what follows on the tensors. constants: the kernel's constexprs, which come last, and options"""
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.scalars, self.constants = scalars, constants
        self._compiled: CompiledKernel | None = None
        self._launched: tuple = ()  # the device, the kernel's handle and how it is to be launched
        self._rest: tuple = ()

    def __call__(self, *tensors: Any) -> None:
        if _collected is not None:
            _collected.append(self.kernel.warmup(*tensors, *self.scalars, grid=self.grid, **self.constants))
            return
        if self._compiled is not None:
            hooks = knobs.runtime
            if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # a profiler listens
                self._compiled[self.grid](*tensors, *self._rest)
                return
            # What that does, but for asking again for the device, and for what nobody listens to.
            device, *handles = self._launched
            self._compiled.run(
                *self.grid, hardware.current_stream(device), *handles, None, None, None, *tensors, *self._rest
            )
            return
        compiled = self.kernel[self.grid](*tensors, *self.scalars, **self.constants)
        if isinstance(compiled, CompiledKernel):  # Triton's interpreter gives none
            left = self.kernel.arg_names[len(tensors) + len(self.scalars) :]
            self._rest = *self.scalars, *(self.constants[name] for name in left)
            device = next(x.device for x in tensors if isinstance(x, Tensor))
            self._launched = device, compiled.function, compiled.packed_metadata
            self._compiled = compiled


def of_tensor(descriptor: TensorDescriptor, x: Tensor | None) -> TensorDescriptor:
    """The descriptor of a tensor like the one that `descriptor` was made of, and checked with; None: of none yet"""
    other = object.__new__(TensorDescriptor)
    vars(other).update(vars(descriptor), base=x)
    return other
