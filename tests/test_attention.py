"""Attention, dense and banded: every backend against the float64 reference, in every place where kernels run."""

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity

import gptkernels as gk
from gptkernels.ops.attention import attention, eager, reference, triton_kernels
from gptkernels.ops.attention.record import AttentionCall
from gptkernels.ops.attention.visibility import sides, visible
from gptkernels.ops.dropout import draw_seed

LAUNCHERS = {"eager": eager, "triton": triton_kernels}
BACKENDS = list(LAUNCHERS)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(where, queries, keys=None, *, batch=1, heads=2, kv_heads=None, head_size=64, dtype=torch.float16):
    """q: (B, H, Tq, D), k, v: (B, Hkv, Tk, D) as leaves on where's device"""
    kv_shape = (batch, kv_heads or heads, queries if keys is None else keys, head_size)
    shapes = {"q": (batch, heads, queries, head_size), "k": kv_shape, "v": kv_shape}
    return {name: torch.randn(shape).to(where.device, dtype).requires_grad_() for name, shape in shapes.items()}


def make_packed(where, lengths, *, heads=2, kv_heads=None, head_size=64, dtype=torch.float16):
    """q: (T, H, D), k, v: (T, Hkv, D), cu_seqlens: (N + 1,)"""
    total = sum(lengths)
    tensors = {
        name: torch.randn(total, count, head_size).to(where.device, dtype).requires_grad_()
        for name, count in (("q", heads), ("k", kv_heads or heads), ("v", kv_heads or heads))
    }
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return {**tensors, "cu_seqlens": bounds.to(where.device, torch.int32)}


def key_start(where, *values):
    return torch.tensor(values, dtype=torch.int32, device=where.device)


def assert_attention_parity(tensors, backend, *, dropout=0.0, cotangents=None, **options):
    torch.manual_seed(7)
    seed = draw_seed(tensors["q"].device).cpu() if dropout else None

    def op(**arguments):
        torch.manual_seed(7)
        return attention(**arguments, **options, dropout=dropout, backend=backend)

    return assert_parity(
        op,
        reference.attention,
        tensors,
        reference_kwargs={**options, "dropout": dropout, "seed": seed},
        cotangents=cotangents,
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_reference_is_torch_attention(causal, kv_heads):
    q = torch.randn(2, 2, 9, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, 9, 16, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(reference.attention(q, k, v, causal=causal, scale=0.3), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"window": 2, "causal": False},
        {"scale": 0.4, "dropout": 0.3, "seed": torch.tensor([5])},
        {"key_start": torch.tensor([2, 5])},
    ],
)
def test_reference_gradients_are_finite_differences(options):
    q, k, v = (torch.randn(2, heads, 5, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda *qkv: reference.attention(*qkv, **options), (q, k, v))


def test_reference_packed_is_each_document_alone():
    q, k, v = torch.randn(3, 11, 2, 16, dtype=torch.float64)
    packed = reference.attention(q, k, v, cu_seqlens=torch.tensor([0, 4, 4, 11]))
    for start, end in ((0, 4), (4, 11)):
        alone = reference.attention(*(x[start:end].transpose(0, 1)[None] for x in (q, k, v)))
        torch.testing.assert_close(packed[start:end], alone[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention(where, backend, window, dtype):
    where.require(backend)
    assert_attention_parity(make(where, 150, heads=2, kv_heads=1, dtype=dtype), backend, window=window)


@pytest.mark.parametrize("length", [1, 63, 111, 129])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(where, backend, length):
    where.require(backend)
    for window in (None, 50):
        assert_attention_parity(make(where, length), backend, window=window)


@pytest.mark.parametrize("head_size", [16, 19, 40, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_sizes(where, backend, head_size):
    where.require(backend)
    dtype = torch.bfloat16 if where.arch == 90 else torch.float16
    assert_attention_parity(make(where, 70, heads=1, head_size=head_size, dtype=dtype), backend, window=30)


@pytest.mark.parametrize(
    ("head_size", "dtype"),
    [(80, torch.float32), (128, torch.float32), (24, torch.bfloat16), (104, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_and_padded_heads(anywhere, backend, head_size, dtype):
    """Those in 16 bits end within the one part that holds them."""
    anywhere.require(backend)
    tensors = make(anywhere, 70, heads=1, head_size=head_size, dtype=dtype)
    assert_attention_parity(tensors, backend, window=30)


@pytest.mark.parametrize(("queries", "keys"), [(40, 150), (1, 90), (150, 40)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_query_is_at_the_last_key(where, backend, causal, queries, keys):
    where.require(backend)
    for window in (None, 50):
        assert_attention_parity(make(where, queries, keys), backend, causal=causal, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(where, backend):
    """Scores of several hundred: the softmax must not overflow, and a positive scale may be anything."""
    where.require(backend)
    tensors = make(where, 100, dtype=torch.bfloat16)
    assert_attention_parity(tensors, backend, scale=5.0)
    assert_attention_parity(tensors, backend, scale=1e-3, window=20)


def expected_keys(query, queries, keys, causal, window):
    """The rule in words, key by key."""
    position = query + keys - queries
    seen = []
    for key in range(keys):
        if causal and key > position:
            continue
        if window is not None and abs(position - key) >= window:
            continue
        seen.append(key)
    return seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(150, 150), (40, 150)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_window_counts_visible_keys(anywhere, backend, causal, queries, keys):
    """With q = 0 all weights are the same: exp(lse) counts the keys, and v holds which ones they are."""
    anywhere.require(backend)
    q = torch.zeros(1, 1, queries, 64, device=anywhere.device)
    k, v = torch.randn(2, 1, 1, keys, 64, device=anywhere.device)
    v[..., 0] = torch.arange(keys) / keys
    for window in (None, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, keys - 1, keys, keys + 1):
        left, right = sides(causal, window)
        out, lse = LAUNCHERS[backend].attention_fwd(AttentionCall(q, k, v, left=left, right=right))
        seen = [expected_keys(i, queries, keys, causal, window) for i in range(queries)]
        counts = torch.tensor([len(s) for s in seen], dtype=torch.float32)
        means = torch.tensor([sum(s) / len(s) / keys for s in seen])
        torch.testing.assert_close(lse.exp().flatten().cpu(), counts, atol=1e-2, rtol=0)
        torch.testing.assert_close(out[0, 0, :, 0].cpu(), means, atol=1e-4, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 2, 5, 8, 9])
def test_visible_is_the_rule_in_words(causal, window):
    for queries, keys in ((8, 8), (3, 8), (8, 3)):
        seen = visible(queries, keys, causal, window)
        for query in range(queries):
            assert seen[query].nonzero().flatten().tolist() == expected_keys(query, queries, keys, causal, window)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_that_covers_all_is_dense(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 70)
    dense = attention(**tensors, backend=backend)
    for window in (70, 71, 10**12):
        assert torch.equal(attention(**tensors, window=window, backend=backend), dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding(where, backend):
    where.require(backend)
    starts = key_start(where, 0, 37, 100)
    for window in (None, 20):
        tensors = make(where, 100, batch=3, heads=2, kv_heads=1)
        assert_attention_parity({**tensors, "key_start": starts}, backend, window=window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing(where, backend, causal):
    """Padding of a whole row, no keys at all, and queries before the first key: zeros, and gradients of zero."""
    where.require(backend)
    tensors = make(where, 50, 30, batch=2)
    out = attention(**tensors, causal=causal, window=5, key_start=key_start(where, 30, 27), backend=backend)
    grads = torch.autograd.grad(out.float().square().sum() + out.float().sum(), tensors.values())
    assert bool((out[0] == 0).all())
    assert all(bool((grad[0] == 0).all()) and bool(grad.isfinite().all()) for grad in grads)
    assert bool((out[1, :, -1] != 0).all())
    empty = make(where, 4, 0)
    out = attention(**empty, causal=causal, backend=backend)
    assert bool((out == 0).all())
    assert bool((torch.autograd.grad(out.sum(), empty["q"])[0] == 0).all())


@pytest.mark.parametrize("shape", [{"queries": 0}, {"queries": 0, "keys": 9}, {"queries": 5, "batch": 0}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(anywhere, backend, shape):
    anywhere.require(backend)
    tensors = make(anywhere, **shape)
    out = attention(**tensors, backend=backend)
    assert out.shape == tensors["q"].shape
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(out.sum(), tensors.values()))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents(where, backend, window, causal):
    where.require(backend)
    tensors = make_packed(where, [5, 0, 130, 1, 0, 64], heads=2, kv_heads=1)
    assert_attention_parity(tensors, backend, causal=causal, window=window)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_documents(anywhere, backend):
    anywhere.require(backend)
    for lengths in ([], [0], [0, 0]):
        tensors = make_packed(anywhere, lengths)
        out = attention(**tensors, backend=backend)
        assert out.shape == (0, 2, 64)
        torch.autograd.grad(out.sum(), tensors["q"])


@pytest.mark.parametrize("dropout", [0.1, 0.9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(where, backend, dropout):
    """All backends drop the same weights, the ones that the reference drops, and backward drops them too."""
    where.require(backend)
    tensors = make(where, 70, batch=2, heads=2, kv_heads=1, head_size=32)
    assert_attention_parity(tensors, backend, dropout=dropout, window=40)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_packed_documents_and_padding(anywhere, backend):
    anywhere.require(backend)
    assert_attention_parity(make_packed(anywhere, [30, 50], head_size=32), backend, dropout=0.4)
    tensors = make(anywhere, 70, batch=2, heads=1)
    assert_attention_parity({**tensors, "key_start": key_start(anywhere, 5, 60)}, backend, dropout=0.4)


def layouts(where):
    """(q, k, v) whose memory is not (B, H, T, D): packed qkv both ways, one head for all, every other token, a gap."""
    qkv = torch.randn(2, 90, 3, 2, 64).to(where.device, torch.float32)
    yield qkv.permute(2, 0, 3, 1, 4).unbind(0)
    yield torch.randn(2, 3, 2, 90, 64).to(where.device, torch.float32).unbind(1)
    yield [x[:, :1].expand(2, 2, 90, 64) for x in torch.randn(3, 2, 1, 90, 64).to(where.device, torch.float32)]
    yield [x[:, :, ::2, :64] for x in torch.randn(3, 1, 2, 180, 72).to(where.device, torch.float32)]
    yield [x[..., ::2] for x in torch.randn(3, 1, 2, 90, 128).to(where.device, torch.float32)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(where, backend):
    where.require(backend)
    for q, k, v in layouts(where):
        tensors = {name: x.detach().requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))}
        assert_attention_parity(tensors, backend, window=40)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_has_the_memory_order_of_q(anywhere, backend):
    anywhere.require(backend)
    q, k, v = torch.randn(2, 30, 3, 2, 64, device=anywhere.device).permute(2, 0, 3, 1, 4).unbind(0)
    out = attention(q, k, v, backend=backend)
    assert out.transpose(1, 2).is_contiguous()
    assert attention(*(x.contiguous() for x in (q, k, v)), backend=backend).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradients(where, backend):
    """out.sum() sends back a gradient with strides of 0."""
    where.require(backend)
    for cotangent in (torch.ones(()), torch.randn(1, 1, 1, 64), torch.randn(1, 2, 90, 1)):
        cotangents = [cotangent.expand(1, 2, 90, 64)]
        assert_attention_parity(make(where, 90), backend, cotangents=cotangents)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_32_bits(anywhere, backend):
    """Rows, and batch entries, more than 2^31 elements apart. Only the pages in use are ever touched."""
    anywhere.require(backend)
    length = 40
    storage = torch.empty(length * 2**26 + 64, dtype=torch.float16, device="meta" if anywhere.kind == "cuda" else "cpu")
    if storage.is_meta:
        pytest.skip("needs 5 GB of address space, which on a GPU is memory")
    expected_inputs = make(anywhere, length, batch=2, heads=1)
    views = {
        "q": storage.as_strided((2, 1, length, 64), (64, 64, 2**26, 1)),
        "k": storage.as_strided((2, 1, length, 64), (2**31 + 2**16, 2**14, 64, 1), 2**12),
        "v": storage.as_strided((2, 1, length, 64), (2**31 + 2**16, 2**14, 64, 1), 2**20),
    }
    for name, view in views.items():
        view.copy_(expected_inputs[name].detach())
    for name, view in views.items():
        assert torch.equal(view, expected_inputs[name]), "the views overlap"
    dout = torch.randn(2, 1, length, 64).half()
    results = []
    for tensors in (views, expected_inputs):
        q, k, v = (x.detach() for x in tensors.values())
        call = AttentionCall(q, k, v, scale=0.125)
        out, lse = LAUNCHERS[backend].attention_fwd(call)
        grads = LAUNCHERS[backend].attention_bwd(call, dout, out, lse)
        results.append((out, *grads[:3]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_future_tokens_change_nothing(anywhere, backend, value):
    """Not a bit, although a weight of zero times NaN is NaN."""
    anywhere.require(backend)
    for window, head_size in ((None, 64), (20, 64), (None, 80)):
        tensors = {name: x.detach() for name, x in make(anywhere, 100, head_size=head_size).items()}
        before = attention(**tensors, window=window, backend=backend)
        for x in tensors.values():
            x[:, :, 70] = value
        after = attention(**tensors, window=window, backend=backend)
        assert torch.equal(before[:, :, :70], after[:, :, :70])
        assert bool(after[:, :, 70].isnan().all())
        if window:
            assert torch.equal(before[:, :, 90:], after[:, :, 90:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_values_reach_who_sees_them(anywhere, backend):
    anywhere.require(backend)
    q, k, v = (x.detach().float() for x in make(anywhere, 100).values())
    v[:, :, 50, 3], v[:, :, 60, 5], v[:, 1, 61, 3] = float("nan"), -float("inf"), float("inf")
    out = attention(q, k, v, window=30, backend=backend).cpu()
    expected = torch.zeros(1, 2, 100, 64)
    expected[:, :, 50:80, 3] = float("nan")
    expected[:, 1, 80:91, 3] = float("inf")
    expected[:, :, 60:90, 5] = -float("inf")
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf() * out.sign(), expected.isinf() * expected.sign())


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_be_anything(anywhere, backend):
    anywhere.require(backend)
    tensors = {name: x.detach() for name, x in make(anywhere, 80, batch=2).items()}
    starts = key_start(anywhere, 10, 77)
    before = attention(**tensors, key_start=starts, backend=backend)
    for name in ("k", "v"):
        tensors[name][0, :, :10], tensors[name][1, :, :77] = float("nan"), float("inf")
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    after = attention(**tensors, key_start=starts, backend=backend)
    assert torch.equal(before, after)
    grads = torch.autograd.grad(after.float().sum(), tensors.values())
    assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_same_every_time(where, backend):
    where.require(backend)
    tensors = make(where, 150, heads=4, kv_heads=2)
    results = [
        torch.autograd.grad(attention(**tensors, backend=backend).float().square().sum(), tensors.values())
        for _ in range(2)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 40, dtype=torch.float32)
    with torch.autocast(anywhere.device.type, torch.bfloat16):
        out = attention(**tensors, backend=backend)
    assert out.dtype == torch.bfloat16
    same = attention(**{name: x.bfloat16() for name, x in tensors.items()}, backend=backend)
    assert torch.equal(out, same)
    assert torch.autograd.grad(out.sum(), tensors["q"])[0].dtype == torch.float32


def test_large_float32_heads_have_a_reason(anywhere):
    tensors = make(anywhere, 10, head_size=160, dtype=torch.float32)
    assert_attention_parity(tensors, "eager")
    with pytest.raises(gk.UnsupportedError, match="takes float32 head sizes up to 128, not 160"):
        attention(**tensors, backend="triton")


def test_explain_says_why():
    choice = gk.explain(attention, *torch.randn(3, 1, 2, 8, 64))
    assert choice.backend == "eager"
    choice = gk.explain(attention, *torch.randn(3, 1, 2, 8, 64), backend="triton")
    assert choice.backend is None
    assert "not cpu" in choice.reasons["triton"]


@pytest.mark.parametrize("steepness", [3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steep_scores(dtype, steepness):
    """Scores of many times the usual size, on the CPU, whose kernel is PyTorch's fused one."""
    q, k, v = torch.randn(3, 1, 2, 128, 64).unbind(0)
    tensors = {name: x.to(dtype).requires_grad_() for name, x in (("q", q * steepness), ("k", k), ("v", v))}
    assert_parity(attention, reference.attention, tensors)
