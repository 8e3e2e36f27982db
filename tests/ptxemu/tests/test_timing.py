"""The clock: recorded launches compute the same, and take the time that can be worked out by hand."""

import shutil

import pytest
import torch

import ptxemu.cuda
from ptxemu import timing
from ptxemu.timing import sass, tiles
from ptxemu.timing.units import PARAMETERS, SMS, units


@pytest.fixture
def library(cuda_library):
    try:
        sass.find_tool("nvdisasm")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if not shutil.which("ptxas"):
        pytest.skip("ptxas is not here")
    with ptxemu.cuda.use(seed=3) as cuda:
        yield cuda, cuda.load(cuda_library("timing"))


def record(library, function, *args):
    cuda, functions = library
    with timing.recording() as launches:
        cuda.check(getattr(functions, function)(*(cuda.pointer(x) if isinstance(x, torch.Tensor) else x for x in args)))
    return launches[0]


def assert_conserved(timed):
    """No unit is busy for longer than the launch takes, and every instruction was found."""
    assert timed.lost == 0
    for name in ("tensor", "shared", "tma", "l2", "dram", "issue"):
        assert timed.busy[name] <= timed.cycles, name
    for name in ("fma", "alu", "xu"):
        assert timed.busy[name] <= 4 * timed.cycles, name


@pytest.mark.parametrize(("n", "cycles"), [(64, 32), (32, 24)])  # 32: 3 KiB of operands at 128 bytes per cycle
def test_products_take_the_tensor_cores_time(library, n, cycles):
    out = torch.zeros(128)
    short, long = (record(library, "run_products", out, n, count, 1).time() for count in (64, 256))
    assert long.busy["tensor"] == 256 * n / 2
    assert long.cycles - short.cycles == pytest.approx((256 - 64) * cycles, rel=0.02)
    for timed in (short, long):
        assert_conserved(timed)
    assert out[0] == 256 * 16 * n / 2


def test_warpgroups_share_the_tensor_cores(library):
    out = torch.zeros(256)
    short, long = (record(library, "run_products", out, 64, count, 2).time() for count in (64, 256))
    assert long.busy["tensor"] == 2 * 256 * 32
    assert long.cycles - short.cycles == pytest.approx(2 * 192 * 32, rel=0.02)


@pytest.mark.parametrize(("threads", "cycles"), [(32, PARAMETERS["xu_latency"]), (1024, 64)])
def test_exponentials_wait_for_each_other_or_for_their_pipe(library, threads, cycles):
    """A warp alone pays the latency; eight to a scheduler pay eight cycles each."""
    out = torch.zeros(threads)
    short, long = (record(library, "run_exponentials", out, count, threads).time() for count in (256, 1024))
    assert (long.cycles - short.cycles) / 768 == pytest.approx(cycles, rel=0.2)
    assert_conserved(long)


def test_bulk_copies_reach_the_memorys_rate(library):
    data, out = torch.randn(64, 2048), torch.zeros(64, 2048)
    launch = record(library, "run_bulk_copy", data, out, 64)
    assert torch.equal(out, data)
    slow, fast = launch.time(dram_read_share=1.0), launch.time(dram_read_share=0.0, dram_write_share=0.0)
    assert slow.counts["loaded_bytes"] == slow.counts["stored_bytes"] == data.nbytes
    assert slow.cycles > fast.cycles
    assert slow.cycles >= 2 * data.nbytes / units(1500)["dram_bytes"]
    for timed in (slow, fast):
        assert_conserved(timed)


def test_copy_is_bound_by_hbm(library):
    count = 1 << 18
    x, out = torch.randn(count), torch.zeros(count)
    timed = record(library, "run_scale", x, out, count, count // 1024).time()
    assert_conserved(timed)
    assert timed.busy["dram"] > 0.85 * timed.cycles
    assert timed.cycles > 2 * x.nbytes / units(1500)["dram_bytes"]


def test_results_are_those_of_the_untimed_run(library):
    cuda, functions = library
    timed, untimed = torch.zeros(256), torch.zeros(256)
    record(library, "run_products", timed, 64, 40, 2).time()
    cuda.check(functions.run_products(cuda.pointer(untimed), 64, 40, 2))
    assert torch.equal(timed, untimed)
    assert timed.any()


def test_longer_loops_take_longer(library):
    out = torch.zeros(128)
    cycles = [record(library, "run_products", out, 64, count, 1).time().cycles for count in range(8, 72, 8)]
    assert cycles == sorted(cycles) and cycles[0] < cycles[-1]


def test_recordings_outlive_others_and_say_what_ran(library):
    out = torch.zeros(128)
    first = record(library, "run_products", out, 64, 8, 1)
    record(library, "run_exponentials", out, 8, 128)
    assert "products" in first.kernel and first.block == (128, 1, 1)
    assert first.time().busy["tensor"] == 8 * 32
    assert first.resident_ctas >= 2


def test_waits_name_ptx_lines(library):
    launch = record(library, "run_products", torch.zeros(128), 64, 256, 1)
    worst = max(launch.time().waits, key=lambda wait: wait.cycles)
    assert "wgmma" in launch.ptx.split("\n")[worst.line - 1]


def test_nothing_is_recorded_outside(library):
    cuda, functions = library
    with timing.recording() as launches:
        pass
    cuda.check(functions.run_exponentials(cuda.pointer(torch.zeros(32)), 8, 32))
    assert launches == []


def test_units_refuse_unknown_names():
    with pytest.raises(ValueError, match="no unit is called speed; there are fma"):
        units(1500, speed=2)


def test_costs_come_back_from_their_samples():
    samples = [(tiles_, blocks, 100 + 30 * tiles_ + 7 * blocks) for tiles_, blocks in ((1, 4), (3, 5), (2, 40))]
    cost = tiles.fit_cost(samples)
    assert (cost.start, cost.tile, cost.block) == pytest.approx((100, 30, 7))
    with pytest.raises(ValueError, match="different lengths"):
        tiles.fit_cost([(1, 4, 9.0), (2, 8, 18.0), (3, 12, 27.0)])


def test_tiles_are_dealt_to_who_is_free():
    cost = tiles.Cost(0, 0, 1)
    assert tiles.makespan(cost, [5, 3, 3, 1], sms=2) == 6
    assert tiles.makespan(cost, [1] * SMS) == 1
    assert tiles.makespan(cost, [1] * (SMS + 1)) == 2


class Launch:
    """Of one tile that takes 900 cycles, or as long as its products where those take longer."""

    cluster_size = 2

    def __init__(self, blocks, tiles_=1):
        self.blocks, self.tiles = blocks, tiles_

    def time(self, mhz):
        tensor = 100.0 * self.blocks
        busy = {"tensor": tensor * self.cluster_size, "xu": 8.0}
        return timing.Timed(max(900.0 * self.tiles, tensor), busy, {}, [], [])


def test_no_prediction_is_below_what_keeps_a_unit_busy():
    """Between 8 and 10 blocks the launch takes 50 cycles longer for each: half of what the tensor cores need."""
    samples = [(1, 8, Launch(8)), (2, 16, Launch(16, 2)), (1, 10, Launch(10))]
    stage = tiles.Stage("products", samples, [1000] * 3 * SMS)
    assert stage.cost(1500).block < stage.limits(1500)["tensor"].block == pytest.approx(100)
    assert stage.microseconds(1500) >= 3 * 1000 * 100 / 1500
    short = tiles.Stage("products", samples, [8] * 3 * SMS)
    assert short.microseconds(1500) == pytest.approx(3 * 900 / 1500 + 2)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 700])
@pytest.mark.parametrize("tokens", [512, 1000])
def test_counts_the_blocks_that_a_mask_shows(backward, window, tokens):
    own, other = (128, 192) if backward else (192, 128)
    seen = {(i, j) for i in range(tokens) for j in range(max(0, i - (window or tokens) + 1), i + 1)}
    visited = {((j // own, i // other) if backward else (i // own, j // other)) for i, j in seen}
    lengths = tiles.attention_blocks(tokens, own, other, True, window, backward)
    assert len(lengths) == -(-tokens // own)
    assert lengths == [sum(tile == at for tile, _ in visited) for at in range(len(lengths))]
