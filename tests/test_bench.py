"""`gptkernels bench`: what it counts, what it refuses to time, and what it writes."""

import json
import math

import pytest
import torch

from gptkernels import cli, dispatch
from gptkernels.bench import measure, peers, report, run, schema, suites, truth
from gptkernels.bench.cases import OPS, Case, parse_shape
from gptkernels.ops.attention import attention
from gptkernels.ops.attention.visibility import visible
from gptkernels.parity import ParityError

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--seconds", "0.01", "--op", "attention", "--shape", "B2,H4,G2,T96,D16,W20"]
TINY = {
    "attention": {"B": 2, "H": 4, "G": 2, "T": 80, "D": 16, "W": 33, "S": 1, "C": 5, "A": 1},
    "decode_attention": {"B": 2, "H": 4, "G": 2, "T": 45, "D": 16, "W": 20, "S": 1, "P": 8},
    "layer_norm": {"M": 37, "N": 48},
    "add_layer_norm": {"M": 37, "N": 48},
    "rms_norm": {"M": 37, "N": 48},
    "add_rms_norm": {"M": 37, "N": 48},
    "rope": {"B": 2, "H": 4, "G": 2, "T": 80, "D": 16},
    "mlp": {"M": 21, "N": 16},
    "linear_cross_entropy": {"M": 21, "N": 16, "V": 101, "C": 5},
    "linear_log_probs": {"M": 21, "N": 16, "V": 101},
    "linear_kl_div": {"M": 21, "N": 16, "V": 101},
    "gated_mlp": {"M": 21, "N": 16, "F": 40},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without seconds of products and copies, and of flushing what may be hundreds of MiB"""
    rates = {"gemm_tflops": {"float32": 0.1, "bfloat16": 0.1}, "copy_gbps": 10.0, "timer_floor_us": None}
    monkeypatch.setattr(measure.CpuBench, "ceilings", lambda self, dtypes: rates)
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: 2**20)


def bench(tmp_path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "bench.json"
    status = cli.main(["bench", *SMALL, "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


def add_contender(monkeypatch, make, kind: str = "peer", name: str = "another") -> None:
    contender = peers.Contender(name, kind, tuple(OPS), make, devices=("cpu",))
    monkeypatch.setattr(peers, "CONTENDERS", [*peers.CONTENDERS, contender])


def test_what_is_written(tmp_path, capsys):
    status, document = bench(tmp_path)
    assert status == 0
    assert schema.problems(document) == []
    rows = {(row["contender"], row["pass"]): row for row in document["cases"]}
    assert {name for name, _ in rows} == {"eager", "naive", "sdpa-flash"}
    assert {which for _, which in rows} == {"fwd", "bwd", "both"}
    for row in rows.values():
        assert row["status"] == "ok", row["detail"]
        assert len(row["samples_us"]) == sum(row["rounds"]) >= 5
        assert row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["tflops"] == pytest.approx(row["flops"] / row["median_us"] * 1e-6)
        assert row["percent_of_gemm"] == pytest.approx(row["tflops"] / 0.1 * 100)
        assert row["percent_of_copy"] == pytest.approx(row["gbps"] / 10.0 * 100)
        assert 0 < row["error_ratio"] < 1
    assert set(document["versions"]) >= {"gptkernels", "torch", "triton", "cuda", "driver"}
    assert "GFLOP/s" in capsys.readouterr().out


def test_every_op_on_the_cpu(tmp_path, monkeypatch):
    """One pass of everything that the quick suite runs, small, with a second thought for each status."""
    usual = ("attention", {"B": 2, "T": 80, "D": 16}), ("decode_attention", {"B": 2, "T": 48, "D": 16})
    shapes = [*TINY.items(), *usual]
    monkeypatch.setattr(suites, "cpu_quick", lambda dtype: [Case.of(op, dtype, **shape) for op, shape in shapes])
    path = tmp_path / "all.json"
    for dtype in ("float32", "bfloat16"):
        command = ["bench", "--device", "cpu", "--seconds", "0.01", "--dtype", dtype, "--json", str(path)]
        assert cli.main(command) == 0
        document = json.loads(path.read_text())
        assert schema.problems(document) == []
        bad = [row for row in document["cases"] if row["status"] != "ok" and row["contender"] != "torch-loss"]
        # SDPA has no sinks: nothing but that keeps it from the two cases with them.
        assert {(row["contender"], row["status"], row["detail"]) for row in bad} == {
            ("sdpa-flash", "unsupported", "it has no sinks")
        }
        assert all("S1" in row["label"] for row in bad)
        assert {row["op"] for row in document["cases"]} == set(OPS)


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch, capsys):
    def make(case, device):
        return lambda q, k, v: attention(q, k, v, window=case.shape["W"] + 1)  # one key too many

    add_contender(monkeypatch, make, kind="ours")
    status, document = bench(tmp_path)
    assert status == 1
    wrong = [row for row in document["cases"] if row["contender"] == "another"]
    assert {row["status"] for row in wrong} == {"wrong"}
    assert all(row["median_us"] is None and row["samples_us"] == [] for row in wrong)
    assert "another: wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (dispatch.UnsupportedError("attention\n  triton: too large"), "unsupported"),
        (peers.UnfitError("not this shape"), "unsupported"),
        (ZeroDivisionError("integer division"), "failed"),
    ],
)
def test_what_goes_wrong_is_a_row(tmp_path, monkeypatch, error, status):
    def make(case, device):
        def call(**tensors):
            raise error

        return call

    add_contender(monkeypatch, make)
    returned, document = bench(tmp_path)
    assert returned == 0  # it is not ours
    rows = {row["contender"]: row for row in document["cases"] if row["pass"] == "fwd"}
    assert rows["another"]["status"] == status
    assert str(error).splitlines()[-1].strip() in rows["another"]["detail"]
    assert rows["eager"]["status"] == rows["naive"]["status"] == "ok"


def test_a_failure_while_timing_spoils_one_pass_of_one_contender(tmp_path, monkeypatch):
    calls = []

    def make(case, device):
        def call(q, k, v):
            calls.append(1)
            if len(calls) > 9:
                raise RuntimeError("the ninth time")
            return attention(q, k, v, window=case.shape["W"])

        return call

    add_contender(monkeypatch, make)
    _, document = bench(tmp_path, "--pass", "fwd")
    statuses = {row["contender"]: row["status"] for row in document["cases"]}
    assert statuses.pop("another") == "failed"
    assert set(statuses.values()) == {"ok"}


def test_resuming_keeps_what_is_there_and_blames_what_was_running(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    bench(tmp_path, "--pass", "fwd")
    document = json.loads(path.read_text())
    samples = next(row for row in document["cases"] if row["contender"] == "eager")["samples_us"]
    crashed = next(row for row in document["cases"] if row["contender"] == "naive")
    crashed.update(status="started", samples_us=[], median_us=None)
    skipped = next(row for row in document["cases"] if row["contender"] == "sdpa-flash")
    skipped.update(status="skipped", samples_us=[])
    path.write_text(json.dumps(document))
    _, document = bench(tmp_path, "--pass", "fwd", "--resume")
    rows = {row["contender"]: row for row in document["cases"]}
    assert rows["eager"]["samples_us"] == samples
    assert rows["naive"]["status"] == "failed"
    assert "did not return" in rows["naive"]["detail"]
    assert rows["sdpa-flash"]["status"] == "ok"
    assert schema.problems(document) == []


def test_a_running_contender_is_named_in_the_file(tmp_path, monkeypatch):
    """So that a crash is put down to whom it belongs."""
    found = []

    def make(case, device):
        def call(q, k, v):
            rows = json.loads((tmp_path / "bench.json").read_text())["cases"]
            found.append({row["contender"] for row in rows if row["status"] == "started"})
            return attention(q, k, v, window=case.shape["W"])

        return call

    add_contender(monkeypatch, make)
    bench(tmp_path, "--pass", "bwd")
    assert found
    assert all(names == {"another"} for names in found)


def test_no_time_left(tmp_path):
    _, document = bench(tmp_path, "--budget-s", "1e-9")
    assert {(row["status"], row["detail"]) for row in document["cases"]} == {("skipped", "no time was left")}


def test_a_peer_that_is_missing_is_listed(tmp_path, monkeypatch, capsys):
    install = "pip install nonesuch"
    missing = peers.Contender(
        "nonesuch", "peer", ("attention",), peers.plain, module="nonesuch", install=install, devices=("cpu",)
    )
    monkeypatch.setattr(peers, "CONTENDERS", [*peers.CONTENDERS, missing])
    _, document = bench(tmp_path)
    assert document["peers"]["nonesuch"]["status"] == "missing"
    assert "nonesuch" not in {row["contender"] for row in document["cases"]}
    assert install in capsys.readouterr().out


def test_schema_finds_mistakes(tmp_path):
    _, document = bench(tmp_path, "--pass", "fwd")
    row = document["cases"][0]
    for field, value in (("samples_us", []), ("flops", None), ("suspect", 1), ("window", True), ("status", "fine")):
        changed = {**document, "cases": [{**row, field: value}]}
        assert any(field in problem for problem in schema.problems(changed)), field
    assert schema.problems({**document, "schema": 0})
    assert schema.problems({key: value for key, value in document.items() if key != "git"})
    assert schema.problems([])


def test_flops_and_bytes():
    dense, banded = Case.of("attention", H=2, T=50, D=16), Case.of("attention", H=2, T=50, D=16, W=7)
    for case, window in ((dense, None), (banded, 7)):
        pairs = int(visible(50, 50, True, window).sum())
        assert case.seen() == pairs
        assert case.flops("fwd") == 4 * 16 * pairs * 2
        assert case.flops("bwd") == 10 * 16 * pairs * 2
    # 8 and 16 bytes per row, head and head dimension in bfloat16, and the log-sum-exp
    case = Case.of("attention", "bfloat16", H=2, T=50, D=16)
    assert case.bytes("fwd") == 50 * 2 * (8 * 16 + 4)
    assert case.bytes("bwd") == 50 * 2 * (16 * 16 + 4)
    mlp = Case.of("mlp", M=8, N=16)
    assert (mlp.flops("fwd"), mlp.flops("bwd")) == (16 * 8 * 16**2, 32 * 8 * 16**2)
    gated = Case.of("gated_mlp", "bfloat16", M=8, N=16, F=24)
    assert (gated.flops("fwd"), gated.flops("bwd")) == (6 * 8 * 16 * 24, 12 * 8 * 16 * 24)
    assert gated.bytes("fwd") == 2 * (2 * 8 * 16 + 3 * 16 * 24 + 2 * 8 * 24)
    norm = Case.of("layer_norm", "bfloat16", M=1000, N=1000)
    assert norm.bytes("fwd") == pytest.approx(2 * 2e6, rel=0.01)
    assert norm.bytes("bwd") == pytest.approx(3 * 2e6, rel=0.01)
    assert Case.of("add_layer_norm", "bfloat16", M=1000, N=1000).bytes("bwd") == pytest.approx(4 * 2e6, rel=0.01)
    assert Case.of("rms_norm", "bfloat16", M=1000, N=1000).bytes("bwd") == 3 * 2e6 + 4 * 1000 + 2 * 2000
    assert Case.of("linear_cross_entropy", M=2, N=3, V=5).flops("both") == 6 * 30
    for op, shape in TINY.items():
        case = Case.of(op, **shape)
        if case.passes == ("fwd", "bwd", "both"):
            assert case.flops("both") == case.flops("fwd") + case.flops("bwd")
            assert case.bytes("both") == case.bytes("fwd") + case.bytes("bwd")


def test_shapes():
    assert parse_shape("B2,H16 T=8192") == {"B": 2, "H": 16, "T": 8192}
    assert Case.of("attention", T=10, W=10).kwargs == {"window": None}
    assert Case.of("attention", B=2, H=4, G=2, T=64, W=8).label == "B2 H4 G2 T64 D64 W8"
    assert Case.of("mlp", N=64).shape["F"] == 256
    case = Case.of("attention", T=64, W=8, S=1, C=50)
    assert (case.label, case.kwargs) == ("B1 H12 T64 D64 W8 S1 C50", {"window": 8, "softcap": 50.0})
    for op, shape, message in (
        ("mlp", {"T": 3}, "means nothing to mlp"),
        ("attention", {"H": 4, "G": 3}, "divides"),
        ("layer_norm", {"M": 0}, "at least 1"),
        ("attention", {"S": 2}, "a S of 0 or 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Case.of(op, **shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "conv"], "--op must be one of"),
        (["--pass", "sideways"], "--pass must be of"),
        (["--shape", "B2,x"], "--shape must look like"),
        (["--shape", "V5", "--op", "attention"], "--shape has dimensions"),
        (["--peers", "cublas"], "--peers must be none, all"),
        (["--op", "decode_attention", "--pass", "bwd"], "nothing to measure"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert cli.main(["bench", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", suites.SUITES)
def test_suites(name, device):
    cases = suites.suite(name, torch.device(device))
    assert {case.op for case in cases} == set(OPS)
    assert len({(case.op, case.label, case.passes) for case in cases}) == len(cases)
    for case in cases:
        contenders = peers.chosen(case, torch.device(device), (), None)
        assert {"eager", "naive"} <= {contender.name for contender in contenders}
        assert report.expected_seconds(case, contenders, device) > 0


def test_dry_run(capsys):
    assert cli.main(["bench", "--device", "cpu", "--suite", "headline", "--dry-run"]) == 0
    assert "about" in capsys.readouterr().out


@pytest.mark.parametrize("op", OPS)
def test_truth_in_chunks(op, monkeypatch):
    """Chunks of a few rows give what the whole reference gives, and our ops agree with it."""
    case = Case.of(op, "float32", **TINY[op])
    tensors = case.tensors(CPU, 0)
    torch.manual_seed(1)
    whole = truth.truth_of(case, tensors)
    monkeypatch.setattr(truth, "element_limit", lambda device, dtype: 600)
    torch.manual_seed(1)
    pieces = truth.truth_of(case, tensors)
    assert op == "decode_attention" or len(list(truth.chunks(case, tensors, 600))) > 1
    for a, b in zip(whole.exact.outputs, pieces.exact.outputs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert set(pieces.exact.grads) == set(whole.exact.grads)
    for name, grad in whole.exact.grads.items():
        torch.testing.assert_close(pieces.exact.grads[name], grad, atol=1e-12, rtol=1e-12)
    eager = next(c for c in peers.CONTENDERS if c.name == "eager")
    assert 0 < truth.check(case, eager.make(case, CPU), tensors, pieces, ours=True) <= 1


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, where):
        ctx.where = where
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.where] *= 1.05
        return grad, None


def unwritten(q, k, v):
    out = torch.empty(q.shape)
    out[:, :, :-1] = attention(q, k, v)[:, :, :-1]
    return out + 0 * q


def test_truth_catches():
    case = Case.of("attention", "float32", B=2, H=2, T=64, D=16)
    tensors = case.tensors(CPU, 0)
    facts = truth.truth_of(case, tensors)
    planted = {
        "gradient of k": lambda q, k, v: attention(q, WrongGradient.apply(k, (1, 1, 63)), v),
        "output 0: error": lambda q, k, v: attention(q, k, v, scale=0.26),
        "output 0: not finite": unwritten,
    }
    for message, call in planted.items():
        with pytest.raises(ParityError, match=message):
            truth.check(case, call, tensors, facts, ours=True)


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (lambda q, k, v, sinks: attention(q, k, v) + 0 * sinks.sum(), "output 0: error"),
        (lambda q, k, v, sinks: attention(q, k, v, sinks=WrongGradient.apply(sinks, 0)), "gradient of sinks"),
    ],
    ids=["without sinks", "their gradient"],
)
def test_truth_catches_sinks(planted, message):
    """Their gradients are sums over the whole batch."""
    case = Case.of("attention", "float32", B=2, H=2, T=64, D=16, S=1)
    tensors = case.tensors(CPU, 0)
    with pytest.raises(ParityError, match=message):
        truth.check(case, planted, tensors, truth.truth_of(case, tensors), ours=True)


def test_above_the_ceiling_is_suspect():
    row = {"flops": 10**9, "bytes": 10**6, "dtype": "float32"}
    timing = measure.Timing("wall", 1, 1, cold=True, samples_us=[1000.0] * 5)
    ceilings = {"gemm_tflops": {"float32": 0.5}, "copy_gbps": 10.0}
    assert report.figures(timing, row, ceilings)["suspect"]
    ceilings["gemm_tflops"]["float32"] = 2.0
    found = report.figures(timing, row, ceilings)
    assert not found["suspect"]
    assert math.isclose(found["percent_of_gemm"], 50)


def test_summary():
    assert report.summary([3.0, 1.0, 2.0]) == {"median_us": 2.0, "p20_us": 1.0, "p80_us": 3.0}
    assert report.summary([float(i) for i in range(101)]) == {"median_us": 50.0, "p20_us": 20.0, "p80_us": 80.0}


def test_a_lost_context_ends_the_run(tmp_path, monkeypatch):
    def make(case, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    add_contender(monkeypatch, make)
    monkeypatch.setattr(run, "context_is_lost", lambda error: "illegal memory" in str(error))
    status, document = bench(tmp_path)
    assert status == run.CONTEXT_LOST
    rows = {row["contender"]: row["status"] for row in document["cases"]}
    assert rows["another"] == "failed"
    assert rows["eager"] == "skipped"  # for the next process to do
