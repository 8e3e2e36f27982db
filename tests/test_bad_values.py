"""Values that no shape shows: refused on a CPU, compiled or not; on a GPU never an access outside of the tensors."""

from unittest import mock

import pytest
import torch

import gptkernels as gk
from gptkernels.ops import checks
from gptkernels.ops.attention import reference

INT = torch.int32
# Of 70 tokens: unsorted, negative, too long, at the ends of int32.
BOUNDS = [(0, 60, 30, 70), (-5, 70), (0, 150), (150, -3, 20, 400), (0, 2**31 - 1, 70), (-(2**31), 50, 70)]


def packed(*bounds: int) -> tuple:
    return *torch.randn(3, 70, 2, 32, requires_grad=True).unbind(0), torch.tensor(bounds, dtype=INT)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_wrong_bounds_reach_nothing_outside(backend, bounds, anywhere):
    anywhere.require(backend)
    q, k, v, cu_seqlens = packed(*bounds)
    q, k, v = (x.to(anywhere.device, torch.bfloat16) for x in (q, k, v))
    with mock.patch.object(checks, "check_bounds"):
        for window in (None, 7):
            out = gk.attention(q, k, v, cu_seqlens=cu_seqlens.to(q.device), window=window, backend=backend)
            torch.autograd.grad(out.sum(), (q, k, v))


def test_wrong_lengths_reach_nothing_outside(anywhere):
    anywhere.require("triton")
    q, cache = torch.randn(3, 2, 1, 32), torch.randn(3, 2, 20, 32)
    lengths = torch.tensor([-7, 10**6, -(2**31)], dtype=INT)
    arguments = [x.to(anywhere.device) for x in (q, cache, cache, lengths)]
    with mock.patch.object(checks, "check_cache_lengths"):
        out = gk.decode_attention(*arguments, backend="triton")
        gk.decode_attention(*arguments, window=8, backend="triton")
    clamped = reference.decode_attention(q, cache, cache, torch.tensor([0, 20, 0], dtype=INT))
    torch.testing.assert_close(out.cpu(), clamped, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
def test_the_first_key_is_clamped(backend, anywhere):
    anywhere.require(backend)
    q, k, v = torch.randn(3, 3, 2, 20, 32, device=anywhere.device).half()
    key_start = torch.tensor([-3, 25, -(2**31)], dtype=INT, device=q.device)
    out = gk.attention(q, k, v, key_start=key_start, backend=backend)
    expected = reference.attention(q.double(), k.double(), v.double(), key_start=key_start)
    assert (expected[0] != 0).all()
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)


def compiled(call, *arguments):
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, backend="aot_eager")(*arguments)


def test_compiled_attention_refuses_wrong_bounds():
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to 70 \(q's tokens\), not \[0, 90\]"):
        compiled(lambda q, k, v, bounds: gk.attention(q, k, v, cu_seqlens=bounds), *packed(0, 90))


def test_compiled_decoding_refuses_wrong_lengths():
    cache = torch.randn(1, 2, 20, 32)
    with pytest.raises(ValueError, match="lengths must be at most the cache's 20 slots, not 21"):
        compiled(gk.decode_attention, cache[:, :, :1], cache, cache, torch.tensor([21], dtype=INT))


def test_compiled_loss_refuses_wrong_targets():
    x = torch.randn(4, 32)
    with pytest.raises(ValueError, match=r"targets must be 0 ... 3 or ignore_index \(-100\), not 4"):
        compiled(gk.linear_cross_entropy, x, x, torch.tensor([0, 1, 4, -100]))
