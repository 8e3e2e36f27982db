"""Removes each wait, fence, barrier and arrival from the CUDA attention kernels, one at a time, and sees that the
simulator catches it: `python tests/mutate_attention.py [attention_fwd_kernel.cuh ...]`, a quarter of an hour."""

import argparse
import contextlib
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from kernel_variants import Builder, using

import gptkernels as gk
from gptkernels import cuda_build, simulator
from gptkernels.ops.attention import reference
from gptkernels.parity import assert_parity

FILES = (
    "attention_fwd_kernel.cuh",
    "attention_fwd_consumer.cuh",
    "attention_bwd_kernel.cuh",
    "attention_bwd_consumer.cuh",
    "attention_bwd_passes.cuh",
    "attention_tile.cuh",
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
SEEDS = range(8)
# Of a processor for each seed, whatever else it has to do: beyond that a variant hangs; one that does not takes two.
CPU_LIMIT_S = 20


def mutants(file: str) -> list[tuple[int, str, str | None, str]]:
    """-> line number, what was removed, why that may be harmless, the file's text without it"""
    text = (cuda_build.source_directory() / "attention" / file).read_text()
    found = []
    for match in STATEMENT.finditer(text):
        rest = " ".join(text[match.start() :][:200].split())
        reason = next((why for start, why in HARMLESS.items() if rest.startswith(start)), None)
        line = text.count("\n", 0, match.start()) + 1
        found.append((line, match.group(), reason, f"{text[: match.start()]};{text[match.end() :]}"))
    return found


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


def limit_time() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + CPU_LIMIT_S, resource.RLIM_INFINITY))


def run_cases(library: Path) -> None:
    """Enough tiles for each CTA to take several, and enough blocks in each to go round its rings."""
    expected = None
    for seed in SEEDS:
        limit_time()
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


def survives(library: Path) -> bool:
    """Whether all cases pass, in a process of their own: a hang counts as caught."""
    command = [sys.executable, os.path.abspath(__file__), "--run", str(library)]
    return subprocess.run(command, capture_output=True).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=FILES)
    parser.add_argument("--run", type=Path, metavar="LIBRARY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_cases(arguments.run)
        return 0
    files = arguments.files
    caught, harmless, missed = 0, 0, []
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        builder = Builder(Path(folder), "attention")
        if not survives(builder.build("unchanged", {})):
            sys.exit("the kernels fail without any change")
        for file in files:
            for line, removed, reason, text in mutants(file):
                lives = survives(builder.build(f"{Path(file).stem}_{line}", {file: text}))
                caught, harmless = caught + (not lives), harmless + (lives and reason is not None)
                if lives and not reason:
                    missed.append(f"{file}:{line}: {removed}")
                verdict = "caught" if not lives else f"harmless: {reason}" if reason else "MISSED"
                print(f"{file}:{line}: {' '.join(removed.split())}  {verdict}", flush=True)
    print(f"{caught} caught, {harmless} harmless, {len(missed)} missed", *missed, sep="\n")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
