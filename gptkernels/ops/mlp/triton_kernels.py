"""The MLP with Triton: products with fused epilogues, or cuBLAS and one fused pointwise pass, whichever is faster."""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import hardware
from ...launch import shipped
from ...remembered import remembered
from ...torch_library import torch_op
from ...triton_calls import Launch, of_tensor
from ...tuning import choices
from ..rows import zero_
from .eager import linear, other_grads, preact_of
from .outputs import bwd_outputs, copies_cost_more, fwd_outputs, hidden_layer
from .record import MlpCall
from .triton_gemm import mlp_bwd_kernel, mlp_fwd_kernel
from .triton_pointwise import activation_bwd_kernel, activation_fwd_kernel

AnyCall = Any  # MlpCall, or the gated MLP's

# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages for float32, and for 16-bit types with few rows, in both directions and on
# every architecture; what others take is in gptkernels/launch.
FLOAT_LAUNCH = (64, 64, 16, 8, 2)
FEW_ROWS_LAUNCH = (64, 128, 64, 4, 3)
FEW_ROWS = 256
GROUP_M = 8
POINTWISE_LAUNCH = {"BLOCK": 2048, "num_warps": 8}
POINTWISE_BWD_LAUNCH = {"ROWS": 128, "BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 8}


def fused_up_to(arch: int) -> int:
    return shipped(arch)["mlp_fused_up_to"]


def is_fused(call: MlpCall) -> bool:
    return not copies_cost_more(call) and fusing_is_faster(call)


def fusing_is_faster(call: AnyCall) -> bool:
    measured = choices.setting("mlp_fused", call.OP, call, None)
    return call.x.shape[-1] <= fused_up_to(hardware.arch(call.x.device)) if measured is None else measured


def unsupported(call: AnyCall) -> str | None:
    return hardware.triton_unsupported(call.x.device)


def describe(call: MlpCall) -> str:
    return told(is_fused(call))


def told(fused: bool) -> str:
    return "fused epilogues" if fused else "cuBLAS and a fused pointwise pass"


def gemm_launch(call: AnyCall, a: Tensor, setting: str) -> dict:
    """a: (M, K)"""
    if a.dtype == torch.float32:
        row = FLOAT_LAUNCH
    else:
        row = FEW_ROWS_LAUNCH if a.shape[0] <= FEW_ROWS else shipped(hardware.arch(a.device))[setting]
    row = choices.setting(setting, call.OP, call, row)
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


class Product:
    """A launch whose first operands are matrices, which it takes as TMA descriptors where it can."""

    def __init__(self, launch: Launch, *templates: TensorDescriptor | None):
        self.launch, self.templates = launch, templates

    def __call__(self, *tensors: Any) -> None:
        """tensors: or None, where a kernel does without"""
        count = len(self.templates)
        operands = [operand(*pair) for pair in zip(self.templates, tensors[:count], strict=True)]
        with hardware.on_device(tensors[0].device):
            self.launch(*operands, *tensors[count:])


def linear_launch(
    call: AnyCall,
    x: Tensor,
    weight: Tensor,
    biases: tuple[Tensor | None, ...],
    residual: Tensor | None,
    has_preact: bool,
    activation: str,
    up_weight: Tensor | None = None,
) -> Product:
    """Takes x: (M, K), weight, up_weight: (N, K), bias, up_bias: (N,), residual, preact, up, out: (M, N) and makes
    out = activation(x @ weight.T + bias) + residual, preact = x @ weight.T + bias. With an up_weight the activation is
    multiplied with up = x @ up_weight.T + up_bias. biases: bias and up_bias, or others where they are"""
    (M, K), N = x.shape, weight.shape[0]
    gated = up_weight is not None
    matrices = (x, weight, up_weight) if up_weight is not None else (x, weight)
    row, tma = gemm_launch(call, x, "mlp_fwd_tile"), takes_tma(*matrices)
    if up_weight is not None:
        row["BLOCK_N"] //= 2  # of each weight
    up_stride = 0 if up_weight is None else up_weight.stride(0)
    launch = Launch(
        mlp_fwd_kernel,
        gemm_grid(row, M, N, x.device),
        (M, N, K, x.stride(0), weight.stride(0), up_stride, 0 if residual is None else residual.stride(0)),
        ACTIVATION=activation,
        GATED=gated,
        HAS_BIAS=biases[0] is not None,
        HAS_UP_BIAS=gated and biases[1] is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_PREACT=has_preact,
        TMA=tma,
        PRECISION=precision(x.dtype),
        **row,
    )
    rows = row["BLOCK_M"], row["BLOCK_N"], row["BLOCK_N"]
    return Product(launch, *(described(m, tma, n, row["BLOCK_K"]) for m, n in zip(matrices, rows, strict=False)))


def grad_preact_launch(
    call: AnyCall, dout: Tensor, proj_weight: Tensor, has_act: bool, wants_partials: bool, gated: bool = False
) -> tuple[Product, tuple[int, ...]]:
    """-> what takes dout: (M, K), proj_weight: (K, N), preact, up, act, grad, up_grad: (M, N), partials: (P, N) and
    makes grad = dout @ proj_weight * activation'(preact), its column sums in parts, and act = activation(preact); and
    the shape of those parts. gated: the activation is multiplied with up, whose gradient has sums, too: (2, P, N)"""
    (M, K), N = dout.shape, proj_weight.shape[1]
    row, tma = gemm_launch(call, dout, "mlp_bwd_tile"), takes_tma(dout, proj_weight)
    launch = Launch(
        mlp_bwd_kernel,
        gemm_grid(row, M, N, dout.device),
        (M, N, K, dout.stride(0), proj_weight.stride(0)),
        ACTIVATION=call.activation,
        GATED=gated,
        HAS_ACT=has_act,
        HAS_PARTIALS=wants_partials,
        TMA=tma,
        PRECISION=precision(dout.dtype),
        **row,
    )
    k = row["BLOCK_K"]
    templates = described(dout, tma, row["BLOCK_M"], k), described(proj_weight, tma, k, row["BLOCK_N"])
    return Product(launch, *templates), parts_shape(triton.cdiv(M, row["BLOCK_M"]), N, gated)


def parts_shape(parts: int, columns: int, gated: bool) -> tuple[int, ...]:
    return (2, parts, columns) if gated else (parts, columns)


def pointwise_activation(preact: Tensor, up: Tensor | None, activation: str, act: Tensor) -> None:
    """act = activation(preact), or that times up, all contiguous"""
    with hardware.on_device(preact.device):
        pointwise_launch(preact, activation, up is not None)(preact, up, act)


@remembered
def pointwise_launch(preact: Tensor, activation: str, gated: bool) -> Launch:
    grid = (triton.cdiv(preact.numel(), POINTWISE_LAUNCH["BLOCK"]),)
    flags = {"ACTIVATION": activation, "GATED": gated}
    return Launch(activation_fwd_kernel, grid, (preact.numel(),), **flags, **POINTWISE_LAUNCH)


def pointwise_grad_preact(
    grad: Tensor,
    preact: Tensor,
    up: Tensor | None,
    activation: str,
    act: Tensor | None,
    up_grad: Tensor | None,
    wants_partials: bool,
) -> Tensor | None:
    """grad: (M, N) is multiplied by activation'(preact) in place -> its column sums in parts: (P, N). act is filled.
    With up also by that, up_grad is filled, and there are sums of both: (2, P, N)."""
    launch, parts = pointwise_bwd_launch(grad, preact, activation, up is not None, act is not None, wants_partials)
    partials = torch.empty(parts, dtype=torch.float32, device=grad.device) if wants_partials else None
    with hardware.on_device(grad.device):
        launch(grad, preact, up, grad if act is None else act, up_grad, grad if partials is None else partials)
    return partials


@remembered
def pointwise_bwd_launch(grad, preact, activation, gated, has_act, wants_partials):
    """-> the launch, the shape of the partial sums"""
    M, N = grad.shape
    grid = (triton.cdiv(M, POINTWISE_BWD_LAUNCH["ROWS"]), triton.cdiv(N, POINTWISE_BWD_LAUNCH["BLOCK_N"]))
    flags = {"ACTIVATION": activation, "GATED": gated, "HAS_ACT": has_act, "HAS_PARTIALS": wants_partials}
    launch = Launch(activation_bwd_kernel, grid, (M, N), **flags, **POINTWISE_BWD_LAUNCH)
    return launch, parts_shape(grid[0], N, gated)


@torch_op(fake=fwd_outputs)
def mlp_fwd(call: MlpCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> out: (M, d_out), preact, act: (M, hidden)"""
    if call.x.shape[0] == 0:
        return fwd_outputs(call)
    products = fwd_products(call, precision(call.x.dtype))
    if products:
        fc, proj = products
        out, preact, act = fwd_outputs(call)
        hidden = hidden_layer(call) if act is None else act
        fc_weight, proj_weight = call.fc_weight.contiguous(), call.proj_weight.contiguous()
        fc(call.x, fc_weight, None, or_any(call.fc_bias, out), None, out, or_any(preact, out), None, hidden)
        bias, residual = or_any(call.proj_bias, out), or_any(call.residual, out)
        proj(hidden, proj_weight, None, bias, None, residual, out, None, out)
        return out, preact, act
    before = linear(call.x, call.fc_weight, call.fc_bias)
    # Where the input of the activation is not kept, its output takes its place.
    hidden = before if call.save == "input" else torch.empty_like(before)
    pointwise_activation(before, None, call.activation, hidden)
    out = linear_and_residual(hidden, call.proj_weight, call.proj_bias, call.residual)
    return out, None if call.save == "input" else before, hidden if call.save == "all" else None


def linear_and_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x: (M, K), weight: (N, K), bias: (N,), residual: (M, N) -> (M, N)"""
    if residual is None:
        return linear(x, weight, bias)
    return torch.addmm(residual if bias is None else residual + bias, x, weight.mT)


def or_any(x: Tensor | None, other: Tensor) -> Tensor:
    """Kernels do not read what is not there"""
    return other if x is None else x


@remembered
def fwd_products(call: MlpCall, precision: str) -> tuple[Product, Product] | tuple[()]:
    """Nothing where cuBLAS is faster"""
    if not is_fused(call):
        return ()
    fc_weight, proj_weight, hidden = call.fc_weight.contiguous(), call.proj_weight.contiguous(), hidden_layer(call)
    has_preact = call.save != "input"
    return (
        linear_launch(call, call.x, fc_weight, (call.fc_bias,), None, has_preact, call.activation),
        linear_launch(call, hidden, proj_weight, (call.proj_bias,), call.residual, False, "none"),
    )


@torch_op(fake=bwd_outputs, mutates=("fc_sum", "proj_sum"))
def mlp_bwd(
    call: MlpCall,
    dout: Tensor,
    preact: Tensor | None,
    act: Tensor | None,
    needs: list[bool],
    fc_sum: Tensor | None,
    proj_sum: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dout: (M, d_out), preact, act: (M, hidden) -> gradients of x, both of fc, both of proj; those of the weights are
    added to fc_sum: (hidden, d) and proj_sum: (d_out, hidden) instead, where these are given"""
    needs_fc_bias, needs_proj_weight = needs[2:4]
    if call.x.shape[0] == 0:
        grads = bwd_outputs(call, dout, preact, act, needs, fc_sum, proj_sum)
        zero_(grads)
        return grads
    preact = preact_of(call, preact)
    remade = None
    if needs_proj_weight and call.save != "all":
        act = remade = torch.empty_like(preact)
    product = bwd_product(call, dout, remade is not None, needs_fc_bias, precision(dout.dtype))
    if product:
        launch, parts = product
        grad = torch.empty_like(preact)
        partials = torch.empty(parts, dtype=torch.float32, device=dout.device) if needs_fc_bias else None
        weight = call.proj_weight.contiguous()
        launch(dout, weight, preact, None, or_any(remade, grad), grad, None, or_any(partials, grad))
    else:
        grad = dout @ call.proj_weight
        partials = pointwise_grad_preact(grad, preact, None, call.activation, remade, None, needs_fc_bias)
    return other_grads(call, dout, act, grad, partials, needs, fc_sum, proj_sum)


@remembered
def bwd_product(
    call: MlpCall, dout: Tensor, has_act: bool, wants_partials: bool, precision: str
) -> tuple[Product, tuple[int, ...]] | tuple[()]:
    """-> with the shape of the partial sums; nothing where cuBLAS is faster"""
    if not is_fused(call):
        return ()
    return grad_preact_launch(call, dout, call.proj_weight.contiguous(), has_act, wants_partials)
