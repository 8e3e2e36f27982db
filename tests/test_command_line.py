"""Whatever is typed: the answer, or one line that names the flag or the file, and an exit status. Never a traceback."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptkernels import __version__, cli, cuda_build
from gptkernels.models import GPT, GPTConfig, checkpoint
from gptkernels.models.few_shot import evaluate

CHECKOUT = Path(__file__).resolve().parent.parent
SMALL = GPTConfig(vocabulary=256, context=32, layers=1, width=32, heads=2)


def gptkernels(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gptkernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def save_model(folder: Path, **changes) -> Path:
    model = GPT(replace(SMALL, **changes))
    state = {"config": checkpoint.describe(model.config), "model": model.state_dict(), "step": 1}
    checkpoint.save(folder / checkpoint.NAME, state | {"tokenizer": {"kind": "bytes"}})
    return folder


def test_version_and_help_need_no_torch():
    script = "import sys; from gptkernels import cli; cli.main([sys.argv[1]]); print(sorted(sys.modules))"
    for flag, expected in (("--version", f"gptkernels {__version__}"), ("--help", "usage: gptkernels COMMAND")):
        out = subprocess.run([sys.executable, "-c", script, flag], capture_output=True, text=True, check=True).stdout
        assert out.startswith(expected)
        assert not {"torch", "triton", "numpy", "rich"} & set(json.loads(out.splitlines()[-1].replace("'", '"')))


def test_importing_the_package_leaves_out_what_it_does_not_need():
    script = """
import sys, torch
before = set(sys.modules)
import gptkernels as gk
for name in gk.__all__:
    getattr(gk, name)
print(sorted(name for name in set(sys.modules) - before))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    names = json.loads(out.replace("'", '"'))
    heavy = ("torch._dynamo", "torch._inductor", "transformers", "matplotlib", "tokenizers", "safetensors")
    assert not [name for name in names if name.startswith(heavy)]


NUMBERS = [
    ("train", "--steps", "0", "a whole number, at least 1"),
    ("train", "--batch", "many", "a whole number, at least 1"),
    ("train", "--micro-batch", "0", "a whole number, at least 1"),
    ("train", "--warmup", "-1", "a whole number, at least 0"),
    ("train", "--weight-decay", "-0.1", "a finite number >= 0"),
    ("train", "--clip", "-1", "a finite number >= 0"),
    ("train", "--clip", "nan", "a finite number >= 0"),
    ("train", "--learning-rate", "inf", "a finite number > 0"),
    ("train", "--learning-rate", "-1", "a finite number > 0"),
    ("train", "--min-learning-rate", "2", "a finite number >= 0 and <= 1"),
    ("train", "--dropout", "1", "a finite number >= 0 and <= 0.999"),
    ("train", "--seed", "-1", "a whole number of 0 ... 4294967295"),
    ("train", "--seed", "99999999999999999999", "a whole number of 0 ... 4294967295"),
    ("train", "--checkpoint-every", "0", "a whole number, at least 1"),
    ("train", "--evaluate-every", "-1", "a whole number, at least 0"),
    ("train", "--log-every", "0", "a whole number, at least 1"),
    ("train", "--context", "0", "a whole number, at least 1"),
    ("generate", "--tokens", "0", "a whole number, at least 1"),
    ("generate", "--temperature", "nan", "a finite number >= 0"),
    ("generate", "--parallel", "fsdp", "none, tp or tp=N"),
    ("generate", "--parallel", "tp=2,cp=2", "none, tp or tp=N"),
    ("generate", "--top-p", "0", "a finite number > 0 and <= 1"),
    ("few-shot", "--shots", "-1", "a whole number, at least 0"),
    ("bench", "--seconds", "0", "a finite number > 0"),
    ("profile", "--steps", "0", "a whole number, at least 1"),
    ("check", "--seed", "1.5", "a whole number of 0 ... 4294967295"),
]


@pytest.mark.parametrize(("command", "flag", "value", "accepted"), NUMBERS)
def test_numbers_out_of_range_are_named(command, flag, value, accepted, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, f"{flag}={value}"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {flag}: must be {accepted}, not " in error
    assert value in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("command", [["train", "--data", "x"], ["bench"], ["profile"], ["check"]])
def test_a_device_that_is_not_there(command, capsys):
    assert cli.main([*command, "--device", "cuda"]) == 2
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err


def test_a_backend_that_cannot_run(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some text " * 100)
    arguments = ["train", "--model", "tiny", "--data", str(tmp_path / "text.txt"), "--device", "cpu", "--steps", "2"]
    assert cli.main([*arguments, "--backend", "triton"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no backend supports this call; triton: runs on CUDA tensors, not cpu" in error


def test_out_of_memory_says_what_a_step_needs(tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("some text " * 100)

    def no_room(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("gptkernels.models.training.Trainer.one_step", no_room)
    arguments = ["train", "--model", "tiny", "--data", str(tmp_path / "text.txt"), "--device", "cpu"]
    assert cli.main(arguments) == 1
    assert "a step of 16 sequence(s) at once needs about 0.1 GiB (--dry-run says of what)" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "gptkernels", "info", "--json"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "gptkernels info: No space left on device" in result.stderr


def test_a_reader_that_leaves():
    command = f"{sys.executable} -m gptkernels train --dry-run | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


def test_json_into_a_folder_that_is_not_writable(tmp_path, capsys):
    target = tmp_path / "file"
    target.write_text("")
    assert cli.main(["check", "--op", "layer_norm", "--device", "cpu", "--json", str(target / "check.json")]) == 1
    assert f"{target}: " in capsys.readouterr().err


CHECKPOINTS = {
    "empty": b"",
    "incomplete": b"\x10\x00\x00\x00\x00\x00\x00\x00{",
    "huge header": b"\xff" * 64,
    "pickle": b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_that_are_none(name, tmp_path, capsys):
    path = tmp_path / checkpoint.NAME
    path.write_bytes(CHECKPOINTS[name])
    assert cli.main(["generate", "--checkpoint", str(tmp_path), "--prompt", "a"]) == 1
    error = capsys.readouterr().err
    assert f"{path} is not a whole checkpoint" in error
    assert error.count("\n") == 1


def test_generate_refuses_what_cannot_be_right(tmp_path, capsys):
    save_model(tmp_path / "good")
    nan = GPT(SMALL)
    torch.nn.init.constant_(nan.embedding.token.weight, torch.nan)
    state = {"config": checkpoint.describe(SMALL), "model": nan.state_dict(), "tokenizer": {"kind": "bytes"}}
    checkpoint.save(tmp_path / "nan" / checkpoint.NAME, state)
    save_model(tmp_path / "few", vocabulary=100)

    def generate(folder, prompt="a"):
        status = cli.main(["generate", "--checkpoint", str(tmp_path / folder), "--prompt", prompt, "--device", "cpu"])
        return status, capsys.readouterr().err

    assert generate("good") == (0, "")
    status, error = generate("nan")
    assert status == 1
    assert "the model's logits are not finite" in error
    status, error = generate("few")
    assert status == 2
    assert "--tokenizer must have the model's 100 tokens at most, not 256" in error
    status, error = generate("good", "")
    assert status == 2
    assert "--prompt must have at least one token" in error


EXAMPLES = {
    "not json": ("{", "line 1: not JSON"),
    "nested": ("[" * 100_000, "line 1: not JSON"),
    "a list": ("[1]", "line 1: must be an object, not list"),
    "a key less": ('{"text": "a"}', "it lacks label"),
    "a number": ('{"text": 1, "label": "x"}', "text must be text, not 1"),
    "a list as label": ('{"text": "a", "label": [1]}', r"label must be text or a whole number, not [1]"),
    "one label": ('{"text": "a", "label": "x"}', "at least two labels"),
    "nothing": ("", "must have at least one example"),
    "bytes": (b"\xff\xfe", "must be text in UTF-8"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_task_files(name, tmp_path, capsys):
    text, message = EXAMPLES[name]
    path = tmp_path / "task.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    arguments = ["train", "--model", "tiny", "--task", "classification", "--data", str(path), "--device", "cpu"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_context_too_short_for_a_task(tmp_path, capsys):
    path = tmp_path / "task.jsonl"
    path.write_text('{"first": "abc", "second": "abd", "label": 0}\n{"first": "abc", "second": "x", "label": 1}\n')
    arguments = ["train", "--model", "tiny", "--task", "similarity", "--data", str(path), "--device", "cpu"]
    assert cli.main([*arguments, "--steps", "1", "--context", "1"]) == 1
    assert "the context must be at least 5 tokens for similarity, not 1" in capsys.readouterr().err
    assert cli.main([*arguments, "--steps", "1", "--context", "5", "--batch", "1"]) == 0


def test_few_shot(tmp_path, capsys):
    save_model(tmp_path / "model")
    questions = [{"context": f"{i} +", "choices": [" a", " bc"], "answer": i % 2} for i in range(4)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, questions)))
    arguments = ["few-shot", "--checkpoint", str(tmp_path / "model"), "--questions", str(path), "--device", "cpu"]
    assert cli.main([*arguments, "--shots", "2", "--json", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"2 shot(s): {found['accuracy']:.1%} of 4 questions right, by chance 50.0%" in out
    assert len(found["scores"]) == 4
    assert cli.main([*arguments, "--shots", "4"]) == 2
    assert "--shots must be fewer than the 4 questions" in capsys.readouterr().err
    path.write_text('{"context": "a", "choices": ["b"], "answer": 1}')
    assert cli.main(arguments) == 2
    assert "question 1: answer must be 0 ... 0, not 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="questions must have at least one question"):
        evaluate(None, None, [])


def test_an_nvcc_that_is_none(tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_bytes(b"\x7fELF not")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("GPTKERNELS_CACHE", str(tmp_path / "cache"))
    assert cli.main(["build"]) == 1
    assert f"{nvcc} cannot be run: Exec format error" in capsys.readouterr().err


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTKERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(cuda_build.BuildError, match=r"cannot be made \(Not a directory\); GPTKERNELS_CACHE"):
        cuda_build.build_into_cache()


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["train", "--dry-run"],
        ["bench", "--dry-run", "--device", "cpu", "--suite", "full"],
        ["bench", "--dry-run", "--device", "cuda", "--suite", "headline"],
        ["tune", "--dry-run", "--device", "cuda", "--model", "gpt3-1.3b"],
        ["check", "--device", "cpu", "--seed", "1"],
        ["compare", "--all", *["benchmarks/results/cpu-bench.json"] * 2],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_no_cell_is_cut(arguments, columns):
    arguments = [str(CHECKOUT / part) if part.endswith(".json") else part for part in arguments]
    result = gptkernels(*arguments, env={**os.environ, "COLUMNS": str(columns)})
    assert result.returncode == 0
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= columns
