"""What torch does with attention in Triton: checks its schemas, compiles it."""

import pytest
import torch
from parity import assert_parity
from test_attention import key_start, make, make_packed

import gptkernels as gk
from gptkernels.ops.attention import native, reference, triton_kernels
from gptkernels.ops.attention.record import AttentionCall
from gptkernels.ops.attention.visibility import sides
from gptkernels.ops.dropout import draw_seed


def calls(where):
    dense = {name: x.detach() for name, x in make(where, 20, batch=2, heads=2, kv_heads=1, head_size=32).items()}
    views = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in dense.items()}
    packed = {name: x.detach() for name, x in make_packed(where, [5, 0, 9]).items()}
    bounds = packed.pop("cu_seqlens")
    seed = draw_seed(dense["q"].device)
    yield AttentionCall(*dense.values(), scale=0.125)
    yield AttentionCall(
        *views.values(), key_start=key_start(where, 0, 7), seed=seed, left=3, right=3, scale=0.5, dropout=0.25
    )
    yield AttentionCall(*packed.values(), cu_seqlens=bounds, left=5, scale=0.125)
    device = dense["q"].device
    columns = {"sinks": torch.ones(2, device=device), "alibi_slopes": torch.ones(2, device=device)}
    bounds_k = torch.tensor([0, 9, 9, 14], dtype=torch.int32, device=device)
    own_keys = {"cu_seqlens": bounds, "cu_seqlens_k": bounds_k}
    yield AttentionCall(*packed.values(), **columns, **own_keys, right=3, softcap=2.0, return_lse=True)


@pytest.mark.parametrize("call", range(4))
def test_opcheck(anywhere, call):
    anywhere.require("triton")
    record = list(calls(anywhere))[call]
    # Autograd goes through AttentionFunction, not through the ops.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(triton_kernels.attention_fwd.torch_op, record.flat(), test_utils=checks)
    out, lse = triton_kernels.attention_fwd(record)
    dlse = torch.randn_like(lse) if record.return_lse else None
    arguments = (*record.flat(), torch.randn_like(out), out, lse, dlse)
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


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compile_fullgraph_with_all_options(anywhere, backend):
    anywhere.require(backend)
    torch._dynamo.reset()
    slopes = torch.tensor([0.5, 0.25], device=anywhere.device)

    def block(q, k, v, sinks):
        options = {"causal": False, "window": (20, 3), "softcap": 3.0, "alibi_slopes": slopes, "return_lse": True}
        out, lse = gk.attention(q * 2, k, v, sinks=sinks * 2, backend=backend, **options)
        return out.sin() + lse.unsqueeze(-1).cos().to(out.dtype)

    sinks = torch.randn(2, device=anywhere.device, requires_grad=True)
    tensors = [*make(anywhere, 40, head_size=32).values(), sinks]
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out = function(*tensors)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("causal", "window", "queries", "keys", "kv_heads"),
    [
        (True, None, 70, 70, 4),
        (False, None, 30, 70, 2),
        (True, None, 30, 70, 2),  # more keys than queries
        (True, None, 70, 30, 4),  # queries that see no key
        (True, 9, 70, 70, 1),
        (True, 9, 600, 600, 2),  # several blocks
        (False, 17, 530, 600, 2),
        (False, 3, 70, 30, 4),
    ],
)
def test_pytorchs_own_attention_is_ours(causal, window, queries, keys, kv_heads, monkeypatch):
    """As `auto` runs it on a GPU where `gptkernels tune` found it to be the fastest; here with fewer rows to a block,
    and in float32: what PyTorch's kernels round in 16 bits is theirs."""
    monkeypatch.setattr(native, "FEWEST_ROWS", 64)
    where, sizes = type("Cpu", (), {"device": "cpu"}), {"batch": 2, "heads": 4, "kv_heads": kv_heads, "head_size": 16}
    tensors = make(where, queries, keys, **sizes, dtype=torch.float32)
    options = {"causal": causal, "window": window}

    def op(q, k, v):
        left, right = sides(causal, window)
        return native.run(AttentionCall(q, k, v, left=left, right=right, scale=q.shape[-1] ** -0.5))

    assert_parity(op, reference.attention, tensors, kwargs={}, reference_kwargs=options)
