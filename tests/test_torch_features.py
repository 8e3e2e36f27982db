"""What torch does with ops: compiles them, checks their schemas, recomputes, differentiates again, maps over them."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gptkernels as gk
from gptkernels.ops.dropout import draw_seed
from gptkernels.ops.layer_norm import cuda_kernels, eager, triton_kernels
from gptkernels.ops.layer_norm.record import LayerNormCall
from gptkernels.ops.rms_norm import cuda_kernels as rms_norm_cuda
from gptkernels.ops.rms_norm import eager as rms_norm_eager
from gptkernels.ops.rms_norm import triton_kernels as rms_norm_triton
from gptkernels.ops.rms_norm.record import RMSNormCall

BACKENDS = {"eager": eager, "triton": triton_kernels, "cuda": cuda_kernels}
RMS_NORM = {"eager": rms_norm_eager, "triton": rms_norm_triton, "cuda": rms_norm_cuda}


def inputs(where, rows=4, columns=64):
    shapes = [(rows, columns), (rows, columns), (columns,), (columns,)]
    return [torch.randn(shape, device=where.device, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(anywhere, backend, dropout):
    anywhere.require(backend)
    torch._dynamo.reset()

    def block(x, residual, weight, bias):
        y, h = gk.add_layer_norm(x * 2, residual, weight, bias, dropout=dropout, backend=backend)
        return gk.layer_norm(y + h, weight, backend=backend).sin()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same_with_gradients(block, compiled, inputs(anywhere))


def assert_same_with_gradients(one, other, tensors):
    results = []
    for function in (one, other):
        torch.manual_seed(5)
        out = function(*tensors)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_dynamic_shapes(anywhere, backend):
    anywhere.require(backend)
    torch._dynamo.reset()
    function = torch.compile(
        lambda x, w: gk.layer_norm(x, w, backend=backend), fullgraph=True, backend="aot_eager", dynamic=True
    )
    weight = torch.randn(48, device=anywhere.device)
    for rows in (3, 5, 9):
        x = torch.randn(rows, 48, device=anywhere.device)
        torch.testing.assert_close(function(x, weight), gk.layer_norm(x, weight, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(anywhere, backend):
    anywhere.require(backend)
    kernels = BACKENDS[backend]
    x, residual, weight, bias = (t.detach() for t in inputs(anywhere))
    seed = draw_seed(x.device)
    for arguments in (
        (x, None, weight, None, None, 1e-5, 0.0),
        (x, residual, weight, bias, None, 1e-5, 0.0),
        (x.bfloat16(), residual, weight, bias, seed, 1e-5, 0.5),
    ):
        torch.library.opcheck(kernels.layer_norm_fwd.torch_op, LayerNormCall(*arguments).flat())
    statistics = torch.randn(4, device=x.device), torch.rand(4, device=x.device)
    for dy, dh, seed_drawn, dropout, needs in (
        (x, None, None, 0.0, (True, True)),
        (x.bfloat16(), x, seed, 0.5, (True, False)),
        (x, x, None, 0.0, (False, False)),
    ):
        call = LayerNormCall(residual, None, weight, None, seed_drawn, 1e-5, dropout)
        torch.library.opcheck(kernels.layer_norm_bwd.torch_op, (*call.flat(), dy, dh, *statistics, *needs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_compiles_without_a_break(anywhere, backend):
    """Alone on heads of packed projections, with a residual and dropout, and where sizes change"""
    anywhere.require(backend)
    torch._dynamo.reset()

    def block(x, residual, weight):
        heads = gk.rms_norm(x.unflatten(-1, (2, 32)).transpose(0, 1), None, backend=backend).transpose(0, 1).flatten(1)
        y, h = gk.add_rms_norm(heads, residual, weight, dropout=0.2, backend=backend)
        return gk.rms_norm(y + h, weight, offset=1.0, cast="gemma", backend=backend).sin()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7):
        assert_same_with_gradients(block, compiled, inputs(anywhere, rows)[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_rms_norm(anywhere, backend):
    anywhere.require(backend)
    kernels = RMS_NORM[backend]
    x, residual, weight, _ = (t.detach() for t in inputs(anywhere))
    seed, heads = draw_seed(x.device), torch.randn(4, 3, 64, device=x.device)[:, :2]
    for arguments in (
        (x, None, weight, None, 1e-5, 0.0, True, 0.0),
        (heads, None, None, None, 1e-5, 0.0, True, 0.0),
        (x.bfloat16(), residual, weight, seed, 1e-5, 1.0, False, 0.5),
    ):
        torch.library.opcheck(kernels.rms_norm_fwd.torch_op, RMSNormCall(*arguments).flat())
    for h, dy, dh, scale, options, wanted in (
        (residual, x, None, weight, (None, 1e-5, 0.0, True, 0.0), True),
        (heads, heads, None, None, (None, 1e-5, 0.0, True, 0.0), False),
        (residual, x.bfloat16(), x, weight, (seed, 1e-5, 1.0, False, 0.5), True),
    ):
        rstd = torch.rand(h.shape[:-1].numel(), device=x.device)
        backward = (*RMSNormCall(h, None, scale, *options).flat(), dy, dh, rstd, wanted)
        torch.library.opcheck(kernels.rms_norm_bwd.torch_op, backward)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_repeats_dropout(anywhere, backend, use_reentrant):
    anywhere.require(backend)
    tensors = inputs(anywhere)

    def block(*arguments):
        y, h = gk.add_layer_norm(*arguments, dropout=0.3, backend=backend)
        return y * h

    results = []
    for run in (block, lambda *arguments: checkpoint(block, *arguments, use_reentrant=use_reentrant)):
        torch.manual_seed(11)
        out = run(*tensors)
        out.sum().backward()
        results.append((out, *(t.grad.clone() for t in tensors)))
        for t in tensors:
            t.grad = None
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_an_error(anywhere, backend):
    anywhere.require(backend)
    # Of float32 on a CPU eager makes PyTorch's own op, which has second derivatives.
    x, residual, weight, bias = (t.detach().bfloat16().requires_grad_() for t in inputs(anywhere))
    y, h = gk.add_layer_norm(x, residual, weight, bias, backend=backend)
    first = torch.autograd.grad((y * y + h).sum(), (x, weight), create_graph=True)
    expected = torch.autograd.grad((y * y + h).sum(), (x, weight))
    for a, b in zip(first, expected, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(gk.UnsupportedError, match="add_layer_norm: double backward"):
        first[0].square().sum().backward()
    (first,) = torch.autograd.grad(gk.rms_norm(x, weight, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(gk.UnsupportedError, match="rms_norm: double backward"):
        first.square().sum().backward()


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad])
@pytest.mark.parametrize("backend", BACKENDS)
def test_function_transforms_are_an_error(anywhere, backend, transform):
    anywhere.require(backend)
    weight = torch.randn(64, device=anywhere.device)
    with pytest.raises(RuntimeError, match=r"functorch transforms|vmap"):
        transform(lambda x: gk.layer_norm(x, weight, backend=backend).sum())(torch.randn(4, 64, device=anywhere.device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph(backend):
    tensors = [t.cuda().detach().requires_grad_() for t in inputs(type("Cpu", (), {"device": "cpu"}))]

    def step():
        y, h = gk.add_layer_norm(*tensors, dropout=0.1, backend=backend)
        return (y, h, *torch.autograd.grad((y * h).sum(), tensors))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    torch.manual_seed(1)
    graph.replay()
    first = [t.clone() for t in captured]
    graph.replay()
    assert not torch.equal(first[1], captured[1]), "dropout must differ between replays"
    torch.manual_seed(1)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_run_where_their_tensors_are(backend):
    x, weight = torch.randn(8, 64, device="cuda:1"), torch.randn(64, device="cuda:1")
    with torch.cuda.device(0):
        y = gk.layer_norm(x, weight, backend=backend)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (64,), weight))


def ops_on(device):
    """name -> (op, tensors), (shape of the result)"""

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=device)

    x, weight, heads = zeros(8, 32), zeros(32), zeros(2, 3, 16, 32)
    lengths, starts = zeros(2, dtype=torch.int32), zeros(4, dtype=torch.int32)
    targets = zeros(8, dtype=torch.int64)
    return {
        "layer_norm": (gk.layer_norm, (x, weight), {}, [(8, 32)]),
        "add_layer_norm": (gk.add_layer_norm, (x, x, weight), {"dropout": 0.1}, [(8, 32)] * 2),
        "rms_norm": (gk.rms_norm, (heads.transpose(1, 2), weight), {}, [(2, 16, 3, 32)]),
        "add_rms_norm": (gk.add_rms_norm, (x, x, weight), {"dropout": 0.1}, [(8, 32)] * 2),
        "attention": (gk.attention, (heads,) * 3, {"window": 4, "key_start": lengths}, [(2, 3, 16, 32)]),
        "packed": (gk.attention, (heads[0],) * 3, {"cu_seqlens": starts, "dropout": 0.1}, [(3, 16, 32)]),
        "decode_attention": (gk.decode_attention, (heads[:, :, :1], heads, heads, lengths), {}, [(2, 3, 1, 32)]),
        "mlp": (gk.mlp, (x, zeros(64, 32), None, zeros(48, 64), None), {}, [(8, 48)]),
        "gated_mlp": (gk.gated_mlp, (x, zeros(64, 32), zeros(64, 32), zeros(48, 64)), {}, [(8, 48)]),
        "loss": (gk.linear_cross_entropy, (x, zeros(50, 32), targets), {}, [()]),
        "losses": (gk.linear_cross_entropy, (x, zeros(50, 32), targets), {"reduction": "none"}, [(8,)]),
    }


OPS = list(ops_on("meta"))


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_give_shapes(name):
    op, tensors, options, shapes = ops_on("meta")[name]
    if op is not gk.decode_attention:
        tensors = [x if x is None or not x.is_floating_point() else x.requires_grad_() for x in tensors]
    out = op(*tensors, **options)
    outs = out if isinstance(out, tuple) else (out,)
    assert [x.shape for x in outs] == shapes
    assert all(x.is_meta for x in outs)
    if op is not gk.decode_attention:
        sum(x.sum() for x in outs).backward()
        for x in tensors:
            assert x is None or not x.requires_grad or x.grad.shape == x.shape


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
@pytest.mark.parametrize("name", OPS)
def test_transforms_are_refused_by_name(name, transform):
    op, (first, *tensors), options, _ = ops_on("cpu")[name]
    with pytest.raises(gk.UnsupportedError, match=f"{op.__name__}: the transforms of torch.func .* are not supported"):
        transform(lambda x: op(x, *tensors, **options))(first)
