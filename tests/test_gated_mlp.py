"""The gated MLP: every backend, activation and choice of what to keep, against the float64 reference."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from compile_gate import assert_within_limits, compiled_launches
from parity import assert_parity
from test_mlp import sixteen_bits

import gptkernels as gk
from gptkernels import simulator
from gptkernels.ops.gated_mlp import eager, reference, triton_kernels
from gptkernels.ops.gated_mlp.record import GatedMlpCall
from gptkernels.ops.mlp import accumulate_gradient, triton_gemm
from gptkernels.ops.mlp import triton_kernels as mlp_triton
from gptkernels.parity import ParityError
from gptkernels.remembered import forget

BACKENDS = ["eager", "fused", "pointwise"]
ACTIVATIONS = list(reference.ACTIVATIONS)
KERNELS = {"eager": eager, "triton": triton_kernels}
DTYPE = {"cuda": torch.bfloat16}


@pytest.fixture
def backend(request):
    """eager, or Triton with its choice between fused products and a pointwise pass made for it."""
    if request.param == "eager":
        yield "eager"
    else:
        widest = 10**9 if request.param == "fused" else 0
        with mock.patch.object(mlp_triton, "fused_up_to", return_value=widest):
            yield "triton"


def make(where, rows, d, hidden, dtype, *, bias=True, residual=False, out=None, packed=None):
    """packed: gate and up as the "halves" of one matrix or as its "pairs" of rows"""

    def leaf(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(where.device, dtype).requires_grad_()

    out = out or d
    if packed:
        both = torch.randn(2 * hidden, d).mul_(d**-0.5).to(where.device, dtype)
        gate, up = both.chunk(2) if packed == "halves" else (both[::2], both[1::2])
        gate, up = gate.requires_grad_(), up.requires_grad_()
    else:
        gate, up = leaf(hidden, d, scale=d**-0.5), leaf(hidden, d, scale=d**-0.5)
    return {
        "x": leaf(rows, d),
        "gate_weight": gate,
        "up_weight": up,
        "down_weight": leaf(out, hidden, scale=hidden**-0.5),
        "gate_bias": leaf(hidden) if bias else None,
        "up_bias": leaf(hidden) if bias else None,
        "down_bias": leaf(out) if bias else None,
        "residual": leaf(rows, out) if residual else None,
    }


def across_the_limits(tensors):
    """gpt-oss's gates and ups are then multiples of 1/4 but not of 1/2, which no rounding moves across a limit."""
    for name, values in (("x", (-1, 0, 1)), ("gate_weight", (-1, -0.5, 0.5, 1)), ("up_weight", (-1, -0.5, 0.5, 1))):
        tensor = tensors[name]
        chosen = torch.tensor(values)[torch.randint(len(values), tensor.shape)]
        tensors[name] = chosen.to(tensor.device, tensor.dtype).requires_grad_()
    for name in ("gate_bias", "up_bias"):
        tensors[name] = torch.full_like(tensors[name], 0.25).requires_grad_()
    return tensors


def assert_gated_parity(tensors, backend, activation="silu", save="preact"):
    return assert_parity(
        gk.gated_mlp,
        reference.gated_mlp,
        tensors,
        kwargs={"activation": activation, "save": save, "backend": backend},
        reference_kwargs={"activation": activation},
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_right(activation):
    """By finite differences, with gates and ups on both sides of gpt-oss's limits; and as its own model says it."""
    sizes = {"x": (3, 5), "gate_weight": (7, 5), "up_weight": (7, 5), "down_weight": (4, 7)}
    sizes |= {"gate_bias": (7,), "up_bias": (7,), "down_bias": (4,), "residual": (3, 4)}
    tensors = [4 * torch.randn(size, dtype=torch.float64).requires_grad_() for size in sizes.values()]

    def op(*values):
        return reference.gated_mlp(**dict(zip(sizes, values, strict=True)), activation=activation)

    assert torch.autograd.gradcheck(op, [t.detach().requires_grad_() for t in tensors])
    gate, up = torch.randn(2, 50, dtype=torch.float64) * 6
    grads = [torch.randn(50, dtype=torch.float64)]
    gate, up = gate.requires_grad_(), up.requires_grad_()
    out = reference.ACTIVATIONS[activation](gate, up)
    torch.testing.assert_close(out, eager.gated(activation, gate.detach(), up.detach()))
    found = eager.gated_grads(activation, grads[0].clone(), gate.detach(), up.detach())
    for a, b in zip(found, torch.autograd.grad(out, (gate, up), grads[0]), strict=True):
        torch.testing.assert_close(a, b)


def test_gpt_oss_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    experts = modeling.GptOssExperts.__new__(modeling.GptOssExperts)
    torch.nn.Module.__init__(experts)
    experts.limit, experts.alpha = 7.0, 1.702
    both = torch.randn(9, 2 * 40, dtype=torch.float64) * 6
    expected = experts._apply_gate(both)
    torch.testing.assert_close(reference.gpt_oss(both[:, ::2], both[:, 1::2]), expected)


KEPT = [(activation, "preact") for activation in ACTIVATIONS]
KEPT += [(activation, save) for activation in ("silu", "gpt_oss") for save in ("all", "input")]


@pytest.mark.parametrize(("activation", "save"), KEPT)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_activations_and_what_is_kept(anywhere, backend, activation, save):
    anywhere.require(backend)
    tensors = make(anywhere, 70, 64, 136, torch.bfloat16)
    tensors = across_the_limits(tensors) if activation == "gpt_oss" else tensors
    assert_gated_parity(tensors, backend, activation, save)


@pytest.mark.parametrize(("rows", "d", "hidden", "out"), [(65, 72, 200, 72), (150, 64, 264, 48)])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_sizes(where, backend, rows, d, hidden, out):
    where.require(backend)
    for dtype in sixteen_bits(where):
        assert_gated_parity(make(where, rows, d, hidden, dtype, out=out), backend)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_odd_sizes(anywhere, backend):
    """Which TMA cannot address; and of one, where the error allowed for 16 bits is of a few numbers."""
    anywhere.require(backend)
    assert_gated_parity(make(anywhere, 37, 63, 111, torch.bfloat16, out=57), backend)
    for rows, d, hidden, out in ((1, 1, 64, 63), (33, 111, 1, 1)):
        assert_gated_parity(make(anywhere, rows, d, hidden, torch.float32, out=out), backend)


@pytest.mark.parametrize("packed", ["halves", "pairs"])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_packed_weights(anywhere, backend, packed):
    """Not copied: what is kept for backward is the matrix itself, whose gradient is right."""
    anywhere.require(backend)
    tensors = make(anywhere, 40, 64, 96, torch.bfloat16, bias=False, residual=True, packed=packed)
    assert_gated_parity(tensors, backend, save="input")
    both = torch.randn(192, 64).mul_(0.125).to(anywhere.device, torch.bfloat16).requires_grad_()
    rest = {"x": tensors["x"].detach(), "down_weight": tensors["down_weight"].detach()}

    def taken_apart(weight):
        if packed == "halves":
            return {"gate_weight": weight[:96], "up_weight": weight[96:]}
        return {"gate_weight": weight[::2], "up_weight": weight[1::2]}

    out = gk.gated_mlp(**rest, **taken_apart(both), save="input", backend=backend)
    storages = {t.untyped_storage().data_ptr() for t in out.grad_fn.saved_tensors if t is not None}
    assert both.untyped_storage().data_ptr() in storages
    assert len(storages) == 3  # x and the two weights
    out.float().sum().backward()
    exact = both.detach().double().requires_grad_()
    reference.gated_mlp(**{n: t.double() for n, t in rest.items()}, **taken_apart(exact)).sum().backward()
    assert both.grad.shape == both.shape
    torch.testing.assert_close(both.grad.double(), exact.grad, rtol=0.02, atol=0.02 * exact.grad.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strides(anywhere, backend):
    """Any rows of x, weights in any layout, gradients of any strides, more than two dimensions."""
    anywhere.require(backend)
    tensors = make(anywhere, 30, 64, 128, torch.bfloat16, residual=True)
    wide = torch.randn(30, 104).to(tensors["x"])
    for x in (wide[:, 8:72], wide[:, 3:67], wide[:1, :64].expand(30, 64)):
        assert_gated_parity({**tensors, "x": x.detach().requires_grad_()}, backend)
    transposed = {
        name: tensors[name].detach().t().contiguous().t().requires_grad_() for name in ("up_weight", "down_weight")
    }
    residual = wide[:, 40:].detach().requires_grad_()
    assert_gated_parity({**tensors, **transposed, "residual": residual}, backend)
    batched = {name: torch.randn(2, 5, 64).to(tensors["x"]).requires_grad_() for name in ("x", "residual")}
    assert_gated_parity({**tensors, **batched}, backend)
    out = gk.gated_mlp(**tensors, backend=backend)
    leaves = tuple(tensors.values())
    for dout in (torch.ones_like(out[:1, :1]).expand_as(out), torch.ones(30, 67).to(out)[:, 3:]):
        grads = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        again = torch.autograd.grad(out, leaves, dout.clone(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_gradients_only_where_asked(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 10, 32, 64, torch.float32, residual=True)
    for wanted in ({"x", "down_weight"}, *({name} for name in tensors)):
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in wanted)
        for save in ("all", "preact", "input"):
            assert_gated_parity(tensors, backend, save=save)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_no_rows(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 0, 64, 128, torch.float16, residual=True)
    out = gk.gated_mlp(**tensors, backend=backend)
    assert out.shape == (0, 64)
    out.sum().backward()
    assert all(bool((t.grad == 0).all()) for t in tensors.values())


@pytest.mark.parametrize(("save", "per_row"), [("all", 6), ("preact", 4), ("input", 0)])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_bytes_kept(anywhere, backend, save, per_row):
    """6, 4 or 0 bytes of 16-bit activations for each of M x hidden, beside x; 8 where they are PyTorch's own ops."""
    anywhere.require(backend)
    if (backend, anywhere.device.type) == ("eager", "cpu") and save != "input":
        per_row = 8
    tensors = make(anywhere, 40, 64, 192, torch.bfloat16)
    known = {tensor.data_ptr() for tensor in tensors.values() if tensor is not None}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gk.gated_mlp(**tensors, save=save, backend=backend)
    assert sum(kept.values()) == per_row * 40 * 192


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_autocast(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 20, 64, 128, torch.float32)
    with torch.autocast(anywhere.device.type, torch.bfloat16):
        out = gk.gated_mlp(**tensors, backend=backend)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {t.grad.dtype for t in tensors.values() if t is not None} == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_compile_and_opcheck(anywhere, backend):
    anywhere.require(backend)
    torch._dynamo.reset()
    tensors = make(anywhere, 12, 64, 128, DTYPE.get(backend, torch.float32), residual=True)

    def block(**arguments):
        return gk.gated_mlp(**arguments, backend=backend).sin()

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out = function(**tensors)
        results.append((out, *torch.autograd.grad(out.sum(), tensors.values())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    kernels = KERNELS[backend]
    given = {name: t.detach() for name, t in tensors.items()}
    first = [given[name] for name in ("x", "gate_weight", "up_weight", "gate_bias", "up_bias", "down_weight")]
    call = GatedMlpCall(*first, given["down_bias"], given["residual"], "silu", "all")
    torch.library.opcheck(kernels.gated_mlp_fwd.torch_op, call.flat())
    out, *kept = kernels.gated_mlp_fwd(call)
    needs = [True, True, True, True, False, True, True]
    backward = (*call.flat(), torch.ones_like(out), *kept, needs)
    torch.library.opcheck(kernels.gated_mlp_bwd.torch_op, (*backward, None, None, None))
    sums = (torch.zeros_like(given[name]) for name in ("gate_weight", "up_weight", "down_weight"))
    torch.library.opcheck(kernels.gated_mlp_bwd.torch_op, (*backward, *sums))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_gradients_are_added_unrounded(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 40, 64, 96, torch.bfloat16, packed="halves")
    exact = {n: None if t is None else t.detach().float().requires_grad_() for n, t in tensors.items()}
    out = reference.gated_mlp(**exact)
    dout = torch.randn_like(out)
    out.backward(dout)
    sums = {n: torch.randn_like(exact[n]) for n in ("gate_weight", "up_weight", "down_weight")}
    earlier = {name: total.clone() for name, total in sums.items()}
    for name, total in sums.items():
        accumulate_gradient(tensors[name], total)
    gk.gated_mlp(**tensors, backend=backend).backward(dout.bfloat16())
    for name, total in sums.items():
        assert tensors[name].grad is None
        added = total - earlier[name]
        assert (added - exact[name].grad).norm() < 6e-3 * exact[name].grad.norm()
        assert (added.bfloat16().float() != added).float().mean() > 0.5
    assert tensors["x"].grad is not None


def test_double_backward_is_an_error():
    tensors = make(type("Cpu", (), {"device": "cpu"}), 4, 64, 128, torch.float32)
    (grad,) = torch.autograd.grad(gk.gated_mlp(**tensors, save="input").sum(), tensors["x"], create_graph=True)
    with pytest.raises(gk.UnsupportedError, match="gated_mlp: double backward"):
        grad.sum().backward()


# What is changed in the Triton kernels, into what. Each is there once.
PLANTED = {
    "gradients swapped": ("return act * u, tl.where(gate", "return act, tl.where(gate"),
    "up from gate's weight": ("load_tile(other, n, k,", "load_tile(b, n, k,"),
    "limit lost": ("tl.where(inside, act, 0.0)", "act"),
    "up's bias on gate": ("second += tl.load(up_bias_ptr", "second -= tl.load(up_bias_ptr"),
    "up's sums over gate's": ("(m // BLOCK_M + tl.cdiv(M, BLOCK_M))", "(m // BLOCK_M)"),
    "a quarter off": ("[quarter], m, n + (2 * half + quarter)", "[quarter], m, n + (2 * half + half)"),
}


def test_planted_bugs_are_caught(anywhere, tmp_path, monkeypatch):
    """gpt-oss's MLP has every input and flag."""
    anywhere.require("triton")
    monkeypatch.setattr(mlp_triton, "fused_up_to", lambda arch: 10**9)
    tensors = across_the_limits(make(anywhere, 70, 40, 72, torch.bfloat16))
    text = Path(triton_gemm.__file__).read_text()

    def lives(name: str, changed: str) -> bool:
        path = tmp_path / f"{name.replace(' ', '_').replace(chr(39), '')}.py"
        path.write_text(changed)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for kernel in ("mlp_fwd_kernel", "mlp_bwd_kernel"):
            monkeypatch.setattr(mlp_triton, kernel, getattr(module, kernel))
        forget()
        try:
            assert_gated_parity(tensors, "triton", "gpt_oss")
        except ParityError:
            return False
        return True

    assert lives("unchanged", text)
    assert all(text.count(old) == 1 for old, _ in PLANTED.values())
    assert [name for name, (old, new) in PLANTED.items() if lives(name, text.replace(old, new))] == []
    forget()


def launches_on(arch, variant, widest):
    dtype, rows, activation = variant
    tensors = make(SimpleNamespace(device=torch.device("cpu")), rows, 256, 1024, dtype, residual=True)
    with mock.patch.object(mlp_triton, "fused_up_to", return_value=widest), compiled_launches(arch) as launches:
        gk.gated_mlp(**tensors, activation=activation, backend="triton").sum().backward()
    return launches


LAUNCHED = [(torch.bfloat16, 1024, "silu"), (torch.bfloat16, 64, "gpt_oss"), (torch.float32, 64, "gelu")]


FUSED = [(arch, variant, 10**9) for arch in (80, 90, 100) for variant in LAUNCHED[:2]]
FUSED += [(89, LAUNCHED[0], 10**9), (80, LAUNCHED[2], 10**9)]


@pytest.mark.skipif(bool(simulator.unavailable()), reason=str(simulator.unavailable()))
@pytest.mark.parametrize(("arch", "variant", "widest"), [*FUSED, (80, LAUNCHED[1], 0), (100, LAUNCHED[0], 0)], ids=str)
def test_launches_compile(arch, variant, widest):
    launches = launches_on(arch, variant, widest)
    fused, pointwise = ["mlp_fwd_kernel"] * 2 + ["mlp_bwd_kernel"], ["activation_fwd_kernel", "activation_bwd_kernel"]
    assert [compiled.kernel for compiled in launches] == (fused if widest else pointwise)
    for compiled in launches:
        assert_within_limits(compiled)
        if arch == 90 and variant[0] != torch.float32:
            assert compiled.machine_code.count("HGMMA") > 0
            assert compiled.machine_code.count("UTMALDG") > 0


X, GATE, UP, DOWN = (torch.randn(s) for s in [(4, 32), (48, 32), (48, 32), (16, 48)])
B1, B2 = torch.randn(48), torch.randn(16)
BAD = [
    ({"x": None}, TypeError, "x must be a tensor"),
    ({"x": X.double()}, TypeError, "x must be float16, bfloat16, float32, not float64"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must have a last dimension"),
    ({"x": X.half()}, TypeError, "gate_weight must be float16, not float32"),
    ({"x": X[:, :31]}, ValueError, r"gate_weight must have shape \(48, 31\)"),
    ({"gate_weight": None}, TypeError, "gate_weight must be a tensor"),
    ({"gate_weight": GATE[0]}, ValueError, "gate_weight must have 2 dimensions"),
    ({"gate_weight": GATE[:0]}, ValueError, "gate_weight must not be empty"),
    ({"gate_weight": GATE[:24]}, ValueError, r"up_weight must have shape \(24, 32\) .* not \(48, 32\)"),
    ({"up_weight": UP.half()}, TypeError, "up_weight must be float32, not float16"),
    ({"up_weight": UP.to("meta")}, ValueError, "up_weight must be on cpu"),
    ({"up_weight": UP.t().contiguous()}, ValueError, r"up_weight must have shape \(48, 32\) .* not \(32, 48\)"),
    ({"down_weight": DOWN.t().contiguous()}, ValueError, r"down_weight must have shape \(48, 48\)"),
    ({"down_weight": None}, TypeError, "down_weight must be a tensor"),
    ({"gate_bias": B2}, ValueError, r"gate_bias must have shape \(48,\) .* not \(16,\)"),
    ({"gate_bias": 0.0}, TypeError, "gate_bias must be a tensor, not float"),
    ({"up_bias": B1.half()}, TypeError, "up_bias must be float32"),
    ({"up_bias": B1[None]}, ValueError, r"up_bias must have shape \(48,\)"),
    ({"down_bias": B1}, ValueError, r"down_bias must have shape \(16,\)"),
    ({"residual": X}, ValueError, r"residual must have shape \(4, 16\) .* not \(4, 32\)"),
    ({"residual": 1}, TypeError, "residual must be a tensor, not int"),
    ({"activation": "swiglu"}, ValueError, "activation must be one of gelu_tanh, .*, silu, gpt_oss, not 'swiglu'"),
    ({"activation": torch.relu}, ValueError, "activation must be one of"),
    ({"save": "none"}, ValueError, "save must be one of all, preact, input, not 'none'"),
    ({"save": ["all"]}, ValueError, "save must be one of"),
    ({"backend": "cublas"}, ValueError, "backend must be one of"),
    ({"backend": "triton"}, gk.UnsupportedError, "triton: "),
    ({"backend": "cuda"}, gk.UnsupportedError, "cuda: "),
]


@pytest.mark.parametrize(("changes", "exception", "words"), BAD, ids=range(len(BAD)))
def test_error_names_the_argument(changes, exception, words):
    good = {"x": X, "gate_weight": GATE, "up_weight": UP, "down_weight": DOWN}
    gk.gated_mlp(**good)
    with pytest.raises(exception, match=words):
        gk.gated_mlp(**{**good, **changes})
