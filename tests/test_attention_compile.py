"""Every launch-table row of attention compiles for each architecture: no spills, shared memory within limits, and the
matrix instructions meant. No GPU."""

import itertools

import pytest
import torch
from compile_gate import SHARED_LIMIT, assert_within_limits, compiled_launches

from gptkernels import simulator
from gptkernels.launch import ARCHS, shipped
from gptkernels.ops.attention import triton_kernels
from gptkernels.ops.attention.decode import triton_kernels as decode_kernels
from gptkernels.ops.attention.record import AttentionCall, DecodeCall
from gptkernels.ops.attention.triton_launch import head_parts, launch_row
from gptkernels.ops.attention.visibility import sides

if simulator.unavailable():
    pytest.skip(simulator.unavailable(), allow_module_level=True)

KERNELS = {"attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel"}
HEAD_SIZES = [16, 32, 40, 64, 80, 96, 128, 160, 256]
FIRST_CLASS = (64, 80, 96, 128)


def launch(head_size, dtype, window, layout="plain"):
    q, k, v, out, dout = torch.empty(5, 1, 2, 256, head_size, dtype=dtype)
    lse, cu_seqlens = torch.empty(1, 2, 256), None
    if layout == "one head for all":
        # A stride of 0, which TMA cannot address.
        q, k, v, dout = (x[:, :1].expand_as(x) for x in (q, k, v, dout))
    elif layout == "packed":
        q, k, v, out, dout = (x[0].transpose(0, 1) for x in (q, k, v, out, dout))
        lse, cu_seqlens = lse[0], torch.empty(3, dtype=torch.int32)
    left, right = sides(True, window)
    call = AttentionCall(q, k, v, cu_seqlens=cu_seqlens, left=left, right=right, scale=0.1)
    triton_kernels.attention_fwd(call)
    triton_kernels.attention_bwd(call, dout, out, lse)


def test_every_row_is_compiled_here():
    for arch, (size, suffix) in itertools.product(ARCHS, ((2, ""), (4, "_float32"))):
        parts = [head_parts(head_size, size) for head_size in HEAD_SIZES if size == 2 or head_size <= 128]
        rows = {part1 + part1 // 2 if part2 else part1 for part1, part2 in parts}
        for kernel in ("attention_fwd", "attention_dq", "attention_dkdv"):
            assert set(shipped(arch)[kernel + suffix]) == rows, (arch, kernel)
            assert size == 4 or set(shipped(arch).get(f"{kernel}_tma", ())) <= rows


def windows(arch, bits, head_size):
    """Dense and banded differ in little. Where it matters most both are compiled, else the banded one, which is what
    test_head_sizes of test_attention.py runs: what either compiles is in Triton's cache for the other."""
    if bits == 16 and head_size in {90: FIRST_CLASS, 100: (128,)}.get(arch, (64, 128)):
        return (100, None)
    return (None,) if arch == 100 and head_size not in FIRST_CLASS else (100,)


def same_rows(head_size, bits):
    """Whether 8.9 has the rows of 8.0 for these heads"""
    return all(
        launch_row(kernel, 89, bits // 8, head_size, False) == launch_row(kernel, 80, bits // 8, head_size, False)
        for kernel in ("fwd", "dq", "dkdv")
    )


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_attention(arch, bits, head_size):
    if head_size not in (16, 32, 64, 128) and bits == 32:
        pytest.skip("float32 heads up to 128 are padded to a power of two; larger ones are not supported")
    dtype = torch.float32 if bits == 32 else torch.bfloat16  # which takes more registers than float16
    if arch == 100 and triton_kernels.OLD_TRITON and 128 < head_size <= 192:
        pytest.skip("Triton before 3.8 fails to compile them, and unsupported() says so")
    if arch == 89 and same_rows(head_size, bits):
        # The same programs as for 8.0, compiled there, if only they fit.
        with compiled_launches(80) as launches:
            launch(head_size, dtype, 100)
        assert all(compiled.shared <= SHARED_LIMIT[89] for compiled in launches)
        return
    with compiled_launches(arch) as launches:
        for window in windows(arch, bits, head_size):
            launch(head_size, dtype, window)
    assert {compiled.kernel for compiled in launches} == KERNELS
    for compiled in launches:
        assert_within_limits(compiled)
        if arch == 80:
            assert "mma.sync" in compiled.ptx, f"{compiled.kernel} does not use tensor cores"
        if arch == 90 and bits == 16 and head_size in FIRST_CLASS:
            assert "wgmma.mma_async" in compiled.ptx, f"{compiled.kernel} does not use wgmma"
            assert compiled.machine_code.count("UTMALDG") > 0, f"{compiled.kernel} does not load with TMA"
        elif bits == 16 and head_size in (64, 128):
            wide = "cp.async.cg.shared.global"
            assert wide in compiled.ptx, f"{compiled.kernel} does not copy 16 bytes at a time in the background"


@pytest.mark.parametrize(
    ("head_size", "option"),
    [(64, "sinks"), (128, "alibi_slopes"), (256, "softcap")],
    ids=["gpt-oss", "BLOOM", "Gemma 2"],
)
@pytest.mark.parametrize("arch", [90, 100])
def test_options(arch, head_size, option):
    """With lse's gradient, and keys on both sides"""
    q, k, v, out, dout = torch.empty(5, 1, 2, 256, head_size, dtype=torch.bfloat16)
    lse, options = torch.empty(1, 2, 256), {option: 50.0 if option == "softcap" else torch.empty(2)}
    call = AttentionCall(q, k, v, left=100, right=20, scale=0.1, return_lse=True, **options)
    with compiled_launches(arch) as launches:
        triton_kernels.attention_fwd(call)
        triton_kernels.attention_bwd(call, dout, out, lse, lse)
    assert {compiled.kernel for compiled in launches} == KERNELS
    for compiled in launches:
        assert_within_limits(compiled)


@pytest.mark.parametrize("layout", ["one head for all", "packed"])
@pytest.mark.parametrize("head_size", [16, 32, 40, 64, 96, 128, 160, 256])  # one for each row
def test_what_tma_cannot_address(head_size, layout):
    """On 9.0, where other rows than those of test_attention serve it: pointers load, forward or backward or both."""
    with compiled_launches(90) as launches:
        launch(head_size, torch.float16, 100 if head_size in (64, 128) else None, layout)
    assert {compiled.kernel for compiled in launches} == KERNELS
    for compiled in launches:
        assert_within_limits(compiled)
        with_tma = layout == "packed" and compiled.kernel == "attention_fwd_kernel" and head_size < 256
        assert ("cp.async.bulk.tensor" in compiled.ptx) == with_tma, compiled.kernel


@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_decode(arch, head_size):
    with compiled_launches(arch) as launches:
        for dtype in (torch.float16, torch.float32):
            q, cache = torch.empty(1, 8, 1, head_size, dtype=dtype), torch.empty(1, 2, 4096, head_size, dtype=dtype)
            lengths = torch.empty(1, dtype=torch.int32)
            for window in (None, 1024):
                decode_kernels.decode_attention_fwd(DecodeCall(q, cache, cache, lengths, window=window, scale=0.1))
    assert_decodes_within_limits(launches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_decode_options(arch, dtype):
    """gpt-oss's pages and sinks with Gemma 2's softcap and a padded row: all that the kernels can do at once"""
    with compiled_launches(arch) as launches:
        for head_size in (64, 256):
            q, pages = torch.empty(1, 8, 1, head_size, dtype=dtype), torch.empty(64, 2, 64, head_size, dtype=dtype)
            row = torch.empty(1, dtype=torch.int32)
            call = DecodeCall(q, pages, pages, row, torch.empty(1, 64, dtype=torch.int32), torch.empty(8, dtype=dtype))
            call.key_start, call.window, call.scale, call.softcap = row, 1024, 0.1, 50.0
            decode_kernels.decode_attention_fwd(call)
    assert_decodes_within_limits(launches)


def assert_decodes_within_limits(launches):
    kernels = {"decode_attention_fwd_kernel", "decode_attention_combine_kernel"}
    assert {compiled.kernel for compiled in launches} == kernels
    for compiled in launches:
        assert_within_limits(compiled)
        assert not compiled.machine_code.spilled_bytes, f"{compiled.kernel} spills"


def test_decode_compiles_once():
    """A conversation waits for no kernel after the first: whatever the batch, tokens, capacity, window and splits."""
    sizes = itertools.product((1, 3, 8), (1, 2, 5, 16), (40, 4096), (None, 24))
    with compiled_launches(90) as launches:
        for batch, tokens, capacity, window in sizes:
            q, cache = torch.empty(batch, 8, tokens, 64).half(), torch.empty(batch, 2, capacity, 64).half()
            lengths = torch.empty(batch, dtype=torch.int32)
            decode_kernels.decode_attention_fwd(DecodeCall(q, cache, cache, lengths, window=window, scale=0.1))
    assert len({launch.ptx for launch in launches}) == 2
    assert len(launches) > 48


def test_what_an_older_triton_fails_to_compile_is_refused(monkeypatch):
    """On 10.0 alone; `auto` goes on to what runs."""
    monkeypatch.setattr(triton_kernels, "OLD_TRITON", True)
    cases = (100, 160, True), (100, 192, True), (100, 128, False), (100, 200, False), (90, 160, False)
    for arch, head_size, refused in cases:
        q = torch.empty(1, 1, 8, head_size).half()
        with simulator.use(arch):
            reason = triton_kernels.unsupported(AttentionCall(q, q, q))
        assert (reason is not None and "fails to compile" in reason) == refused


def test_rows_are_powers_of_two():
    for arch in ARCHS:
        for head_size in range(16, 257):
            for kernel in ("fwd", "dq", "dkdv"):
                for size in (2, 4) if head_size <= 128 else (2,):
                    for addressable in (False, True):
                        row = launch_row(kernel, arch, size, head_size, addressable)
                        assert all(row[name] & (row[name] - 1) == 0 for name in ("BLOCK_M", "BLOCK_N", "num_warps"))
