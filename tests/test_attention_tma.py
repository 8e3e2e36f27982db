"""Attention in Triton where TMA loads, and where it cannot: on 9.0 in the simulator. tests/test_attention.py runs all
else there as well."""

import pytest
import torch
from test_attention import assert_attention_parity, key_start, make, make_packed

from gptkernels import simulator
from gptkernels.ops.attention import attention, triton_kernels

if simulator.unavailable():
    pytest.skip(simulator.unavailable(), allow_module_level=True)

KERNELS = ("attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel")
HERE = type("Here", (), {"device": torch.device("cpu")})


class Watched:
    """A kernel that notes how many bytes TMA loaded for it."""

    def __init__(self, kernel, driver, loaded, name):
        self.kernel, self.driver, self.loaded, self.name = kernel, driver, loaded, name

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.kernel[grid](*args, **options)
            self.loaded[self.name] = self.driver.last_launch.stats.tma_load_bytes

        return launch


@pytest.fixture(params=[0, 1], ids="seed{}".format)
def loaded(request, monkeypatch):
    """{kernel: bytes that TMA loaded in its last launch}"""
    found = {}
    with simulator.use(90, request.param) as driver:
        for name in KERNELS:
            monkeypatch.setattr(triton_kernels, name, Watched(getattr(triton_kernels, name), driver, found, name))
        yield found


def with_tma(loaded):
    """fwd, dq, dkdv"""
    return [loaded[name] > 0 for name in KERNELS]


@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
@pytest.mark.parametrize(
    ("causal", "window", "dtype"),
    [(True, None, torch.bfloat16), (True, 70, torch.bfloat16), (False, 40, torch.float16)],
    ids=str,
)
def test_parity(loaded, head_size, dtype, causal, window):
    tensors = make(HERE, 131, 173, batch=2, heads=2, kv_heads=1, head_size=head_size, dtype=dtype)
    assert_attention_parity(tensors, "triton", causal=causal, window=window)
    assert with_tma(loaded) == [True] * 3


@pytest.mark.parametrize("head_size", [64, 80])
def test_views(loaded, head_size):
    """Packed qkv both ways, and every other token."""
    dtype = torch.bfloat16
    qkv = torch.randn(2, 90, 3, 2, head_size, dtype=dtype)
    views = [
        qkv.permute(2, 0, 3, 1, 4).unbind(0),
        torch.randn(2, 3, 2, 90, head_size, dtype=dtype).unbind(1),
        [x[:, :, ::2, 8 : head_size + 8] for x in torch.randn(3, 1, 2, 180, head_size + 16, dtype=dtype)],
    ]
    for q, k, v in views:
        tensors = {name: x.detach().requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))}
        assert_attention_parity(tensors, "triton", window=40)
        assert with_tma(loaded) == [True] * 3


def test_one_row_of_any_stride(loaded):
    """The stride of a dimension of size 1 says nothing."""
    q, k, v = (x.as_strided((1, 1, 90, 64), (3, 5, 64, 1)) for x in torch.randn(3, 90 * 64).half())
    tensors = {name: x.detach().requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))}
    assert_attention_parity(tensors, "triton")
    assert with_tma(loaded) == [True] * 3


@pytest.mark.parametrize("window", [None, 20])
def test_padding(loaded, window):
    """Forward takes padding in and cleans up if it is not finite; queries' gradients load by pointer."""
    tensors = make(HERE, 100, batch=3, kv_heads=1)
    tensors["key_start"] = key_start(HERE, 0, 37, 100)
    assert_attention_parity(tensors, "triton", window=window)
    assert with_tma(loaded) == [True, False, True]
    before = attention(**tensors, window=window, backend="triton")
    spoiled = {name: tensors[name].detach().clone() for name in ("q", "k", "v")}
    for name, value in (("k", float("inf")), ("v", float("nan"))):
        spoiled[name][1, :, :37], spoiled[name][2] = value, value
    spoiled = {name: x.requires_grad_() for name, x in spoiled.items()}
    after = attention(**spoiled, key_start=tensors["key_start"], window=window, backend="triton")
    assert torch.equal(before, after)
    for grads in zip(
        torch.autograd.grad(before.float().square().sum(), [tensors[name] for name in ("q", "k", "v")]),
        torch.autograd.grad(after.float().square().sum(), spoiled.values()),
        strict=True,
    ):
        assert torch.equal(*grads)


@pytest.mark.parametrize("causal", [True, False])
def test_documents_keep_to_themselves(loaded, causal):
    """Also where a neighbour is NaN, and where only its values are."""
    tensors = make_packed(HERE, [70, 50, 40], kv_heads=1)
    assert_attention_parity(tensors, "triton", causal=causal)
    assert with_tma(loaded) == [True, False, False]

    def results(arguments):
        out = attention(**arguments, causal=causal, backend="triton")
        grads = torch.autograd.grad(out, [arguments[name] for name in ("q", "k", "v")], cotangent)
        return [torch.cat((x[:70], x[120:])) for x in (out, *grads)]

    cotangent = torch.randn(160, 2, 64).half()
    expected = results(tensors)
    for names in (("q", "k", "v"), ("v",)):
        spoiled = {name: x.detach().clone() for name, x in tensors.items()}
        for name in names:
            spoiled[name][70:120] = float("nan")
            spoiled[name].requires_grad_()
        spoiled = {name: x if name == "cu_seqlens" else x.requires_grad_() for name, x in spoiled.items()}
        for a, b in zip(expected, results(spoiled), strict=True):
            assert torch.equal(a, b)


def unaddressable():
    """(q, k, v) that TMA cannot read: a start that is not at 16 bytes, rows that are not, one head for all."""
    yield "start", [x[..., 1:65] for x in torch.randn(3, 1, 2, 90, 72).half()]
    yield "rows", [x[..., :64] for x in torch.randn(3, 1, 2, 90, 65).half()]
    yield "expanded", [x.expand(1, 2, 90, 64) for x in torch.randn(3, 1, 1, 90, 64).half()]


@pytest.mark.parametrize(("problem", "qkv"), list(unaddressable()), ids=lambda x: x if isinstance(x, str) else "")
def test_pointers_load_what_tma_cannot(loaded, problem, qkv):
    tensors = {name: x.detach().requires_grad_() for name, x in zip("qkv", qkv, strict=True)}
    assert_attention_parity(tensors, "triton", window=50)
    assert with_tma(loaded) == [False] * 3
    # Keys decide forward and for queries' gradients, queries for keys' and values'.
    tensors["q"] = tensors["q"].detach().contiguous().requires_grad_()
    assert_attention_parity(tensors, "triton", window=50, cotangents=[torch.randn(1, 2, 90, 64).half()])
    assert with_tma(loaded) == [False, False, True]


def test_float32_and_older_gpus_load_by_pointer():
    for arch, dtype in ((90, torch.float32), (80, torch.float16)):
        found = {}
        with simulator.use(arch) as driver, pytest.MonkeyPatch.context() as patch:
            for name in KERNELS:
                patch.setattr(triton_kernels, name, Watched(getattr(triton_kernels, name), driver, found, name))
            assert_attention_parity(make(HERE, 70, dtype=dtype), "triton")
        assert with_tma(found) == [False] * 3
