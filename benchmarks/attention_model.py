"""Where the time of the Hopper attention kernels goes, predicted: `python benchmarks/attention_model.py`.

Per block of a tile the model counts the cycles that each unit of an SM needs. The tensor cores and the softmax overlap
but for a share of the shorter one; every tile adds a fixed time. Both constants are fitted to the published figures of
FlashAttention-3, which has the same structure; how far the fit is off is printed. Nothing here was measured on a GPU.
"""

from dataclasses import dataclass

SMS = 132
GEMM_TFLOPS = 798.0  # what large bfloat16 products reach on an H100 SXM under its power limit
FLOPS_PER_CYCLE = 4096  # of one SM's tensor cores
CLOCK = GEMM_TFLOPS * 1e12 / SMS / FLOPS_PER_CYCLE  # the clock at which the tensor cores give that
ISSUE_PER_CYCLE, EXP2_PER_CYCLE, SHARED_BYTES_PER_CYCLE = 4, 16, 128
L2_BYTES_PER_CYCLE = 5.5e12 / SMS / CLOCK
HBM_BYTES_PER_S = 3.0e12


@dataclass(frozen=True)
class Kernel:
    """One direction at one head size. `issued`: warp instructions per block, counted in the simulator; FA3: estimated
    from 0.652 (forward) and 0.597 (backward) per kFLOP at head size 128, in proportion to the scores elsewhere."""

    name: str
    head: int
    m: int  # rows of the block that streams queries (backward) or that a tile owns (forward)
    n: int
    backward: bool
    issued: float

    @property
    def products(self) -> list[tuple[int, int, int, bool]]:
        """wgmma shapes of one block: rows, columns, depth, whether operand A comes from shared memory"""
        d, m, n = self.head, self.m, self.n
        if not self.backward:
            return [(m, n, d, True), (m, d, n, False)]
        scores = (n, m, d, True) if d < 256 else (2 * n, m // 2, d, True)
        gradients = (n, d, m, False) if d < 256 else (2 * n, d // 2, m, True)
        dq = (m, d, n, True) if m == 128 else (2 * m, d // 2, n, True)
        return [scores, scores, gradients, gradients, dq]

    @property
    def tensor(self) -> float:
        """Cycles: the products', or their operands' way out of shared memory where that takes longer"""
        cycles = 0.0
        for rows, columns, depth, shared_a in self.products:
            operands = (64 * 16 * 2 * shared_a + columns * 16 * 2) / SHARED_BYTES_PER_CYCLE
            cycles += rows / 64 * depth / 16 * max(columns * 64 * 16 * 2 / FLOPS_PER_CYCLE, operands)
        return cycles

    @property
    def units(self) -> dict[str, float]:
        """Cycles of one block, by the unit that spends them"""
        streamed = 2 * self.n * self.head * 2  # K and V
        if self.backward:
            streamed = 2 * self.m * self.head * 2 + 4 * self.m * self.head  # Q, dout; dq, added in float32
        return {
            "tensor": self.tensor,
            "issue": self.issued / ISSUE_PER_CYCLE,
            "exp2": self.m * self.n / EXP2_PER_CYCLE,
            "L2": streamed / L2_BYTES_PER_CYCLE,
        }

    def block_cycles(self, exposed: float) -> float:
        units = self.units
        softmax = max(units["issue"], units["exp2"])
        return max(max(units["tensor"], softmax) + exposed * min(units["tensor"], softmax), units["L2"])


def blocks_and_pairs(kernel: Kernel, tokens: int, causal: bool, window: int | None) -> tuple[int, int, int]:
    """-> tiles of a head, blocks they visit, pairs of a query and a key that are seen"""
    own, other = (kernel.n, kernel.m) if kernel.backward else (kernel.m, kernel.n)
    if not causal:
        return -(-tokens // own), -(-tokens // own) * -(-tokens // other), tokens * tokens
    reach = tokens if window is None else window
    tiles, blocks = 0, 0
    for start in range(0, tokens, own):
        end = min(start + own, tokens)
        first, last = (start, min(tokens, end + reach - 1)) if kernel.backward else (max(0, start - reach + 1), end)
        tiles, blocks = tiles + 1, blocks + (last - 1) // other - first // other + 1
    w = min(reach, tokens)
    return tiles, blocks, tokens * w - w * (w - 1) // 2


def predict(
    kernel: Kernel, tokens: int, constants: tuple[float, float], causal: bool = True, window: int | None = None
) -> float:
    """Useful TFLOP/s with enough heads to fill the GPU many times over. constants: exposed share, cycles per tile"""
    exposed, per_tile = constants
    tiles, blocks, pairs = blocks_and_pairs(kernel, tokens, causal, window)
    seconds = (blocks * kernel.block_cycles(exposed) + tiles * per_tile) / CLOCK / SMS
    # Bytes of a head in HBM: q, k, v, out; backward q, k, v, dout, dk, dv.
    seconds = max(seconds, tokens * kernel.head * (12 if kernel.backward else 8) / HBM_BYTES_PER_S)
    if kernel.backward:  # passes of their own: out, dout read and float32 dq cleared before; dq read and written after
        seconds += tokens * kernel.head * 14 / HBM_BYTES_PER_S
    return (10 if kernel.backward else 4) * kernel.head * pairs / seconds / 1e12


OURS = {
    ("fwd", 64): Kernel("ours", 64, 192, 128, False, 5406),
    ("fwd", 128): Kernel("ours", 128, 128, 128, False, 3801),
    ("fwd", 256): Kernel("ours", 256, 128, 80, False, 2919),
    ("bwd", 64): Kernel("ours", 64, 128, 128, True, 4986),
    ("bwd", 128): Kernel("ours", 128, 64, 128, True, 3583),
    ("bwd", 256): Kernel("ours", 256, 64, 64, True, 3682),
}
FA3 = {
    ("fwd", 64): Kernel("FA3", 64, 192, 128, False, 7900),
    ("fwd", 128): Kernel("FA3", 128, 128, 128, False, 5470),
    ("fwd", 256): Kernel("FA3", 256, 128, 80, False, 4000),
    ("bwd", 64): Kernel("FA3", 64, 128, 128, True, 6260),
    ("bwd", 128): Kernel("FA3", 128, 64, 128, True, 6260),
}
# TFLOP/s on an H100 by tokens, from flash-attention: forward causal (assets/flash3_fp16_fwd.png, 2024, 16k tokens in
# all), backward without a mask (the FlashAttention-3 paper).
PUBLISHED = {
    ("fwd", 64): {512: 197, 1024: 265, 2048: 371, 4096: 420, 8192: 460, 16384: 473},
    ("fwd", 128): {512: 292, 1024: 423, 2048: 521, 4096: 579, 8192: 602, 16384: 616},
    ("fwd", 256): {512: 286, 1024: 427, 2048: 537, 4096: 612, 8192: 628, 16384: 642},
    ("bwd", 64): {1024: 363, 4096: 453, 16384: 474},
    ("bwd", 128): {1024: 424, 4096: 542, 16384: 561},
}


def errors(direction: str, constants: tuple[float, float]) -> dict[tuple[int, int], float]:
    """(head, tokens) -> relative error of the prediction for FA3"""
    return {
        (head, tokens): predict(FA3[way, head], tokens, constants, causal=way == "fwd") / published - 1
        for (way, head), table in PUBLISHED.items()
        if way == direction
        for tokens, published in table.items()
    }


def fit(direction: str) -> tuple[float, float]:
    """The share of the shorter of products and softmax that is not hidden, and a tile's cycles beside its blocks"""
    grid = [(exposed / 50, 250.0 * tile) for exposed in range(51) for tile in range(81)]
    return min(grid, key=lambda constants: sum(error**2 for error in errors(direction, constants).values()))


def main() -> None:
    for direction in ("fwd", "bwd"):
        constants = fit(direction)
        off = errors(direction, constants)
        print(f"\n{direction}: {constants[0]:.0%} of the shorter unit exposed, {constants[1]:.0f} cycles per tile")
        mean = sum(map(abs, off.values())) / len(off)
        print(f"  off FA3's published figures by {mean:.0%} on average, {max(map(abs, off.values())):.0%} at most")
        for (way, head), kernel in OURS.items():
            if way != direction:
                continue
            units = kernel.units
            bound = max(units, key=units.get)
            cycles = ", ".join(f"{unit} {value:.0f}" for unit, value in units.items())
            print(f"  D={head}, {kernel.m}x{kernel.n}: cycles of a block: {cycles}; bound by {bound}")
            lengths = (512, 1024, 2048, 4096, 8192, 16384)
            predicted = [f"{predict(kernel, tokens, constants):.0f}" for tokens in lengths]
            print(f"    dense, T = {', '.join(map(str, lengths))}: {', '.join(predicted)} TFLOP/s")
            windows = (128, 256, 512, 1024, 2048)
            predicted = [f"{predict(kernel, 32768, constants, window=window):.0f}" for window in windows]
            print(f"    T = 32768, window = {', '.join(map(str, windows))}: {', '.join(predicted)} TFLOP/s")


if __name__ == "__main__":
    main()
