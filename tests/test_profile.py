"""`gptkernels profile` on models small enough for a CPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from gptkernels import cli
from gptkernels.bench import measure
from gptkernels.models import GPT, GPTConfig, config, cost
from gptkernels.models.plain import plain_twin
from gptkernels.profile import shares, workload

CPU = torch.device("cpu")
TINY = GPTConfig(vocabulary=512, context=128, layers=2, width=64, heads=2, pattern=("dense", "banded"), window=16)
LLAMA = {"norm": "rms", "rotary": 1e4, "kv_heads": 1, "gated": True, "activation": "silu", "bias": False, "tied": False}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(config.PRESETS, "tiny", TINY)
    rates = {"gemm_tflops": {"float32": 0.1, "bfloat16": 0.1}, "copy_gbps": 10.0, "timer_floor_us": None}
    monkeypatch.setattr(measure.CpuBench, "ceilings", lambda self, dtypes: dict(rates))


def profile(tmp_path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "profile.json"
    command = ["profile", "--model", "tiny", "--device", "cpu", "--batch", "2", "--seq", "64", "--json", str(path)]
    status = cli.main([*command, *arguments])
    return status, json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt3", "llama"])
def test_training(tmp_path, capsys, monkeypatch, changes):
    model = replace(TINY, **changes)
    monkeypatch.setitem(config.PRESETS, "tiny", model)
    trace = tmp_path / "trace.json"
    status, found = profile(tmp_path, "--trace", str(trace))
    assert status == 0
    assert "plain PyTorch" in capsys.readouterr().out
    assert found["tuned"]["classes"] == 0
    assert found["ours"]["difference"] < 1e-5
    per_token = cost.training_flops_per_token(model, 64)
    for name in ("plain", "ours"):
        one = found[name]
        assert {"attention", "projections", "mlp", "norm", "embedding", "loss", "optimizer"} <= set(one["parts_us"])
        assert one["parts_us"].get("rest", 0) < 0.2 * sum(one["parts_us"].values())
        parameters = GPT(model).parameter_count()
        assert one["memory_bytes"]["weights"] == one["memory_bytes"]["gradients"] == 4 * parameters
        assert 8 * parameters <= one["memory_bytes"]["optimizer"] < 8 * parameters + 1000
        assert one["tokens_per_second"] == pytest.approx(128e6 / one["step_us"])
        used = one["utilisation"]
        assert used["of_measured_gemm"] == pytest.approx(one["tokens_per_second"] * per_token / 1e11)
        assert used["mfu"] is None  # nobody has written down what this CPU could do
    events = json.loads(trace.read_text())["traceEvents"]
    assert any("attention" in event.get("name", "") for event in events)


@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt3", "llama"])
def test_activations_are_what_the_formula_says(tmp_path, monkeypatch, changes):
    """Of ours; the plain model keeps more."""
    model = replace(TINY, **changes)
    monkeypatch.setitem(config.PRESETS, "tiny", model)
    _, found = profile(tmp_path)
    ours, plain = (found[name]["memory_bytes"]["activations"] for name in ("ours", "plain"))
    formula = cost.training_memory(model, 128, mixed=False, on_cpu=True).activations
    assert ours == pytest.approx(formula, rel=0.15)
    assert plain > ours


def test_inference(tmp_path, capsys):
    status, found = profile(tmp_path, "--infer", "--dtype", "bfloat16", "--no-plain")
    assert status == 0
    assert found["plain"] is None
    assert set(found["ours"]["memory_bytes"]) == {"weights"}
    assert found["flops_per_token"]["window_aware"] == cost.forward_flops_per_token(TINY, 64)
    assert "inference of tiny" in capsys.readouterr().out


def test_another_result_than_the_plain_model_is_an_error(tmp_path, monkeypatch, capsys):
    def broken_twin(model):
        twin = plain_twin(model)
        twin.blocks[0].mlp.fc.weight.data.mul_(1.5)
        return twin

    monkeypatch.setattr("gptkernels.models.plain.plain_twin", broken_twin)
    status, found = profile(tmp_path)
    assert status == 1
    assert found["ours"]["status"] == "wrong"
    assert "differs from the plain model" in capsys.readouterr().out


def test_a_failure_is_said(tmp_path, monkeypatch, capsys):
    status, found = profile(tmp_path, "--backend", "cuda")
    assert status == 1
    assert found["plain"]["status"] == "ok"
    assert found["ours"]["status"] == "failed"
    assert "UnsupportedError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt5"], "--model must be one of"),
        (["--seq", "100000"], "--seq must be at most"),
        (["--model", "albert-base"], "must predict next tokens"),
        (["--parallel", "ddp"], "torchrun"),
        (["--hf", "/nonexistent/model"], "--hf /nonexistent/model"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message, capsys):
    status, _ = profile(tmp_path, *arguments)
    assert status == 2
    assert message in capsys.readouterr().err


def test_parts_add_up():
    """All of the profiler's time is in some part, and what a part of the model takes is found there, backward too."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            for _ in range(200):
                grad = grad.mul(1.0)
            return grad

    class SlowMLP(nn.Module):
        def forward(self, x):
            return Slow.apply(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(64), SlowMLP()

        def forward(self, x):
            return self.mlp(self.norm(x)).sum()

    model, x = Model(), torch.randn(64, 64)
    parts, profiler = shares.profiled(model, lambda: model(x).backward(), 3, CPU)
    assert parts["mlp"] > 0.7 * sum(parts.values())
    own = sum(event.self_cpu_time_total for event in profiler.events())
    assert sum(parts.values()) == pytest.approx(own / 3, rel=0.01)


class Event:
    """As much of a profiler's event as is read"""

    def __init__(self, name, start, end, parent=None, number=-1, kernels=()):
        self.name, self.cpu_parent, self.sequence_nr, self.kernels = name, parent, number, kernels
        self.device_type = torch.autograd.DeviceType.CPU
        self.time_range = type("Range", (), {"start": start, "end": end})
        self.self_cpu_time_total = 1.0


class Kernel:
    def __init__(self, name, duration):
        self.name, self.duration = name, duration


def test_kernels_of_a_gpu():
    """A kernel belongs to where it was launched; the announcement, which shows up as a kernel, is not counted."""
    label = Event("gptkernels.attention", 0, 10, kernels=[Kernel("gptkernels.attention", 99.0)])
    forward = Event("AttentionFunction", 1, 9, label, number=7, kernels=[Kernel("attention_fwd_kernel", 5.0)])
    backward = Event(shares.EVALUATE + "AttentionFunctionBackward", 20, 30, number=7)
    inner = Event("AttentionFunctionBackward", 21, 29, backward, kernels=[Kernel("attention_bwd_kernel", 11.0)])
    copy = Event("aten::copy_", 40, 41, kernels=[Kernel("Memcpy", 2.0)])
    reduce = Event("nccl:all_reduce", 50, 51, kernels=[Kernel("ncclKernel", 3.0)])
    found = shares.by_part([label, forward, backward, inner, copy, reduce], on_gpu=True)
    assert {part: time for part, time in found.items() if time} == {
        "attention": 16.0,
        "rest": 2.0,
        "communication": 3.0,
    }


def test_parts_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    tiny = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=100, n_positions=32)
    model = transformers.GPT2LMHeadModel(tiny)
    found = {part for _, part in shares.parts_of(model)}
    assert {"attention", "projections", "mlp", "norm", "embedding"} <= found


def test_a_transformers_model_from_a_folder(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    tiny = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=32, vocab_size=100, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    transformers.GPT2LMHeadModel(tiny).save_pretrained(tmp_path / "model")
    status, found = profile(tmp_path, "--hf", str(tmp_path / "model"))
    assert status == 0, found["ours"]
    assert found["ours"]["difference"] < 1e-4
    assert {"attention", "mlp", "norm"} <= set(found["ours"]["parts_us"])


def test_flops_of_a_transformers_model():
    """The general formula agrees with the exact one of the same model."""
    transformers = pytest.importorskip("transformers")
    gpt = GPT(GPTConfig(vocabulary=512, context=128, layers=2, width=64, heads=2))
    hf = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=512, n_positions=128)
    plain = {"plain": transformers.GPT2LMHeadModel(hf)}
    subject = workload.Subject("hf", plain, 512, 128, None, None, None)
    found = workload.flops_of(subject, 64, training=True)
    assert found.dense == pytest.approx(cost.training_flops_per_token(gpt.config, 64), rel=1e-6)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes(tmp_path, parallel):
    """Two of them on the CPU: a row for each, and the sum."""
    path = tmp_path / "profile.json"
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from gptkernels import cli\n"
        "from gptkernels.models import GPTConfig, config\n"
        f"config.PRESETS['tiny'] = {TINY!r}\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += ["profile", "--model", "tiny", "--device", "cpu", "--batch", "1", "--seq", "32", "--steps", "2"]
    command += ["--parallel", parallel, "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(path.read_text())
    for name in ("plain", "ours"):
        one = found[name]
        assert len(one["per_gpu"]) == 2
        each = [row["tokens_per_second"] for row in one["per_gpu"]]
        assert one["tokens_per_second_of_all"] == pytest.approx(sum(each))
    weights = 4 * GPT(TINY).parameter_count()
    share = {"ddp": 1.0, "fsdp": 0.5}[parallel]
    assert found["ours"]["memory_bytes"]["weights"] == pytest.approx(weights * share, rel=0.05)
    assert "communication" in found["ours"]["parts_us"]
    assert "sum" in result.stdout
