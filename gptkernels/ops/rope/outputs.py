"""What the launchers return, allocated: shared by every backend, and by torch.compile as the fake implementation."""

import torch
from torch import Tensor

from ..attention.outputs import empty_in_order_of
from .record import NormRopeCall, RopeCall


def fwd_outputs(call: RopeCall) -> tuple[Tensor, Tensor]:
    return empty_in_order_of(call.q), empty_in_order_of(call.k)


def norm_fwd_outputs(call: NormRopeCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> q, k, and 1 / rms of each of their heads: (B, H, T), (B, Hkv, T) float32"""
    q_rstd, k_rstd = (torch.empty(x.shape[:3], dtype=torch.float32, device=x.device) for x in (call.q, call.k))
    return empty_in_order_of(call.q), empty_in_order_of(call.k), q_rstd, k_rstd


def norm_bwd_outputs(
    call: NormRopeCall, dq: Tensor, dk: Tensor, q_rstd: Tensor, k_rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of q, k in their memory order, of q_norm, k_norm"""
    norms = torch.empty_like(call.q_norm), torch.empty_like(call.k_norm)
    return empty_in_order_of(call.q), empty_in_order_of(call.k), *norms
