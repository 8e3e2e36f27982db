"""The MLP: every backend, activation and choice of what to keep, against the float64 reference."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from compile_gate import SHARED_LIMIT, assert_within_limits, compiled_launches
from parity import assert_parity

import gptkernels as gk
from gptkernels import simulator
from gptkernels.ops.mlp import eager, outputs, reference, triton_kernels
from gptkernels.ops.mlp.record import MlpCall

BACKENDS = ["eager", "fused", "pointwise"]
ACTIVATIONS = list(reference.ACTIVATIONS)


@pytest.fixture
def backend(request):
    """eager, or Triton with its choice between fused products and a pointwise pass made for it."""
    if request.param == "eager":
        yield "eager"
    else:
        widest = 10**9 if request.param == "fused" else 0
        with mock.patch.object(triton_kernels, "fused_up_to", return_value=widest):
            yield "triton"


def make(where, rows, d, hidden, dtype, *, bias=True, residual=False, out=None):
    def leaf(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(where.device, dtype).requires_grad_()

    out = out or d
    return {
        "x": leaf(rows, d),
        "fc_weight": leaf(hidden, d, scale=d**-0.5),
        "fc_bias": leaf(hidden) if bias else None,
        "proj_weight": leaf(out, hidden, scale=hidden**-0.5),
        "proj_bias": leaf(out) if bias else None,
        "residual": leaf(rows, out) if residual else None,
    }


def assert_mlp_parity(tensors, backend, activation="gelu_tanh", save="preact"):
    return assert_parity(
        gk.mlp,
        reference.mlp,
        tensors,
        kwargs={"activation": activation, "save": save, "backend": backend},
        reference_kwargs={"activation": activation},
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_torch(activation):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(reference.ACTIVATIONS[activation](x), eager.FORWARD[activation](x))
    tensors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(3, 5), (7, 5), (7,), (4, 7), (4,)]
    ]
    assert torch.autograd.gradcheck(lambda *args: reference.mlp(*args, activation=activation), tensors)


@pytest.mark.parametrize("save", ["all", "preact", "input"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_activations_and_what_is_kept(anywhere, backend, activation, save):
    anywhere.require(backend)
    assert_mlp_parity(make(anywhere, 33, 64, 256, torch.bfloat16), backend, activation, save)


def sixteen_bits(where):
    """In the simulator one type on each architecture."""
    return {80: [torch.float16], 90: [torch.bfloat16]}.get(where.arch, [torch.float16, torch.bfloat16])


@pytest.mark.parametrize(
    ("rows", "d", "hidden", "out"), [(1, 64, 256, 64), (65, 72, 200, 72), (300, 64, 320, 64), (40, 96, 384, 48)]
)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_sizes(where, backend, rows, d, hidden, out):
    where.require(backend)
    for dtype in (torch.float32, *sixteen_bits(where)):
        assert_mlp_parity(make(where, rows, d, hidden, dtype, out=out), backend)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_sizes_that_tma_cannot_address(anywhere, backend):
    anywhere.require(backend)
    assert_mlp_parity(make(anywhere, 37, 70, 130, torch.bfloat16), backend)
    assert_mlp_parity(make(anywhere, 37, 33, 51, torch.float32), backend)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_bias_and_residual(anywhere, backend, bias, residual):
    anywhere.require(backend)
    for save in ("preact", "input"):
        tensors = make(anywhere, 50, 64, 128, torch.float16, bias=bias, residual=residual)
        assert_mlp_parity(tensors, backend, save=save)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_many_tiles(anywhere, backend):
    """More tiles than programs, in two dimensions, none of them whole."""
    anywhere.require(backend)
    assert_mlp_parity(make(anywhere, 397, 64, 712, torch.bfloat16), backend, "silu", "all")


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_gradients_only_where_asked(anywhere, backend):
    anywhere.require(backend)
    for wanted in (
        {"x"},
        {"fc_weight"},
        {"fc_bias"},
        {"proj_weight"},
        {"proj_bias"},
        {"residual"},
        {"x", "proj_weight"},
    ):
        tensors = make(anywhere, 40, 64, 128, torch.float32, residual=True)
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in wanted)
        for save in ("all", "preact", "input"):
            assert_mlp_parity(tensors, backend, save=save)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strides(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 30, 64, 128, torch.bfloat16)
    wide = torch.randn(30, 100).to(tensors["x"])
    for x in (
        wide[:, 8:72],
        wide[:, 3:67],
        wide[:1, :64].expand(30, 64),
        wide[:64].t()[:30, :30].expand(30, 30)[:, :1],
    ):
        if x.shape[1] == 64:
            assert_mlp_parity({**tensors, "x": x.detach().requires_grad_()}, backend)
    batched = torch.randn(2, 5, 64).to(tensors["x"]).requires_grad_()
    assert_mlp_parity({**tensors, "x": batched, "residual": None}, backend)
    transposed = tensors["fc_weight"].detach().t().contiguous().t().requires_grad_()
    assert_mlp_parity({**tensors, "fc_weight": transposed}, backend)


def transposed(tensors: dict, *names: str) -> dict:
    """With those weights as views of matrices (in, out)"""
    return tensors | {name: tensors[name].detach().t().contiguous().t().requires_grad_() for name in names}


@pytest.mark.parametrize("copies_from", [0, 10**9])
@pytest.mark.parametrize("names", [("fc_weight",), ("proj_weight",), ("fc_weight", "proj_weight")])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_transposed_weights(anywhere, backend, names, copies_from):
    """Right in every layout, gradients in the weights' own; few rows take the weights as they are."""
    anywhere.require(backend)
    for dtype in (torch.bfloat16, torch.float32):
        tensors = transposed(make(anywhere, 40, 64, 128, dtype, residual=True), *names)
        with mock.patch.object(outputs, "COPIES_FROM_ROWS", copies_from):
            for save in ("all", "preact", "input"):
                assert_mlp_parity(tensors, backend, save=save)
            out = gk.mlp(**tensors, backend=backend)
        if (backend, anywhere.device.type) != ("eager", "cpu"):  # whose are PyTorch's own ops
            saved = {tensor.data_ptr() for tensor in out.grad_fn.saved_tensors if tensor is not None}
            assert {tensors["fc_weight"].data_ptr(), tensors["proj_weight"].data_ptr()} <= saved
        grads = torch.autograd.grad(out.square().sum(), tensors.values())
        for grad, tensor in zip(grads, tensors.values(), strict=True):
            assert grad.stride() == tensor.stride()
    kernels = eager if backend == "eager" else triton_kernels
    arguments = tuple(t.detach() for t in tensors.values())
    call = MlpCall(*arguments, "gelu", "all")
    torch.library.opcheck(kernels.mlp_fwd.torch_op, call.flat())
    out, preact, act = kernels.mlp_fwd(call)
    backward = (*call.flat(), torch.ones_like(out), preact, act, [True] * 5)
    torch.library.opcheck(kernels.mlp_bwd.torch_op, (*backward, None, None))
    sums = torch.zeros(call.fc_weight.shape), torch.zeros(call.proj_weight.shape)
    torch.library.opcheck(kernels.mlp_bwd.torch_op, (*backward, *sums))


@pytest.mark.parametrize(("copies_from", "detail"), [(0, "fused epilogues"), (41, "cuBLAS and a fused pointwise pass")])
def test_few_rows_are_not_worth_a_copy(anywhere, copies_from, detail):
    anywhere.require("triton")
    tensors = transposed(make(anywhere, 40, 64, 128, torch.bfloat16), "fc_weight", "proj_weight")
    with mock.patch.object(outputs, "COPIES_FROM_ROWS", copies_from):
        assert gk.explain(gk.mlp, **tensors, backend="triton").detail == detail


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_no_rows(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 0, 64, 128, torch.float16, residual=True)
    out = gk.mlp(**tensors, backend=backend)
    assert out.shape == (0, 64)
    out.sum().backward()
    assert all(bool((t.grad == 0).all()) for t in tensors.values())


@pytest.mark.parametrize(("save", "per_row"), [("all", 18), ("preact", 10), ("input", 2)])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_bytes_kept(anywhere, backend, save, per_row):
    """18, 10 or 2 bytes of activations for each of M x d, at a hidden layer of 4 d in 16 bits."""
    anywhere.require(backend)
    if (backend, save, anywhere.device.type) == ("eager", "preact", "cpu"):
        per_row = 18
    rows, d = 40, 64
    tensors = make(anywhere, rows, d, 4 * d, torch.bfloat16)
    parameters = {tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None and name != "x"}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gk.mlp(**tensors, save=save, backend=backend)
    assert sum(kept.values()) == per_row * rows * d


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_autocast(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 20, 64, 128, torch.float32)
    with torch.autocast(anywhere.device.type, torch.bfloat16):
        out = gk.mlp(**tensors, backend=backend)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {t.grad.dtype for t in tensors.values() if t is not None} == {torch.float32}


def test_float32_follows_the_matmul_precision(anywhere):
    anywhere.require("triton")
    tensors = make(anywhere, 40, 64, 128, torch.float32)
    exact = gk.mlp(**tensors, backend="triton")
    try:
        torch.set_float32_matmul_precision("high")
        with mock.patch.object(triton_kernels, "fused_up_to", return_value=10**9):
            rounded = gk.mlp(**tensors, backend="triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    if anywhere.kind != "interpreter":
        assert 1e-5 < (exact - rounded).abs().max() < 1e-2


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_compile_and_opcheck(anywhere, backend):
    anywhere.require(backend)
    torch._dynamo.reset()
    tensors = make(anywhere, 12, 64, 128, torch.float32, residual=True)

    def block(**arguments):
        return gk.mlp(**arguments, backend=backend).sin()

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out = function(**tensors)
        results.append((out, *torch.autograd.grad(out.sum(), tensors.values())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    kernels = eager if backend == "eager" else triton_kernels
    arguments = tuple(None if t is None else t.detach() for t in tensors.values())
    torch.library.opcheck(kernels.mlp_fwd.torch_op, (*arguments, "gelu", "all"))


def test_double_backward_is_an_error():
    tensors = make(type("Cpu", (), {"device": "cpu"}), 4, 64, 128, torch.float32)
    (grad,) = torch.autograd.grad(gk.mlp(**tensors, save="input").sum(), tensors["x"], create_graph=True)
    with pytest.raises(gk.UnsupportedError, match="mlp: double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("widest", [0, 10**9])
def test_the_chosen_kernels_really_run(anywhere, widest):
    anywhere.require("triton")
    tensors = make(anywhere, 20, 64, 128, torch.bfloat16)
    with mock.patch.object(triton_kernels, "fused_up_to", return_value=widest):
        choice = gk.explain(gk.mlp, **tensors, backend="triton")
        assert choice.backend == "triton"
        assert choice.detail == ("fused epilogues" if widest else "cuBLAS and a fused pointwise pass")
        assert choice.detail in str(choice)
        if anywhere.kind != "simulator":
            return
        with compiled_launches(anywhere.arch) as launches:
            gk.mlp(**tensors, backend="triton").sum().backward()
    expected = (
        ["mlp_fwd_kernel"] * 2 + ["mlp_bwd_kernel"] if widest else ["activation_fwd_kernel", "activation_bwd_kernel"]
    )
    assert [launch.kernel for launch in launches] == expected


def launches_on(arch, variant, widest):
    dtype, rows, activation = variant
    tensors = make(SimpleNamespace(device=torch.device("cpu")), rows, 256, 1024, dtype, residual=True)
    with mock.patch.object(triton_kernels, "fused_up_to", return_value=widest), compiled_launches(arch) as launches:
        gk.mlp(**tensors, activation=activation, backend="triton").sum().backward()
    return launches


LAUNCHED = [
    (torch.bfloat16, 1024, "gelu_tanh"),
    (torch.bfloat16, 1024, "gelu"),
    (torch.float16, 64, "silu"),
    (torch.float32, 64, "relu2"),
]


@pytest.mark.skipif(bool(simulator.unavailable()), reason=str(simulator.unavailable()))
@pytest.mark.parametrize("widest", [0, 10**9])
@pytest.mark.parametrize("variant", LAUNCHED, ids=str)
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_launches_compile(arch, variant, widest):
    dtype, rows, _ = variant
    if arch == 89 and not (widest and rows == 1024):
        # The same programs as for 8.0, compiled there, if only they fit.
        assert all(compiled.shared <= SHARED_LIMIT[89] for compiled in launches_on(80, variant, widest))
        return
    for compiled in launches_on(arch, variant, widest):
        assert_within_limits(compiled)
        if arch == 90 and compiled.kernel.startswith("mlp") and dtype != torch.float32:
            assert compiled.machine_code.count("HGMMA") > 0
            assert compiled.machine_code.count("UTMALDG") > 0


X, W1, B1, W2, B2 = (torch.randn(s) for s in [(4, 32), (48, 32), (48,), (16, 48), (16,)])
BAD = [
    ({"x": None}, TypeError, "x must be a tensor"),
    ({"x": X.double()}, TypeError, "x must be float16, bfloat16, float32, not float64"),
    ({"x": X.int()}, TypeError, "x must be .* not int32"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must have a last dimension"),
    ({"x": X[:, :0]}, ValueError, "x must have a last dimension"),
    ({"x": X.half()}, TypeError, "fc_weight must be float16, not float32"),
    ({"x": X[:, :31]}, ValueError, r"fc_weight must have shape \(48, 31\)"),
    ({"fc_weight": None}, TypeError, "fc_weight must be a tensor"),
    ({"fc_weight": W1.half()}, TypeError, "fc_weight must be float32, not float16"),
    ({"fc_weight": W1[0]}, ValueError, "fc_weight must have 2 dimensions"),
    ({"fc_weight": W1.t().contiguous()}, ValueError, r"fc_weight must have shape \(32, 32\) .* not \(32, 48\)"),
    ({"fc_weight": W1[:0]}, ValueError, "fc_weight must not be empty"),
    ({"fc_weight": W1.to("meta")}, ValueError, "fc_weight must be on cpu"),
    ({"fc_bias": 0.0}, TypeError, "fc_bias must be a tensor, not float"),
    ({"fc_bias": B1.half()}, TypeError, "fc_bias must be float32"),
    ({"fc_bias": B2}, ValueError, r"fc_bias must have shape \(48,\) .* not \(16,\)"),
    ({"fc_bias": B1[None]}, ValueError, r"fc_bias must have shape \(48,\)"),
    ({"fc_bias": B1.to("meta")}, ValueError, "fc_bias must be on cpu"),
    ({"proj_weight": None}, TypeError, "proj_weight must be a tensor"),
    ({"proj_weight": W2.bfloat16()}, TypeError, "proj_weight must be float32, not bfloat16"),
    ({"proj_weight": W2.t().contiguous()}, ValueError, r"proj_weight must have shape \(48, 48\)"),
    ({"proj_weight": W2[0]}, ValueError, "proj_weight must have 2 dimensions"),
    ({"proj_weight": W2[:0]}, ValueError, "proj_weight must not be empty"),
    ({"proj_weight": W2.to("meta")}, ValueError, "proj_weight must be on cpu"),
    ({"proj_bias": B1}, ValueError, r"proj_bias must have shape \(16,\)"),
    ({"proj_bias": B2.half()}, TypeError, "proj_bias must be float32"),
    ({"proj_bias": [0.0] * 16}, TypeError, "proj_bias must be a tensor, not list"),
    ({"residual": X}, ValueError, r"residual must have shape \(4, 16\) .* not \(4, 32\)"),
    ({"residual": X[:, :16].half()}, TypeError, "residual must be float32, not float16"),
    ({"residual": 1}, TypeError, "residual must be a tensor, not int"),
    ({"residual": X[:3, :16]}, ValueError, r"residual must have shape \(4, 16\)"),
    ({"residual": X[:, :16].to("meta")}, ValueError, "residual must be on cpu"),
    ({"activation": "swish"}, ValueError, "activation must be one of gelu_tanh, gelu, relu, relu2, silu, not 'swish'"),
    ({"activation": None}, ValueError, "activation must be one of"),
    ({"activation": torch.relu}, ValueError, "activation must be one of"),
    ({"save": "none"}, ValueError, "save must be one of all, preact, input, not 'none'"),
    ({"save": True}, ValueError, "save must be one of"),
    ({"save": ["all"]}, ValueError, "save must be one of"),
    ({"backend": "cublas"}, ValueError, "backend must be one of"),
    ({"backend": "triton"}, gk.UnsupportedError, "triton: runs on CUDA tensors, not cpu"),
    ({"backend": "cuda"}, gk.UnsupportedError, "cuda: "),
]


@pytest.mark.parametrize(("changes", "exception", "words"), BAD, ids=range(len(BAD)))
def test_error_names_the_argument(changes, exception, words):
    good = {"x": X, "fc_weight": W1, "fc_bias": B1, "proj_weight": W2, "proj_bias": B2}
    gk.mlp(**good)
    with pytest.raises(exception, match=words):
        gk.mlp(**{**good, **changes})
