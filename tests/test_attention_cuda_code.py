"""What the compiler made of the CUDA attention kernels, and what they execute: registers, instructions, bytes."""

import re

import pytest
import sass
import torch
from kernel_variants import Builder, using

from gptkernels import cuda_build, cuda_library, simulator
from gptkernels.ops.attention import cuda_kernels
from gptkernels.ops.attention.record import AttentionCall
from gptkernels.ops.attention.visibility import sides

# Warp instructions per thousand tensor-core FLOPs of FlashAttention-3's own kernels, counted in the same simulator
# (one head of 128, causal): beyond 0.98 an H100 cannot issue them as fast as its tensor cores multiply.
FLASH_ATTENTION_3 = {("fwd", 1024): 0.748, ("fwd", 2048): 0.677, ("bwd", 512): 0.665, ("bwd", 1024): 0.616}


@pytest.fixture
def library():
    reason = simulator.cuda_unavailable()
    if reason and not cuda_build.find_nvcc():
        pytest.skip(reason)
    return cuda_library.load()


def kernels(what: str) -> dict[str, str]:
    """What cuobjdump says of the attention kernels, by name."""
    return {name: part for name, part in sass.listing(what).items() if "attention" in name}


def test_no_kernel_spills(library):
    resources = kernels("--dump-resource-usage")
    assert len(resources) >= 50
    for name, text in resources.items():
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
        assert used["STACK"] == 0, name
        assert used["LOCAL"] == 0, name
        # Launched with what all threads can have alike; setmaxnreg then moves registers to those that multiply.
        limit = 168 if re.search(r"attention_[fb]wd_kernel", name) else 64
        assert used["REG"] <= limit, name


def test_the_instructions_that_are_meant(library):
    code = kernels("--dump-sass")
    main = {name: text for name, text in code.items() if re.search(r"attention_[fb]wd_kernel", name)}
    assert len(main) >= 34
    for name, text in main.items():
        meant = ["HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "SYNCS"]
        for instruction in meant + ["UBLKCP"] * ("attention_bwd_kernel" in name):
            assert re.search(rf"\b{instruction}", text), f"{name} has no {instruction}"
        assert not re.search(r"\b(LDL|STL|HMMA)\b", text), name
        # Every product but the first of a group follows without a wait: one that ptxas serialised would not.
        multiplies = len(re.findall(r"\bHGMMA", text))
        assert len(re.findall(r"WARPGROUP\.DEPBAR", text)) * 3 < multiplies, name


def test_masks_are_bits(library):
    """Moved to predicates seven at a time, where two comparisons for each score would take as many instructions."""
    for name in ("attention_fwd_kernel", "attention_bwd_kernel"):
        for kernel in sass.kernels(name):
            masked, comparisons = kernel.count("FSEL"), kernel.count("ISETP")
            assert kernel.count("R2P") * 8 >= masked * 0.8, kernel.name
            assert comparisons < 180, f"{kernel.name}: {comparisons} comparisons, {masked} selections"


@pytest.mark.parametrize(
    ("name", "scores"),
    [("attention_fwd_kernel", {64: 128, 96: 128, 128: 128, 192: 128, 256: 80}),
     ("attention_bwd_kernel", {64: 64, 96: 32, 128: 32, 256: 16})],
)  # fmt: skip
def test_scores_are_bent_in_kernels_of_their_own(library, name, scores):
    """scores: of a thread, by head size, in all places where they are multiplied. A softcap takes two instructions for
    each, or five in float16, which has no use for the special function unit's hyperbolic tangent; ALiBi takes two."""
    bent, plain = {}, {}
    for kernel in sass.kernels(name):
        (head_size,) = re.findall(r"Li(\d+)E", kernel.name)
        of = bent if "Lb1E" in kernel.name else plain
        of[int(head_size), "half" in kernel.name] = kernel
    assert len(bent) == 8
    assert not any(kernel.count(r"MUFU\.TANH") for kernel in plain.values())
    for (head_size, is_half), kernel in bent.items():
        places = scores[head_size]
        assert kernel.count(r"MUFU\.TANH") == (0 if is_half else places), kernel.name
        assert (kernel.count(r"MUFU\.RCP") >= places) == is_half, kernel.name
        if name == "attention_fwd_kernel":
            added = len(kernel.code) - len(plain[head_size, is_half].code)
            assert added <= ((5 if is_half else 2) + 2 + 1) * places, f"{kernel.name}: {added} instructions"


@pytest.fixture(scope="module")
def main_kernel_last(tmp_path_factory):
    """The library without the pass that follows the backward pass's main kernel, so that it is the last one counted."""
    if simulator.unavailable() or not cuda_build.find_nvcc():
        pytest.skip(simulator.unavailable() or "nvcc was not found")
    if torch.version.cuda:
        pytest.skip("this torch brings a CUDA runtime of its own, which libraries bind to instead of the simulator's")
    file = "attention_bwd_passes.cuh"
    text = (cuda_build.source_directory() / "attention" / file).read_text()
    edited, count = re.subn(
        r"launch<attention_bwd_end_kernel<T, HeadDim>>\([^;]*;", "cudaStreamSynchronize(stream);", text
    )
    assert count == 1
    return Builder(tmp_path_factory.mktemp("build"), "attention").build("main_last", {file: edited})


def counters():
    import ptxemu.cuda

    with ptxemu.cuda.use() as device:
        return device.last_stats()


@pytest.mark.parametrize(("direction", "tokens"), FLASH_ATTENTION_3)
def test_executes_no_more_than_flash_attention_3(main_kernel_last, direction, tokens):
    q, k, v = (torch.randn(1, 1, tokens, 128).bfloat16() for _ in range(3))
    call = AttentionCall(q, k, v, scale=128**-0.5)
    with using(main_kernel_last), simulator.use(arch=90):
        out, lse = cuda_kernels.attention_fwd(call)
        if direction == "bwd":
            cuda_kernels.attention_bwd(call, torch.randn_like(q), out, lse)
        stats = counters()
    assert stats.warp_instructions / stats.tensor_flops * 1e3 <= FLASH_ATTENTION_3[direction, tokens]
    assert stats.shared_wavefronts == stats.shared_ideal_wavefronts
    assert stats.local_bytes == 0

    m, n, products = (128, 128, 2) if direction == "fwd" else (64, 128, 5)
    tiles = sum(1 for i in range(0, tokens, m) for j in range(0, tokens, n) if j < i + m)
    assert stats.tensor_flops == products * 2 * m * n * 128 * tiles
    # Of every tile: K and V once per block of queries; or Q, dout and their statistics once per block of keys.
    rows = tokens * 128 * 2
    loads = 2 * n * 128 * 2 * tiles + rows if direction == "fwd" else (2 * m * 128 * 2 + 8 * m) * tiles + 2 * rows
    stores = rows if direction == "fwd" else m * 128 * 4 * tiles + 2 * rows
    assert stats.tma_load_bytes == loads
    assert stats.tma_store_bytes == stores


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("causal", "window"), [(True, 1), (True, 129), (True, 400), (False, 100)])
def test_visits_only_the_band(main_kernel_last, head_dim, causal, window):
    """Tensor-core FLOPs are those of the blocks that hold a visible pair of a query and a key, and no others."""
    tokens = 900
    q, k, v = (torch.randn(1, 1, tokens, head_dim).bfloat16() for _ in range(3))
    left, right = sides(causal, window)
    call = AttentionCall(q, k, v, left=left, right=right, scale=0.1)
    i = torch.arange(tokens)
    distance = i[:, None] - i
    visible = (distance < window) & (distance >= 0 if causal else distance > -window)

    def flops(m, n, per_pair):
        padded = torch.nn.functional.pad(visible, (0, -tokens % n, 0, -tokens % m))
        blocks = padded.unflatten(0, (-1, m)).unflatten(2, (-1, n)).any(3).any(1).sum()
        return per_pair * m * n * head_dim * int(blocks)

    with using(main_kernel_last), simulator.use(arch=90):
        out, lse = cuda_kernels.attention_fwd(call)
        assert counters().tensor_flops == flops(192 if head_dim == 64 else 128, 80 if head_dim == 256 else 128, 4)
        cuda_kernels.attention_bwd(call, torch.randn_like(q), out, lse)
        assert counters().tensor_flops == flops(128 if head_dim == 64 else 64, 64 if head_dim == 256 else 128, 10)


@pytest.mark.parametrize(
    ("head_dim", "keys", "padded"), [(96, 128, 96), (192, 112, 192), (136, 112, 192), (200, 80, 256)]
)
def test_forward_pads_heads_no_further_than_this(library, head_dim, keys, padded):
    if simulator.cuda_unavailable():
        pytest.skip(simulator.cuda_unavailable())
    q, k, v = (torch.randn(1, 1, 300, head_dim).bfloat16() for _ in range(3))
    with simulator.use(arch=90):
        cuda_kernels.attention_fwd(AttentionCall(q, k, v, right=None, scale=0.1))
        blocks = -(-300 // 128) * -(-300 // keys)
        assert counters().tensor_flops == blocks * 4 * 128 * keys * padded


@pytest.mark.parametrize(
    ("head_dim", "queries", "keys", "columns"),
    [(64, 128, 128, 5 * 64), (72, 64, 128, 4 * 96 + 128), (96, 64, 128, 4 * 96 + 128), (104, 64, 128, 5 * 128),
     (256, 64, 64, 5 * 256)],
)  # fmt: skip
def test_backward_pads_heads_no_further_than_this(library, head_dim, queries, keys, columns):
    """columns: of all five products; dq's halves are whole panels of columns"""
    if simulator.cuda_unavailable():
        pytest.skip(simulator.cuda_unavailable())
    from ptxemu import timing

    q, k, v, out, dout = (torch.randn(1, 1, 300, head_dim).bfloat16() for _ in range(5))
    call = AttentionCall(q, k, v, right=None, scale=0.1)
    with simulator.use(arch=90), timing.recording() as launches:
        cuda_kernels.attention_bwd(call, dout, out, torch.zeros(1, 1, 300))
    (main,) = (launch for launch in launches if "attention_bwd_kernel" in launch.kernel)
    blocks = -(-300 // queries) * -(-300 // keys)
    assert main.stats["tensor_flops"] == blocks * 2 * queries * keys * columns
