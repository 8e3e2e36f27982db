"""Removes each wait, fence, barrier and arrival from the CUDA attention kernels, one at a time, and plants bugs in what
they make of attention's options, and sees that the simulator catches it:
`python tests/mutate_attention.py [attention_fwd_kernel.cuh ...]`, ten minutes."""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import torch
from kernel_variants import using
from planted import Place, Planted, limit_time, removals, report, serve

import gptkernels as gk
from gptkernels import simulator
from gptkernels.ops.attention import reference
from gptkernels.parity import assert_parity

FILES = (
    "attention_fwd_kernel.cuh",
    "attention_fwd_consumer.cuh",
    "attention_bwd_kernel.cuh",
    "attention_bwd_consumer.cuh",
    "attention_bwd_passes.cuh",
    "attention_bwd_tile.cuh",
    "attention_softmax.cuh",
    "attention_tile.cuh",
    "attention_bend.cuh",
)
STATEMENT = re.compile(
    r"\b(mbarrier_wait|mbarrier_arrive|warp_arrive|mbarrier_arrive_expect|wgmma_wait<\d>|wgmma_fence|wgmma_commit|"
    r"fence_async_proxy|fence_async_proxy_global|named_barrier_sync|named_barrier_arrive|bulk_wait_read|bulk_wait|"
    r"bulk_commit|release|wait_turn|pass_turn|red_release_add|wait_for_prerequisite|__syncthreads)\([^;{}]*\);"
)
# What may go without a wrong result, by how the source goes on from there, and why.
HARMLESS = {
    "wait_turn();": "the warpgroups' turns are for speed",
    "named_barrier_sync(kTurn + group,": "the warpgroups' turns are for speed",
    "named_barrier_sync(kGroup + group,": "wgmma keeps the warps of a group together",
    "fence_async_proxy_global();": "the simulator orders the proxies in global memory",
    "wgmma_fence(); #pragma unroll for (int n = 0; n < Traits::kBlockN; n += 16) Wgmma<Traits::kDqColumns": (
        "the simulator asks for no fence where results are overwritten"
    ),
}
# In sinks, gradients of lse, two-sided windows and keys with documents of their own
PLANTED = {
    "every second row has no sink": Place("attention_fwd_consumer.cuh", "add_sink(sink, inverse[1], lse[1]);"),
    "all heads have one sink": Place(
        "attention_fwd_consumer.cuh",
        "float(static_cast<const T*>(args.params.sinks)[tile.head])",
        "float(static_cast<const T*>(args.params.sinks)[0])",
    ),
    "float32 sinks are read as 16 bits": Place("attention_fwd_consumer.cuh", "args.params.sinks_are_float", "false"),
    "the output has no share for the sink": Place("attention_softmax.cuh", "inverse_sum *= keys / sum;"),
    "lse is without the sink": Place("attention_softmax.cuh", "lse = fmaf(kLn2, log2f(sum), top);"),
    "the sink is not in the maximum": Place("attention_softmax.cuh", "fmaxf(lse, sink)", "lse"),
    "neither keys nor a sink": Place("attention_softmax.cuh", "if (top == -INFINITY) return;"),
    "lse's gradient has the other sign": Place(
        "attention_bwd_passes.cuh", "delta -= params.dlse[first_lse + row];", "delta += params.dlse[first_lse + row];"
    ),
    "lse's gradient is the first head's": Place(
        "attention_bwd_passes.cuh", "delta -= params.dlse[first_lse + row];", "delta -= params.dlse[row];"
    ),
    "sinks' gradients come from nowhere": Place("attention_bwd_passes.cuh", "params.delta[first_lse + row] = delta;"),
    "blocks of queries on the right are left out": Place(
        "attention_bwd_tile.cuh", "first_key - shape.right - offset", "first_key - offset"
    ),
    "queries see no key on their right, backward": Place(
        "attention_bwd_tile.cuh", "diagonal - shape.right", "diagonal"
    ),
    "queries see no key on their right": Place("attention_tile.cuh", "diagonal + shape.right", "diagonal"),
    "queries are cut like keys": Place(
        "attention_tile.cuh",
        "own_keys && order.of_keys ? shape.cu_seqlens_k : shape.cu_seqlens",
        "own_keys ? shape.cu_seqlens_k : shape.cu_seqlens",
    ),
    "keys are cut like queries": Place(
        "attention_tile.cuh", "own_keys && order.of_keys ? shape.cu_seqlens_k : shape.cu_seqlens", "shape.cu_seqlens"
    ),
    "keys end where queries end": Place(
        "attention_tile.cuh", "order.of_keys ? shape.k_len : shape.q_len", "shape.q_len"
    ),
    "queries' keys are their own rows": Place(
        "attention_tile.cuh",
        "own_keys && !order.of_keys ? document_rows(shape.cu_seqlens_k, document, shape.k_len) : rows",
        "rows",
    ),
    "keys' queries are their own rows": Place(
        "attention_tile.cuh",
        "own_keys && order.of_keys ? document_rows(shape.cu_seqlens, document, shape.q_len) : rows",
        "rows",
    ),
}
# In a softcap and ALiBi
PLANTED_BENT = {
    "scores are not in base 2": Place("attention_bend.cuh", "largest * kLog2E", "largest"),
    "the softcap bends scores in base 2": Place(
        "attention_bend.cuh",
        "shape.scale / shape.softcap * kTanhUnit<T>",
        "kLog2E * shape.scale / shape.softcap * kTanhUnit<T>",
    ),
    "slopes are taken for those of base 2": Place("attention_bend.cuh", "1.f / largest", "kLog2E / largest"),
    "all heads have one slope": Place(
        "attention_bend.cuh",
        "int64_t(tile.batch) * shape.slope_stride + head",
        "int64_t(tile.batch) * shape.slope_stride",
    ),
    "all documents have one's slopes": Place(
        "attention_bend.cuh", "int64_t(tile.batch) * shape.slope_stride + head", "head"
    ),
    "ALiBi has the other sign": Place(
        "attention_bend.cuh",
        "fmaf(-slope, diagonal_distance(first, i), s[i])",
        "fmaf(slope, diagonal_distance(first, i), s[i])",
    ),
    "distances have a sign": Place(
        "attention_bend.cuh",
        "fabsf((i / 2 % 2 ? first.y : first.x) - float(i / 4 * 8 + i % 2))",
        "(i / 2 % 2 ? first.y : first.x) - float(i / 4 * 8 + i % 2)",
    ),
    "columns are as far as those beside them": Place("attention_bend.cuh", "i / 4 * 8 + i % 2", "i / 4 * 8"),
    "softmax has the scale of plain scores": Place(
        "attention_fwd_consumer.cuh", "kBent ? args.bend.unit : shape.scale * kLog2E", "shape.scale * kLog2E"
    ),
    "the first block is not bent": Place("attention_fwd_consumer.cuh", "bend(blocks.end - 1, tile, slope);", ";"),
    "only the first block is bent": Place("attention_fwd_consumer.cuh", "bend(n, tile, slope);", ";"),
    "positions are one further": Place(
        "attention_fwd_consumer.cuh",
        "thread_row(tile) + tile.k_len - tile.q_len - n * Traits::kBlockN - lane % 4 * 2",
        "thread_row(tile) + tile.k_len - tile.q_len - n * Traits::kBlockN - lane % 4 * 2 + 1",
    ),
    "positions are counted from the first key": Place(
        "attention_fwd_consumer.cuh",
        "thread_row(tile) + tile.k_len - tile.q_len - n * Traits::kBlockN - lane % 4 * 2",
        "thread_row(tile) - n * Traits::kBlockN - lane % 4 * 2",
    ),
    "every second row is as far as the one before": Place(
        "attention_fwd_consumer.cuh", "float(first + 8)", "float(first)"
    ),
    "scores are not capped, backward": Place("attention_bwd_consumer.cuh", "cap_scores<T>(scores, args.bend);", ";"),
    "the softcap has no derivative": Place(
        "attention_bwd_consumer.cuh", "kCapped ? p[i] * fmaxf(fmaf(-capped, capped, 1.f), 0.f) : p[i]", "p[i]"
    ),
    "the derivative of masked scores is not finite": Place(
        "attention_bwd_consumer.cuh", "fmaxf(fmaf(-capped, capped, 1.f), 0.f)", "fmaf(-capped, capped, 1.f)"
    ),
    "the derivative is taken after ALiBi": Place(
        "attention_bwd_consumer.cuh", "fmaf(-capped, capped, 1.f)", "fmaf(-score, score, 1.f)"
    ),
    "values' gradients have the derivative": Place(
        "attention_bwd_consumer.cuh", "pack<T>(p[0], p[1])", "pack<T>(scores[j], scores[j + 1])"
    ),
    "scores have the scale of plain ones, backward": Place(
        "attention_bwd_consumer.cuh",
        "fmaf(score, args.bend.unit, i % 2 ? l.y : l.x)",
        "fmaf(score, scale, i % 2 ? l.y : l.x)",
    ),
    "ALiBi has the other sign, backward": Place(
        "attention_bwd_consumer.cuh",
        "fmaf(-slope, diagonal_distance(first, j + i), capped)",
        "fmaf(slope, diagonal_distance(first, j + i), capped)",
    ),
    "the slope is that of the key's head": Place(
        "attention_bwd_consumer.cuh",
        "alibi_slope(args.bend, shape, tile, head)",
        "alibi_slope(args.bend, shape, tile, tile.head)",
    ),
    "positions are one further, backward": Place(
        "attention_bwd_consumer.cuh",
        "key - (tile.k_len - tile.q_len) - query - queries_at",
        "key - (tile.k_len - tile.q_len) - query - queries_at + 1",
    ),
    "positions are counted from the first key, backward": Place(
        "attention_bwd_consumer.cuh", "key - (tile.k_len - tile.q_len) - query - queries_at", "key - query - queries_at"
    ),
    "every second key is as far as the one before": Place(
        "attention_bwd_consumer.cuh", "float(first + 8)", "float(first)"
    ),
    "a softcap is without ALiBi": Place("attention_bwd_consumer.cuh", "slope == 0.f", "true"),
    "ALiBi is without a softcap": Place("attention_bwd_consumer.cuh", "args.bend.tanh_factor == 0.f", "slope != 0.f"),
}
# No bug: the simulator's hyperbolic tangent is exact. A GPU's is off by up to 2^-11 of its value, this one by all of
# that, up or down.
COARSE = Place(
    "attention_bend.cuh",
    "tanh_approx(x)",
    "fminf(fmaxf(tanh_approx(x) * (1.f + (__float_as_int(x) & 1 ? 0x1p-11f : -0x1p-11f)), -1.f), 1.f)",
)
# On a busy GPU those that it waits for may not have started.
TILES_BY_BLOCK_INDEX = (
    Place("attention_bwd_kernel.cuh", "args.params.dq_in_order ? take_tile() : blockIdx.x", "blockIdx.x"),
    Place("attention_bwd_passes.cuh", "params.dq_in_order ? 0 : ctas", "ctas"),
)
SEEDS = range(8)
# Of a processor for each seed, whatever else it has to do: beyond that a variant hangs; one that does not takes two.
CPU_LIMIT_S = 20


def check(tensors: dict[str, torch.Tensor], deterministic: bool = False, **kwargs) -> None:
    torch.use_deterministic_algorithms(deterministic)
    assert_parity(
        gk.attention, reference.attention, tensors, kwargs={"backend": "cuda", **kwargs}, reference_kwargs=kwargs
    )


def leaves(heads: int, tokens: int, head_dim: int, grad: bool, packed: bool = False) -> dict[str, torch.Tensor]:
    shapes = [(tokens, h, head_dim) if packed else (1, h, tokens, head_dim) for h in (heads, heads // 2, heads // 2)]
    return {name: torch.randn(shape).bfloat16().requires_grad_(grad) for name, shape in zip("qkv", shapes, strict=True)}


def poisoned(head_dim: int, grad: bool) -> None:
    """Two documents with NaNs between them."""
    bounds = torch.tensor([0, 100, 150, 290], dtype=torch.int32)
    tensors = leaves(2, 290, head_dim, False, packed=True)
    dout = torch.randn(290, 2, head_dim).bfloat16()
    for x in (*tensors.values(), dout):
        x[100:150] = torch.nan
    for x in tensors.values():
        x.requires_grad_(grad)
    out = gk.attention(**tensors, cu_seqlens=bounds, backend="cuda")
    results = (out, *torch.autograd.grad(out, tuple(tensors.values()), dout)) if grad else (out,)
    for x in results:
        assert torch.cat((x[:100], x[150:])).isfinite().all()


def ordered_gradients() -> torch.Tensor:
    """dq, dense and banded"""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    tensors, dout = leaves(2, 512, 64, True), torch.randn(1, 2, 512, 64).bfloat16()
    outs = [gk.attention(**tensors, window=window, backend="cuda") for window in (None, 200)]
    return torch.stack([torch.autograd.grad(out, tensors["q"], dout)[0] for out in outs])


def busy_gradients(seed: int) -> None:
    """Where no CTA starts before another has ended, dense and banded."""
    import ptxemu.cuda

    with ptxemu.cuda.use(seed=seed, few_ctas=True):
        for window in (None, 90):
            check(leaves(2, 512, 64, True), deterministic=True, window=window)


def with_sinks(tensors: dict, dtype: torch.dtype, last: float) -> dict[str, torch.Tensor]:
    """Of four heads: among the scores, below them, far above them, and `last`"""
    return {**tensors, "sinks": torch.tensor([2.0, -1.0, 200.0, last]).to(dtype).requires_grad_()}


def run_options(library: Path) -> None:
    """In several blocks of queries and of keys, some of which nobody sees"""
    bounds = {"cu_seqlens": [0, 100, 150, 290], "cu_seqlens_k": [0, 40, 240, 400]}
    bounds = {name: torch.tensor(values, dtype=torch.int32) for name, values in bounds.items()}
    for seed in SEEDS[:2]:
        limit_time(CPU_LIMIT_S)
        torch.manual_seed(seed)
        with using(library), simulator.use(arch=90, seed=seed):
            dtype = (torch.bfloat16, torch.float32)[seed]
            check(with_sinks(leaves(4, 150, 64, True), dtype, -torch.inf), return_lse=True)
            check(leaves(2, 300, 64, True), causal=False, window=(40, 20))
            keys = leaves(4, 400, 64, True, packed=True)
            documents = {**keys, "q": leaves(4, 290, 64, True, packed=True)["q"], **bounds}
            check(with_sinks(documents, dtype, 0.5), return_lse=True)
            neither = with_sinks(documents, dtype, -torch.inf)  # the reference has NaNs where there is no key either
            assert gk.attention(**neither, backend="cuda").isfinite().all()


def run_bent(library: Path) -> None:
    """A softcap and ALiBi, apart and together, with what else there may be, on kernels of all three designs"""
    bounds = {"cu_seqlens": [0, 100, 150, 290], "cu_seqlens_k": [0, 40, 240, 400]}
    bounds = {name: torch.tensor(values, dtype=torch.int32) for name, values in bounds.items()}
    slopes = torch.tensor([[0.5, 0.03, 0.2, -0.05], [0.01, 0.0, 0.7, 0.1], [0.1, 0.3, 0.02, 0.4]])
    for seed in SEEDS[:2]:
        limit_time(CPU_LIMIT_S)
        torch.manual_seed(seed)
        with using(library), simulator.use(arch=90, seed=seed):
            check(with_sinks(leaves(4, 150, 64, True), torch.bfloat16, 0.5), return_lse=True, softcap=2.0, scale=0.5)
            documents = {**leaves(4, 400, 64, True, packed=True), "q": leaves(4, 290, 64, True, packed=True)["q"]}
            check(documents, return_lse=True, causal=False, alibi_slopes=slopes, **bounds)
            for head_dim in (64, 128):
                tensors, both = leaves(4, 300, head_dim, True), {"softcap": 2.0, "alibi_slopes": slopes[0]}
                check(tensors, return_lse=True, causal=False, window=(100, 40), scale=0.3, **both)
            check(leaves(4, 150, 256, True), softcap=2.0, scale=0.2, alibi_slopes=slopes[2], window=70)


def run_cases(library: Path) -> None:
    """Enough tiles for each CTA to take several, and enough blocks in each to go round its rings."""
    expected = None
    for seed in SEEDS:
        limit_time(CPU_LIMIT_S)
        torch.manual_seed(seed)
        with using(library), simulator.use(arch=90, seed=seed):
            check(leaves(4, 420, 64, True))
            check(leaves(2, 420, 128, True), deterministic=True)
            check(leaves(4, 330, 256, True), window=200)
            result = ordered_gradients()
            expected = result if expected is None else expected
            assert torch.equal(result, expected)
            busy_gradients(seed)
            poisoned(64, True)
            poisoned(128, True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--serve", type=Path, metavar="LIBRARY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, {"cases": run_cases, "options": run_options, "bent": run_bent})
        return 0
    places, harmless = removals("attention", arguments.files, STATEMENT, HARMLESS)
    planted, bent = (
        {name: (place,) for name, place in bugs.items() if place.file in arguments.files}
        for bugs in (PLANTED, PLANTED_BENT)
    )
    bugs = planted | {name: (place,) for name, place in places.items()} | {"tiles by index": TILES_BY_BLOCK_INDEX}
    trials = {name: "options" if name in planted else "cases" for name in bugs}
    with tempfile.TemporaryDirectory() as folder:
        with Planted(Path(folder) / "plain", "attention", __file__, bugs) as library:
            missed = report([library], trials, harmless)
        with Planted(Path(folder) / "bent", "attention_bent", __file__, bent | {"coarse": (COARSE,)}) as library:
            if not library.survives("coarse", "bent"):
                sys.exit("the kernels fail with a hyperbolic tangent as exact as a GPU's")
            return report([library], dict.fromkeys(bent, "bent"), {}) or missed


if __name__ == "__main__":
    sys.exit(main())
