"""The rotation of queries and keys: every backend against the float64 reference, in every place where kernels run."""

import math

import pytest
import torch
from compile_gate import assert_within_limits, compiled_launches
from parity import assert_parity

import gptkernels as gk
from gptkernels import simulator
from gptkernels.ops.rope import reference, triton_kernels
from gptkernels.ops.rope.record import NormRopeCall, RopeCall

BACKENDS = ["eager", "triton"]
# head size, rotated, columns of the tables, interleaved
LAYOUTS = [
    (64, 64, 64, False),
    (64, 64, 32, False),  # gpt-oss
    (128, 32, 32, False),  # GPT-NeoX rotates a part
    (40, 24, 24, True),  # GPT-J
    (33, 10, 5, True),
    (111, 2, 2, False),
    (256, 256, 256, True),
]


def make(where, size, columns, dtype, *, heads=3, kv_heads=1, tokens=7, batch=2, tables=None):
    """q as a projection leaves it, k contiguous; tables per row of the batch"""
    q = torch.randn(batch, tokens, heads, size).to(where.device, dtype).transpose(1, 2)
    k = torch.randn(batch, kv_heads, tokens, size).to(where.device, dtype)
    angles = torch.rand(*(tables or (batch, tokens)), columns) * 2 * math.pi
    return {"q": q.detach().requires_grad_(), "k": k.requires_grad_()}, angles.cos(), angles.sin()


def assert_rope_parity(where, tensors, cos, sin, backend, **options):
    dtype = tensors["q"].dtype
    on_device = cos.to(where.device), sin.to(where.device)

    def op(q, k):
        return gk.rope(q, k, *on_device, backend=backend, **options)

    def true(q, k):
        # Every dtype sees the tables as the op does: rounded to its own.
        return reference.rope(q, k, cos.to(dtype), sin.to(dtype), **options)

    return assert_parity(op, true, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(anywhere, backend, layout, dtype):
    anywhere.require(backend)
    size, rotated, columns, interleaved = layout
    tensors, cos, sin = make(anywhere, size, columns, dtype)
    assert_rope_parity(anywhere, tensors, cos, sin, backend, rotary_dim=rotated, interleaved=interleaved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides(anywhere, backend):
    """Tables for all rows of a batch, single tokens, more key heads than query heads, no rows, packed projections."""
    anywhere.require(backend)
    for sizes in ({"tokens": 1}, {"heads": 1, "kv_heads": 5}, {"tokens": 300, "batch": 1}):
        tensors, cos, sin = make(anywhere, 32, 32, torch.bfloat16, tables=(sizes.get("tokens", 7),), **sizes)
        assert_rope_parity(anywhere, tensors, cos, sin, backend)
    packed = torch.randn(2, 7, 3, 4, 16).to(anywhere.device)  # (B, T, 3, H, D)
    q, k, _ = packed.permute(2, 0, 3, 1, 4)
    cos, sin = torch.randn(2, 7, 16).to(anywhere.device)
    found = gk.rope(q, k, cos, sin, backend=backend)
    for value, truth in zip(found, reference.rope(q, k, cos, sin), strict=True):
        torch.testing.assert_close(value, truth)
    assert found[0].transpose(1, 2).is_contiguous()  # in q's memory order
    transposed = q.mT.contiguous().mT
    torch.testing.assert_close(gk.rope(transposed, k, cos, sin, backend=backend), found)
    for empty in (q[:0], q[:, :, :0]):
        rows = empty.shape[2]
        out, _ = gk.rope(empty, k[: len(empty), :, :rows], cos[:rows], sin[:rows], backend=backend)
        assert out.shape == empty.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradients(anywhere, backend):
    anywhere.require(backend)
    tensors, cos, sin = make(anywhere, 24, 24, torch.float32)
    q, k = tensors.values()
    out = gk.rope(q, k, cos.to(anywhere.device), sin.to(anywhere.device), backend=backend)
    grads = torch.autograd.grad(out[0].sum(), (q, k))  # one number for all of it, and none for k
    truth = torch.autograd.grad(reference.rope(q, k, cos.to(q), sin.to(q))[0].sum(), q)
    torch.testing.assert_close(grads[0], truth[0])
    assert not grads[1].any()


def normed(where, size, columns, dtype, **sizes):
    """-> tensors, cos, sin with weights of QK-norm among the tensors, that of k in float32 where others are shorter"""
    tensors, cos, sin = make(where, size, columns, dtype, **sizes)
    for name, kind in (("q_norm", dtype), ("k_norm", torch.float32)):
        tensors[name] = (1 + torch.randn(size) / 4).to(where.device, kind).requires_grad_()
    return tensors, cos, sin


def assert_norm_parity(where, tensors, cos, sin, backend, **options):
    dtype = tensors["q"].dtype
    on_device = cos.to(where.device), sin.to(where.device)

    def op(q, k, q_norm, k_norm):
        return gk.rope(q, k, *on_device, q_norm=q_norm, k_norm=k_norm, backend=backend, **options)

    def true(q, k, q_norm, k_norm):
        return reference.rope(q, k, cos.to(dtype), sin.to(dtype), q_norm=q_norm, k_norm=k_norm, **options)

    return assert_parity(op, true, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_parity(anywhere, backend, layout, dtype):
    anywhere.require(backend)
    size, rotated, columns, interleaved = layout
    tensors, cos, sin = normed(anywhere, size, columns, dtype)
    options = {"rotary_dim": rotated, "interleaved": interleaved, "eps": 1e-3}
    if interleaved:
        options |= {"offset": 1.0, "cast": "gemma"}
    assert_norm_parity(anywhere, tensors, cos, sin, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_many_rows(anywhere, backend):
    """Programs of the backward pass that go on over rows, some with none of k's; expanded gradients; no rows."""
    anywhere.require(backend)
    for sizes in ({"tokens": 900, "batch": 1, "heads": 8}, {"heads": 1, "kv_heads": 3}):
        tensors, cos, sin = normed(anywhere, 32, 16, torch.bfloat16, tables=(sizes.get("tokens", 7),), **sizes)
        assert_norm_parity(anywhere, tensors, cos, sin, backend, rotary_dim=32)
    tensors, cos, sin = normed(anywhere, 16, 16, torch.float32)
    tables = cos.to(anywhere.device), sin.to(anywhere.device)
    out = gk.rope(tensors["q"], tensors["k"], *tables, q_norm=tensors["q_norm"], k_norm=tensors["k_norm"])
    grads = torch.autograd.grad(out[0].sum(), tensors.values())
    truth = torch.autograd.grad(
        reference.rope(cos=tables[0], sin=tables[1], **tensors)[0].sum(), (tensors["q"], tensors["q_norm"])
    )
    torch.testing.assert_close((grads[0], grads[2]), truth)
    assert not grads[1].any()
    assert not grads[3].any()
    q = tensors["q"].detach()[:0]
    norms = {name: tensors[name] for name in ("q_norm", "k_norm")}
    out, _ = gk.rope(q, q, tables[0][:0], tables[1][:0], backend=backend, **norms)
    (grad,) = torch.autograd.grad(out.sum(), norms["q_norm"])
    assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_compile_and_opcheck(anywhere, backend):
    anywhere.require(backend)
    torch._dynamo.reset()
    tensors, cos, sin = normed(anywhere, 16, 8, torch.bfloat16)
    cos, sin = cos.to(anywhere.device), sin.to(anywhere.device)

    def block(q, k, q_norm, k_norm):
        one, two = gk.rope(q * 2, k, cos, sin, rotary_dim=16, q_norm=q_norm, k_norm=k_norm, backend=backend)
        return one.sum() + two.float().square().sum()

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out = function(**tensors)
        results.append((out, *torch.autograd.grad(out, tensors.values())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    q, k, q_norm, k_norm = (x.detach() for x in tensors.values())
    module = triton_kernels if backend == "triton" else pytest.importorskip("gptkernels.ops.rope.eager")
    call = NormRopeCall(q, k, cos, sin, q_norm, k_norm, 16, False, 1e-6, 0.0, True)
    torch.library.opcheck(module.rope_norm_fwd.torch_op, call.flat())
    rstds = torch.rand(2, 3, 7, device=q.device), torch.rand(2, 1, 7, device=q.device)
    torch.library.opcheck(module.rope_norm_bwd.torch_op, (*call.flat(), q, k, *rstds))


def test_norms_are_qwen_s_and_gemma_s():
    """The very bits of the modules on a CPU, in bfloat16."""
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    q, k = torch.randn(2, 3, 5, 16).bfloat16(), torch.randn(2, 1, 5, 16).bfloat16()
    angles = torch.rand(2, 5, 8)
    cos, sin = (torch.cat((t, t), -1).bfloat16() for t in (angles.cos(), angles.sin()))
    for norm, options in (
        (qwen.Qwen3RMSNorm(16), {}),
        (gemma.Gemma3RMSNorm(16), {"offset": 1.0, "cast": "gemma"}),
    ):
        norm = norm.bfloat16()
        torch.nn.init.normal_(norm.weight)
        truth = qwen.apply_rotary_pos_emb(norm(q), norm(k), cos, sin)
        found = gk.rope(q, k, cos, sin, q_norm=norm.weight, k_norm=norm.weight, eps=1e-6, **options)
        normed = gk.rope(norm(q), norm(k), cos, sin)
        for a, b, c in zip(found, normed, truth, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, atol=2e-2, rtol=2e-2)  # which rounds between products and sum


def test_norms_double_backward_is_an_error():
    q, cos, sin = torch.randn(1, 2, 3, 8, requires_grad=True), *torch.randn(2, 3, 8)
    out = gk.rope(q, q, cos, sin, q_norm=torch.ones(8), k_norm=torch.ones(8))[0].sin().sum()
    (grad,) = torch.autograd.grad(out, q, create_graph=True)
    with pytest.raises(gk.UnsupportedError, match="rope: double backward"):
        grad.sum().backward()


def test_it_is_transformers_rope():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gpt_j = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    q, k = torch.randn(2, 3, 5, 16), torch.randn(2, 1, 5, 16)
    angles = torch.rand(2, 5, 8)
    table = torch.cat((angles, angles), -1)
    for found, truth in zip(
        gk.rope(q, k, table.cos(), table.sin()), llama.apply_rotary_pos_emb(q, k, table.cos(), table.sin()), strict=True
    ):
        torch.testing.assert_close(found, truth)
    halves = gk.rope(q, k, angles.cos(), angles.sin(), rotary_dim=16)
    for found, truth in zip(halves, gk.rope(q, k, table.cos(), table.sin()), strict=True):
        torch.testing.assert_close(found, truth)
    found, _ = gk.rope(q, k, angles.cos(), angles.sin(), rotary_dim=16, interleaved=True)
    truth = gpt_j.apply_rotary_pos_emb(q.transpose(1, 2), angles.sin(), angles.cos()).transpose(1, 2)
    torch.testing.assert_close(found, truth)


def test_gradcheck_and_second_derivatives():
    q, k = (torch.randn(1, 2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cos, sin = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.autograd.gradcheck(lambda q, k: reference.rope(q, k, cos, sin), (q, k))
    single = [x.detach().float().requires_grad_() for x in (q, k)]
    out = gk.rope(*single, cos.float(), sin.float())[0].sin().sum()
    (grad,) = torch.autograd.grad(out, single[0], create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), single[0])
    doubled = single[0].detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(reference.rope(doubled, k, cos, sin)[0].sin().sum(), doubled, create_graph=True)
    truth = torch.autograd.grad(grad.square().sum(), doubled)[0]
    torch.testing.assert_close(second.double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_and_opcheck(anywhere, backend):
    anywhere.require(backend)
    torch._dynamo.reset()
    tensors, cos, sin = make(anywhere, 16, 8, torch.bfloat16)
    cos, sin = cos.to(anywhere.device), sin.to(anywhere.device)

    def block(q, k):
        one, two = gk.rope(q * 2, k, cos, sin, rotary_dim=16, backend=backend)
        return one.sum() + two.float().square().sum()

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out = function(**tensors)
        results.append((out, *torch.autograd.grad(out, tensors.values())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    q, k = (x.detach() for x in tensors.values())
    module = triton_kernels if backend == "triton" else pytest.importorskip("gptkernels.ops.rope.eager")
    for transposed in (False, True):
        torch.library.opcheck(module.rope_fwd.torch_op, RopeCall(q, k, cos, sin, 16, False, transposed).flat())
    meta = gk.rope(q.to("meta"), k.to("meta"), cos.to("meta"), sin.to("meta"), rotary_dim=16)
    assert [x.shape for x in meta] == [q.shape, k.shape]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.randn(3, 5, 8)}, ValueError, "q must have 4 dimensions"),
        ({"q": torch.randn(2, 3, 5, 8).double()}, TypeError, "q must be float16, bfloat16, float32"),
        ({"k": torch.randn(2, 1, 6, 8)}, ValueError, "k must have shape"),
        ({"k": torch.randn(2, 1, 5, 8).half()}, TypeError, "k must be float32"),
        ({"cos": torch.randn(6, 8)}, ValueError, r"cos must have shape \(5, W\) or \(2, 5, W\)"),
        ({"cos": torch.randn(5, 8, requires_grad=True)}, ValueError, "cos must not require a gradient"),
        ({"sin": torch.randn(5, 4)}, ValueError, "sin must have shape"),
        ({"sin": torch.randn(5, 8).half()}, TypeError, "sin must be float32"),
        ({"rotary_dim": 7}, ValueError, "rotary_dim must be even and 2 ... 8"),
        ({"rotary_dim": 10}, ValueError, "rotary_dim must be even and 2 ... 8"),
        ({"rotary_dim": 4}, ValueError, "cos must have 4 or 2 columns"),
        ({"rotary_dim": 8.0}, TypeError, "rotary_dim must be None or an int"),
        ({"cos": torch.randn(5, 10), "sin": torch.randn(5, 10)}, ValueError, "cos must have a last dimension"),
        ({"q_norm": torch.ones(8)}, TypeError, "q_norm and k_norm must be given both, or neither"),
        ({"q_norm": torch.ones(8), "k_norm": torch.ones(4)}, ValueError, r"k_norm must have shape \(8,\)"),
        ({"q_norm": torch.ones(8).half(), "k_norm": torch.ones(8)}, TypeError, "q_norm must be float32"),
        ({"q_norm": torch.ones(8), "k_norm": torch.ones(8), "eps": 0}, ValueError, "eps must be > 0"),
        ({"q_norm": torch.ones(8), "k_norm": torch.ones(8), "cast": "t5"}, ValueError, "cast must be one of"),
        ({"interleaved": 1}, TypeError, "interleaved must be True or False"),
        ({"backend": "cuda"}, gk.UnsupportedError, "rope has no such kernels"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input(change, error, words):
    usual = {"q": torch.randn(2, 3, 5, 8), "k": torch.randn(2, 1, 5, 8), "cos": torch.randn(5, 8)}
    with pytest.raises(error, match=words):
        gk.rope(**{**usual, "sin": torch.randn(5, 8), **change})


@pytest.mark.skipif(simulator.unavailable() is not None, reason="the simulator is not installed")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_code(arch):
    """16-byte loads, and nothing spills: as compiled for the GPU."""
    q, k, table = torch.empty(2, 8, 64, 128).bfloat16(), torch.empty(2, 2, 64, 128).bfloat16(), torch.empty(64, 128)
    with compiled_launches(arch) as launches:
        for transposed in (False, True):
            triton_kernels.rope_fwd(RopeCall(q, k, table, table, 128, False, transposed))
        weight = torch.ones(128).bfloat16()
        call = NormRopeCall(q, k, table, table, weight, weight, 128, False, 1e-6, 0.0, True)
        _, _, *rstds = triton_kernels.rope_norm_fwd(call)
        triton_kernels.rope_norm_bwd(call, q, k, *rstds)
    assert len(launches) == 4
    for compiled in launches:
        assert_within_limits(compiled)
        assert compiled.machine_code.count(r"LDG\.E\.128") >= 4
        assert compiled.machine_code.count(r"STG\.E\.128") >= 2


@pytest.mark.skipif(simulator.unavailable() is not None, reason="the simulator is not installed")
def test_reads_and_writes_everything_once():
    q, k, table = torch.randn(1, 8, 64, 64).bfloat16(), torch.randn(1, 2, 64, 64).bfloat16(), torch.randn(64, 64)
    with simulator.use(arch=90) as driver:
        gk.rope(q, k, table, table, backend="triton")
        stats = driver.last_launch.stats
    moved = (q.numel() + k.numel()) * 2 // 32
    assert stats.global_store_sectors == moved
    # The tables are float32 and come for each head, from a cache.
    assert stats.global_load_sectors <= 5 * moved
