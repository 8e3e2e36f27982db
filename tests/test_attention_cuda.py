"""CUDA C++ attention: against the float64 reference, under many schedules of the simulator or on a Hopper GPU."""

import functools
import random
from unittest import mock

import pytest
import torch
from conftest import Where, device_kind
from parity import assert_parity, guarded_allocations

import gptkernels as gk
from gptkernels import UnsupportedError, cuda_library, hardware
from gptkernels.ops.attention import cuda_kernels, outputs, reference
from gptkernels.ops.attention.record import AttentionCall

SEEDS = range(20)


@pytest.fixture
def hopper(request):
    """Where the kernels can run; tests that take a `seed` run on that schedule."""
    kind = device_kind(request.config)
    where = Where(kind, 90, request.node.callspec.params.get("seed", 0) if hasattr(request.node, "callspec") else 0)
    if kind == "interpreter":
        pytest.skip("the interpreter runs Triton kernels only")
    if kind == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    with where.active():
        where.require("cuda")
        yield where


def leaves(where, batch, heads, kv_heads, q_len, k_len, head_dim, dtype, layout="bhtd"):
    """q: (B, H, Tq, D), k, v: (B, Hkv, Tk, D), with heads or tokens outermost in memory, or as views of one tensor."""

    def leaf(*shape):
        return torch.randn(*shape).to(where.device, dtype)

    if layout == "bthd":
        tensors = (
            leaf(batch, t, h, head_dim).mT.transpose(-1, -2).transpose(1, 2)
            for t, h in ((q_len, heads), (k_len, kv_heads), (k_len, kv_heads))
        )
    elif layout == "packed":
        assert (heads, q_len) == (kv_heads, k_len)
        tensors = leaf(batch, q_len, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    else:
        tensors = (leaf(batch, h, t, head_dim) for t, h in ((q_len, heads), (k_len, kv_heads), (k_len, kv_heads)))
    return {name: x.detach().requires_grad_() for name, x in zip("qkv", tensors, strict=True)}


def assert_attention_parity(tensors, **kwargs):
    return assert_parity(
        gk.attention,
        reference.attention,
        tensors,
        kwargs={"backend": "cuda", **kwargs},
        reference_kwargs={name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()},
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_any_schedule(hopper, seed):
    """Long enough for every ring to be filled three times over, and for every CTA to take several tiles."""
    draw = random.Random(seed)
    head_dim = (64, 128, 96, 80, 256)[seed % 5]
    q_len, k_len = draw.randint(400, 520), draw.randint(400, 520)
    tensors = leaves(hopper, 1, 4, 2, q_len, k_len, head_dim, (torch.bfloat16, torch.float16)[seed // 4 % 2])
    causal, window = ((True, None), (False, None), (True, draw.randint(2, 200)), (False, draw.randint(2, 200)))[
        seed // 5
    ]
    key_start = torch.tensor([draw.randint(0, 300)], dtype=torch.int32, device=hopper.device) if seed % 3 == 0 else None
    torch.use_deterministic_algorithms(seed % 2 == 1)
    try:
        assert_attention_parity(tensors, causal=causal, window=window, key_start=key_start)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 72, 80, 96, 104, 112, 128])
def test_head_sizes(hopper, head_dim):
    assert_attention_parity(leaves(hopper, 2, 2, 1, 150, 170, head_dim, torch.bfloat16, "bthd"))


@pytest.mark.parametrize("head_dim", [136, 160, 192, 256])
@pytest.mark.parametrize("window", [None, 100])
def test_large_head_sizes(hopper, head_dim, window):
    assert_attention_parity(leaves(hopper, 1, 2, 1, 150, 300, head_dim, torch.float16), window=window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [2, 63, 64, 65, 128, 129, 1000])
def test_windows(hopper, causal, window):
    assert_attention_parity(leaves(hopper, 1, 1, 1, 300, 300, 64, torch.bfloat16), causal=causal, window=window)


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 300), (63, 111), (300, 64), (129, 128), (257, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(hopper, q_len, k_len, causal):
    """More queries than keys: the first of them see none when causal."""
    assert_attention_parity(leaves(hopper, 1, 2, 2, q_len, k_len, 128, torch.bfloat16), causal=causal)


def test_one_visible_key(hopper):
    """Its weight is 1 whatever the scores, so q and k have no gradient but for the rounding of dout * v."""
    tensors = leaves(hopper, 1, 1, 1, 200, 200, 64, torch.bfloat16)
    dout = torch.randn(1, 1, 200, 64).to(hopper.device, torch.bfloat16)
    out = gk.attention(**tensors, window=1, backend="cuda")
    assert torch.equal(out, tensors["v"])
    dq, dk, dv = torch.autograd.grad(out, tuple(tensors.values()), dout)
    assert torch.equal(dv, dout)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


def test_no_keys(hopper):
    tensors = leaves(hopper, 1, 2, 2, 5, 0, 64, torch.bfloat16)
    out = gk.attention(**tensors, backend="cuda")
    out.sum().backward()
    assert not out.any()
    assert not tensors["q"].grad.any()


@pytest.mark.parametrize("layout", ["bhtd", "bthd", "packed"])
def test_layouts(hopper, layout):
    tensors = leaves(hopper, 2, 3, 3, 140, 140, 64, torch.float16, layout)
    assert_attention_parity(tensors)
    out = gk.attention(**tensors, backend="cuda")
    assert sorted(range(4), key=lambda i: -out.stride(i)) == sorted(range(4), key=lambda i: -tensors["q"].stride(i))


def test_strides_beyond_32_bits(hopper):
    """Rows of the batch 4 GiB apart, of which only what is used is ever touched."""
    shape, apart = (2, 1, 70, 64), 2**31

    def far_apart():
        x = torch.empty(apart + 70 * 64, dtype=torch.bfloat16, device=hopper.device)
        return x.as_strided(shape, (apart, 70 * 64, 64, 1)).copy_(torch.randn(shape))

    tensors = {name: far_apart() for name in "qkv"}
    near = {name: x.contiguous().requires_grad_() for name, x in tensors.items()}
    out = gk.attention(**near, backend="cuda")
    dout = far_apart()
    expected = (out, *torch.autograd.grad(out, tuple(near.values()), dout.contiguous()))
    call = AttentionCall(*tensors.values(), scale=64**-0.5)
    # Outputs that are as far apart: the launchers' own would be dense.
    with mock.patch.object(outputs, "empty_in_order_of", side_effect=lambda x: far_apart().fill_(torch.nan)):
        out, lse = cuda_kernels.attention_fwd(call)
        *grads, _ = cuda_kernels.attention_bwd(call, dout, out, lse)
    for value, truth in zip((out, *grads), expected, strict=True):
        torch.testing.assert_close(value, truth)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_heads(hopper, kv_heads):
    assert_attention_parity(leaves(hopper, 2, 6, kv_heads, 140, 200, 64, torch.bfloat16), window=90)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 1), (8, 2)])
def test_query_heads_in_parts(hopper, head_dim, heads, kv_heads):
    """Few key heads and blocks: the query heads of each are split, and their shares of dk and dv added up."""
    splits = query_head_splits(heads, kv_heads, 150, head_dim, hardware.sm_count(hopper.device))
    assert splits > 1 or hopper.kind == "cuda"
    tensors = leaves(hopper, 1, heads, kv_heads, 200, 150, head_dim, torch.bfloat16, "bthd")
    assert_attention_parity(tensors)
    assert_attention_parity(tensors, causal=False, window=70)


def query_head_splits(heads, kv_heads, k_len, head_dim, sm_count):
    """In how many parts the query heads of a key head are worked on: as many shares of dk and dv has the workspace."""
    q, k = (torch.empty(1, h, k_len, head_dim, device="meta") for h in (heads, kv_heads))
    numbers = cuda_kernels.shape_numbers(AttentionCall(q, k, k))
    block = 64 if head_dim > 128 else 128
    padded = next(size for size in (64, 96, 128, 256) if head_dim <= size)
    variables = cuda_kernels.VARIABLES, numbers, (None,) * len(cuda_kernels.VARIABLES)
    # With one SM nothing is split.
    bytes_of = functools.partial(cuda_library.load().attention_bwd_workspace_bytes, *variables)
    shares = bytes_of(sm_count) - bytes_of(1)
    return max(1, shares // (-(-k_len // block) * block * padded * kv_heads * 2 * 4))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "k_len", "splits"),
    [(32, 8, 2048, 4), (32, 8, 4096, 2), (32, 8, 8192, 1), (64, 8, 1024, 8), (32, 32, 512, 1), (12, 4, 1024, 3)],
)
def test_a_gpu_of_132_multiprocessors_is_filled(hopper, heads, kv_heads, k_len, splits):
    """Two tiles for each, or as many as there are query heads to share out."""
    assert query_head_splits(heads, kv_heads, k_len, 128, 132) == splits
    tiles = kv_heads * k_len // 128 * splits
    assert tiles >= 2 * 132 or splits == heads // kv_heads


def test_key_start(hopper):
    key_start = torch.tensor([0, 1, 130, 299, 300, 1000], dtype=torch.int32, device=hopper.device)
    assert_attention_parity(leaves(hopper, 6, 1, 1, 200, 300, 64, torch.bfloat16), key_start=key_start)


DOCUMENTS = [[100, 0, 300, 1, 129], [128, 128], [3] * 40 + [200], [500]]


@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "causal", "window"),
    [(64, True, None), (80, False, 200), (128, True, 60), (192, True, None), (256, False, None)],
)
def test_documents(hopper, lengths, head_dim, causal, window):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(hopper.device)
    total = sum(lengths)
    tensors = {
        name: torch.randn(total, heads, head_dim).to(hopper.device, torch.bfloat16).requires_grad_()
        for name, heads in (("q", 2), ("k", 1), ("v", 1))
    }
    assert_attention_parity(tensors, cu_seqlens=bounds, causal=causal, window=window)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_do_not_touch_each_other(hopper, head_dim, causal):
    """The blocks that hold a document's end hold the next one's beginning too: its NaNs must stay there."""
    bounds = torch.tensor([0, 100, 150, 290], dtype=torch.int32, device=hopper.device)

    def run(poison):
        torch.manual_seed(1)
        tensors = [torch.randn(290, 2, head_dim) for _ in range(4)]
        for x in tensors:
            x[100:150] = poison
        q, k, v, dout = (x.to(hopper.device, torch.bfloat16).requires_grad_() for x in tensors)
        out = gk.attention(q, k, v, cu_seqlens=bounds, causal=causal, backend="cuda")
        grads = torch.autograd.grad(out, (q, k, v), dout)
        return [torch.cat((x[:100], x[150:])).detach() for x in (out, *grads)]

    for clean, beside_nan in zip(run(0.0), run(torch.nan), strict=True):
        assert beside_nan.isfinite().all()
        torch.testing.assert_close(beside_nan, clean)


def test_lse_is_the_natural_logarithm(hopper):
    q, k, v = (x.detach() for x in leaves(hopper, 1, 1, 1, 200, 150, 64, torch.float16).values())
    with guarded_allocations():
        out, lse = cuda_kernels.attention_fwd(AttentionCall(q, k, v, scale=0.125))
    scores = (q.double() @ k.double().mT * 0.125).cpu()
    seen = torch.ones(200, 150, dtype=torch.bool).tril(150 - 200)
    truth = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.cpu().double(), truth, atol=1e-5, rtol=1e-5)
    assert not out[:, :, :50].any()


def gradients(where, deterministic, window, head_dim=64):
    torch.manual_seed(3)
    q, k, v = leaves(where, 1, 2, 1, 400, 400, head_dim, torch.bfloat16).values()  # of dk and dv there are two shares
    dout = torch.randn(1, 2, 400, head_dim).to(where.device, torch.bfloat16)
    torch.use_deterministic_algorithms(deterministic)
    try:
        return torch.autograd.grad(gk.attention(q, k, v, window=window, backend="cuda"), (q, k, v), dout)
    finally:
        torch.use_deterministic_algorithms(False)


def on_other_schedules(where, seeds, *options):
    """Gradients of the same call under each of the seeds"""
    for seed in seeds:
        with Where(where.kind, 90, seed).active():
            yield gradients(where, *options)


@pytest.mark.parametrize(
    ("deterministic", "window", "head_dim"),
    [(True, None, 64), (True, None, 96), (True, None, 128), (True, None, 256), (False, 1, 64), (False, 200, 64),
     (False, 399, 128), (False, 70, 128), (False, 90, 256), (True, 90, 64)],
)  # fmt: skip
def test_gradients_do_not_depend_on_the_schedule(hopper, deterministic, window, head_dim):
    """With a window never, without one by torch's switch."""
    first = gradients(hopper, deterministic, window, head_dim)
    for others in on_other_schedules(hopper, range(1, 16), deterministic, window, head_dim):
        assert all(torch.equal(one, other) for one, other in zip(first, others, strict=True))


def test_key_and_value_gradients_never_depend_on_the_schedule(hopper):
    first = gradients(hopper, False, None)
    others = list(on_other_schedules(hopper, range(1, 8), False, None))
    for _, dk, dv in others:
        assert torch.equal(first[1], dk)
        assert torch.equal(first[2], dv)
    # Of dq that is not promised, and the simulator's schedules show it.
    assert hopper.kind == "cuda" or not all(torch.equal(first[0], dq) for dq, _, _ in others)


@pytest.mark.parametrize("window", [None, 90])
def test_a_busy_gpu_does_not_stop_the_fixed_order(hopper, window):
    """CTAs that start only when others have ended: nobody may wait for one that has not begun."""
    if hopper.kind == "cuda":
        pytest.skip("a test of the simulator's schedules")
    import ptxemu.cuda

    expected = gradients(hopper, True, window)
    for seed in range(6):
        with Where(hopper.kind, 90, seed).active(), ptxemu.cuda.use(seed=seed, few_ctas=True):
            for one, other in zip(expected, gradients(hopper, True, window), strict=True):
                assert torch.equal(one, other)


def test_explain_says_whether_gradients_repeat(hopper):
    q, k, v = leaves(hopper, 1, 1, 1, 64, 64, 64, torch.bfloat16).values()
    assert "dq is summed in any order" in gk.explain(gk.attention, q, k, v, backend="cuda").detail
    same = "the gradients have the same bits on every run"
    assert gk.explain(gk.attention, q, k, v, window=9, backend="cuda").detail == same
    torch.use_deterministic_algorithms(True)
    try:
        assert gk.explain(gk.attention, q, k, v, backend="cuda").detail == same
    finally:
        torch.use_deterministic_algorithms(False)


def test_explain_runs_what_bends_scores(hopper):
    q, k, v = leaves(hopper, 1, 2, 2, 64, 64, 256, torch.float16).values()
    slopes = torch.tensor([0.5, 0.1], device=hopper.device)
    for options in ({"softcap": 50.0}, {"alibi_slopes": slopes}, {"softcap": 50.0, "alibi_slopes": slopes}):
        told = gk.explain(gk.attention, q, k, v, **options, backend="cuda")
        assert (told.backend, told.reasons) == ("cuda", {})


def test_gradient_expanded_from_one_number(hopper):
    tensors = leaves(hopper, 1, 2, 2, 70, 70, 64, torch.float16)
    assert_attention_parity(tensors, window=9)
    q, k, v = tensors.values()
    out = gk.attention(q, k, v, backend="cuda")
    ones = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    for one, other in zip(ones, torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, other)


def test_large_scores(hopper):
    """Exponentials relative to a stale maximum must not overflow, whichever way the scores run."""
    for ascending in (False, True):
        tensors = leaves(hopper, 1, 1, 1, 256, 512, 64, torch.float16)
        ramp = torch.linspace(0.1, 3, 512, device=hopper.device).flip(0 if ascending else ()).view(1, 1, -1, 1)
        with torch.no_grad():
            tensors["k"].mul_(ramp)
        assert_attention_parity(tensors, causal=False, scale=1.0)


def test_compiles_in_one_graph(hopper):
    tensors = leaves(hopper, 1, 2, 1, 130, 130, 64, torch.bfloat16)

    def run(q, k, v):
        return gk.attention(q, k, v, window=50, backend="cuda").square().sum()

    expected = torch.autograd.grad(run(**tensors), tuple(tensors.values()))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    # Alignment is not known when the graph is made, so a misaligned q is copied rather than refused.
    misaligned = torch.zeros(tensors["q"].numel() + 1, dtype=torch.bfloat16, device=hopper.device)[1:]
    misaligned = misaligned.view_as(tensors["q"]).copy_(tensors["q"].detach()).requires_grad_()
    for q in (tensors["q"], misaligned):
        leaf = (q, tensors["k"], tensors["v"])
        for value, truth in zip(torch.autograd.grad(compiled(*leaf), leaf), expected, strict=True):
            torch.testing.assert_close(value, truth)


@pytest.mark.parametrize("packed", [False, True])
def test_ops_are_well_formed(hopper, packed):
    shape = (40, 2, 64) if packed else (1, 2, 40, 64)
    q, k, v, dout = (torch.randn(shape).to(hopper.device, torch.bfloat16) for _ in range(4))
    bounds = torch.tensor([0, 10, 40], dtype=torch.int32, device=hopper.device) if packed else None
    call = AttentionCall(q, k, v, cu_seqlens=bounds, left=8, scale=0.125)
    out, lse = cuda_kernels.attention_fwd(call)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(cuda_kernels.attention_fwd.torch_op, call.flat(), test_utils=tests)
    backward = (*call.flat(), dout, out, lse, None)
    torch.library.opcheck(cuda_kernels.attention_bwd.torch_op, backward, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout": 0.1}, "has no dropout"),
        ({"dtype": torch.float32}, "takes float16 and bfloat16, not torch.float32"),
        ({"head_dim": 36}, "multiples of 8, not 36"),
        ({"offset": 1}, "q does not start at a multiple of 16 bytes"),
        ({"pitch": 65}, "q has a stride of 65 elements"),
        ({"expand": True}, "q has a stride of 0 elements"),
    ],
)
def test_refusals_give_their_reason(hopper, change, reason):
    head_dim, dtype = change.get("head_dim", 64), change.get("dtype", torch.bfloat16)
    pitch, offset = change.get("pitch", head_dim), change.get("offset", 0)
    q = torch.zeros(8192, dtype=dtype, device=hopper.device)[offset:].as_strided(
        (1, 2, 9, head_dim), (16 * pitch, 8 * pitch, pitch, 1), offset
    )
    q = q[:, :1].expand(1, 2, 9, head_dim) if change.get("expand") else q
    k = torch.zeros(1, 2, 9, head_dim, dtype=dtype, device=hopper.device, requires_grad=True)
    with pytest.raises(UnsupportedError, match=reason):
        gk.attention(q, k, k, dropout=change.get("dropout", 0.0), backend="cuda")


def test_older_gpus_are_refused():
    with Where("simulator", 80).active():
        q = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16)
        assert "needs compute capability 9.0" in cuda_kernels.unsupported(AttentionCall(q, q, q))
