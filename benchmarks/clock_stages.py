"""Our kernels as stages for the simulator's clock: recorded in small launches, at the size that is asked for."""

import functools
from dataclasses import dataclass
from unittest import mock

import torch

from gptkernels import hardware, remembered, simulator

assert simulator.cuda_unavailable() is None, simulator.cuda_unavailable()

from ptxemu import timing  # noqa: E402
from ptxemu.timing import tiles  # noqa: E402
from ptxemu.timing.calibrate import gemm_shares  # noqa: E402
from ptxemu.timing.units import SMS  # noqa: E402

from gptkernels.ops.attention import cuda_kernels, triton_kernels, triton_launch  # noqa: E402
from gptkernels.ops.attention.record import AttentionCall  # noqa: E402
from gptkernels.ops.attention.visibility import sides  # noqa: E402
from gptkernels.ops.gated_mlp import cuda_kernels as gated_mlp_kernels  # noqa: E402
from gptkernels.ops.gated_mlp.record import GatedMlpCall  # noqa: E402
from gptkernels.ops.layer_norm import cuda_kernels as layer_norm_kernels  # noqa: E402
from gptkernels.ops.layer_norm.record import LayerNormCall  # noqa: E402
from gptkernels.ops.linear_cross_entropy import cuda_kernels as loss_kernels  # noqa: E402
from gptkernels.ops.linear_cross_entropy.chunks import Chunk, Options  # noqa: E402
from gptkernels.ops.mlp import cuda_kernels as mlp_kernels  # noqa: E402
from gptkernels.ops.rms_norm import cuda_kernels as rms_norm_kernels  # noqa: E402
from gptkernels.ops.rms_norm.record import RMSNormCall  # noqa: E402

BF16 = torch.bfloat16


def launches_of(call, sms: int = 1) -> list[timing.Recorded]:
    """What `call` launches on a device with so many SMs"""
    with (
        simulator.use(90, 0),
        mock.patch.object(hardware, "sm_count", return_value=sms),
        timing.recording() as launches,
    ):
        remembered.forget()  # what was decided for another number of SMs
        call()
    remembered.forget()
    return launches


def attention_tile(head_dim: int, backward: bool) -> tuple[int, int]:
    """Rows that a tile of csrc/attention owns, rows of the blocks it visits"""
    if backward:
        return {64: (128, 128), 96: (128, 64), 128: (128, 64), 256: (64, 64)}[head_dim]
    return {64: (192, 128), 96: (128, 128), 128: (128, 128), 192: (128, 112), 256: (128, 80)}[head_dim]


@dataclass(frozen=True)
class AttentionOptions:
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False


@functools.cache
def attention_launches(
    backend: str, tokens: int, heads: int, head_dim: int, options: AttentionOptions, backward: bool
) -> list[timing.Recorded]:
    q, k, v, out, dout = (torch.randn(1, heads, tokens, head_dim, dtype=BF16) for _ in range(5))
    module = cuda_kernels if backend == "cuda" else triton_kernels
    left, right = sides(options.causal, options.window)
    slopes = torch.full((heads,), 0.1) if options.alibi else None
    call = AttentionCall(q, k, v, alibi_slopes=slopes, left=left, right=right, scale=head_dim**-0.5)
    call.softcap = options.softcap
    if not backward:
        return launches_of(lambda: module.attention_fwd(call))
    lse = torch.full((1, heads, tokens), 3.0)
    return launches_of(lambda: module.attention_bwd(call, dout, out, lse))


def attention(
    tokens: int, heads: int, head_dim: int, options: AttentionOptions, backward: bool = False
) -> list[tiles.Stage]:
    """heads: of all sequences"""
    own, other = attention_tile(head_dim, backward)

    def record(tokens: int, heads: int, launch: int = int(backward)) -> timing.Recorded:
        return attention_launches("cuda", tokens, heads, head_dim, options, backward)[launch]

    mask = {"causal": options.causal, "window": options.window, "backward": backward}
    main = tiles.attention_stage("main", record, tokens, heads, head_dim, own, other, **mask)
    if not backward:
        return [main]
    count = 4 if options.window is None else 8
    before, after = (
        tiles.streaming(
            name,
            [(count * own * h // 64, record(count * own, h, launch)) for h in (2, 4)],
            tokens * heads // 64,
        )
        for name, launch in (("before", 0), ("after", 2))
    )
    return [before, main, after]


def triton_attention(
    tokens: int, heads: int, head_dim: int, options: AttentionOptions, backward: bool = False
) -> list[tiles.Stage]:
    def stage(kernel: str, launch: int) -> tiles.Stage:
        row = triton_launch.launch_row(kernel, 90, 2, head_dim, True)
        own, other = row["BLOCK_M"], row["BLOCK_N"]
        if kernel == "dkdv":
            own, other = other, own

        def record(tokens: int, heads: int) -> timing.Recorded:
            found = attention_launches("triton", tokens, heads, head_dim, options, backward)
            return next(r for r in found if kernel in r.kernel)

        mask = {"causal": options.causal, "window": options.window, "backward": kernel == "dkdv"}
        return tiles.attention_stage(kernel, record, tokens, heads, head_dim, own, other, **mask)

    return [stage("dkdv", 1), stage("dq", 2)] if backward else [stage("fwd", 0)]


@functools.cache
def product_launch(rows: int, columns: int, depth: int, activation: str, backward: bool) -> timing.Recorded:
    x = torch.randn(rows, depth, dtype=BF16)
    if backward:
        weight, preact = torch.randn(depth, columns, dtype=BF16), torch.randn(rows, columns, dtype=BF16)
        launch, parts = mlp_kernels.grad_preact_launch(x, weight, activation)
        tensors = x, weight, preact, preact.clone(), preact.clone(), torch.empty(parts)
        return launches_of(lambda: launch(*tensors), sms=2)[0]
    weight, bias = torch.randn(columns, depth, dtype=BF16), torch.randn(columns, dtype=BF16)
    out = torch.empty(rows, columns, dtype=BF16)
    preact = None if activation == "none" else torch.empty_like(out)
    launch = mlp_kernels.linear_launch(x, weight, None, activation)
    return launches_of(lambda: launch(x, weight, bias, None, preact, out), sms=2)[0]


@functools.cache
def gated_launch(rows: int, columns: int, depth: int, backward: bool) -> timing.Recorded:
    """columns: of gate and up together forward"""
    x = torch.randn(rows, depth, dtype=BF16)
    if backward:
        weight, (gate, up) = torch.randn(depth, columns, dtype=BF16), torch.randn(2, rows, columns, dtype=BF16)
        launch, _ = gated_mlp_kernels.grads_launch(x, weight, "silu")
        tensors = x, weight, gate, up, gate.clone(), gate.clone(), gate.clone(), None
        return launches_of(lambda: launch(*tensors), sms=2)[0]
    gate_weight, up_weight = torch.randn(columns, depth, dtype=BF16).chunk(2)
    outs = torch.empty(3, rows, columns // 2, dtype=BF16).unbind()
    call = GatedMlpCall(x, gate_weight, up_weight, None, None, gate_weight, None, None, "silu", "preact")
    launch = gated_mlp_kernels.gate_and_up_launch(call, x, gate_weight, up_weight)
    return launches_of(lambda: launch(x, gate_weight, up_weight, None, None, *outs), sms=2)[0]


def product(
    rows: int, columns: int, depth: int, activation: str = "none", backward: bool = False, gated: bool = False
) -> list[tiles.Stage]:
    """Forward out = activation(x @ weight.T + bias), the value before the activation kept too; backward its gradient,
    out = x @ weight * activation'(preact), with activation(preact) and column sums. A cluster's tile: 256 x 256. gated:
    forward half of the columns are gate's, the others up's; backward both gradients, and what forward gives, no sums"""
    samples = []
    # What the epilogue hides behind depends on the depth, up to where all of it is hidden.
    near = min(-(-depth // 64) * 64, 1024)
    for m, n, k in ((512, 512, near), (1024, 512, near), (512, 512, 2 * near)):
        count = m * n // (256 * 256)
        recorded = gated_launch(m, n, k, backward) if gated else product_launch(m, n, k, activation, backward)
        samples.append((count, count * k // 64, recorded))
    count = -(-rows // 256) * -(-columns // 256)
    lengths = [-(-depth // 64)] * count
    return [tiles.Stage("product", samples, lengths, gemm_shares(rows, columns, depth, 128, 256), slots=SMS // 2)]


@functools.cache
def norm_launches(op: str, rows: int, columns: int, backward: bool, sms: int = 1) -> list[timing.Recorded]:
    x, weight, bias = torch.randn(rows, columns, dtype=BF16), torch.ones(columns), torch.zeros(columns)
    mean, rstd = torch.zeros(rows), torch.ones(rows)
    dy = torch.randn_like(x)
    if op == "layer_norm":
        call = LayerNormCall(x, None, weight, bias, None, 1e-5, 0.0)
        if backward:
            return launches_of(lambda: layer_norm_kernels.layer_norm_bwd(call, dy, None, mean, rstd, True, True), sms)
        return launches_of(lambda: layer_norm_kernels.layer_norm_fwd(call), sms)
    call = RMSNormCall(x, None, weight, None, 1e-6, 0.0, True, 0.0)
    if backward:
        return launches_of(lambda: rms_norm_kernels.rms_norm_bwd(call, dy, None, rstd, True), sms)
    return launches_of(lambda: rms_norm_kernels.rms_norm_fwd(call), sms)


def norm(op: str, rows: int, columns: int, backward: bool = False) -> list[tiles.Stage]:
    """layer_norm or rms_norm"""
    # Enough rows for the CTAs that an SM holds, of which a short row takes a small part.
    few, more = (64, 256) if columns > 256 else (512, 2048)
    samples = [(count, norm_launches(op, count, columns, backward)[0]) for count in (few, more)]
    main = tiles.streaming("rows", samples, rows)
    if not backward:
        return [main]
    # The sums over the rows of each CTA, of as many CTAs as the GPU holds.
    sums = [(n // 16, norm_launches(op, SMS * 8, n, True, SMS)[1]) for n in (256, 512)]
    sums_stage = tiles.streaming("sums", sums, columns // 16)
    sums_stage.shares = {"dram_read_share": 0.0}
    return [main, sums_stage]


@functools.cache
def loss_launch(rows: int, vocabulary: int) -> timing.Recorded:
    logits, targets = torch.randn(rows, vocabulary, dtype=BF16), torch.zeros(rows, dtype=torch.int64)
    chunk = Chunk(logits, targets, torch.empty(rows), torch.empty(rows), torch.ones(()))
    options = Options(-100, True, None, None, None, 0.0, 0.0, 1.0)
    return launches_of(lambda: loss_kernels.chunk_loss(chunk, options))[0]


def cross_entropy(rows: int, vocabulary: int) -> list[tiles.Stage]:
    """The loss and its gradient in place of the logits: read twice, the second time from L2"""
    stage = tiles.streaming("rows", [(few, loss_launch(few, vocabulary)) for few in (4, 12)], rows)
    stage.shares = {"dram_read_share": 0.5}
    return [stage]
