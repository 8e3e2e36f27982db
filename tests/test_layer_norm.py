"""LayerNorm and add + LayerNorm: every backend against the float64 reference, in every place where kernels run."""

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity

import gptkernels as gk
from gptkernels.ops.dropout import draw_seed, keep_mask
from gptkernels.ops.layer_norm import reference

BACKENDS = ["eager", "triton", "cuda"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(
    where, rows, columns, dtype, *, residual=False, residual_dtype=None, parameter_dtype=None, bias=True, offset=0.0
):
    """Inputs of layer_norm or add_layer_norm as leaves on where's device."""

    def leaf(*shape, dtype):
        return torch.randn(*shape).add(offset).to(where.device, dtype).requires_grad_()

    tensors = {"x": leaf(rows, columns, dtype=dtype)}
    if residual:
        tensors["residual"] = leaf(rows, columns, dtype=residual_dtype or dtype)
    tensors["weight"] = leaf(columns, dtype=parameter_dtype or dtype)
    if bias:
        tensors["bias"] = leaf(columns, dtype=parameter_dtype or dtype)
    return tensors


def ordinary(x, residual=None, weight=None, bias=None, *, eps=1e-5, dropout=0.0, seed=None):
    """The same with torch.nn.functional."""
    if dropout:
        x_kept = x * keep_mask(seed, *x.shape, dropout) / (1 - dropout)
    else:
        x_kept = x
    h = x if residual is None else x_kept + residual
    bias = None if bias is None else bias.to(h.dtype)
    y = F.layer_norm(h, x.shape[-1:], weight.to(h.dtype), bias, eps).to(x.dtype)
    return y if residual is None else (y, h)


def assert_layer_norm_parity(tensors, backend, *, dropout=0.0, eps=1e-5, cotangents=None):
    if "residual" not in tensors:
        return assert_parity(
            gk.layer_norm,
            reference.layer_norm,
            tensors,
            kwargs={"backend": backend, "eps": eps},
            reference_kwargs={"eps": eps},
            ordinary=ordinary,
            cotangents=cotangents,
        )
    torch.manual_seed(7)
    seed = draw_seed(tensors["x"].device).cpu()

    def op(**arguments):
        torch.manual_seed(7)
        return gk.add_layer_norm(**arguments, eps=eps, dropout=dropout, backend=backend)

    return assert_parity(
        op,
        reference.add_layer_norm,
        tensors,
        reference_kwargs={"eps": eps, "dropout": dropout, "seed": seed},
        ordinary=ordinary,
        cotangents=cotangents,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 17), (2, 3, 64)])
def test_reference_is_torch_layer_norm(shape, bias):
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(shape[-1:], dtype=torch.float64)
    shift = torch.randn(shape[-1:], dtype=torch.float64) if bias else None
    torch.testing.assert_close(
        reference.layer_norm(x, weight, shift, eps=1e-3), F.layer_norm(x, shape[-1:], weight, shift, eps=1e-3)
    )


def test_reference_gradients_are_finite_differences():
    x, residual = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    seed = torch.tensor([123])
    assert torch.autograd.gradcheck(
        lambda *args: reference.add_layer_norm(*args, dropout=0.4, seed=seed), (x, residual, weight, bias)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 63, 64, 111, 256, 768, 1600])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_norm(where, backend, columns, dtype):
    where.require(backend)
    if backend == "eager" and columns == 1:
        dtype = torch.float32  # PyTorch's float32 gradient of a row of one is rounding noise, not 0; that is eager's
    assert_layer_norm_parity(make(where, 5, columns, dtype), backend)


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("columns", [2048, 4099, 8192, 12288, 16384, 20000, 65535, 65536])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_rows(anywhere, backend, columns):
    anywhere.require(backend)
    assert_layer_norm_parity(make(anywhere, 3, columns, torch.bfloat16, residual=True), backend)
    assert_layer_norm_parity(make(anywhere, 2, columns, torch.float32), backend)


@pytest.mark.parametrize("rows", [1, 2, 33, 100])
@pytest.mark.parametrize("columns", [24, 160])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_programs(where, backend, rows, columns):
    where.require(backend)
    assert_layer_norm_parity(make(where, rows, columns, torch.float16, residual=True), backend)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.9])
@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "parameter_dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_add_layer_norm(where, backend, dtype, residual_dtype, parameter_dtype, dropout):
    where.require(backend)
    options = {"residual": True, "residual_dtype": residual_dtype, "parameter_dtype": parameter_dtype}
    # Whole vectors are loaded alike on every architecture; test_layer_norm does it on each.
    for columns in (63,) if where.arch == 80 else (63, 256):
        assert_layer_norm_parity(make(where, 6, columns, dtype, **options), backend, dropout=dropout)


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias(where, backend):
    where.require(backend)
    assert_layer_norm_parity(make(where, 4, 96, torch.bfloat16, bias=False), backend)
    assert_layer_norm_parity(make(where, 4, 96, torch.bfloat16, bias=False, residual=True), backend)


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_strides(where, backend):
    """A slice of wider rows, rows in another order, one row expanded to many, a transposed batch (one copy)."""
    where.require(backend)
    wide = torch.randn(4, 6, 200).to(where.device, torch.bfloat16)
    views = [wide[..., 8:104], wide[..., 3:99], wide.transpose(0, 1)[..., :96], wide[:1, :1, :96].expand(4, 6, 96)]
    views += [wide[::2, :, :96], wide[:, 0, :192:2]]
    parameters = make(where, 1, 96, torch.bfloat16)
    for x in views:
        assert_layer_norm_parity({**parameters, "x": x.detach().requires_grad_()}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradients(where, backend):
    """y.sum() sends back a gradient with strides of 0; so does a mean over rows in one dimension only."""
    where.require(backend)
    for cotangents in ([torch.ones(()).expand(5, 40)], [torch.randn(1, 40).expand(5, 40)]):
        assert_layer_norm_parity(make(where, 5, 40, torch.float32), backend, cotangents=cotangents)
    both = [torch.ones(()).expand(5, 40), torch.randn(5, 1).expand(5, 40)]
    assert_layer_norm_parity(make(where, 5, 40, torch.float16, residual=True), backend, cotangents=both)


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_output_used(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 4, 48, torch.bfloat16, residual=True, residual_dtype=torch.float32)
    for used in (0, 1):
        got = torch.autograd.grad(
            gk.add_layer_norm(**tensors, backend=backend)[used].float().sum(), tensors.values(), allow_unused=True
        )
        expected = torch.autograd.grad(
            reference.add_layer_norm(**tensors)[used].float().sum(), tensors.values(), allow_unused=True
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 0, 40, torch.float16, residual=True)
    for dropout in (0.0, 0.5):
        y, h = gk.add_layer_norm(**tensors, dropout=dropout, backend=backend)
        assert y.shape == h.shape == (0, 40)
        grads = torch.autograd.grad(y.sum() + h.sum(), tensors.values())
        assert [g.shape for g in grads] == [(0, 40), (0, 40), (40,), (40,)]
        assert all(bool((g == 0).all()) for g in grads)


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_centred_float32(anywhere, backend):
    """With a mean far from zero, E[x^2] - E[x]^2 in float32, or any statistic in half precision, would be far off."""
    anywhere.require(backend)
    assert_layer_norm_parity(make(anywhere, 4, 300, torch.float32, offset=3000.0), backend)
    assert_layer_norm_parity(make(anywhere, 4, 300, torch.bfloat16, offset=50.0), backend)
    assert_layer_norm_parity(make(anywhere, 4, 300, torch.float16, residual=True, offset=100.0), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_stay_in_their_rows(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 6, 70, torch.float32)
    clean = gk.layer_norm(**tensors, backend=backend)
    with torch.no_grad():
        tensors["x"][1, 3], tensors["x"][4, 69] = float("nan"), float("inf")
    dirty = gk.layer_norm(**tensors, backend=backend)
    for row in range(6):
        assert bool(dirty[row].isnan().all()) if row in (1, 4) else torch.equal(dirty[row], clean[row])


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_offsets_beyond_32_bits(anywhere, backend):
    """Three rows 2^30 elements apart: the last starts at element 2^31. Only their own pages are ever touched."""
    anywhere.require(backend)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=anywhere.device)
    far_rows = far.as_strided((3, 64), (2**30, 1))
    near_rows = torch.randn(3, 64).to(far_rows)
    far_rows.copy_(near_rows)
    weight, bias = torch.randn(2, 64).to(far_rows)
    assert torch.equal(
        gk.layer_norm(far_rows, weight, bias, backend=backend), gk.layer_norm(near_rows, weight, bias, backend=backend)
    )
    x = near_rows.clone().requires_grad_()
    for tensor in (far_rows, near_rows):
        (grad,) = torch.autograd.grad(gk.layer_norm(x, weight, bias, backend=backend), x, tensor)
        if tensor is far_rows:
            far_grad = grad
    assert torch.equal(far_grad, grad)


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_same_bits_every_time(where, backend):
    where.require(backend)
    tensors = make(where, 70, 96, torch.bfloat16, residual=True)
    cotangents = [torch.randn(70, 96).to(where.device, torch.bfloat16) for _ in range(2)]

    def gradients():
        outputs = gk.add_layer_norm(**tensors, backend=backend)
        return torch.autograd.grad(outputs, tensors.values(), cotangents)

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_asked(anywhere, backend):
    anywhere.require(backend)
    for wanted in ({"x"}, {"weight"}, {"bias"}, {"residual"}, {"x", "bias"}):
        tensors = make(anywhere, 4, 64, torch.float32, residual=True)
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in wanted)
        assert_layer_norm_parity(tensors, backend)


def test_dropout_keeps_what_the_rule_says(where):
    """The mask is the same in every backend, of the stated density, and another one for another seed."""
    x, residual = torch.ones(40, 130, device=where.device), torch.zeros(40, 130, device=where.device)
    weight = torch.ones(130, device=where.device)
    masks = {}
    for backend in BACKENDS:
        if backend == "cuda" and where.kind == "interpreter":
            continue
        where.require(backend)
        torch.manual_seed(3)
        masks[backend] = gk.add_layer_norm(x, residual, weight, dropout=0.25, backend=backend)[1] > 0
    torch.manual_seed(3)
    expected = keep_mask(draw_seed(x.device), 40, 130, 0.25)
    for mask in masks.values():
        assert torch.equal(mask, expected)
    assert abs(expected.float().mean().item() - 0.75) < 0.02
    assert not torch.equal(expected, keep_mask(draw_seed(x.device), 40, 130, 0.25))


def test_philox_known_answers():
    """Philox4x32-10 of zeros and of ones (the test vectors published with Random123), through the rule's threshold."""
    first_word = {(0, 0): 0x6627E8D5}
    for (seed, column), word in first_word.items():
        kept_just = keep_mask(torch.tensor([seed]), 1, column + 1, word / 2**32)[0, column]
        dropped_just = keep_mask(torch.tensor([seed]), 1, column + 1, (word + 1) / 2**32)[0, column]
        assert bool(kept_just)
        assert not bool(dropped_just)


@pytest.mark.not_in_interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast(anywhere, backend):
    """bfloat16 activations, float32 residual stream and parameters: what autocast hands a pre-norm block."""
    anywhere.require(backend)
    linear = torch.nn.Linear(64, 64, device=anywhere.device)
    residual = torch.randn(5, 64, device=anywhere.device)
    weight, bias = torch.randn(2, 64, device=anywhere.device)
    with torch.autocast(anywhere.device.type, torch.bfloat16):
        branch = linear(residual)
        y, h = gk.add_layer_norm(branch, residual, weight, bias, backend=backend)
        assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
        expected_y, expected_h = reference.add_layer_norm(branch, residual, weight, bias)
    torch.testing.assert_close(h, expected_h)
    torch.testing.assert_close(y, expected_y, atol=2e-2, rtol=2e-2)
    (y.float().sum() + h.sum()).backward()
    assert linear.weight.grad.dtype == torch.float32
