"""The MLP with Triton: products with fused epilogues, or cuBLAS and one fused pointwise pass, whichever is faster."""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import hardware
from ...remembered import remembered
from ...torch_library import torch_op
from ...triton_calls import Launch, of_tensor
from ...tuning import choices
from .eager import linear, other_grads
from .outputs import bwd_outputs, copies_cost_more, fwd_outputs
from .triton_gemm import mlp_bwd_kernel, mlp_fwd_kernel
from .triton_pointwise import activation_bwd_kernel, activation_fwd_kernel

# arch -> (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) for 16-bit types: what compiles without spills.
# `gptkernels tune` finds better ones on the GPU at hand.
GEMM_LAUNCH = {
    80: (128, 128, 32, 4, 4),
    89: (128, 128, 32, 4, 3),
    90: (128, 256, 64, 8, 3),
    100: (128, 256, 64, 8, 3),
}
# The same for backward, whose epilogue needs more registers.
GEMM_BWD_LAUNCH = {
    80: (128, 128, 32, 8, 4),
    89: (128, 128, 32, 8, 3),
    90: (128, 128, 64, 8, 4),
    100: (128, 128, 64, 8, 4),
}
# The same for float32 on every arch, and for 16-bit types with few rows, in both directions.
FLOAT_LAUNCH = (64, 64, 16, 8, 2)
FEW_ROWS_LAUNCH = (64, 128, 64, 4, 3)
FEW_ROWS = 256
GROUP_M = 8
POINTWISE_LAUNCH = {"BLOCK": 2048, "num_warps": 8}
POINTWISE_BWD_LAUNCH = {"ROWS": 128, "BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 8}

# arch -> the widest d at which the fused epilogue is faster than cuBLAS and a pointwise pass. What it can win shrinks
# as 266 / d of the products' time; what a product loses against cuBLAS does not.
FUSED_UP_TO = {80: 1024, 89: 1024, 90: 2048, 100: 1024}


def nearest(table: dict, arch: int):
    """The row of the newest arch that is not newer than this one."""
    return table[max((known for known in table if known <= arch), default=min(table))]


def is_fused(x: Tensor, fc_weight: Tensor, proj_weight: Tensor) -> bool:
    if copies_cost_more(x, fc_weight, proj_weight):
        return False
    (measured,) = fused_setting(x, fc_weight)
    return x.shape[-1] <= nearest(FUSED_UP_TO, hardware.arch(x.device)) if measured is None else measured


@remembered
def fused_setting(x: Tensor, fc_weight: Tensor) -> tuple[bool | None]:
    return (choices.setting("mlp_fused", "mlp", (x, fc_weight), None),)


def unsupported(x: Tensor, *_) -> str | None:
    return hardware.triton_unsupported(x.device)


def describe(x: Tensor, fc_weight: Tensor, fc_bias, proj_weight: Tensor, *_) -> str:
    return "fused epilogues" if is_fused(x, fc_weight, proj_weight) else "cuBLAS and a fused pointwise pass"


def gemm_launch(table: dict, a: Tensor, setting: str, weight: Tensor) -> dict:
    """a: (M, K), weight: (N, K)"""
    if a.dtype == torch.float32:
        row = FLOAT_LAUNCH
    else:
        row = FEW_ROWS_LAUNCH if a.shape[0] <= FEW_ROWS else nearest(table, hardware.arch(a.device))
    row = choices.setting(setting, "mlp", (a, weight), row)
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return {**dict(zip(names, row, strict=True)), "GROUP_M": GROUP_M}


def precision(dtype: torch.dtype) -> str:
    """Of a product of float32, as torch.set_float32_matmul_precision asks."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def takes_tma(*matrices: Tensor) -> bool:
    """Whether TMA can address them: Hopper on, 16-byte aligned starts and rows."""
    return hardware.arch(matrices[0].device) >= 90 and all(
        m.data_ptr() % 16 == 0 and m.stride(0) * m.element_size() % 16 == 0 and m.stride(1) == 1 for m in matrices
    )


def described(matrix: Tensor, tma: bool, rows: int, columns: int) -> TensorDescriptor | None:
    """For tiles of rows x columns, of no tensor yet; None: load_tile takes the matrix itself"""
    if not tma:
        return None
    return of_tensor(TensorDescriptor(matrix, matrix.shape, matrix.stride(), [rows, columns]), None)


def operand(template: TensorDescriptor | None, matrix: Tensor):
    """What load_tile takes for `matrix`."""
    return matrix if template is None else of_tensor(template, matrix)


def gemm_grid(launch: dict, M: int, N: int, device: torch.device) -> tuple[int]:
    return (min(hardware.sm_count(device), triton.cdiv(M, launch["BLOCK_M"]) * triton.cdiv(N, launch["BLOCK_N"])),)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    preact: Tensor | None = None,
    out: Tensor,
) -> None:
    """out: (M, N) = activation(x @ weight.T + bias) + residual; preact: (M, N) = x @ weight.T + bias.
    x: (M, K), weight: (N, K), bias: (N,), residual: (M, N)"""
    launch, a, b = linear_launch(x, weight, bias, residual, preact, out, activation, precision(x.dtype))
    with hardware.on_device(x.device):
        launch(
            operand(a, x),
            operand(b, weight),
            weight if bias is None else bias,
            out if residual is None else residual,
            out if preact is None else preact,
            out,
        )


@remembered
def linear_launch(x, weight, bias, residual, preact, out, activation, precision):
    """-> the launch, and descriptors of x and weight where it takes them"""
    (M, K), N = x.shape, weight.shape[0]
    row, tma = gemm_launch(GEMM_LAUNCH, x, "mlp_fwd_tile", weight), takes_tma(x, weight)
    launch = Launch(
        mlp_fwd_kernel,
        gemm_grid(row, M, N, x.device),
        (M, N, K, x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0)),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_PREACT=preact is not None,
        TMA=tma,
        PRECISION=precision,
        **row,
    )
    k = row["BLOCK_K"]
    return launch, described(x, tma, row["BLOCK_M"], k), described(weight, tma, row["BLOCK_N"], k)


def fused_grad_preact(
    dout: Tensor, proj_weight: Tensor, preact: Tensor, activation: str, act: Tensor | None, wants_partials: bool
) -> tuple[Tensor, Tensor | None]:
    """-> dout @ proj_weight * activation'(preact): (M, N), and its column sums in parts: (P, N). act: (M, N) is filled.
    dout: (M, K), proj_weight: (K, N), preact: (M, N)"""
    wants = activation, act is not None, wants_partials, precision(dout.dtype)
    launch, a, b, parts = grad_preact_launch(dout, proj_weight, preact, *wants)
    grad = torch.empty(preact.shape, dtype=dout.dtype, device=dout.device)
    partials = torch.empty(parts, dtype=torch.float32, device=dout.device) if wants_partials else None
    with hardware.on_device(dout.device):
        launch(
            operand(a, dout),
            operand(b, proj_weight),
            preact,
            grad if act is None else act,
            grad,
            grad if partials is None else partials,
        )
    return grad, partials


@remembered
def grad_preact_launch(dout, proj_weight, preact, activation, has_act, wants_partials, precision):
    """-> the launch, descriptors of dout and proj_weight where it takes them, the shape of the partial sums"""
    (M, K), N = dout.shape, proj_weight.shape[1]
    row, tma = gemm_launch(GEMM_BWD_LAUNCH, dout, "mlp_bwd_tile", proj_weight.mT), takes_tma(dout, proj_weight)
    launch = Launch(
        mlp_bwd_kernel,
        gemm_grid(row, M, N, dout.device),
        (M, N, K, dout.stride(0), proj_weight.stride(0)),
        ACTIVATION=activation,
        HAS_ACT=has_act,
        HAS_PARTIALS=wants_partials,
        TMA=tma,
        PRECISION=precision,
        **row,
    )
    k = row["BLOCK_K"]
    templates = described(dout, tma, row["BLOCK_M"], k), described(proj_weight, tma, k, row["BLOCK_N"])
    return launch, *templates, (triton.cdiv(M, row["BLOCK_M"]), N)


def pointwise_activation(preact: Tensor, activation: str, act: Tensor) -> None:
    """act = activation(preact), both contiguous"""
    with hardware.on_device(preact.device):
        pointwise_launch(preact, activation)(preact, act)


@remembered
def pointwise_launch(preact: Tensor, activation: str) -> Launch:
    grid = (triton.cdiv(preact.numel(), POINTWISE_LAUNCH["BLOCK"]),)
    return Launch(activation_fwd_kernel, grid, (preact.numel(),), ACTIVATION=activation, **POINTWISE_LAUNCH)


def pointwise_grad_preact(
    grad: Tensor, preact: Tensor, activation: str, act: Tensor | None, wants_partials: bool
) -> Tensor | None:
    """grad: (M, N) is multiplied by activation'(preact) in place -> its column sums in parts: (P, N). act is filled."""
    launch, parts = pointwise_bwd_launch(grad, preact, activation, act is not None, wants_partials)
    partials = torch.empty(parts, dtype=torch.float32, device=grad.device) if wants_partials else None
    with hardware.on_device(grad.device):
        launch(grad, preact, grad if act is None else act, grad if partials is None else partials)
    return partials


@remembered
def pointwise_bwd_launch(grad, preact, activation, has_act, wants_partials):
    """-> the launch, the shape of the partial sums"""
    M, N = grad.shape
    grid = (triton.cdiv(M, POINTWISE_BWD_LAUNCH["ROWS"]), triton.cdiv(N, POINTWISE_BWD_LAUNCH["BLOCK_N"]))
    flags = {"ACTIVATION": activation, "HAS_ACT": has_act, "HAS_PARTIALS": wants_partials}
    return Launch(activation_bwd_kernel, grid, (M, N), **flags, **POINTWISE_BWD_LAUNCH), (grid[0], N)


@torch_op(fake=fwd_outputs)
def mlp_fwd(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    save: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (M, d), fc_weight: (hidden, d), proj_weight: (d_out, hidden) -> out: (M, d_out), preact, act: (M, hidden)"""
    outputs = out, preact, act = fwd_outputs(x, fc_weight, fc_bias, proj_weight, proj_bias, residual, activation, save)
    if x.shape[0] == 0:
        return outputs
    hidden = act if save == "all" else torch.empty((x.shape[0], fc_weight.shape[0]), dtype=x.dtype, device=x.device)
    if is_fused(x, fc_weight, proj_weight):
        kept = None if save == "input" else preact
        fused_linear(x, fc_weight.contiguous(), fc_bias, activation=activation, preact=kept, out=hidden)
        fused_linear(hidden, proj_weight.contiguous(), proj_bias, residual=residual, out=out)
        return outputs
    before = linear(x, fc_weight, fc_bias)
    # Where the input of the activation is not kept, its output takes its place.
    hidden = before if save == "input" else hidden
    pointwise_activation(before, activation, hidden)
    if residual is None:
        out = linear(hidden, proj_weight, proj_bias)
    else:
        start = residual if proj_bias is None else residual + proj_bias
        out = torch.addmm(start, hidden, proj_weight.mT)
    return out, preact if save == "input" else before, act


@torch_op(fake=bwd_outputs, mutates=("fc_sum", "proj_sum"))
def mlp_bwd(
    dout: Tensor,
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    preact: Tensor,
    act: Tensor,
    activation: str,
    save: str,
    needs: list[bool],
    fc_sum: Tensor | None,
    proj_sum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dout: (M, d_out), x: (M, d), preact, act: (M, hidden) -> gradients of x, both of fc, both of proj; those of the
    weights are added to fc_sum: (hidden, d) and proj_sum: (d_out, hidden) instead, where these are given"""
    needs_fc_bias, needs_proj_weight = needs[2:4]
    if x.shape[0] == 0:
        grads = bwd_outputs(
            dout, x, fc_weight, fc_bias, proj_weight, preact, act, activation, save, needs, fc_sum, proj_sum
        )
        for grad in grads:
            grad.zero_()
        return grads
    if save == "input":
        preact = linear(x, fc_weight, fc_bias)
    remade = None
    if needs_proj_weight and save != "all":
        act = remade = torch.empty_like(preact)
    if is_fused(x, fc_weight, proj_weight):
        grad, partials = fused_grad_preact(dout, proj_weight.contiguous(), preact, activation, remade, needs_fc_bias)
    else:
        grad = dout @ proj_weight
        partials = pointwise_grad_preact(grad, preact, activation, remade, needs_fc_bias)
    return other_grads(dout, x, fc_weight, proj_weight, act, grad, partials, needs, fc_sum, proj_sum)
