"""What changes attention's scores or its softmax, and windows of two sides: against the float64 reference, and the
reference against the formulas written otherwise."""

import pytest
import torch
from conftest import Where, device_kind
from test_attention import assert_attention_parity, key_start, make, make_packed

import gptkernels as gk
from gptkernels.ops.attention import attention, reference

BACKENDS = ["eager", "triton", "cuda"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def require(where, backend, dtype=torch.bfloat16):
    where.require(backend)
    capability = where.arch or 10 * torch.cuda.get_device_capability()[0]
    if backend == "cuda" and (capability != 90 or dtype == torch.float32):
        pytest.skip("the CUDA kernels are for 16 bits on compute capability 9.0")


def with_sinks(where, tensors, *values, dtype=torch.float32):
    """values: of the heads, over and over"""
    sinks = torch.tensor(values).repeat(tensors["q"].shape[1] // len(values))
    return {**tensors, "sinks": sinks.to(where.device, dtype).requires_grad_()}


def with_slopes(where, tensors, *shape):
    return {**tensors, "alibi_slopes": (torch.rand(shape) + 0.05).to(where.device)}


def with_own_keys(where, queries, keys, **shape):
    """Packed documents with as many queries and keys as these"""
    tensors, other = make_packed(where, queries, **shape), make_packed(where, keys, **shape)
    return {**tensors, "k": other["k"], "v": other["v"], "cu_seqlens_k": other["cu_seqlens"]}


REFERENCE_OPTIONS = [
    {"window": (2, 1), "causal": False},
    {"window": (None, 1), "causal": False, "return_lse": True},
    {"softcap": 0.7, "window": 3},
    {"sinks": True, "return_lse": True},
    {"sinks": True, "key_start": torch.tensor([2, 5])},
    {"alibi_slopes": torch.tensor([0.5, 0.1], dtype=torch.float64), "softcap": 0.5, "return_lse": True},
    {"sinks": True, "dropout": 0.3, "seed": torch.tensor([5]), "alibi_slopes": torch.rand(2, 2).double()},
]


@pytest.mark.parametrize("options", REFERENCE_OPTIONS)
def test_reference_gradients_are_finite_differences(options):
    q, k, v = (torch.randn(2, heads, 5, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def op(q, k, v, sinks):
        outs = reference.attention(q, k, v, **(options | {"sinks": sinks} if "sinks" in options else options))
        return outs if options.get("return_lse") else (outs, sinks * 2)

    assert torch.autograd.gradcheck(op, (q, k, v, sinks))


def test_reference_is_the_formulas():
    """One score after the other, with Python's numbers."""
    q, k, v = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64)
    k, v = k[:, :, :3], v[:, :, :3]
    sinks, slopes = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.5, 0.25]).double()
    out, lse = reference.attention(
        q, k, v, causal=False, window=(1, 1), scale=0.4, softcap=0.9, sinks=sinks, alibi_slopes=slopes, return_lse=True
    )
    for h in range(2):
        for i in range(4):
            total, mixed = sinks[h].exp(), torch.zeros(8).double()
            for j in range(3):
                if -1 <= i - 1 - j <= 1:
                    score = 0.9 * ((q[0, h, i] @ k[0, h, j]) * 0.4 / 0.9).tanh() - slopes[h] * abs(i - 1 - j)
                    total = total + score.exp()
                    mixed = mixed + score.exp() * v[0, h, j]
            torch.testing.assert_close(lse[0, h, i], total.log())
            torch.testing.assert_close(out[0, h, i], mixed / total)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(150, 150), (40, 150), (150, 40)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_sided_windows_show_these_keys(anywhere, backend, causal, queries, keys):
    """With q = 0 all weights are the same: exp(lse) counts the keys, and v holds which ones they are."""
    require(anywhere, backend)
    dtype = torch.float16 if backend == "cuda" else torch.float32
    q = torch.zeros(1, 1, queries, 64, device=anywhere.device, dtype=dtype)
    k, v = torch.randn(2, 1, 1, keys, 64, device=anywhere.device).to(dtype)
    v[..., 0] = torch.arange(keys) / keys
    rights = (0, None, -1) if causal else (None, 0, 1, 63, 64, 100)
    for left in (None, -1, 0, 1, 63, 64, 65):
        for right in rights:
            out, lse = attention(q, k, v, causal=causal, window=(left, right), return_lse=True, backend=backend)
            position = torch.arange(queries)[:, None] + keys - queries
            behind = position - torch.arange(keys)
            seen = torch.ones(queries, keys, dtype=torch.bool)
            if left not in (None, -1):
                seen &= behind <= left
            if causal or right not in (None, -1):
                seen &= behind >= -(0 if causal else right)
            torch.testing.assert_close(lse.exp()[0, 0].cpu(), seen.sum(1).float(), atol=1e-2, rtol=0)
            means = (seen.float() @ (torch.arange(keys) / keys)[:, None]).flatten() / seen.sum(1).clamp(min=1)
            exact = 1e-4 if dtype == torch.float32 else 1e-3
            torch.testing.assert_close(out[0, 0, :, 0].float().cpu(), means, atol=exact, rtol=0)


@pytest.mark.parametrize(
    ("options", "queries", "keys"),
    [
        ({"window": (20, 70), "causal": False}, 150, 150),
        ({"window": (70, 3), "causal": False}, 40, 150),
        ({"window": (None, 20), "causal": False}, 150, 90),
        ({"window": (20, None), "causal": False}, 90, 150),
        ({"window": (33, 0)}, 150, 150),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_sided_windows(where, backend, options, queries, keys):
    require(where, backend)
    assert_attention_parity(make(where, queries, keys, kv_heads=1), backend, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks(where, backend, dtype):
    """Above all scores, among them, and far below."""
    require(where, backend, dtype)
    # exp(200) is infinite; in float32 the logarithm that is kept would have fewer digits than this compares.
    highest = 8.0 if dtype == torch.float32 else 200.0
    for values, window in (((highest, -torch.inf, 3.0, -2.0), None), ((0.5, -30.0, 6.0), 20)):
        tensors = with_sinks(where, make(where, 100, heads=12, kv_heads=2, dtype=dtype), *values, dtype=dtype)
        assert_attention_parity(tensors, backend, window=window, return_lse=True)
    tensors = with_sinks(where, make(where, 100, 60, batch=2, heads=6, kv_heads=3, dtype=dtype), 1.0, -1.0)
    assert_attention_parity({**tensors, "key_start": key_start(where, 0, 50)}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_keys_has_its_sink(anywhere, backend):
    require(anywhere, backend)
    for keys, seen in ((0, 0), (3, 3)):
        tensors = with_sinks(anywhere, make(anywhere, 5, keys), 1.5, -torch.inf)
        out, lse = attention(**tensors, return_lse=True, backend=backend)
        grads = torch.autograd.grad((out.float().sum(), lse[:, :, : 5 - seen].clamp(min=-1).sum()), tensors.values())
        assert bool((out[:, :, : 5 - seen] == 0).all())
        assert bool((lse[:, 0, : 5 - seen] == 1.5).all())
        assert bool((lse[:, 1, : 5 - seen] == -torch.inf).all())
        assert all(bool(grad.isfinite().all()) for grad in grads)
        bare, bare_lse = attention(**{**tensors, "sinks": None}, return_lse=True, backend=backend)
        assert bool((bare_lse[:, :, : 5 - seen] == -torch.inf).all())
        torch.testing.assert_close(out[:, 1], bare[:, 1])  # a sink of -inf is none


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap(where, backend, dtype):
    require(where, backend, dtype)
    tensors = make(where, 100, kv_heads=1, dtype=dtype)
    assert_attention_parity(tensors, backend, softcap=2.0, scale=0.5)  # most scores are bent
    assert_attention_parity(tensors, backend, softcap=50.0, window=30)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(2,), (2, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_alibi(where, backend, causal, shape):
    require(where, backend)
    for queries, keys in ((100, 100), (40, 100)):
        tensors = with_slopes(where, make(where, queries, keys, batch=2, kv_heads=1), *shape)
        assert_attention_parity(tensors, backend, causal=causal)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_heads(anywhere, backend):
    """BLOOM's and Gemma 2's"""
    require(anywhere, backend)
    tensors = make(anywhere, 70, heads=1, head_size=128, dtype=torch.bfloat16)
    assert_attention_parity(with_slopes(anywhere, tensors, 1), backend)
    tensors = make(anywhere, 70, heads=1, head_size=256, dtype=torch.bfloat16)
    assert_attention_parity(tensors, backend, softcap=50.0, window=40)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_has_gradients(where, backend):
    require(where, backend)
    for window in (None, 20):
        assert_attention_parity(make(where, 100, kv_heads=1), backend, window=window, return_lse=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_merging_two_shards_is_the_whole(anywhere, backend):
    """As ring attention does it: shares by lse, whose gradients count."""
    require(anywhere, backend)
    dtype, exact = (torch.float16, 2e-3) if backend == "cuda" else (torch.float32, 1e-5)
    q, k, v = make(anywhere, 70, 90, dtype=dtype).values()
    parts = [
        attention(q, k[:, :, keys], v[:, :, keys], causal=False, return_lse=True, backend=backend)
        for keys in (slice(0, 40), slice(40, 90))
    ]
    shares = torch.stack([lse for _, lse in parts]).softmax(0).unsqueeze(-1)
    merged = sum(share * out for share, (out, _) in zip(shares, parts, strict=True))
    whole = attention(q, k, v, causal=False, backend=backend)
    dout = torch.randn_like(whole)
    torch.testing.assert_close(merged.to(dtype), whole, atol=exact, rtol=10 * exact)
    for mine, right in zip(
        *(torch.autograd.grad(out, (q, k, v), dout) for out in (merged.to(dtype), whole)), strict=True
    ):
        torch.testing.assert_close(mine, right, atol=exact, rtol=10 * exact)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_with_keys_of_their_own(where, backend, causal):
    """Fewer keys than queries, more, none, and no queries."""
    require(where, backend)
    tensors = with_own_keys(where, [5, 70, 0, 1, 66], [9, 0, 30, 80, 40], heads=2, kv_heads=1)
    for window in (None, (15, 0)):
        assert_attention_parity(tensors, backend, causal=causal, window=window)
    tensors = with_slopes(where, with_sinks(where, tensors, 0.5, -0.5), 5, 2)
    assert_attention_parity(tensors, backend, causal=causal, return_lse=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_at_once(where, backend, dtype):
    require(where, backend, dtype)
    tensors = make(where, 90, 120, batch=2, heads=2, kv_heads=1, head_size=80, dtype=dtype)
    tensors = with_slopes(where, with_sinks(where, tensors, 1.0, 0.0, dtype=dtype), 2, 2)
    starts = key_start(where, 0, 50)
    options = {"causal": False, "window": (40, 7), "softcap": 3.0, "return_lse": True, "scale": 0.3}
    assert_attention_parity({**tensors, "key_start": starts}, backend, **options)
    if backend != "cuda":
        assert_attention_parity({**tensors, "key_start": starts}, backend, dropout=0.2, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_one_number_and_of_lse_alone(where, backend):
    """out.sum() sends back strides of 0; an output that nobody uses gets no gradient."""
    require(where, backend)
    tensors = with_sinks(where, make(where, 70), 0.5, -0.5)
    cotangents = [torch.ones(()).expand(1, 2, 70, 64), torch.ones(()).expand(1, 2, 70)]
    assert_attention_parity(tensors, backend, return_lse=True, cotangents=cotangents)
    cotangents = [torch.zeros(1, 2, 70, 64), torch.randn(1, 2, 70)]
    assert_attention_parity(tensors, backend, return_lse=True, cotangents=cotangents)


@pytest.mark.parametrize("seed", range(8))
def test_cuda_on_any_schedule(seed, request):
    """Sinks, gradients of lse, windows of two sides and documents with keys of their own; every head size's kernels."""
    where = Where(device_kind(request.config), 90, seed)
    with where.active():
        require(where, "cuda")
        head_size, dtype = (64, 128, 96, 256)[seed % 4], DTYPES[1 + seed % 2]
        shape = {"heads": 4, "kv_heads": 2, "head_size": head_size, "dtype": dtype}
        if seed % 2:
            tensors = with_own_keys(where, [70, 0, 200, 33], [150, 40, 90, 0], **shape)
        else:
            tensors = make(where, 300, 260, **shape)
        tensors = with_sinks(where, tensors, 2.0, -1.0, dtype=(dtype, torch.float32)[seed // 4])
        options = ({"window": (100, 30), "causal": False}, {}, {"window": (None, 50), "causal": False}, {"window": 80})
        assert_attention_parity(tensors, "cuda", return_lse=True, **options[seed // 2 % 4])


@pytest.mark.parametrize("seed", range(12))
def test_bent_cuda_on_any_schedule(seed, request):
    """A softcap, ALiBi and both, with all that may come with them, on every head size's kernels."""
    where = Where(device_kind(request.config), 90, seed)
    with where.active():
        require(where, "cuda")
        head_size, dtype = (64, 128, 80, 256, 112, 192)[seed % 6], DTYPES[1 + seed // 3 % 2]
        shape = {"heads": 4, "kv_heads": (2, 1, 4)[seed % 3], "head_size": head_size, "dtype": dtype}
        options = {"softcap": (50.0, 1.5)[seed // 6], "scale": (None, 0.4)[seed // 6]} if seed % 3 != 1 else {}
        slopes = torch.tensor([[0.5, -0.02, 0.0, 3.0], [2.0**-8, 0.1, 0.3, 0.03]] * 2)
        if seed % 4 == 3:
            tensors, sequences = with_own_keys(where, [70, 0, 201, 33], [150, 41, 90, 0], **shape), 4
        else:
            tensors, sequences = make(where, 203, 177, batch=2, **shape), 2
        if options:
            tensors = with_sinks(where, tensors, 2.0, -1.0, dtype=(dtype, torch.float32)[seed // 6])
        if seed % 3:
            tensors["alibi_slopes"] = (slopes[0] if seed % 2 else slopes[:sequences]).to(where.device)
        seen = ({}, {"window": (100, 30), "causal": False}, {"window": 80}, {"causal": False})[(seed + seed // 4) % 4]
        assert_attention_parity(tensors, "cuda", return_lse=True, **options, **seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_alibi_alone_are_these_weights(anywhere, backend):
    """With q = 0 weights are the softmax of -slope * distance, whichever sign a slope has."""
    require(anywhere, backend)
    dtype, exact = (torch.float16, 1e-3) if backend == "cuda" else (torch.float32, 1e-4)
    q, k, v = torch.zeros(1, 2, 70, 64), torch.randn(1, 1, 150, 64), torch.randn(1, 1, 150, 64)
    q, k, v = (x.to(anywhere.device, dtype) for x in (q, k, v))
    slopes = torch.tensor([0.3, -0.1])
    distance = (torch.arange(70)[:, None] + 80 - torch.arange(150)).abs()
    scores = -slopes[:, None, None] * distance
    out, lse = attention(
        q, k, v, causal=False, alibi_slopes=slopes.to(anywhere.device), softcap=5.0, return_lse=True, backend=backend
    )
    torch.testing.assert_close(lse[0].cpu(), scores.logsumexp(-1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out[0].float().cpu(), scores.softmax(-1) @ v[0].float().cpu(), atol=exact, rtol=exact)


@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
def test_what_there_is_one_of_for_each_row_or_head_may_be_expanded(anywhere, backend):
    anywhere.require(backend)
    q, k, v = torch.randn(3, 3, 2, 40, 32).to(anywhere.device, torch.float16)
    one = {"key_start": torch.tensor([7], dtype=torch.int32).expand(3), "sinks": torch.tensor([1.0]).expand(2)}
    one["alibi_slopes"] = torch.tensor([0.3]).expand(2)
    one = {name: x.to(anywhere.device) for name, x in one.items()}
    expected = gk.attention(q, k, v, **{name: x.contiguous() for name, x in one.items()}, backend=backend)
    assert torch.equal(gk.attention(q, k, v, **one, backend=backend), expected)
