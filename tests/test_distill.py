"""Students: their loss, that they learn what the teacher knows, and that a run goes on as it was."""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gptkernels import cli
from gptkernels.failures import UsageError
from gptkernels.models import GPT, GPTConfig, checkpoint
from gptkernels.models.data import Text
from gptkernels.models.distill import Student, check_options
from gptkernels.models.training import Trainer, TrainOptions

SMALL = GPTConfig(vocabulary=64, context=32, layers=2, width=64, heads=4, pattern=("dense", "banded"), window=8)
LARGER = replace(SMALL, layers=3, width=96, heads=6, vocabulary=72)


def make(config: GPTConfig, seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(config)


def make_teacher() -> GPT:
    """Of opinions strong enough to have something to learn from"""
    teacher = make(replace(LARGER, dropout=0.1, init_std=0.3), 1)
    return teacher.eval().requires_grad_(False)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 3.0)])
def test_the_loss_is_as_it_says(alpha, temperature):
    gpt, teacher = make(SMALL, 0), make_teacher()
    student = Student.of(gpt, teacher, alpha, temperature, 64)
    tokens = torch.randint(64, (2, 33))
    tokens, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :5] = -100
    loss = student(tokens, targets)
    own, expected = gpt(tokens), teacher(tokens)[..., :64]
    kl = F.kl_div((own / temperature).log_softmax(-1), (expected / temperature).softmax(-1), reduction="none").sum(-1)
    kl = kl[targets != -100].mean()
    entropy = F.cross_entropy(own.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, alpha * entropy + (1 - alpha) * temperature**2 * kl)
    # Evaluation is of the data alone, and whoever asks for logits gets logits.
    torch.testing.assert_close(student.eval()(tokens, targets), entropy)
    assert student(tokens).shape == (2, 32, 64)


def test_the_teacher_is_no_part_of_the_student():
    gpt = make(SMALL, 0)
    student = Student.of(gpt, make_teacher(), 0.5, 2.0, 64)
    assert list(student.state_dict()) == list(gpt.state_dict())
    assert student.parameter_count() == gpt.parameter_count()
    student.train()
    assert not student.teacher.training


def test_who_knows_it_all_learns_nothing():
    gpt, teacher = make(SMALL, 0), make(SMALL, 0).eval().requires_grad_(False)
    student = Student.of(gpt, teacher, 0.0, 2.0, 64)
    tokens = torch.randint(64, (2, 33))
    loss = student(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert loss.item() == 0
    assert all(x.grad.eq(0).all() for x in gpt.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twenty_steps_bring_it_nearer(dtype):
    student = Student.of(make(SMALL, 0), make_teacher(), 0.0, 1.0, 64)
    data = Text(np.random.default_rng(0).integers(0, 64, 4000), 32, 64)
    options = TrainOptions(steps=20, batch=8, learning_rate=3e-3, warmup=5, log_every=1, dtype=dtype)
    losses = [record.loss for record in Trainer(student, data, options).train()]
    assert losses[-1] < losses[0] - 0.2


def arguments(tmp_path, *more: str) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    given = ["train", "--data", str(text), "--batch", "2", "--warmup", "2", "--log-every", "1", "--evaluate-every", "0"]
    return [*given, "--device", "cpu", "--dropout", "0.1", *more]


def tiny(tmp_path, *more: str) -> list[str]:
    return arguments(tmp_path, "--model", "tiny", "--context", "32", *more)


@pytest.fixture
def taught(tmp_path) -> str:
    """A run of ours, to learn from"""
    assert cli.main(tiny(tmp_path, "--steps", "2", "--seed", "5", "--out", str(tmp_path / "teacher"))) == 0
    return str(tmp_path / "teacher")


def logged(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_goes_on_as_it_was(tmp_path, taught, capsys):
    more = ("--distill-from", taught, "--alpha", "0.25", "--temperature", "3")
    straight = tiny(tmp_path, "--steps", "6", *more)
    assert cli.main([*straight, "--out", str(tmp_path / "one")]) == 0
    assert "loss: 0.25 cross-entropy + 6.75 KL from" in capsys.readouterr().out
    # Killed after three steps; the cosine is that of the whole run.
    cut = [*straight, "--out", str(tmp_path / "two"), "--checkpoint-every", "3"]
    code = (
        "import gptkernels.models.training as t, sys, os\n"
        "from gptkernels import cli\n"
        "save = t.Trainer.save\n"
        "def once(self):\n    save(self)\n    os._exit(9)\n"
        "t.Trainer.save = once\n"
        f"cli.main({cut!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    capsys.readouterr()
    resume = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "two"), "--resume"]
    assert cli.main([*resume, "--device", "cpu"]) == 0
    assert "goes on after step 3" in capsys.readouterr().out
    one, two = (checkpoint.load(tmp_path / name) for name in ("one", "two"))
    assert one["step"] == two["step"] == 6
    assert all(torch.equal(x, two["model"][name]) for name, x in one["model"].items())
    assert logged(tmp_path / "two")[-3:] == logged(tmp_path / "one")[-3:]
    # What comes out is a model like any other.
    assert isinstance(checkpoint.load_model(tmp_path / "one")[0], GPT)
    for other, said in (
        (["--alpha", "0.5"], "--alpha must be what the checkpoint was trained with, 0.25, not 0.5"),
        (["--distill-from", "elsewhere"], f"trained with, {taught}, not elsewhere"),
    ):
        assert cli.main([*resume, *other]) == 2
        assert said in capsys.readouterr().err


def test_a_teacher_of_transformers(tmp_path, capsys):
    make(replace(SMALL, vocabulary=256, pattern=("dense",)), 3).to_hf(tmp_path / "hf")
    source = f"hf:{tmp_path / 'hf'}"
    assert cli.main(tiny(tmp_path, "--steps", "2", "--distill-from", source)) == 0
    assert "loss: 0.5 cross-entropy + 2 KL from" in capsys.readouterr().out
    assert cli.main(arguments(tmp_path, "--model", "tiny", "--context", "33", "--distill-from", source)) == 2
    assert "--context must be at most the 32 tokens of --distill-from" in capsys.readouterr().err


def test_tokenizers_must_be_the_same(tmp_path, taught, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["the", "fox", "?"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    own = ("--steps", "2", "--tokenizer", str(tmp_path / "tokenizer.json"))
    assert cli.main(tiny(tmp_path, *own, "--distill-from", taught)) == 2
    assert "must have the tokenizer of this run (--tokenizer), not another" in capsys.readouterr().err
    # The same one, written in another way.
    make(replace(SMALL, vocabulary=100, pattern=("dense",)), 3).to_hf(tmp_path / "hf")
    written = json.dumps(json.loads((tmp_path / "tokenizer.json").read_text()), indent=4)
    (tmp_path / "hf" / "tokenizer.json").write_text(written)
    assert cli.main(tiny(tmp_path, *own, "--distill-from", f"hf:{tmp_path / 'hf'}")) == 0
    # Where the tokens are anybody's, there have to be as many, but for padding that no text has.
    np.arange(400, dtype="<u2").__mod__(260).tofile(tmp_path / "large.bin")
    make(replace(SMALL, vocabulary=300, pattern=("dense",)), 3).to_hf(tmp_path / "padded")
    padded = ["train", "--init-from", f"hf:{tmp_path / 'padded'}", "--data", str(tmp_path / "large.bin")]
    assert cli.main([*padded, "--context", "16", "--device", "cpu", "--steps", "1", "--distill-from", taught]) == 1
    assert "tokens must be below the vocabulary of 256" in capsys.readouterr().err
    np.arange(400, dtype="<u2").__mod__(100).tofile(tmp_path / "text.bin")
    binary = ["train", "--model", "gpt2", "--data", str(tmp_path / "text.bin"), "--context", "32", "--device", "cpu"]
    assert cli.main([*binary, "--distill-from", taught]) == 2
    assert "must have the 50257 tokens of this run, but for padding, not 256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--alpha", "0.5"], "--alpha needs --distill-from"),
        (["--temperature", "2"], "--temperature needs --distill-from"),
        (["--distill-from", "nowhere"], "no checkpoint at nowhere"),
        (["--distill-from", "hf:./nowhere"], "no folder ./nowhere"),
    ],
)
def test_bad_input(tmp_path, more, said, capsys):
    assert cli.main(tiny(tmp_path, "--steps", "1", *more)) in (1, 2)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--alpha", "1.5"], ["--alpha", "-1"], ["--temperature", "0"]])
def test_bad_values(tmp_path, words, capsys):
    with pytest.raises(SystemExit):
        cli.main(tiny(tmp_path, *words))
    assert words[0] in capsys.readouterr().err


def test_masked_models_and_tasks_are_refused(tmp_path, taught, capsys):
    masked = arguments(tmp_path, "--model", "albert-base", "--context", "32", "--steps", "1")
    assert cli.main([*masked, "--distill-from", taught]) == 2
    assert "the model must predict next tokens to be distilled, not masked ones" in capsys.readouterr().err
    (tmp_path / "task.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n' * 4)
    task = tiny(tmp_path, "--steps", "1", "--task", "classification", "--data", str(tmp_path / "task.jsonl"))
    assert cli.main([*task, "--distill-from", taught]) == 2
    assert "--distill-from is for language models" in capsys.readouterr().err


@pytest.mark.parametrize("parallel", ["fsdp,cp=2", "tp", "ddp,cp"])
def test_cut_sequences_and_layers_are_refused(parallel):
    options = Namespace(task=None, alpha=None, temperature=None, parallel=parallel)
    with pytest.raises(UsageError, match=f"goes with --parallel none, ddp or fsdp, not {parallel}"):
        check_options(options, "hf:teacher")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_as_one(kind, tmp_path, taught):
    more = ("--distill-from", taught, "--dropout", "0", "--steps", "4", "--learning-rate", "3e-3", "--out")
    assert cli.main(tiny(tmp_path, *more, str(tmp_path / "one"))) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = tiny(tmp_path, *more, str(tmp_path / kind), "--parallel", kind)
    result = subprocess.run([*torchrun, "-m", "gptkernels", *words], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert logged(tmp_path / kind) == pytest.approx(logged(tmp_path / "one"), rel=2e-5)
