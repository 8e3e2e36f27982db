"""RMSNorm and add + RMSNorm: every backend against the float64 reference, in every place where kernels run, and against
transformers' modules bit for bit."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity

import gptkernels as gk
from gptkernels.ops.dropout import draw_seed, keep_mask
from gptkernels.ops.rms_norm import cuda_kernels, eager, reference, triton_kernels
from gptkernels.ops.rms_norm.native import CASTS
from gptkernels.ops.rms_norm.record import RMSNormCall
from gptkernels.ops.rows import as_row_groups

KERNELS = {"eager": eager, "triton": triton_kernels, "cuda": cuda_kernels}
BACKENDS = list(KERNELS)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(where, *shape, dtype=torch.float32, residual=False, residual_dtype=None, weight_dtype=None, weight=True):
    """Inputs of rms_norm or add_rms_norm as leaves on where's device."""

    def leaf(*shape, dtype):
        return torch.randn(*shape).to(where.device, dtype).requires_grad_()

    tensors = {"x": leaf(*shape, dtype=dtype)}
    if residual:
        tensors["residual"] = leaf(*shape, dtype=residual_dtype or dtype)
    tensors["weight"] = leaf(shape[-1], dtype=weight_dtype or dtype) if weight else None
    return tensors


def ordinary(x, residual=None, weight=None, *, eps=1e-6, offset=0.0, cast="llama", dropout=0.0, seed=None):
    """The same as transformers writes it."""
    x_kept = x * keep_mask(seed, *x.shape, dropout) / (1 - dropout) if dropout else x
    h = x if residual is None else x_kept + residual
    y = h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = weight * y.to(x.dtype) if cast == "llama" else (weight.float() + offset) * y
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), h)


def assert_rms_norm_parity(tensors, backend, *, dropout=0.0, cotangents=None, **options):
    if "residual" not in tensors:
        return assert_parity(
            gk.rms_norm,
            reference.rms_norm,
            tensors,
            kwargs={"backend": backend, **options},
            reference_kwargs=options,
            ordinary=ordinary,
            cotangents=cotangents,
        )
    torch.manual_seed(7)
    seed = draw_seed(tensors["x"].device).cpu()

    def op(**arguments):
        torch.manual_seed(7)
        return gk.add_rms_norm(**arguments, dropout=dropout, **options, backend=backend)

    return assert_parity(
        op,
        reference.add_rms_norm,
        tensors,
        reference_kwargs={"dropout": dropout, "seed": seed, **options},
        ordinary=ordinary,
        cotangents=cotangents,
    )


@pytest.mark.parametrize("shape", [(3, 17), (2, 3, 64)])
def test_reference_is_torch_rms_norm(shape):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1:], dtype=torch.float64)
    for w in (weight, None):
        torch.testing.assert_close(reference.rms_norm(x, w, eps=1e-3), F.rms_norm(x, shape[-1:], w, 1e-3))
    shifted = reference.rms_norm(x, weight, eps=1e-3, offset=1.0, cast="gemma")
    torch.testing.assert_close(shifted, F.rms_norm(x, shape[-1:], 1 + weight, 1e-3))


@pytest.mark.parametrize("cast", CASTS)
def test_reference_gradients_are_finite_differences(cast):
    x, residual = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, seed = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.tensor([123])
    options = {"dropout": 0.4, "seed": seed, "offset": 1.0, "cast": cast}
    assert torch.autograd.gradcheck(lambda *args: reference.add_rms_norm(*args, **options), (x, residual, weight))


# transformers' module -> how it is said here
MODULES = {
    "llama.LlamaRMSNorm": {"cast": "llama"},
    "mistral.MistralRMSNorm": {"cast": "llama"},
    "qwen2.Qwen2RMSNorm": {"cast": "llama"},
    "qwen3.Qwen3RMSNorm": {"cast": "llama"},
    "phi3.Phi3RMSNorm": {"cast": "llama"},
    "granite.GraniteRMSNorm": {"cast": "llama"},
    "t5.T5LayerNorm": {"cast": "llama"},
    "gemma.GemmaRMSNorm": {"cast": "gemma", "offset": 1.0},
    "gemma2.Gemma2RMSNorm": {"cast": "gemma", "offset": 1.0},
    "gemma3.Gemma3RMSNorm": {"cast": "gemma", "offset": 1.0},
    "gpt_oss.GptOssRMSNorm": {"cast": "gpt_oss"},
    "olmo2.Olmo2RMSNorm": {"cast": "gpt_oss"},
}


def module_of(name, columns, dtype):
    family, kind = name.split(".")
    module = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), kind)(columns, eps=1e-5)
    torch.nn.init.normal_(module.weight)
    return module.to(dtype)


@pytest.mark.parametrize("name", MODULES)
def test_on_a_cpu_the_bits_are_those_of_transformers(name):
    pytest.importorskip("transformers")
    for dtype in DTYPES:
        module, x = module_of(name, 48, dtype), torch.randn(5, 3, 48).to(dtype)
        for gradients in (True, False):
            x.requires_grad_(gradients)
            with torch.set_grad_enabled(gradients):
                ours = gk.rms_norm(x, module.weight, eps=1e-5, **MODULES[name])
            assert ours.requires_grad == gradients
            assert torch.equal(ours, module(x))


def test_a_float32_weight_leaves_the_dtype_of_x():
    """Llama's module gives float32 then: the same numbers, not yet rounded."""
    pytest.importorskip("transformers")
    module, x = module_of("llama.LlamaRMSNorm", 48, torch.float32), torch.randn(5, 48).bfloat16()
    assert module(x).dtype == torch.float32
    assert torch.equal(gk.rms_norm(x, module.weight, eps=1e-5), module(x).bfloat16())


@pytest.mark.parametrize("name", ["llama.LlamaRMSNorm", "gemma.GemmaRMSNorm", "gpt_oss.GptOssRMSNorm"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_round_where_transformers_does(anywhere, backend, name):
    """From the 1 / rms that the kernel came to, which may be another float32, on: the same bits."""
    pytest.importorskip("transformers")
    anywhere.require(backend)
    options = {"offset": 0.0, **MODULES[name]}
    for dtype, columns in ((torch.bfloat16, 264), (torch.float16, 63)):
        weight = module_of(name, columns, dtype).weight.detach().to(anywhere.device)
        x = torch.randn(6, columns).to(anywhere.device, dtype)
        first = CASTS[options["cast"]]
        call = RMSNormCall(x, None, weight, None, 1e-5, options["offset"], first, 0.0)
        y, _, rstd = KERNELS[backend].rms_norm_fwd(call)
        torch.testing.assert_close(rstd, (x.float().pow(2).mean(-1) + 1e-5).rsqrt())
        exact = x.float() * rstd.unsqueeze(1)
        rounded_once = (exact * (options["offset"] + weight.float())).to(dtype)
        assert torch.equal(y, weight * exact.to(dtype) if first else rounded_once)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 63, 64, 111, 256, 768, 1600])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm(where, backend, columns, dtype):
    where.require(backend)
    cast = list(CASTS)[(columns + DTYPES.index(dtype)) % 3]
    assert_rms_norm_parity(make(where, 5, columns, dtype=dtype), backend, cast=cast, offset=float(cast == "gemma"))


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("columns", [4099, 12288, 20000, 65536])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_rows(anywhere, backend, columns):
    anywhere.require(backend)
    assert_rms_norm_parity(make(anywhere, 3, columns, dtype=torch.bfloat16, residual=True), backend)


@pytest.mark.parametrize("columns", [24, 128, 160])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_programs(where, backend, columns):
    where.require(backend)
    assert_rms_norm_parity(make(where, 150, columns, dtype=torch.float16), backend)


@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_add_rms_norm(where, backend, dtype, residual_dtype, weight_dtype):
    where.require(backend)
    options = {"dtype": dtype, "residual": True, "residual_dtype": residual_dtype, "weight_dtype": weight_dtype}
    for columns, dropout in ((63, 0.1), (256, 0.0)):
        assert_rms_norm_parity(make(where, 6, columns, **options), backend, dropout=dropout, cast="gpt_oss")


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_weight(anywhere, backend):
    anywhere.require(backend)
    for columns, cast in ((96, "llama"), (63, "gpt_oss")):
        assert_rms_norm_parity(make(anywhere, 4, columns, dtype=torch.bfloat16, weight=False), backend, cast=cast)
    assert_rms_norm_parity(make(anywhere, 4, 96, dtype=torch.bfloat16, weight=False, residual=True), backend)


def heads_of_packed(where, D, dtype=torch.bfloat16):
    """(B, H, T, D) views of one projection: queries, and keys of fewer heads"""
    packed = torch.randn(2, 9, 6 * D).to(where.device, dtype)
    return [
        packed[..., : 4 * D].view(2, 9, 4, D).transpose(1, 2),
        packed[..., 4 * D :].view(2, 9, 2, D).transpose(1, 2),
    ]


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_packed_projections(where, backend, D):
    """Neither copied on the way in, nor left in another memory order."""
    where.require(backend)
    for heads in heads_of_packed(where, D):
        rows = as_row_groups(heads)
        assert rows.data_ptr() == heads.data_ptr()
        assert rows.shape == (18, heads.shape[1], D)
        weight = torch.randn(D).to(heads).requires_grad_()
        assert_rms_norm_parity({"x": heads.detach().requires_grad_(), "weight": weight}, backend)
        x = heads.detach().requires_grad_()
        y = gk.rms_norm(x, weight, backend=backend)
        assert y.stride() == heads.transpose(1, 2).contiguous().transpose(1, 2).stride()
        torch.testing.assert_close(y, gk.rms_norm(x.contiguous(), weight, backend=backend), rtol=0, atol=0)


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_strides(anywhere, backend):
    """Slices of wider rows, transposed and expanded batches, rows in groups of groups and columns apart (one copy)."""
    anywhere.require(backend)
    wide = torch.randn(4, 6, 200).to(anywhere.device, torch.bfloat16)
    views = [wide[..., 8:104], wide[..., 3:99], wide.transpose(0, 1)[..., :96], wide[:1, :1, :96].expand(4, 6, 96)]
    views += [wide[::2, :, :96], wide[:, 0, :192:2], wide.view(4, 2, 3, 200)[:, ::2, ::2, :96], wide[0, 0, :96]]
    weight = torch.randn(96).to(wide).requires_grad_()
    for x in views:
        assert_rms_norm_parity({"x": x.detach().requires_grad_(), "weight": weight}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradients(anywhere, backend):
    """y.sum() sends back a gradient with strides of 0; so does a mean over rows in one dimension only."""
    anywhere.require(backend)
    for cotangents in ([torch.ones(()).expand(5, 40)], [torch.randn(1, 40).expand(5, 40)]):
        assert_rms_norm_parity(make(anywhere, 5, 40), backend, cotangents=cotangents)
    both = [torch.ones(()).expand(5, 40), torch.randn(5, 1).expand(5, 40)]
    assert_rms_norm_parity(make(anywhere, 5, 40, residual=True), backend, cotangents=both)
    x = torch.randn(2, 3, 5, 64).to(anywhere.device).transpose(1, 2).requires_grad_()
    assert_rms_norm_parity({"x": x, "weight": None}, backend, cotangents=[torch.ones(()).expand(2, 5, 3, 64)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 0, 40, dtype=torch.float16, residual=True)
    for dropout in (0.0, 0.5):
        y, h = gk.add_rms_norm(**tensors, dropout=dropout, backend=backend)
        assert y.shape == h.shape == (0, 40)
        grads = torch.autograd.grad(y.sum() + h.sum(), tensors.values())
        assert [g.shape for g in grads] == [(0, 40), (0, 40), (40,)]
        assert all(bool((g == 0).all()) for g in grads)
    assert gk.rms_norm(torch.empty(2, 0, 3, 40, device=anywhere.device), None, backend=backend).shape == (2, 0, 3, 40)


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_output_used(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 4, 48, dtype=torch.bfloat16, residual=True, residual_dtype=torch.float32)
    for used in (0, 1):
        got = torch.autograd.grad(
            gk.add_rms_norm(**tensors, backend=backend)[used].float().sum(), tensors.values(), allow_unused=True
        )
        expected = torch.autograd.grad(
            reference.add_rms_norm(**tensors)[used].float().sum(), tensors.values(), allow_unused=True
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_float32(anywhere, backend):
    """Squares that float16 cannot hold, and a sum that bfloat16 would lose."""
    anywhere.require(backend)
    large = {"x": make(anywhere, 4, 300, dtype=torch.float16)["x"].detach().mul(2000).requires_grad_(), "weight": None}
    assert_rms_norm_parity(large, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_stay_in_their_rows(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 6, 70)
    clean = gk.rms_norm(**tensors, backend=backend)
    with torch.no_grad():
        tensors["x"][1, 3], tensors["x"][4, 69] = float("nan"), float("inf")
    dirty = gk.rms_norm(**tensors, backend=backend)
    truth = ordinary(**tensors)
    assert torch.equal(dirty.isnan(), truth.isnan())
    for row in (0, 2, 3, 5):
        assert torch.equal(dirty[row], clean[row])


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_offsets_beyond_32_bits(anywhere, backend):
    """Rows, and groups of rows, 2^30 elements apart: the last starts at element 2^31. Only their own pages are ever
    touched."""
    anywhere.require(backend)
    far = torch.empty(2**31 + 192, dtype=torch.bfloat16, device=anywhere.device)
    weight = torch.randn(64).to(far)
    for shape, strides in (((3, 64), (2**30, 1)), ((3, 2, 64), (2**30, 128, 1))):
        far_rows = far.as_strided(shape, strides)
        near_rows = torch.randn(shape).to(far)
        far_rows.copy_(near_rows)
        assert as_row_groups(far_rows).data_ptr() == far.data_ptr()
        results = []
        for rows in (far_rows, near_rows):
            x = rows.detach().requires_grad_()
            y = gk.rms_norm(x, weight, backend=backend)
            results.append((y, *torch.autograd.grad(y, x, rows)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_same_bits_every_time(where, backend):
    where.require(backend)
    tensors = make(where, 70, 96, dtype=torch.bfloat16, residual=True)
    cotangents = [torch.randn(70, 96).to(where.device, torch.bfloat16) for _ in range(2)]

    def gradients():
        outputs = gk.add_rms_norm(**tensors, backend=backend)
        return torch.autograd.grad(outputs, tensors.values(), cotangents)

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_asked(anywhere, backend):
    anywhere.require(backend)
    for wanted in ({"x"}, {"weight"}, {"residual"}, {"x", "weight"}):
        tensors = make(anywhere, 4, 64, residual=True)
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in wanted)
        assert_rms_norm_parity(tensors, backend)


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast(anywhere, backend):
    """bfloat16 activations, float32 residual stream and weight: what autocast hands a pre-norm block."""
    anywhere.require(backend)
    linear = torch.nn.Linear(64, 64, device=anywhere.device)
    residual, weight = torch.randn(5, 64, device=anywhere.device), torch.randn(64, device=anywhere.device)
    with torch.autocast(anywhere.device.type, torch.bfloat16):
        branch = linear(residual)
        y, h = gk.add_rms_norm(branch, residual, weight, backend=backend)
        assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
        expected_y, expected_h = reference.add_rms_norm(branch, residual, weight)
    torch.testing.assert_close(h, expected_h)
    torch.testing.assert_close(y, expected_y, atol=2e-2, rtol=2e-2)
    (y.float().sum() + h.sum()).backward()
    assert linear.weight.grad.dtype == torch.float32
