"""The gated MLP's CUDA kernels: parity, schedules, what they execute, and planted bugs."""

from unittest import mock

import pytest
import torch
from conftest import skip_without_library
from mutate_mlp import CPU, assert_caught
from planted import Place
from test_gated_mlp import ACTIVATIONS, across_the_limits, assert_gated_parity, make
from test_mlp_cuda import hopper, library

import gptkernels as gk
from gptkernels import cuda_library, simulator
from gptkernels.ops.gated_mlp import cuda_kernels

__all__ = ["hopper", "library"]  # fixtures


@pytest.mark.parametrize("save", ["all", "preact", "input"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_what_is_kept(hopper, activation, save):
    tensors = make(hopper, 70, 64, 136, torch.bfloat16)
    tensors = across_the_limits(tensors) if activation == "gpt_oss" else tensors
    assert_gated_parity(tensors, "cuda", activation, save)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "d", "hidden", "out"), [(65, 72, 200, 136), (129, 8, 128, 64), (300, 64, 264, 64), (257, 96, 384, 48)]
)
def test_sizes(hopper, rows, d, hidden, out, dtype):
    assert_gated_parity(make(hopper, rows, d, hidden, dtype, out=out, residual=True), "cuda")


def test_many_tiles(hopper):
    """More tiles than CTAs, in two dimensions, none of them whole, and more rows than a group of tiles has."""
    assert_gated_parity(make(hopper, 397, 200, 712, torch.bfloat16, residual=True), "cuda", "silu", "all")
    assert_gated_parity(make(hopper, 2 * 128 * 9 + 1, 16, 264, torch.bfloat16), "cuda", "gelu_tanh")


@pytest.mark.parametrize("packed", ["halves", "pairs"])
@pytest.mark.parametrize("bias", [(), ("gate_bias",), ("up_bias",), ("down_bias",)], ids=str)
def test_biases_and_packed_weights(hopper, bias, packed):
    tensors = make(hopper, 50, 64, 136, torch.bfloat16, packed=packed)
    given = {name: t if name in bias or not name.endswith("bias") else None for name, t in tensors.items()}
    launch = cuda_library.Launch.__call__
    with mock.patch.object(cuda_library.Launch, "__call__", autospec=True, side_effect=launch) as launch:
        assert_gated_parity(given, "cuda", save="all")
    first = next(call.args for call in launch.call_args_list if call.args[0].name == "gated_mlp_fwd")
    assert [t.data_ptr() for t in first[2:4]] == [given[n].data_ptr() for n in ("gate_weight", "up_weight")]


def test_gradients_only_where_asked(hopper):
    tensors = make(hopper, 40, 64, 128, torch.bfloat16, residual=True)
    for wanted in ({"x", "down_weight"}, *({name} for name in tensors)):
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in wanted)
        for save in ("all", "preact"):
            assert_gated_parity(tensors, "cuda", save=save)


def test_strides(hopper):
    tensors = make(hopper, 30, 64, 128, torch.bfloat16)
    wide = torch.randn(30, 104).to(tensors["x"])
    residual = wide[:, 40:].detach().requires_grad_()
    assert_gated_parity({**tensors, "x": wide[:, 8:72].detach().requires_grad_(), "residual": residual}, "cuda")
    transposed = tensors["up_weight"].detach().t().contiguous().t().requires_grad_()
    assert_gated_parity({**tensors, "up_weight": transposed}, "cuda")
    out = gk.gated_mlp(**tensors, backend="cuda")
    for dout in (torch.ones_like(out[:1, :1]).expand_as(out), torch.ones(30, 67).to(out)[:, 3:]):
        grads = torch.autograd.grad(out, tensors["up_bias"], dout, retain_graph=True)
        assert torch.equal(grads[0], torch.autograd.grad(out, tensors["up_bias"], dout.clone(), retain_graph=True)[0])


def test_no_rows(hopper):
    tensors = make(hopper, 0, 64, 128, torch.float16, residual=True)
    gk.gated_mlp(**tensors, backend="cuda").sum().backward()
    assert all(bool((t.grad == 0).all()) for t in tensors.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": lambda t: t.float()}, "takes float16 and bfloat16"),
        ({"x": lambda t: torch.zeros(30, 68).to(t)[:, :64]}, "x has a stride of 68 elements"),
        ({"gate_weight": lambda t: torch.zeros(128, 68).to(t)[:, :64]}, "gate_weight has a stride of 68 elements"),
        ({"up_weight": lambda t: torch.zeros(129 * 64).to(t)[4:-60].view(128, 64)}, "up_weight does not start at"),
        ({"up_weight": lambda t: t[:1].expand_as(t)}, "up_weight has a stride of 0 elements"),
        ({n: lambda t: t[:, :60] for n in ("x", "gate_weight", "up_weight")}, "multiples of 8, not 60, 128, 64"),
    ],
)
def test_says_what_it_does_not_take(hopper, change, words):
    tensors = make(hopper, 30, 64, 128, torch.bfloat16, bias=False)
    tensors |= {name: edit(tensors[name].detach()) for name, edit in change.items()}
    if tensors["x"].dtype == torch.float32:
        tensors = {name: t if t is None else t.float() for name, t in tensors.items()}
    with pytest.raises(gk.UnsupportedError, match=words):
        gk.gated_mlp(**tensors, backend="cuda")


def test_every_schedule_gives_the_same(library):
    """Several tiles for each cluster, up to 15 steps each: the ring of 3 stages goes round several times."""
    if simulator.cuda_unavailable():
        skip_without_library(simulator.cuda_unavailable())
    tensors = make(CPU, 290, 920, 264, torch.bfloat16, residual=True)
    dout, expected = torch.randn(290, 920).bfloat16(), None
    for seed in range(8):
        with simulator.use(arch=90, seed=seed):
            out = gk.gated_mlp(**tensors, backend="cuda")
            results = (out, *torch.autograd.grad(out, tuple(tensors.values()), dout))
        expected = expected or results
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), seed


@pytest.mark.parametrize("backward", [False, True])
def test_counters(library, backward):
    """Tensor-core FLOPs are those of the products, everything is copied once, and shared memory has no conflicts."""
    if simulator.cuda_unavailable():
        skip_without_library(simulator.cuda_unavailable())
    import ptxemu.cuda

    M, N, K = 512, 768, 256
    a, gate, up = torch.randn(M, K).bfloat16(), *torch.randn(2, M, N).bfloat16()
    outs = tuple(torch.empty(3, M, N).bfloat16())
    with simulator.use(arch=90), ptxemu.cuda.use() as device:
        if backward:
            weight = torch.randn(K, N).bfloat16()
            launch, parts = cuda_kernels.grads_launch(a, weight, "silu")
            launch(a, weight, gate, up, *outs, torch.empty(parts))
        else:
            both = torch.randn(2 * N, K).bfloat16()
            call = cuda_kernels.GatedMlpCall(a, both[::2], both[1::2], None, None, both, None, None, "silu", "all")
            cuda_kernels.gate_and_up_launch(call, a, both[::2], both[1::2])(a, both[::2], both[1::2], None, None, *outs)
        stats = device.last_stats()
    products = 1 if backward else 2
    assert stats.tensor_flops == products * 2 * M * N * K
    assert stats.shared_wavefronts == stats.shared_ideal_wavefronts
    assert stats.local_bytes == 0
    assert stats.tma_store_bytes == 3 * M * N * 2
    # Counted where they arrive: what two CTAs share counts for both.
    tiles = products * (M // 128) * (N // 256)
    assert stats.tma_load_bytes == tiles * K * 2 * (128 + 256) + backward * 2 * M * N * 2


PLANTED = {
    "gate and up swapped": Place(
        "mlp_kernel.cuh", "Epilogue::kGatedTile && share > 0", "Epilogue::kGatedTile && share == 0"
    ),
    "up's bias lost": Place("mlp_epilogue.cuh", "if (Gated) load<kWords / 2, kWords>(args.up_bias, column, args.N);"),
    "clamp lost": Place("mlp_activation.cuh", "up < -kLimit ? -kLimit : up", "up"),
    "half a tile off": Place("mlp_epilogue.cuh", "rows.column += MlpTraits::kColumns / 2;"),
    "side_out overwritten": Place("mlp_epilogue.cuh", "boxes.template wait_stored<1>();", "__syncwarp();"),
    "gate overwritten": Place(
        "mlp_epilogue.cuh", "boxes.template wait_stored<MlpTraits::kBoxes - 1>();", "__syncwarp();"
    ),
}


def test_planted_bugs_are_caught(library, tmp_path):
    assert_caught(tmp_path, "gated_mlp", PLANTED)
