"""The MLP's CUDA kernels: parity, schedules, what the compiler made of them, what they execute, and planted bugs."""

import re
from unittest import mock

import pytest
import sass
import torch
from kernel_variants import source
from mutate_mlp import CPU, assert_caught
from planted import Place
from test_mlp import ACTIVATIONS, assert_mlp_parity, make, transposed

import gptkernels as gk
from gptkernels import cuda_build, cuda_library, hardware, simulator
from gptkernels.ops.mlp import cuda_kernels, outputs


@pytest.fixture
def hopper(anywhere):
    anywhere.require("cuda")
    if anywhere.kind == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    return anywhere


@pytest.fixture
def library():
    reason = simulator.cuda_unavailable()
    if reason and not cuda_build.find_nvcc():
        pytest.skip(reason)
    return cuda_library.load()


@pytest.mark.parametrize("save", ["all", "preact", "input"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_what_is_kept(hopper, activation, save):
    assert_mlp_parity(make(hopper, 33, 64, 256, torch.bfloat16), "cuda", activation, save)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "d", "hidden", "out"),
    [(1, 64, 256, 64), (65, 72, 200, 136), (129, 8, 8, 8), (300, 64, 320, 64), (257, 96, 384, 48)],
)
def test_sizes(hopper, rows, d, hidden, out, dtype):
    assert_mlp_parity(make(hopper, rows, d, hidden, dtype, out=out), "cuda")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_bias_and_residual(hopper, bias, residual):
    for save in ("preact", "input"):
        assert_mlp_parity(make(hopper, 50, 64, 136, torch.float16, bias=bias, residual=residual), "cuda", save=save)


@pytest.mark.parametrize("copies_from", [0, 10**9])
def test_transposed_weights(hopper, copies_from):
    """Copied for the fused kernels, or, for few rows, used by cuBLAS as they are."""
    tensors = transposed(make(hopper, 40, 64, 128, torch.bfloat16, residual=True), "fc_weight", "proj_weight")
    with mock.patch.object(outputs, "COPIES_FROM_ROWS", copies_from):
        for save in ("all", "preact", "input"):
            assert_mlp_parity(tensors, "cuda", save=save)
        launch = cuda_library.Launch.__call__
        with mock.patch.object(cuda_library.Launch, "__call__", autospec=True, side_effect=launch) as launch:
            gk.mlp(**tensors, backend="cuda").sum().backward()
    assert launch.called == (copies_from == 0)


def test_many_tiles(hopper):
    """More tiles than CTAs, in two dimensions, none of them whole, and more rows than a group of tiles has."""
    assert_mlp_parity(make(hopper, 397, 200, 712, torch.bfloat16, residual=True), "cuda", "silu", "all")
    assert_mlp_parity(make(hopper, 2 * 128 * 9 + 1, 16, 264, torch.bfloat16, residual=True), "cuda", "relu2")


def test_gradients_only_where_asked(hopper):
    for wanted in ({"x"}, {"fc_weight"}, {"fc_bias"}, {"proj_weight"}, {"proj_bias"}, {"residual"}):
        tensors = make(hopper, 40, 64, 128, torch.bfloat16, residual=True)
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in wanted)
        for save in ("all", "preact", "input"):
            assert_mlp_parity(tensors, "cuda", save=save)


def test_strides(hopper):
    tensors = make(hopper, 30, 64, 128, torch.bfloat16)
    wide = torch.randn(30, 104).to(tensors["x"])
    residual = wide[:, 40:].detach().requires_grad_()
    assert_mlp_parity({**tensors, "x": wide[:, 8:72].detach().requires_grad_(), "residual": residual}, "cuda")
    transposed = tensors["fc_weight"].detach().t().contiguous().t().requires_grad_()
    assert_mlp_parity({**tensors, "fc_weight": transposed}, "cuda")
    # Gradients of any strides, too.
    out = gk.mlp(**tensors, backend="cuda")
    for dout in (torch.ones_like(out[:1, :1]).expand_as(out), torch.ones(30, 67).to(out)[:, 3:]):
        grads = torch.autograd.grad(out, tensors["fc_bias"], dout, retain_graph=True)
        assert torch.equal(grads[0], torch.autograd.grad(out, tensors["fc_bias"], dout.clone(), retain_graph=True)[0])


def test_no_rows(hopper):
    tensors = make(hopper, 0, 64, 128, torch.float16, residual=True)
    out = gk.mlp(**tensors, backend="cuda")
    assert out.shape == (0, 64)
    out.sum().backward()
    assert all(bool((t.grad == 0).all()) for t in tensors.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": lambda t: t.float()}, "takes float16 and bfloat16"),
        ({"x": lambda t: torch.zeros(30, 72).to(t)[:, 4:68]}, "x does not start at a multiple of 16 bytes"),
        ({"x": lambda t: torch.zeros(30, 68).to(t)[:, :64]}, "x has a stride of 68 elements"),
        ({"x": lambda t: t[:, :60], "fc_weight": lambda t: t[:, :60]}, "multiples of 8, not 60, 128, 64"),
        ({"fc_weight": lambda t: t[:124], "proj_weight": lambda t: t[:, :124]}, "multiples of 8, not 64, 124, 64"),
    ],
)
def test_says_what_it_does_not_take(hopper, change, words):
    tensors = make(hopper, 30, 64, 128, torch.bfloat16, bias=False)
    tensors |= {name: edit(tensors[name].detach()) for name, edit in change.items()}
    if tensors["x"].dtype == torch.float32:
        tensors = {name: t if t is None else t.float() for name, t in tensors.items()}
    with pytest.raises(gk.UnsupportedError, match=words):
        gk.mlp(**tensors, backend="cuda")


def test_one_multiprocessor_is_refused(hopper, monkeypatch):
    monkeypatch.setattr(hardware, "sm_count", lambda device: 1)
    with pytest.raises(gk.UnsupportedError, match="needs 2 multiprocessors"):
        gk.mlp(**make(hopper, 30, 64, 128, torch.bfloat16), backend="cuda")


def test_opcheck(hopper):
    tensors = make(hopper, 12, 64, 128, torch.bfloat16, residual=True)
    arguments = tuple(t.detach() for t in tensors.values())
    torch.library.opcheck(cuda_kernels.mlp_fwd.torch_op, (*arguments, "gelu", "all"))


def test_every_schedule_gives_the_same(library):
    """Three tiles for each cluster, up to 15 steps each: the ring of 3 stages goes round several times."""
    if simulator.cuda_unavailable():
        pytest.skip(simulator.cuda_unavailable())
    tensors = make(CPU, 290, 920, 520, torch.bfloat16, residual=True)
    dout, expected = torch.randn(290, 920).bfloat16(), None
    for seed in range(20):
        with simulator.use(arch=90, seed=seed):
            out = gk.mlp(**tensors, backend="cuda")
            results = (out, *torch.autograd.grad(out, tuple(tensors.values()), dout))
        expected = expected or results
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), seed


@pytest.mark.parametrize("backward", [False, True])
def test_counters(library, backward):
    """Tensor-core FLOPs are those of the tiles, everything is copied once, and shared memory has no conflicts."""
    if simulator.cuda_unavailable():
        pytest.skip(simulator.cuda_unavailable())
    import ptxemu.cuda

    M, N, K = 512, 768, 256
    a = torch.randn(M, K).bfloat16()
    with simulator.use(arch=90), ptxemu.cuda.use() as device:
        if backward:
            weight, preact = torch.randn(K, N).bfloat16(), torch.randn(M, N).bfloat16()
            launch, parts = cuda_kernels.grad_preact_launch(a, weight, "gelu")
            launch(a, weight, preact, torch.empty_like(preact), torch.empty_like(preact), torch.empty(parts))
        else:
            out, preact = torch.empty(2, M, N).bfloat16().unbind()
            weight = torch.randn(N, K).bfloat16()
            cuda_kernels.linear_launch(a, weight, None, "gelu")(a, weight, None, None, preact, out)
        stats = device.last_stats()
    assert stats.tensor_flops == 2 * M * N * K
    assert stats.shared_wavefronts == stats.shared_ideal_wavefronts
    assert stats.local_bytes == 0
    tiles = (M // 128) * (N // 256)
    assert stats.tma_store_bytes == 2 * M * N * 2
    # Counted where they arrive: what two CTAs share counts for both.
    assert stats.tma_load_bytes == tiles * K * 2 * (128 + 256) + backward * M * N * 2


# Two dtypes; no activation forward, five activations in both directions, six of the gated MLP's.
KERNELS = 2 * (1 + 5 + 5 + 6 + 6)


def listing(what: str) -> dict[str, str]:
    """Parts of what cuobjdump says of the library, by kernel"""
    return {name.split("#")[0]: part for name, part in sass.listing(what).items() if "mlp_kernel" in name}


def spills_once_a_tile(name: str) -> bool:
    """Two registers in the epilogue of the gated MLP's gelu_tanh, which no other way of writing it saves"""
    return "MlpGatedBackward" in name and "Activation1E" in name


def test_resources(library):
    resources = listing("--dump-resource-usage")
    assert len(resources) == KERNELS
    for name, text in resources.items():
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
        assert used["STACK"] <= (8 if spills_once_a_tile(name) else 0), name
        assert used["LOCAL"] == 0
        assert used["REG"] <= 168, name


def test_the_instructions_that_are_meant(library):
    sass = listing("--dump-sass")
    assert len(sass) == KERNELS
    for name, text in sass.items():
        for instruction in ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "STSM"):
            assert re.search(rf"\b{instruction}", text), f"{name} has no {instruction}"
        assert "UTMALDG.2D.MULTICAST" in text
        assert not re.search(r"\bHMMA\b", text), name
        # The code of the epilogue follows on that of the products.
        products = text[: text.rindex("HGMMA")]
        assert not re.search(r"\b(LDL|STL)\b", products if spills_once_a_tile(name) else text), name
        # One wait follows the products of a step, one those of a tile: ptxas serialised nothing.
        assert len(re.findall(r"WARPGROUP\.DEPBAR", text)) * 2 <= len(re.findall(r"\bHGMMA", text)), name


# What is removed
SUMS = "named_barrier_sync(kGroup + group, kWarpgroup);"
PLANTED = {
    "full": Place("mlp_kernel.cuh", "mbarrier_wait(place.of(shared.full), place.parity());"),
    "empty": Place("mlp_kernel.cuh", "mbarrier_wait(place.of(shared.empty), place.parity() ^ 1);"),
    "products": Place("mlp_kernel.cuh", "wgmma_wait<0>();"),
    "last tile": Place("mlp_kernel.cuh", "epilogue.finish();"),
    "loaded": Place("mlp_epilogue.cuh", "mbarrier_wait(loaded, place.parity());"),
    "proxy": Place("mlp_epilogue.cuh", "fence_async_proxy();"),
    "stored": Place("mlp_epilogue.cuh", "if (lane == 0) bulk_wait_read<Pending>();"),
    "boxes in use": Place("mlp_epilogue.cuh", "bulk_wait_read();"),
    "sums": Place(
        "mlp_epilogue.cuh",
        "named_barrier_sync(kGroup + group, kWarpgroup);",
        at=source("mlp", "mlp_epilogue.cuh").index(
            "named_barrier_sync(kGroup + group, kWarpgroup);\n        float2 sum"
        ),
    ),
}


def test_planted_bugs_are_caught(library, tmp_path):
    assert_caught(tmp_path, "mlp", PLANTED)
