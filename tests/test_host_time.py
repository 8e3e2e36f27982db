"""What a call like one before costs the host: a count of function calls, which no other work on the machine changes."""

import sys
import weakref
from unittest import mock

import pytest
import torch
from conftest import skip_without_library

import gptkernels as gk
from gptkernels import dispatch, remembered, simulator
from gptkernels.remembered import Memory, likeness

if simulator.unavailable():
    pytest.skip(simulator.unavailable(), allow_module_level=True)


def leaf(*shape):
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()


NORM = leaf(6, 64), leaf(64), leaf(64)
HEADS = [leaf(1, 2, 20, 32) for _ in range(3)]
LAYERS = leaf(16, 64), leaf(128, 64), leaf(128), leaf(64, 128), leaf(64)
GATED = leaf(16, 64), leaf(128, 64), leaf(128, 64), leaf(64, 128)
CACHE = torch.randn(2, 2, 64, 32).bfloat16()
LENGTHS = torch.full((2,), 9, dtype=torch.int32)
OPS = {
    "layer_norm": lambda backend: gk.layer_norm(*NORM, backend=backend),
    "rms_norm": lambda backend: gk.rms_norm(*NORM[:2], backend=backend),
    "attention": lambda backend: gk.attention(*HEADS, backend=backend),
    "banded": lambda backend: gk.attention(*HEADS, window=7, backend=backend),
    "mlp": lambda backend: gk.mlp(*LAYERS, backend=backend),
    "gated_mlp": lambda backend: gk.gated_mlp(*GATED, backend=backend),
    "decode": lambda backend: gk.decode_attention(CACHE[:, :, :1], CACHE, CACHE, LENGTHS, backend=backend),
}
# Of Python and C functions, forward and backward: a quarter above what they were. Before anything was remembered
# attention made 400 and 700.
MOST_CALLS = {
    ("layer_norm", "cuda"): (80, 106),
    ("layer_norm", "triton"): (104, 141),
    ("rms_norm", "cuda"): (81, 109),
    ("rms_norm", "triton"): (102, 140),
    ("attention", "cuda"): (135, 190),
    ("attention", "triton"): (148, 272),
    ("banded", "cuda"): (139, 191),
    ("banded", "triton"): (150, 272),
    ("mlp", "cuda"): (154, 136),
    ("mlp", "triton"): (246, 178),
    ("gated_mlp", "cuda"): (155, 129),
    ("gated_mlp", "triton"): (214, 156),
    ("decode", "triton"): (140,),
}


def calls_of(run) -> int:
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(("op", "backend"), MOST_CALLS)
def test_calls(op, backend):
    if backend == "cuda" and simulator.cuda_unavailable():
        skip_without_library(simulator.cuda_unavailable())
    with simulator.use(arch=90, idle=True):
        out = OPS[op](backend)
        grad = torch.randn_like(out)
        counts = [calls_of(lambda: OPS[op](backend))]
        if out.requires_grad:
            out.backward(grad, retain_graph=True)
            counts.append(calls_of(lambda: out.backward(grad, retain_graph=True)))
    assert all(count <= most for count, most in zip(counts, MOST_CALLS[op, backend], strict=True)), counts


def test_a_call_like_one_before_is_not_decided_again():
    x, weight = (t.detach() for t in NORM[:2])
    with mock.patch.object(dispatch, "choose", wraps=dispatch.choose) as choose, simulator.use(arch=90):
        for _ in range(3):
            gk.layer_norm(x, weight, backend="triton")
        assert choose.call_count == 1
        gk.layer_norm(x, weight, backend="eager")
        gk.layer_norm(x[:3], weight, backend="triton")
        assert choose.call_count == 3
        with pytest.raises(TypeError, match="eps must be a number, not bool"):
            gk.layer_norm(x, weight, eps=True, backend="triton")
    with pytest.raises(gk.UnsupportedError, match="triton: runs on CUDA tensors"):  # there is no simulator any more
        gk.layer_norm(x, weight, backend="triton")


def test_alignment_is_part_of_what_is_alike():
    """Of rows that start elsewhere: what was compiled for the first would read them wrong."""
    memory, weight = torch.randn(9, 80).bfloat16(), torch.ones(64).bfloat16()
    with simulator.use(arch=90):
        for start in (0, 1, 8, 3):
            rows = memory[:, start : start + 64]
            found = gk.layer_norm(rows, weight, backend="triton")
            torch.testing.assert_close(found, torch.layer_norm(rows.float(), (64,)).bfloat16(), rtol=2e-2, atol=2e-2)


def test_what_is_alike():
    x = torch.randn(4, 8)
    assert likeness((x, 1, None)) == likeness((torch.zeros(4, 8), 1, None))
    different = [x.T, x[:2], x.half(), x.to("meta"), x.flatten()[1:25].view(4, 6), None, 1, 1.0, True, "1"]
    assert len({likeness((value,)) for value in [x, *different]}) == 1 + len(different)
    for value in (x.to_sparse(), [x], object(), torch.empty(0).as_subclass(Subclass)):
        assert likeness((value,)) is None
    outside = likeness((x,))
    with torch.autocast("cpu", torch.bfloat16):
        assert likeness((x,)) != outside
    with simulator.use(arch=80):
        assert likeness((x,)) != outside
    under = []
    for device in ("cpu", "cuda"):  # to the same dtype, and not of the same tensors
        usual = torch.get_autocast_dtype(device)
        torch.set_autocast_dtype(device, torch.bfloat16)
        torch.set_autocast_enabled(device, True)
        under.append(likeness((x,)))
        torch.set_autocast_enabled(device, False)
        torch.set_autocast_dtype(device, usual)
    assert under[0] != under[1]


class Subclass(torch.Tensor):
    pass


def test_memories_are_small_and_hold_no_tensor():
    memory = Memory()
    for i in range(remembered.MOST_REMEMBERED + 5):
        memory.keep((i,), i)
    assert len(memory) == 5
    memory.keep(None, "of a call that cannot be told")
    assert len(memory) == 5
    x = torch.randn(40, 64).bfloat16()
    alive = weakref.ref(x)
    with simulator.use(arch=90):
        gk.attention(*[x.view(1, 1, 40, 64)] * 3, backend="triton")
        gk.mlp(x, x[:, :], None, x.T.contiguous(), None, backend="triton")
    del x
    assert alive() is None
    remembered.forget()
    assert not memory
