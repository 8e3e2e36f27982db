"""benchmarks/: what README shows is what results/ says, and the pytest-benchmark suite runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks/ is only there in a checkout", allow_module_level=True)


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import measured

    return measured


def test_readme_is_up_to_date():
    result = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"])
    assert result.returncode == 0, "run python benchmarks/report.py"


def test_results_are_of_this_schema():
    from gptkernels.bench import schema

    for path in (ROOT / "benchmarks" / "results").glob("*-bench.json"):
        document = json.loads(path.read_text())
        assert schema.problems(document) == []
        assert not [row for row in document["cases"] if row["status"] in ("wrong", "started")]


def test_tables(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    assert "Nothing" in measured.bench_tables()
    assert "No model" in measured.profile_tables()
    row = {"op": "attention", "label": "B1 H2", "dtype": "bfloat16", "pass": "fwd", "status": "ok"}
    row |= {"percent_of_gemm": 70.0, "percent_of_copy": 20.0}
    rows = [
        row | {"kind": "ours", "contender": "triton", "median_us": 500.0},
        row | {"kind": "ours", "contender": "cuda", "median_us": 400.0},
        row | {"kind": "peer", "contender": "naive", "median_us": 4000.0},
        row | {"kind": "peer", "contender": "sdpa-cudnn", "median_us": 600.0},
        row | {"kind": "peer", "contender": "liger", "median_us": 1.0, "status": "wrong"},
    ]
    document = {
        "device": {"name": "a GPU"},
        "versions": {"torch": "2.11"},
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "ceilings": {"gemm_tflops": {"bfloat16": 800.0}, "copy_gbps": 3000.0},
        "cases": rows,
    }
    (tmp_path / "gpu-bench.json").write_text(json.dumps(document))
    made = measured.bench_tables()
    assert "| attention B1 H2, bfloat16 | forward | 400 us, cuda | 70%, product | 600 us, sdpa-cudnn | 1.50" in made
    assert "commit 0123456789 with changes" in made


def test_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "benchmarks" / "bench_ops.py")]
    command += ["-k", "decode_attention and (eager or naive)", "--benchmark-json", str(path)]
    # pytest-benchmark measures nothing where it takes itself for one of several workers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, env={**environment, "COLUMNS": "200"}
    )
    assert result.returncode == 0, result.stdout[-3000:]
    found = json.loads(path.read_text())
    assert {"device", "versions"} <= set(found["machine_info"])
    assert all(0 < one["extra_info"]["error_ratio"] <= 1 for one in found["benchmarks"] if "eager" in one["name"])
    assert len(found["benchmarks"]) >= 2
