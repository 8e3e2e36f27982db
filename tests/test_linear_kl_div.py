"""The distillation loss that never holds its logits: every backend against the float64 reference."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from compile_gate import assert_within_limits, compiled_launches
from parity import assert_parity

import gptkernels as gk
from gptkernels import simulator
from gptkernels.ops.linear_kl_div import eager, reference, triton_kernels
from gptkernels.ops.linear_kl_div.record import DistillCall

BACKENDS = ["eager", "triton"]
REDUCTIONS = ["mean", "sum", "none"]


def make(where, rows, d, vocabulary, dtype, ignored=0, teacher_d=None, teacher_vocabulary=None):
    def leaf(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(where.device, dtype)

    e, w = teacher_d or d, teacher_vocabulary or vocabulary
    tensors = {"x": leaf(rows, d), "weight": leaf(vocabulary, d, scale=2 * d**-0.5)}
    teacher = {"teacher_x": leaf(rows, e), "teacher_weight": leaf(w, e, scale=2 * e**-0.5)}
    targets = torch.randint(0, vocabulary, (rows,))
    targets[torch.randperm(rows)[:ignored]] = -100
    return {name: x.requires_grad_() for name, x in tensors.items()}, teacher, targets.to(where.device)


class Here:
    device = torch.device("cpu")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_reference_is_torch(reduction, temperature):
    tensors, teacher, targets = make(Here, 6, 5, 9, torch.float64, ignored=2, teacher_d=7, teacher_vocabulary=11)

    def loss(x, weight):
        return reference.linear_kl_div(
            x, weight, **teacher, targets=targets, reduction=reduction, temperature=temperature
        )

    student = (tensors["x"] @ tensors["weight"].T / temperature).log_softmax(-1)
    expected = (teacher["teacher_x"] @ teacher["teacher_weight"][:9].T / temperature).log_softmax(-1)
    losses = F.kl_div(student, expected, reduction="none", log_target=True).sum(-1).where(targets != -100, 0)
    found = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / 4}[reduction]
    torch.testing.assert_close(loss(**tensors), found)
    assert torch.autograd.gradcheck(loss, tuple(tensors.values()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_kl_div(where, backend, dtype, reduction):
    where.require(backend)
    tensors, teacher, targets = make(where, 30, 48, 1003, dtype, 5, teacher_d=64, teacher_vocabulary=1024)
    options = {"targets": targets, "reduction": reduction, "temperature": 2.0}
    # The teacher is an input like any other: what it loses to 16 bits is part of PyTorch's error as well.
    assert_parity(
        lambda **given: gk.linear_kl_div(**given, **teacher, **options, backend=backend),
        lambda **given: reference.linear_kl_div(**given, **like(given, teacher), **options_like(given, options)),
        tensors,
    )


def like(given, teacher):
    x = given["x"]
    return {name: each.to(x.device, x.dtype) for name, each in teacher.items()}


def options_like(given, options):
    return options | {"targets": options["targets"].to(given["x"].device)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_that_is_the_teacher(anywhere, backend):
    anywhere.require(backend)
    tensors, _, _ = make(anywhere, 20, 32, 513, torch.float32)
    same = {f"teacher_{name}": x.detach() for name, x in tensors.items()}
    loss = gk.linear_kl_div(**tensors, **same, temperature=0.7, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert all(x.grad.eq(0).all() for x in tensors.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_gets_nothing(anywhere, backend):
    anywhere.require(backend)
    tensors, teacher, _ = make(anywhere, 9, 16, 104, torch.float32, teacher_vocabulary=112)
    loss = gk.linear_kl_div(**tensors, **teacher, vocabulary=101, backend=backend)
    cut = {"weight": tensors["weight"][:101], "teacher_weight": teacher["teacher_weight"][:101]}
    alone = gk.linear_kl_div(**{**tensors, **teacher, **cut}, backend=backend)
    torch.testing.assert_close(loss, alone, rtol=0, atol=0)
    loss.backward()
    assert tensors["weight"].grad[101:].eq(0).all()
    assert tensors["weight"].grad[:101].ne(0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_teacher_rules_out(anywhere, backend):
    """-inf of the teacher's costs nothing; -inf of the student's where the teacher has probability costs everything"""
    anywhere.require(backend)
    one = torch.ones(3, 1, device=anywhere.device)
    teacher = torch.tensor([[0.0], [1.0], [-torch.inf]], device=anywhere.device)
    student = torch.tensor([[0.5], [0.5], [2.0]], device=anywhere.device, requires_grad=True)
    loss = gk.linear_kl_div(one, student, one, teacher, backend=backend)
    p, q = torch.tensor([0.0, 1.0]).softmax(0), torch.tensor([0.5, 0.5, 2.0]).log_softmax(0)[:2]
    assert loss.item() == pytest.approx((p * (p.log() - q)).sum().item())
    loss.backward()
    assert student.grad.isfinite().all()
    ruled_out = torch.tensor([[0.0], [-torch.inf], [0.0]], device=anywhere.device)
    assert gk.linear_kl_div(one, ruled_out, one, teacher, backend=backend).item() == torch.inf


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_count_for_nothing(anywhere, backend, reduction):
    anywhere.require(backend)
    tensors, teacher, targets = make(anywhere, 8, 16, 100, torch.float32)
    targets[::2] = -100
    with torch.no_grad():
        tensors["x"][::2] = torch.nan
    loss = gk.linear_kl_div(**tensors, **teacher, targets=targets, reduction=reduction, backend=backend)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert tensors["x"].grad.isfinite().all()
    assert tensors["x"].grad[::2].eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_rows(reduction):
    tensors, teacher, _ = make(Here, 0, 16, 100, torch.float32)
    loss = gk.linear_kl_div(**tensors, **teacher, reduction=reduction)
    loss.sum().backward()
    assert tensors["weight"].grad.eq(0).all()
    assert tensors["x"].grad.shape == (0, 16)


def test_shapes_and_autocast():
    tensors, teacher, targets = make(Here, 12, 16, 100, torch.float32, teacher_d=24)
    cut = {name: x.detach().view(3, 4, -1) for name, x in (tensors | teacher).items() if name.endswith("x")}
    weights = {"weight": tensors["weight"], "teacher_weight": teacher["teacher_weight"]}
    losses = gk.linear_kl_div(**cut, **weights, targets=targets.view(3, 4), reduction="none")
    assert losses.shape == (3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gk.linear_kl_div(**cut, **weights)
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert tensors["weight"].grad.dtype == torch.float32
    torch.testing.assert_close(rounded, losses.mean(), rtol=0.02, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(anywhere, backend):
    anywhere.require(backend)
    kernels = {"eager": eager, "triton": triton_kernels}[backend]
    tensors, teacher, targets = make(anywhere, 12, 16, 100, torch.float32, teacher_d=24)
    given = [x.detach() for x in (tensors | teacher).values()]
    for call, needs in (
        (DistillCall(*given, vocabulary=100), (True, True)),
        (DistillCall(*given, targets, reduction="sum", vocabulary=90, temperature=2.0), (False, True)),
        (DistillCall(*given, targets, reduction="none", vocabulary=100), (True, False)),
    ):
        torch.library.opcheck(kernels.linear_kl_div_fwd.torch_op, (*call.flat(), *needs))
    arguments = (*call.flat(), torch.rand(12, device=anywhere.device), True, True, True)
    torch.library.opcheck(kernels.linear_kl_div_bwd.torch_op, arguments)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_launch_compiles_without_spills(arch):
    if simulator.unavailable():
        pytest.skip(simulator.unavailable())
    launches = []
    for vocabulary in (1000, 8000, 50257):
        for dtype in (torch.float32, torch.bfloat16):
            tensors, teacher, _ = make(Here, 4, 16, vocabulary, dtype)
            with compiled_launches(arch) as compiled:
                gk.linear_kl_div(**tensors, **teacher, backend="triton")
            launches += compiled
    assert {launch.kernel for launch in launches} == {"kl_div_kernel"}
    assert len(launches) == 6
    for launch in launches:
        assert_within_limits(launch)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction):
    tensors, teacher, targets = make(Here, 12, 16, 100, torch.float32, ignored=2)

    def loss(x, weight):
        return gk.linear_kl_div(x, weight, **teacher, targets=targets, reduction=reduction).sum()

    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, whole):
        function(**tensors).backward()
    eager_loss, compiled = loss(**tensors), whole(**tensors)
    torch.testing.assert_close(compiled, eager_loss)
    grads = torch.autograd.grad(eager_loss, list(tensors.values()))
    for grad, x in zip(grads, tensors.values(), strict=True):
        torch.testing.assert_close(x.grad, 2 * grad)


def test_second_derivatives_are_an_error():
    tensors, teacher, _ = make(Here, 3, 8, 20, torch.float32)
    (grad,) = torch.autograd.grad(gk.linear_kl_div(**tensors, **teacher), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_logits_never_exist():
    """Peak memory, in a process of its own, beside the logits of one model"""
    code = """
import resource, torch
import gptkernels as gk
torch.set_num_threads(1)
x, teacher_x = torch.randn(4096, 16, requires_grad=True), torch.randn(4096, 24)
weight, teacher_weight = torch.randn(16384, 16, requires_grad=True), torch.randn(16384, 24)
gk.linear_kl_div(x[:8], weight, teacher_x[:8], teacher_weight).backward()  # what the first call costs whatever its size
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gk.linear_kl_div(x, weight, teacher_x, teacher_weight, temperature=2.0).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 4096 * 16384 * 4 / 4


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"temperature": 0}, ValueError, "temperature must be > 0"),
        ({"vocabulary": 21}, ValueError, "vocabulary must be 1 ... 20"),
        ({"vocabulary": 2.0}, TypeError, "vocabulary must be an int or None, not float"),
        ({"teacher_x": torch.zeros(4, 8)}, ValueError, "teacher_x must have shape \\(3, 8\\)"),
        ({"teacher_weight": torch.zeros(20, 9)}, ValueError, "teacher_weight must have shape \\(20, 8\\)"),
        ({"teacher_weight": torch.zeros(20, 8, requires_grad=True)}, ValueError, "must not require a gradient"),
        ({"targets": torch.zeros(3)}, TypeError, "targets must be int64, not float32"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, ValueError, "targets must have shape \\(3,\\)"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of mean, sum, none"),
        ({"weight": torch.zeros(0, 8)}, ValueError, "weight must not be empty"),
        ({"teacher_x": torch.zeros(3, 8, dtype=torch.float16)}, TypeError, "teacher_weight must be float16"),
        ({"backend": "cuda"}, gk.UnsupportedError, "linear_kl_div has no such kernels"),
    ],
)
def test_bad_input(change, error, said):
    tensors, teacher, _ = make(Here, 3, 8, 20, torch.float32)
    with pytest.raises(error, match=said):
        gk.linear_kl_div(**(tensors | teacher | change))


def test_explain():
    tensors, teacher, _ = make(Here, 3, 8, 20, torch.float32)
    assert gk.explain(gk.linear_kl_div, **tensors, **teacher).backend == "eager"
