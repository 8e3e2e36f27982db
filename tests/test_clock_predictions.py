"""benchmarks/predict.py: what the simulator's clock says of our kernels, and the committed tables of it."""

import json
import sys
from pathlib import Path

import pytest
from conftest import skip_without_library

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks/ is only there in a checkout", allow_module_level=True)
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def predict(monkeypatch):
    import torch

    from gptkernels import simulator

    if torch.cuda.is_available() or simulator.unavailable():
        pytest.skip(simulator.unavailable() or "the clock runs where there is no GPU")
    if reason := simulator.cuda_unavailable():
        skip_without_library(reason)
    from ptxemu.timing import sass

    try:
        sass.find_tool("ptxas"), sass.find_tool("nvdisasm")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import predict

    yield predict
    for name in ("predict", "clock_stages"):
        del sys.modules[name]


def test_work_counts_flops_and_bytes(predict):
    shape = {"B": 2, "H": 3, "T": 100, "D": 64}
    pairs = sum(min(i + 1, 100) for i in range(100))
    assert predict.Work("attention", shape).flops == 4 * 64 * pairs * 6
    assert predict.Work("attention", shape, backward=True).flops == 10 * 64 * pairs * 6
    banded = sum(min(i + 1, 17) for i in range(100))
    assert predict.Work("attention", {**shape, "W": 17}).flops == 4 * 64 * banded * 6
    assert predict.Work("layer_norm", {"M": 10, "N": 96}).bytes == 10 * 96 * 4


@pytest.mark.parametrize(
    ("op", "shape", "backward"),
    [
        ("attention", "B1,H2,T1024,D128", False),
        ("attention", "B1,H2,T1024,D64", True),
        ("attention", "B1,H2,T2048,D64,W128", False),
        ("attention", "B1,H2,T1024,D256,C50", True),
        ("mlp", "M2048,N1024,K512", False),
        ("mlp", "M2048,N1024,K512", True),
        ("mlp", "M16384,N4096,K16384", False),
        ("gated_mlp", "M2048,N1024,K512", False),
        ("gated_mlp", "M2048,N1024,K512", True),
        ("layer_norm", "M4096,N1024", True),
        ("cross_entropy", "M512,N4096", False),
    ],
)
def test_predictions_keep_to_the_limits(predict, op, shape, backward):
    """No kernel beats the tensor cores or HBM, every instruction is found, no unit is busy for longer than it takes."""
    work = predict.Work(op, predict.parse_shape(op, shape), backward)
    stages = work.stages()
    assert predict.predicted_us(stages) > work.limit_us
    for stage in stages:
        for timed in stage.timed(1476):
            assert timed.lost == 0
            cycles = timed.cycles * stage.samples[0][-1].cluster_size
            assert all(timed.busy[unit] <= cycles for unit in ("tensor", "shared", "tma", "issue"))


@pytest.mark.parametrize("columns", [256, 512, 768, 1024, 1600, 2048, 4096, 8192, 12288])
def test_layer_norm_backward_launches_what_the_gpu_holds(predict, columns):
    """All of its CTAs, and so all of the partial rows, are there at once; none could be added."""
    from gptkernels import cuda_library

    launch = predict.clock_stages.norm_launches("layer_norm", 64, columns, True)[0]
    assert cuda_library.load().layer_norm_bwd_partial_rows(1 << 20, columns, 1) == launch.resident_ctas


def test_longer_sequences_take_longer(predict):
    times = [
        predict.predicted_us(predict.Work("attention", {"B": 1, "H": 16, "T": tokens, "D": 128}).stages())
        for tokens in (1024, 2048, 4096, 8192)
    ]
    assert times == sorted(times)
    assert times[-1] > 2.5 * times[-2]


def test_says_where_time_goes(predict, capsys):
    predict.main(["--op", "layer_norm", "--shape", "M4096,N1024"])
    said = capsys.readouterr().out
    for part in ("us predicted", "GB/s", "busy", "of waiting for a scoreboard"):
        assert part in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "attention", "--shape", "B2,T8"], "--shape of attention is B<number>,H<number>,T<number>,D<number>"),
        (["--op", "mlp", "--shape", "M1,N1,K1,W2"], "--shape of mlp"),
        (["--op", "cross_entropy", "--shape", "M1,N1", "--pass", "bwd"], "--pass bwd"),
        (["--op", "mlp", "--shape", "M1,N1,K1", "--backend", "triton"], "--backend triton"),
        (["--shape", "M1"], "--op and --shape are needed"),
    ],
)
def test_refuses_what_it_cannot_predict(predict, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        predict.main(arguments)
    assert message in str(stopped.value) + capsys.readouterr().err


def test_committed_rows_are_possible():
    document = json.loads((RESULTS / "clock_predictions.json").read_text())
    assert len(document["rows"]) > 20
    assert all(row["predicted_us"] > row["limit_us"] for row in document["rows"])
    errors = json.loads((RESULTS / "clock_calibration.json").read_text())
    held_out = [abs(row["error"]) for row in errors["rows"] if row["held_out"]]
    assert errors["summary"]["held out"]["worst"] == max(held_out) < 0.15
    assert sum(held_out) / len(held_out) < 0.08
