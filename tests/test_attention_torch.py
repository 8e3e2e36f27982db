"""What torch does with attention in Triton: checks its schemas, compiles it."""

import pytest
import torch
from test_attention import key_start, make, make_packed

import gptkernels as gk
from gptkernels.ops.attention import triton_kernels
from gptkernels.ops.dropout import draw_seed


def calls(where):
    """(q, k, v), (key_start, cu_seqlens, seed), (causal, window, scale, dropout)"""
    dense = {name: x.detach() for name, x in make(where, 20, batch=2, heads=2, kv_heads=1, head_size=32).items()}
    views = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in dense.items()}
    packed = {name: x.detach() for name, x in make_packed(where, [5, 0, 9]).items()}
    bounds = packed.pop("cu_seqlens")
    seed = draw_seed(dense["q"].device)
    yield dense.values(), (None, None, None), (True, None, 0.125, 0.0)
    yield views.values(), (key_start(where, 0, 7), None, seed), (False, 4, 0.5, 0.25)
    yield packed.values(), (None, bounds, None), (True, 6, 0.125, 0.0)


@pytest.mark.parametrize("call", range(3))
def test_opcheck(anywhere, call):
    anywhere.require("triton")
    qkv, variables, options = list(calls(anywhere))[call]
    q, k, v = qkv
    # Autograd goes through AttentionFunction, not through the ops.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(triton_kernels.attention_fwd.torch_op, (q, k, v, *variables, *options), test_utils=checks)
    out, lse = triton_kernels.attention_fwd(q, k, v, *variables, *options)
    arguments = (torch.randn_like(out), q, k, v, out, lse, *variables, *options, True)
    torch.library.opcheck(triton_kernels.attention_bwd.torch_op, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("head_size", "dtype", "dropout"),
    [(32, torch.float16, 0.2), (19, torch.bfloat16, 0.0)],
    ids=["tma", "pointers"],
)
def test_compile_fullgraph(anywhere, head_size, dtype, dropout):
    """Descriptors are made in the launcher, where tensors have addresses."""
    anywhere.require("triton")
    torch._dynamo.reset()

    def block(q, k, v):
        return gk.attention(q * 2, k, v, window=30, dropout=dropout, backend="triton").sin()

    tensors = list(make(anywhere, 40, head_size=head_size, dtype=dtype).values())
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        out = function(*tensors)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
