"""What torch does with attention in Triton: checks its schemas, compiles it."""

import pytest
import torch
from test_attention import key_start, make, make_packed

import gptkernels as gk
from gptkernels.ops.attention import triton_kernels
from gptkernels.ops.attention.record import AttentionCall
from gptkernels.ops.dropout import draw_seed


def calls(where):
    dense = {name: x.detach() for name, x in make(where, 20, batch=2, heads=2, kv_heads=1, head_size=32).items()}
    views = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in dense.items()}
    packed = {name: x.detach() for name, x in make_packed(where, [5, 0, 9]).items()}
    bounds = packed.pop("cu_seqlens")
    seed = draw_seed(dense["q"].device)
    yield AttentionCall(*dense.values(), scale=0.125)
    yield AttentionCall(*views.values(), key_start(where, 0, 7), None, seed, False, 4, 0.5, 0.25)
    yield AttentionCall(*packed.values(), cu_seqlens=bounds, window=6, scale=0.125)


@pytest.mark.parametrize("call", range(3))
def test_opcheck(anywhere, call):
    anywhere.require("triton")
    record = list(calls(anywhere))[call]
    # Autograd goes through AttentionFunction, not through the ops.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(triton_kernels.attention_fwd.torch_op, record.flat(), test_utils=checks)
    out, lse = triton_kernels.attention_fwd(record)
    arguments = (*record.flat(), torch.randn_like(out), out, lse, True)
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
