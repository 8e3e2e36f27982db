"""The command line as a user meets it."""

import json
import subprocess
import sys

import pytest
import torch

from gptkernels import check, cli, simulator
from gptkernels.ops.layer_norm import layer_norm, reference


def test_info_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert set(facts["ops"]["layer_norm"]) == {"cuda", "triton", "eager"}
    assert facts["ops"]["layer_norm"]["eager"] == "available"
    if not torch.cuda.is_available():
        assert "runs on CUDA tensors" in facts["ops"]["layer_norm"]["triton"]


def test_as_a_module():
    result = subprocess.run([sys.executable, "-m", "gptkernels", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for command in ("info", "check", "build"):
        assert command in result.stdout


def test_check_writes_what_it_found(tmp_path, capsys):
    path = tmp_path / "check.json"
    assert cli.main(["check", "--op", "layer_norm", "--device", "cpu", "--seed", "3", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert (found["device"], found["seed"]) == ("cpu", 3)
    assert {r["status"] for r in found["results"]} == {"right"}
    assert {r["dtype"] for r in found["results"]} == set(check.DTYPES)
    assert "0 wrong" in capsys.readouterr().out


def test_check_runs_kernels_in_the_simulator(tmp_path):
    if simulator.unavailable():
        pytest.skip(simulator.unavailable())
    path = tmp_path / "check.json"
    assert cli.main(["check", "--op", "add_layer_norm", "--device", "simulator", "--json", str(path)]) == 0
    right = {r["backend"] for r in json.loads(path.read_text())["results"] if r["status"] == "right"}
    assert {"triton", "eager"} <= right
    assert "cuda" in right or simulator.cuda_unavailable()


def test_check_fails_on_a_wrong_result(monkeypatch, capsys):
    def slightly_wrong(x, weight, bias, *, backend):
        return layer_norm(x, weight, bias, backend=backend) * 1.02

    wrong = check.Case("3 x 64", slightly_wrong, reference.layer_norm, {"x": (3, 64), "weight": (64,), "bias": (64,)})
    monkeypatch.setitem(check.CASES, "layer_norm", lambda small: [wrong])
    assert cli.main(["check", "--op", "layer_norm", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert "times the allowed" in out


def test_check_fails_on_a_crash(monkeypatch, capsys):
    def crash(**arguments):
        raise RuntimeError("illegal memory access")

    broken = check.Case("3 x 64", crash, reference.layer_norm, {"x": (3, 64), "weight": (64,), "bias": (64,)})
    monkeypatch.setitem(check.CASES, "layer_norm", lambda small: [broken])
    assert cli.main(["check", "--op", "layer_norm", "--device", "cpu"]) == 1
    assert "illegal memory access" in capsys.readouterr().out


def test_wrong_arguments(capsys):
    assert cli.main(["check", "--op", "conv"]) == 2
    assert "--op must be one of layer_norm" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["check", "--device", "cuda"]) == 2
        assert "--device cuda: torch sees no GPU" in capsys.readouterr().err
