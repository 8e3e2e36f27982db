"""The loss that never holds its logits: every backend against the float64 reference."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from compile_gate import assert_within_limits, compiled_launches
from parity import assert_parity

import gptkernels as gk
from gptkernels import simulator
from gptkernels.ops.linear_cross_entropy import chunks, cuda_kernels, eager, reference, triton_kernels
from gptkernels.ops.linear_cross_entropy.record import LossCall

BACKENDS = ["eager", "triton", "cuda"]
REDUCTIONS = ["mean", "sum", "none"]


def make(where, rows, d, vocabulary, dtype, ignored=0):
    x = torch.randn(rows, d).to(where.device, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, d) * d**-0.5).to(where.device, dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,))
    targets[torch.randperm(rows)[:ignored]] = -100
    return {"x": x, "weight": weight}, targets


def assert_loss_parity(tensors, targets, backend, **kwargs):
    device = tensors["x"].device
    return assert_parity(
        gk.linear_cross_entropy,
        reference.linear_cross_entropy,
        tensors,
        kwargs={"targets": targets.to(device), "backend": backend, **kwargs},
        reference_kwargs={"targets": targets, **kwargs},
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reference_is_torch(reduction):
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(6, 5), (9, 5)])
    targets = torch.tensor([0, 8, -100, 3, -100, 4])
    expected = F.cross_entropy(x @ weight.T, targets, reduction=reduction)
    torch.testing.assert_close(
        reference.linear_cross_entropy(x, weight, targets, reduction=reduction), expected, check_dtype=False
    )
    assert torch.autograd.gradcheck(
        lambda x, weight: reference.linear_cross_entropy(x, weight, targets, reduction=reduction), (x, weight)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_cross_entropy(where, backend, dtype, reduction):
    where.require(backend)
    tensors, targets = make(where, 70, 48, 1003, dtype, ignored=9)
    assert_loss_parity(tensors, targets, backend, reduction=reduction)


# What the loss may be beside the plain one, each alone and together.
OPTIONS = {
    "bias": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 2.0},
    "class-weight": {},
    "all": {"label_smoothing": 0.3, "z_loss": 1e-2, "softcap": 3.0, "temperature": 0.6},
}


def with_options(where, name, rows, d, vocabulary, dtype, ignored=0):
    """-> tensors, targets, keywords of the op"""
    tensors, targets = make(where, rows, d, vocabulary, dtype, ignored)
    kwargs = dict(OPTIONS[name])
    if name in ("bias", "all"):
        tensors["bias"] = torch.randn(vocabulary).to(where.device, dtype).requires_grad_()
    if name in ("class-weight", "all"):
        kwargs["class_weight"] = torch.rand(vocabulary).to(where.device)
    return tensors, targets, kwargs


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_reference_with_options_is_torch(name, reduction):
    cpu = type("Cpu", (), {"device": "cpu"})
    tensors, targets, kwargs = with_options(cpu, name, 6, 5, 9, torch.float64, ignored=2)
    weights = kwargs.get("class_weight", torch.ones(9)).double()

    def loss(**tensors):
        return reference.linear_cross_entropy(**tensors, targets=targets, reduction=reduction, **kwargs)

    logits = F.linear(**{"input" if name == "x" else name: x for name, x in tensors.items()})
    if "softcap" in kwargs:
        logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
    logits = logits / kwargs.get("temperature", 1.0)
    smoothing = kwargs.get("label_smoothing", 0.0)
    expected = F.cross_entropy(logits, targets, weights, reduction=reduction, label_smoothing=smoothing)
    squares = kwargs.get("z_loss", 0.0) * logits.logsumexp(1).square().where(targets != -100, 0)
    squares = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / 4}[reduction]
    torch.testing.assert_close(loss(**tensors), expected + squares)
    with_z = reference.linear_cross_entropy(
        **tensors, targets=targets, reduction=reduction, **kwargs, return_z_loss=True
    )
    torch.testing.assert_close(with_z, (expected + squares, squares))
    assert torch.autograd.gradcheck(
        lambda *values: loss(**dict(zip(tensors, values, strict=True))), tuple(tensors.values())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options(anywhere, backend, name, dtype):
    anywhere.require(backend)
    for reduction, vocabulary in zip(REDUCTIONS, (503, 1024, 2050), strict=True):
        tensors, targets, kwargs = with_options(anywhere, name, 30, 48, vocabulary, dtype, ignored=5)
        in_reference = kwargs | ({"class_weight": kwargs["class_weight"].cpu()} if "class_weight" in kwargs else {})
        assert_parity(
            gk.linear_cross_entropy,
            reference.linear_cross_entropy,
            tensors,
            kwargs={"targets": targets.to(anywhere.device), "reduction": reduction, "backend": backend, **kwargs},
            reference_kwargs={"targets": targets, "reduction": reduction, **in_reference},
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_in_many_chunks(anywhere, backend):
    """The bias's gradient, too, is a sum over all of them."""
    anywhere.require(backend)
    with mock.patch.object(chunks, "chunk_rows", return_value=7):
        tensors, targets, kwargs = with_options(anywhere, "bias", 20, 32, 300, torch.float32, ignored=4)
        for reduction in REDUCTIONS:
            assert_loss_parity(tensors, targets, backend, reduction=reduction, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_z_loss_is_returned_without_a_gradient(anywhere, backend):
    anywhere.require(backend)
    tensors, targets = make(anywhere, 12, 32, 100, torch.float32, ignored=3)
    targets = targets.to(anywhere.device)
    for reduction in REDUCTIONS:
        plain = gk.linear_cross_entropy(**tensors, targets=targets, reduction=reduction, backend=backend)
        arguments = {**tensors, "targets": targets, "reduction": reduction, "backend": backend, "return_z_loss": True}
        loss, z = gk.linear_cross_entropy(**arguments, z_loss=0.01)
        assert not z.requires_grad
        assert z.shape == loss.shape
        torch.testing.assert_close(loss - z, plain)
        logits = tensors["x"] @ tensors["weight"].T
        squares = (0.01 * logits.logsumexp(1).square()).where(targets != -100, 0).detach()
        expected = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / 9}[reduction]
        torch.testing.assert_close(z, expected)
        loss, z = gk.linear_cross_entropy(**arguments)
        assert bool((z == 0).all())
        assert z.shape == loss.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits_with_softcap_and_smoothing(anywhere, backend):
    """A softcap makes numbers of them; smoothed labels cost a row with a word that is ruled out everything."""
    anywhere.require(backend)
    x = torch.tensor([[1.0, 0.5], [1.0, -2.0], [torch.nan, torch.inf]], device=anywhere.device, requires_grad=True)
    weight = torch.randn(200, 2, device=anywhere.device)
    weight[::2] = torch.tensor([-torch.inf, 0.0])
    targets = torch.tensor([1, 3, -100], device=anywhere.device)
    for options in ({"softcap": 5.0}, {"label_smoothing": 0.1}):
        losses = gk.linear_cross_entropy(x, weight, targets, reduction="none", backend=backend, **options)
        expected = reference.linear_cross_entropy(x[:2], weight, targets[:2], reduction="none", **options)
        torch.testing.assert_close(losses[:2], expected)
        assert losses[2].item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_log_probs(anywhere, backend, dtype):
    anywhere.require(backend)
    for temperature, biased in ((1.0, True), (0.7, False), (2.5, True)):
        tensors, targets = make(anywhere, 24, 48, 1003, dtype)
        if biased:
            tensors["bias"] = torch.randn(1003).to(anywhere.device, dtype).requires_grad_()
        assert_parity(
            gk.linear_log_probs,
            reference.linear_log_probs,
            tensors,
            kwargs={"targets": targets.to(anywhere.device), "temperature": temperature, "backend": backend},
            reference_kwargs={"targets": targets, "temperature": temperature},
        )


def test_log_probs_are_of_the_shape_of_the_targets():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(20, 8)
    targets = torch.tensor([[0, 19, -100], [4, 5, 6]])
    found = gk.linear_log_probs(x, weight, targets, temperature=0.5)
    expected = (2 * x @ weight.T).log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(found, expected.where(targets >= 0, 0))
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert bool((grad[0, 2] == 0).all())
    with pytest.raises(ValueError, match="temperature must be > 0"):
        gk.linear_log_probs(x, weight, targets, temperature=0)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (2, 2), (64, 1024), (65, 1025), (130, 257), (3, 50257)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes(anywhere, backend, rows, vocabulary):
    anywhere.require(backend)
    tensors, targets = make(anywhere, rows, 40, vocabulary, torch.bfloat16)
    assert_loss_parity(tensors, targets, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_chunks(anywhere, backend):
    anywhere.require(backend)
    for step in (1, 7, 50):
        with mock.patch.object(chunks, "chunk_rows", return_value=step):
            tensors, targets = make(anywhere, 50, 32, 300, torch.float32, ignored=4)
            for reduction in REDUCTIONS:
                assert_loss_parity(tensors, targets, backend, reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ignored(anywhere, backend):
    """As in torch: a mean over nothing is NaN, a sum is 0, and no gradient comes back."""
    anywhere.require(backend)
    tensors, _ = make(anywhere, 5, 32, 100, torch.float32)
    targets = torch.full((5,), 7, device=anywhere.device)
    for reduction in REDUCTIONS:
        loss = gk.linear_cross_entropy(**tensors, targets=targets, ignore_index=7, reduction=reduction, backend=backend)
        assert bool(loss.isnan()) if reduction == "mean" else bool((loss == 0).all())
        grads = torch.autograd.grad(loss.sum(), tensors.values())
        assert all(bool((grad == 0).all()) for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(anywhere, backend):
    anywhere.require(backend)
    tensors, targets = make(anywhere, 0, 32, 100, torch.float16)
    loss = gk.linear_cross_entropy(**tensors, targets=targets.to(anywhere.device), reduction="sum", backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert bool((tensors["weight"].grad == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits(anywhere, backend):
    """A word that is ruled out (-inf) costs nothing; an ignored row may hold anything."""
    anywhere.require(backend)
    x = torch.tensor([[1.0, 0.5], [1.0, -2.0], [torch.nan, torch.inf]], device=anywhere.device, requires_grad=True)
    weight = torch.randn(200, 2, device=anywhere.device)
    weight[::2] = torch.tensor([-torch.inf, 0.0])
    weight.requires_grad_()
    targets = torch.tensor([1, 3, -100], device=anywhere.device)
    losses = gk.linear_cross_entropy(x, weight, targets, reduction="none", backend=backend)
    expected = F.cross_entropy((x @ weight.T)[:2], targets[:2], reduction="none")
    torch.testing.assert_close(losses[:2], expected)
    assert losses[2].item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(anywhere, backend):
    anywhere.require(backend)
    tensors, targets = make(anywhere, 20, 64, 500, torch.float32)
    tensors["x"] = (tensors["x"].detach() * 100).requires_grad_()
    assert_loss_parity(tensors, targets, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_with_the_embedding(anywhere, backend):
    """One weight as embedding and as output layer gets the sum of both gradients."""
    anywhere.require(backend)
    embedding = torch.randn(150, 32).to(anywhere.device).requires_grad_()
    tokens, targets = torch.randint(0, 150, (2, 4, 9), device=anywhere.device)
    grads = []
    for loss in (gk.linear_cross_entropy, reference.linear_cross_entropy):
        kwargs = {"backend": backend} if loss is gk.linear_cross_entropy else {}
        out = loss(F.embedding(tokens, embedding).tanh(), embedding, targets, **kwargs)
        grads.append(torch.autograd.grad(out, embedding)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_and_scaled(anywhere, backend):
    anywhere.require(backend)
    tensors, targets = make(anywhere, 20, 32, 100, torch.float32)
    loss = gk.linear_cross_entropy(**tensors, targets=targets.to(anywhere.device), backend=backend)
    once = torch.autograd.grad(loss, tensors.values(), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, tensors.values())
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_weights_gradient_in_float32(anywhere, backend):
    anywhere.require(backend)
    tensors, targets = make(anywhere, 64, 32, 300, torch.float32)
    with torch.autocast(anywhere.device.type, torch.bfloat16):
        loss = gk.linear_cross_entropy(**tensors, targets=targets.to(anywhere.device), backend=backend)
    grad_x, grad_weight = torch.autograd.grad(loss, tensors.values())
    assert (loss.dtype, grad_x.dtype, grad_weight.dtype) == (torch.float32,) * 3
    assert not torch.equal(grad_weight, grad_weight.bfloat16().float())
    expected = torch.autograd.grad(
        reference.linear_cross_entropy(**tensors, targets=targets.to(anywhere.device)), tensors.values()
    )
    torch.testing.assert_close(grad_weight, expected[1], atol=5e-4, rtol=5e-2)
    torch.testing.assert_close(grad_x, expected[0], atol=5e-4, rtol=5e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_gradient_is_summed_in_float32(anywhere, backend):
    """Thousands of small contributions to one row: a bfloat16 sum would stop growing."""
    anywhere.require(backend)
    rows = 600
    x = torch.ones(rows, 16, dtype=torch.bfloat16, device=anywhere.device)
    weight = torch.zeros(8, 16, dtype=torch.bfloat16, device=anywhere.device, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64, device=anywhere.device)
    with mock.patch.object(chunks, "chunk_rows", return_value=1 if backend == "eager" else 20):
        loss = gk.linear_cross_entropy(x, weight, targets, reduction="sum", backend=backend)
    (grad,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(grad[1, 0].item(), rows / 8, rtol=1e-2, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_asked(anywhere, backend):
    anywhere.require(backend)
    for wanted in ("x", "weight"):
        tensors, targets = make(anywhere, 30, 32, 100, torch.float32)
        for name, tensor in tensors.items():
            tensor.requires_grad_(name == wanted)
        for reduction in REDUCTIONS:
            assert_loss_parity(tensors, targets, backend, reduction=reduction)


def test_logits_never_exist(monkeypatch):
    """Peak memory of a call at 1/64 of GPT-2's 16k x 50257, in a process of its own."""
    code = """
import resource, sys, torch
import gptkernels as gk
torch.set_num_threads(1)
x = torch.randn(2048, 64, requires_grad=True)
weight = torch.randn(50257, 64, requires_grad=True)
targets = torch.randint(0, 50257, (2048,))
gk.linear_cross_entropy(x[:8], weight, targets[:8]).backward()  # what the first call costs whatever its size
x.grad = weight.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gk.linear_cross_entropy(x, weight, targets).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    logits = 2048 * 50257 * 4
    assert int(result.stdout) <= logits / 16


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_and_opcheck(anywhere, backend):
    anywhere.require(backend)
    torch._dynamo.reset()
    tensors, targets = make(anywhere, 12, 32, 100, torch.float32)
    targets = targets.to(anywhere.device)
    for reduction in REDUCTIONS:

        def block(x, weight, reduction=reduction):
            return gk.linear_cross_entropy(x * 2, weight, targets, reduction=reduction, backend=backend).sum()

        results = []
        for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
            out = function(**tensors)
            results.append((out, *torch.autograd.grad(out, tensors.values())))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    kernels = {"eager": eager, "triton": triton_kernels, "cuda": cuda_kernels}[backend]
    x, weight = (t.detach() for t in tensors.values())
    bias, class_weight = torch.rand(2, 100, device=x.device)
    for call, needs in (
        (LossCall(x, weight, targets), (True, True, False)),
        (LossCall(x, weight, targets, bias, None, 3, "none", z_loss=0.1), (False, True, True)),
        (LossCall(x, weight, targets, bias, class_weight, 3, "sum", softcap=3.0), (True, False, True)),
    ):
        torch.library.opcheck(kernels.linear_cross_entropy_fwd.torch_op, (*call.flat(), *needs))
    losses, lse = torch.rand(2, 12, device=x.device)
    call = LossCall(x, weight, targets, bias, reduction="none")
    arguments = (*call.flat(), losses, lse, True, True, True, True)
    torch.library.opcheck(kernels.linear_cross_entropy_bwd.torch_op, arguments)


def test_options_compile():
    torch._dynamo.reset()
    cpu = type("Cpu", (), {"device": "cpu"})
    tensors, targets, kwargs = with_options(cpu, "all", 12, 32, 100, torch.float32, ignored=2)

    def block(x, weight, bias):
        loss, z = gk.linear_cross_entropy(x * 2, weight, targets, bias=bias, return_z_loss=True, **kwargs)
        return loss + z + gk.linear_log_probs(x, weight, targets.clamp(min=0), bias=bias, temperature=0.5).sum()

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out = function(**tensors)
        results.append((out, *torch.autograd.grad(out, tensors.values())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_double_backward_is_an_error():
    tensors, targets = make(type("Cpu", (), {"device": "cpu"}), 4, 32, 50, torch.float32)
    (grad,) = torch.autograd.grad(gk.linear_cross_entropy(**tensors, targets=targets), tensors["x"], create_graph=True)
    with pytest.raises(gk.UnsupportedError, match="linear_cross_entropy: double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_launches_compile(arch):
    if simulator.unavailable():
        pytest.skip(simulator.unavailable())
    cpu = type("Cpu", (), {"device": torch.device("cpu")})
    launches = []
    for vocabulary in (1000, 8000, 50257):
        for dtype in (torch.float32, torch.bfloat16):
            tensors, targets = make(cpu, 4, 16, vocabulary, dtype)
            with compiled_launches(arch) as compiled:
                gk.linear_cross_entropy(**tensors, targets=targets, backend="triton")
            launches += compiled
    assert {launch.kernel for launch in launches} == {"cross_entropy_kernel"}
    assert len(launches) == 6
    for launch in launches:
        assert_within_limits(launch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_out_of_range(anywhere, backend):
    """An error where targets are checked; unchecked a loss of NaN, and never a read outside of the logits (which the
    simulator would report)."""
    anywhere.require(backend)
    tensors, targets = make(anywhere, 6, 32, 50, torch.float32)
    for wrong in (50, -1, 2**40, -(2**40)):
        targets = targets.clone().to(anywhere.device)
        targets[2] = wrong
        with mock.patch.dict(os.environ, {"GPTKERNELS_CHECKED": "1"}), pytest.raises(ValueError, match=f"not {wrong}"):
            gk.linear_cross_entropy(**tensors, targets=targets, backend=backend)
        with mock.patch("gptkernels.ops.linear_cross_entropy.chunks.check_range"):
            losses = gk.linear_cross_entropy(**tensors, targets=targets, reduction="none", backend=backend)
        assert losses.isnan().tolist() == [row == 2 for row in range(6)]


X, W, T = torch.randn(4, 32), torch.randn(50, 32), torch.tensor([1, 2, 49, -100])
BAD = [
    ({"x": None}, TypeError, "x must be a tensor"),
    ({"x": X.double()}, TypeError, "x must be .* not float64"),
    ({"x": X.int()}, TypeError, "x must be .* not int32"),
    ({"x": X[:, :0]}, ValueError, "x must have a last dimension"),
    ({"x": torch.tensor(1.0)}, ValueError, "x must have a last dimension"),
    ({"x": X.half()}, TypeError, "weight must be float16, not float32"),
    ({"x": X[:3]}, ValueError, r"targets must have shape \(3,\) .* not \(4,\)"),
    ({"weight": None}, TypeError, "weight must be a tensor"),
    ({"weight": W.half()}, TypeError, "weight must be float32, not float16"),
    ({"weight": W[0]}, ValueError, "weight must have 2 dimensions"),
    ({"weight": W[:, :31]}, ValueError, r"weight must have shape \(50, 32\) .* not \(50, 31\)"),
    ({"weight": W.t()}, ValueError, r"weight must have shape"),
    ({"weight": W[:0]}, ValueError, "weight must not be empty"),
    ({"weight": W.to("meta")}, ValueError, "weight must be on cpu"),
    ({"targets": None}, TypeError, "targets must be a tensor"),
    ({"targets": T.int()}, TypeError, "targets must be int64, not int32"),
    ({"targets": T.float()}, TypeError, "targets must be int64, not float32"),
    ({"targets": T[:3]}, ValueError, r"targets must have shape \(4,\) .* not \(3,\)"),
    ({"targets": T[:, None]}, ValueError, r"targets must have shape \(4,\) .* not \(4, 1\)"),
    ({"targets": T.to("meta")}, ValueError, "targets must be on cpu"),
    ({"targets": T + 1}, ValueError, r"targets must be 0 ... 49 or ignore_index \(-100\), not 50"),
    ({"targets": T.abs().clamp(max=49) - 3}, ValueError, "not -"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, not float"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int, not NoneType"),
    ({"ignore_index": True}, TypeError, "ignore_index must be an int, not bool"),
    ({"ignore_index": 3}, ValueError, r"ignore_index \(3\), not -100"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none, not 'avg'"),
    ({"reduction": None}, ValueError, "reduction must be one of"),
    ({"bias": 1.0}, TypeError, "bias must be a tensor"),
    ({"bias": W[0]}, ValueError, r"bias must have shape \(50,\) .* not \(32,\)"),
    ({"bias": W[:, 0].half()}, TypeError, "bias must be float32, not float16"),
    ({"class_weight": W}, ValueError, "class_weight must have 1 dimension, not"),
    ({"class_weight": T}, TypeError, "class_weight must be .* not int64"),
    ({"class_weight": W[:, 0].clone().requires_grad_()}, ValueError, "class_weight must not require a gradient"),
    ({"label_smoothing": 1.1}, ValueError, "label_smoothing must be >= 0 and <= 1, not 1.1"),
    ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number, not str"),
    ({"z_loss": -1e-4}, ValueError, "z_loss must be >= 0"),
    ({"softcap": 0}, ValueError, "softcap must be > 0"),
    ({"softcap": True}, TypeError, "softcap must be a number, not bool"),
    ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
    ({"return_z_loss": 1}, TypeError, "return_z_loss must be True or False, not 1"),
    ({"backend": "liger"}, ValueError, "backend must be one of"),
    ({"backend": "triton"}, gk.UnsupportedError, "triton: runs on CUDA tensors, not cpu"),
    ({"backend": "cuda"}, gk.UnsupportedError, "cuda: "),
]


@pytest.mark.parametrize(("changes", "exception", "words"), BAD, ids=range(len(BAD)))
def test_error_names_the_argument(changes, exception, words):
    good = {"x": X, "weight": W, "targets": T}
    gk.linear_cross_entropy(**good)
    with pytest.raises(exception, match=words):
        gk.linear_cross_entropy(**{**good, **changes})
