"""What the CUDA launchers ask of the driver: calls per pass, contexts of new threads, old drivers, whose errors."""

import ctypes
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import skip_without_library

import gptkernels as gk
from gptkernels import cuda_library, hardware, remembered, simulator
from gptkernels.ops.attention import cuda_kernels as attention_kernels
from gptkernels.ops.attention.record import AttentionCall
from gptkernels.ops.mlp import cuda_kernels as mlp_kernels

if simulator.unavailable():
    pytest.skip(simulator.unavailable(), allow_module_level=True)
if simulator.cuda_unavailable():
    skip_without_library(simulator.cuda_unavailable())

import ptxemu.cuda


def leaves(*shapes):
    return [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]


def attention(**options):
    return lambda: gk.attention(*leaves(*[(1, 2, 140, 64)] * 3), backend="cuda", **options)


def layer_norm():
    return gk.layer_norm(*leaves((9, 128), (128,), (128,)), backend="cuda")


def rms_norm():
    return gk.rms_norm(*leaves((9, 128), (128,)), backend="cuda")


def mlp():
    return gk.mlp(*leaves((40, 64), (128, 64), (128,), (64, 128), (64,)), backend="cuda")


def gated_mlp():
    return gk.gated_mlp(*leaves((40, 64), (128, 64), (128, 64), (64, 128)), backend="cuda")


def loss():
    x, weight = leaves((20, 64), (100, 64))
    return gk.linear_cross_entropy(x, weight, torch.zeros(20, dtype=torch.long), backend="cuda")


OPS = {
    "attention": attention(),
    "banded": attention(window=50),
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "mlp": mlp,
    "gated_mlp": gated_mlp,
    "linear_cross_entropy": loss,
}


@pytest.fixture
def device():
    with simulator.use(arch=90), ptxemu.cuda.use() as device:
        cuda_library._driver_too_old.cache_clear()
        yield device
    cuda_library._driver_too_old.cache_clear()


# Launches forward and backward. The loss computes its gradient in the forward pass; the MLP's products are two a pass,
# of which backward leaves those of the weights to cuBLAS.
LAUNCHES = {"attention": (1, 3), "banded": (1, 3), "layer_norm": (1, 2), "rms_norm": (1, 2), "mlp": (2, 1)}
LAUNCHES |= {"gated_mlp": (2, 1), "linear_cross_entropy": (1, 0)}


@pytest.mark.parametrize("op", OPS)
def test_calls_to_the_driver(device, op):
    OPS[op]().sum().backward()  # the first time, kernels are told how much shared memory they may have
    before = device.calls()
    out = OPS[op]()
    between = device.calls()
    out.sum().backward()
    forward, backward = LAUNCHES[op]
    assert between - before == {"launches": forward, "memsets": 0, "copies": 0, "attributes": 0}
    assert device.calls() - between == {"launches": backward, "memsets": 0, "copies": 0, "attributes": 0}


def in_a_new_thread(work):
    """Of a thread that has no context yet"""
    results = []

    def run():
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


@pytest.mark.parametrize("op", OPS)
def test_a_new_thread_needs_no_context_of_its_own(device, op):
    """Such as autograd's, whose first work with CUDA may be our backward."""
    out = in_a_new_thread(OPS[op])
    in_a_new_thread(lambda: out.sum().backward())


def test_the_simulated_driver_insists_on_a_context(device):
    """Without it the test above would prove nothing."""
    driver = ctypes.CDLL("libcudart.so.13")
    encode = ctypes.c_void_p()
    assert not driver.cudaGetDriverEntryPoint(b"cuTensorMapEncodeTiled", ctypes.byref(encode), ctypes.c_uint64(0), None)
    assert in_a_new_thread(lambda: ctypes.CFUNCTYPE(ctypes.c_int)(encode.value)()) == 201


def test_an_older_driver_is_refused_by_name():
    reason = "the driver is for CUDA 12.8, the CUDA library was built with " + cuda_library.toolkit_version()
    x, weight = leaves((9, 128), (128,))
    with simulator.use(arch=90), ptxemu.cuda.use(driver_version=12080):
        cuda_library._driver_too_old.cache_clear()
        try:
            for op in OPS.values():
                with pytest.raises(gk.UnsupportedError) as error:
                    op()
                assert reason in str(error.value)
            with mock.patch("gptkernels.dispatch.candidates", return_value=("cuda", "triton", "eager")):
                choice = gk.explain(gk.layer_norm, x, weight)
                gk.layer_norm(x, weight).sum().backward()
        finally:
            cuda_library._driver_too_old.cache_clear()
    assert choice.backend == "triton"
    assert reason in choice.reasons["cuda"]


def test_amd_gpus_are_no_hopper(monkeypatch):
    """PyTorch for ROCm calls them cuda, with compute capabilities such as 9.4."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    gpu = torch.device("cuda", 0)
    assert hardware.arch(gpu) == 0
    assert "this is PyTorch for ROCm" in hardware.triton_unsupported(gpu)
    assert "this is PyTorch for ROCm" in cuda_library.unsupported(gpu, only_arch=90)


def test_a_driver_of_the_same_major_version_is_enough(device):
    with mock.patch.object(cuda_library, "load") as load:
        for library, driver, refused in ((13020, 13000, False), (13000, 14000, False), (13000, 0, True)):
            load().cuda_version, load().driver_version = library, lambda driver=driver: driver
            cuda_library._driver_too_old.cache_clear()
            assert bool(cuda_library.driver_too_old()) == refused
    assert "no CUDA driver" in cuda_library.driver_too_old()


def test_without_a_cuda_runtime_auto_goes_on(tmp_path, monkeypatch):
    """The library as it is where there is no libcudart: a copy that asks for one which nobody has."""
    library = tmp_path / "_cuda.so"
    library.write_bytes(Path(cuda_library.load().__file__).read_bytes().replace(b"libcudart.so.13", b"libcudart.so.99"))
    monkeypatch.setattr(cuda_library.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda_library.cuda_build, "cached_libraries", lambda: [library])
    cuda_library._find.cache_clear()
    try:
        assert "_cuda.so does not load: libcudart.so.99: cannot open" in cuda_library.missing()
        x, weight = leaves((9, 128), (128,))
        with simulator.use(arch=90), mock.patch("gptkernels.dispatch.candidates", return_value=("cuda", "triton")):
            choice = gk.explain(gk.layer_norm, x, weight)
    finally:
        monkeypatch.undo()
        cuda_library._find.cache_clear()
    assert choice.backend == "triton"
    assert "libcudart.so.99" in choice.reasons["cuda"]


def test_a_library_of_other_sources_does_not_hide_the_right_one(tmp_path):
    right, stale = Path(cuda_library.load().__file__), tmp_path / "_cuda.so"
    source_hash = cuda_library.cuda_build.source_hash()
    stale.write_bytes(right.read_bytes().replace(source_hash.encode(), b"0" * len(source_hash)))
    assert [cuda_library.load_file(path).source_hash for path in (stale, right)] == ["0" * 16, source_hash]


def test_an_error_of_another_library_is_not_ours(device):
    runtime = ctypes.CDLL("libcudart.so.13")
    assert runtime.cudaSetDevice(7) == 101
    for op in OPS.values():
        op().sum().backward()
    assert runtime.cudaPeekAtLastError() == 101, "theirs is still there for them to find"
    runtime.cudaGetLastError()


def test_an_error_of_ours_is_not_left_to_others(device):
    q = torch.randn(1, 1, 70, 64).bfloat16()
    with pytest.raises(RuntimeError, match="attention_fwd: launch of attention_fwd_kernel"):
        launch_with(q, sm_count=0)
    assert ctypes.CDLL("libcudart.so.13").cudaPeekAtLastError() == 0


def launch_with(q, **changes):
    """attention_fwd with other parameters than it would have"""

    def changed(name, device, tensors, numbers):
        return cuda_library.Launch(name, device, tensors, numbers | changes)

    remembered.forget()
    with mock.patch.object(attention_kernels, "Launch", changed):
        return attention_kernels.attention_fwd(AttentionCall(q, q, q, scale=0.125))


def test_errors_name_the_step_and_what_it_was_given(device):
    q = torch.randn(1, 1, 70, 64).bfloat16()
    with pytest.raises(RuntimeError) as error:
        launch_with(q, k=(4480, 4480, 65))
    text = str(error.value)
    assert text.startswith(
        "attention_fwd: cuTensorMapEncodeTiled of k: CUDA_ERROR_INVALID_VALUE (1) for sizes (64, 70, 1, 1)"
    )
    assert "strides in bytes (130, " in text
    x, weight = q[0, 0, :, 1:9], q[0, 0, :16, :8].contiguous()
    launch = mlp_kernels.linear_launch(x, weight, None)
    with pytest.raises(RuntimeError, match=r"mlp_fwd: cuTensorMapEncodeTiled of a: "):
        launch(x, weight, None, None, None, torch.empty(70, 16).bfloat16())


LOSS_TENSORS = ("logits", "targets", "losses", "lse", "scale", "bias", "class_weight", "factors")


def test_fields_are_checked_by_name(device):
    q = torch.randn(1, 1, 70, 64).bfloat16()
    with pytest.raises(KeyError, match="more fields"):
        launch_with(q, unknown=1)
    with pytest.raises(KeyError, match="there is no rows"):
        cuda_library.Launch("cross_entropy", q.device, LOSS_TENSORS, {})
    with pytest.raises(KeyError, match="there is no logits"):
        cuda_library.Launch("cross_entropy", q.device, (), {})
    with pytest.raises(ValueError, match="not the tensors"):
        mlp_kernels.linear_launch(q[0, 0], q[0, 0], None)(q)


def test_the_tile_counter_resets_itself(device):
    """Also after a launch that failed half-way, and with as many launches as one likes."""
    q, k, v = (torch.randn(1, 4, 500, 64).bfloat16() for _ in range(3))
    call = AttentionCall(q, k, v, scale=0.125)
    expected = attention_kernels.attention_fwd(call)
    for _ in range(3):
        for value, truth in zip(attention_kernels.attention_fwd(call), expected, strict=True):
            assert torch.equal(value, truth)
        assert not cuda_library.zeroed_counters(q.device).any()
    cuda_library.zeroed_counters(q.device).fill_(3)
    with pytest.raises(RuntimeError):
        launch_with(q, sm_count=0)
    assert not cuda_library.zeroed_counters(q.device).any()


def test_streams_have_counters_of_their_own(device):
    cpu = torch.device("cpu")
    first = cuda_library.zeroed_counters(cpu)
    with mock.patch.object(hardware, "current_stream", return_value=77):
        assert cuda_library.zeroed_counters(cpu) is not first
    with mock.patch.object(hardware, "current_stream", return_value=2):
        mine = cuda_library.zeroed_counters(cpu)
        assert in_a_new_thread(lambda: cuda_library.zeroed_counters(cpu)) is not mine
    assert cuda_library.zeroed_counters(cpu) is first
