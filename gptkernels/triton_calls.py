"""Launches of Triton kernels for calls like one before: what Triton's JIT finds out about the arguments of each launch
takes longer than a small kernel runs, and is the same for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

_compiled: list[CompiledKernel] | None = None


@contextmanager
def compiling() -> Iterator[list[CompiledKernel]]:
    """Inside, kernels are compiled and not launched: what was compiled, in the order of the launches"""
    global _compiled
    before, _compiled = _compiled, []
    try:
        yield _compiled
    finally:
        _compiled = before


class Launch:
    """A kernel with its grid and all its arguments but the first ones: tensors, descriptors and None."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], scalars: tuple = (), **constants):
        """scalars: what follows on the tensors. constants: the kernel's constexprs, which come last, and options"""
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.scalars, self.constants = scalars, constants
        self._run: Callable | None = None
        self._rest: tuple = ()

    def __call__(self, *tensors: Any) -> None:
        if _compiled is not None:
            _compiled.append(self.kernel.warmup(*tensors, *self.scalars, grid=self.grid, **self.constants))
            return
        if self._run is not None:
            self._run(*tensors, *self._rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self.scalars, **self.constants)
        if isinstance(compiled, CompiledKernel):  # Triton's interpreter gives none
            left = self.kernel.arg_names[len(tensors) + len(self.scalars) :]
            self._rest = *self.scalars, *(self.constants[name] for name in left)
            self._run = compiled[self.grid]


def of_tensor(descriptor: TensorDescriptor, x: Tensor | None) -> TensorDescriptor:
    """The descriptor of a tensor like the one that `descriptor` was made of, and checked with; None: of none yet"""
    other = object.__new__(TensorDescriptor)
    vars(other).update(vars(descriptor), base=x)
    return other
