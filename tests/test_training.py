"""Training learns, as the plain model does, and goes on to the bit from wherever it was stopped or killed."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from gptkernels import cli
from gptkernels.models import GPT, GPTConfig, checkpoint, cost
from gptkernels.models.data import MaskedText, Text, Tokenizer, read_tokens
from gptkernels.models.plain import plain_twin
from gptkernels.models.training import DivergedError, NoiseScale, Trainer, TrainOptions

SMALL = GPTConfig(vocabulary=64, context=32, layers=2, width=64, heads=4, pattern=("dense", "banded"), window=8)
LLAMA = {"norm": "rms", "rotary": 1e4, "kv_heads": 2, "gated": True, "activation": "silu", "bias": False, "tied": False}
OPTIONS = TrainOptions(steps=10, batch=8, learning_rate=3e-3, warmup=5, log_every=1)


def counting_text(length: int = 32) -> Text:
    """Runs of rising numbers: after a few tokens each next one is certain, until the run ends."""
    generator = np.random.default_rng(0)
    runs = [(start + np.arange(12)) % 64 for start in generator.integers(0, 64, 400)]
    return Text(np.concatenate(runs), length, 64)


def model(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(replace(SMALL, **changes))


def losses(trainer: Trainer) -> list[float]:
    return [record.loss for record in trainer.train()]


def test_it_learns():
    found = losses(Trainer(model(), counting_text(), replace(OPTIONS, steps=200, log_every=20)))
    # log(64) = 4.16 to begin with; one token in twelve, where a run starts, is anybody's guess: log(64) / 12 = 0.35.
    assert found[0] > 1.5
    assert found[-1] < 0.7


@pytest.mark.parametrize("changes", [{}, {"norm": "post"}, LLAMA], ids=["pre", "post", "llama"])
def test_first_steps_are_those_of_the_plain_model(changes):
    ours = model(**changes)
    expected = losses(Trainer(plain_twin(ours), counting_text(), OPTIONS))
    actual = losses(Trainer(ours, counting_text(), OPTIONS))
    assert len(actual) == 10
    assert actual == pytest.approx(expected, rel=2e-5)
    assert expected[-1] < expected[0] - 0.3, "a model that stands still proves nothing"


def test_micro_batches_add_up_to_the_batch():
    whole = losses(Trainer(model(), counting_text(), OPTIONS))
    parts = losses(Trainer(model(), counting_text(), replace(OPTIONS, micro_batch=2)))
    assert parts == pytest.approx(whole, rel=2e-5)


@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt3", "llama"])
def test_resumes_to_the_bit(tmp_path, changes):
    changes = {"dropout": 0.1, "attention_dropout": 0.1} | changes
    options = replace(OPTIONS, steps=12, micro_batch=4)
    straight = Trainer(model(**changes), counting_text(), options)
    expected = losses(straight)
    first = Trainer(model(**changes), counting_text(), replace(options, steps=5), out=tmp_path)
    # The cosine is that of the whole run.
    object.__setattr__(first.options, "steps", 12)
    found = [next(steps).loss for steps in [first.train()] for _ in range(5)]
    first.save()
    state = checkpoint.load(tmp_path)
    twin = GPT(GPTConfig(**state["config"]))
    twin.load_state_dict(state["model"])
    resumed = Trainer(twin, counting_text(), options)
    resumed.resume(state)
    found += losses(resumed)
    assert found == expected
    for x, y in zip(straight.gpt.parameters(), twin.parameters(), strict=True):
        assert torch.equal(x, y)
    assert resumed.noise.state() == straight.noise.state()


def train_arguments(tmp_path, *more):
    model = () if "--init-from" in more else ("--model", "tiny")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return [
        *("train", *model, "--context", "32", "--data", str(text), "--batch", "2", "--warmup", "2"),
        *("--log-every", "1", "--evaluate-every", "0", "--dropout", "0.1", "--device", "cpu", *more),
    ]


def test_survives_being_killed_at_any_moment(tmp_path):
    """Killed again and again, while it computes and while it writes, it ends where an undisturbed run ends."""
    steps = ("--steps", "60", "--checkpoint-every", "1")
    assert cli.main(train_arguments(tmp_path, *steps, "--out", str(tmp_path / "whole"))) == 0
    out, kills = tmp_path / "killed", 0
    for attempt in range(40):
        resume = ["--resume"] if (out / checkpoint.NAME).exists() else []
        command = [sys.executable, "-m", "gptkernels", *train_arguments(tmp_path, *steps, "--out", str(out), *resume)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        began, before = time.monotonic(), progress(out)
        # Let it make some steps, and kill it at another moment of a step each time.
        while process.poll() is None and progress(out) < before + 12 and time.monotonic() < began + 60:
            time.sleep(0.002)
        time.sleep(0.004 * attempt)
        process.send_signal(signal.SIGKILL)
        error = process.communicate()[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), error
        if process.returncode == 0:
            break
        kills += 1
    assert kills >= 3
    whole, killed = checkpoint.load(tmp_path / "whole"), checkpoint.load(out)
    assert killed["step"] == 60
    for name, x in whole["model"].items():
        assert torch.equal(killed["model"][name], x), name


def progress(out) -> int:
    log = out / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path, capsys):
    arguments = train_arguments(tmp_path, "--steps", "40", "--checkpoint-every", "4", "--log-every", "20")
    out = tmp_path / "wild"
    assert cli.main([*arguments, "--clip", "0", "--learning-rate", "1e18", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    step = int(re.search(r"the loss was not finite any more at step (\d+);", error).group(1))
    if (out / checkpoint.NAME).exists():
        state = checkpoint.load(out)
        assert state["step"] < step
        assert all(x.isfinite().all() for x in state["model"].values())
        assert f"the checkpoint of step {state['step']} is in {out}" in error
    else:
        assert step <= 4
        assert "no checkpoint was written yet" in error


def test_divergence_is_seen_at_its_step():
    trainer = Trainer(model(), counting_text(), replace(OPTIONS, steps=20, log_every=10))
    steps = trainer.train()
    next(steps)
    trainer.one_step()
    with torch.no_grad():
        next(trainer.gpt.parameters()).fill_(torch.nan)
    with pytest.raises(DivergedError, match=r"at step 11$"):
        next(steps)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    arguments = train_arguments(tmp_path, "--steps", "100000", "--warmup", "0", "--out", str(out))
    process = subprocess.Popen([sys.executable, "-m", "gptkernels", *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while progress(out) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    step = checkpoint.load(out)["step"]
    assert f"stopped after step {step}; the checkpoint of step {step} is in {out}, --resume goes on from it" in error
    assert step >= 5
    # What the log says of later steps, here none, would be forgotten.
    assert progress(out) == step


RESUMED = [
    (["--model", "gpt2"], "--model must be what the checkpoint was trained with, tiny, not gpt2"),
    (["--context", "16"], "--context must be what the checkpoint was trained with, 32, not 16"),
    (["--window", "5"], "--window must be what the checkpoint was trained with, 32, not 5"),
    (["--dropout", "0.5"], "--dropout must be what the checkpoint was trained with, 0.1, not 0.5"),
    (["--batch", "4"], "--batch must be what the checkpoint was trained with, 2, not 4"),
    (["--seed", "1"], "--seed must be what the checkpoint was trained with, 0, not 1"),
    (["--learning-rate", "0.5"], "--learning-rate must be what the checkpoint was trained with, 0.0003, not 0.5"),
    (["--dtype", "bfloat16"], "--dtype must be what the checkpoint was trained with, float32, not bfloat16"),
    (["--init-from", "hf:x"], "--init-from must be what the checkpoint was trained with, nothing, not hf:x"),
    (["--task", "entailment"], "--task must be what the checkpoint was trained with, nothing, not entailment"),
    (["--tokenizer", "tokenizer.json"], "tokenizer.json"),
]


def test_resume_refuses_another_run(tmp_path, capsys):
    arguments = train_arguments(tmp_path, "--steps", "2", "--out", str(tmp_path / "run"))
    assert cli.main(arguments) == 0
    for more, message in RESUMED:
        assert cli.main([*arguments, "--resume", *more]) in (1, 2)
        assert message in capsys.readouterr().err
    (tmp_path / "other.txt").write_text("another text, of another length. " * 90)
    assert cli.main([*arguments, "--resume", "--data", str(tmp_path / "other.txt")]) == 2
    assert (
        "--data must be what the checkpoint was trained with, 8100 tokens, not 2673 tokens" in capsys.readouterr().err
    )
    # Whatever is not said is as it was.
    short = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--resume", "--steps", "3"]
    assert cli.main([*short, "--device", "cpu"]) == 0
    assert "goes on after step 2" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "run")["options"]["batch"] == 2


def test_learning_rate():
    options = TrainOptions(steps=110, warmup=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = [options.learning_rate_at(step) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[109] == pytest.approx(0.1, abs=1e-3)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_clipping_bounds_the_gradient(monkeypatch):
    trainer = Trainer(model(), counting_text(), replace(OPTIONS, clip=0.01))
    seen = []
    monkeypatch.setattr(
        trainer.optimizer,
        "step",
        lambda: seen.append(torch.nn.utils.get_total_norm([x.grad for x in trainer.gpt.parameters()])),
    )
    _, norm, _ = trainer.one_step()
    assert norm > 0.1, "what is reported is the norm before clipping"
    assert seen[0].item() == pytest.approx(0.01, rel=1e-3)


def test_only_matrices_decay():
    trainer = Trainer(model(), counting_text(), OPTIONS)
    decayed, rest = trainer.optimizer.param_groups
    assert {x.ndim for x in decayed["params"]} == {2}
    assert {x.ndim for x in rest["params"]} == {1}
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_noise_scale_of_known_gradients():
    generator = torch.Generator().manual_seed(0)
    true, deviation, scale = torch.full((100,), 0.3), 2.0, NoiseScale(decay=0.999)
    for _ in range(4000):
        samples = true + deviation * torch.randn(8, 100, generator=generator)
        scale.update(2, samples[:2].mean(0).square().sum(), 8, samples.mean(0).square().sum())
    # The trace of the covariance over the squared gradient.
    assert scale.tokens == pytest.approx(100 * deviation**2 / true.square().sum().item(), rel=0.1)


def test_noise_scale_is_logged_where_it_can_be_known():
    trainer = Trainer(model(), counting_text(), replace(OPTIONS, steps=30, micro_batch=2))
    assert any(record.noise_scale for record in trainer.train())
    assert not any(record.noise_scale for record in Trainer(model(), counting_text(), OPTIONS).train())


def test_bfloat16_and_compile_learn():
    options = replace(OPTIONS, dtype="bfloat16", compile=True, steps=6)
    torch.compiler.reset()
    found = losses(Trainer(model(), counting_text(), options))
    expected = losses(Trainer(model(), counting_text(), replace(OPTIONS, steps=6)))
    assert found == pytest.approx(expected, rel=0.02)
    assert found != expected


def log(folder) -> np.ndarray:
    """(steps, 2): loss and gradient norm"""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return np.array([[record["loss"], record["gradient_norm"]] for record in records])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(kind, tmp_path):
    sizes = ("--batch", "8", "--micro-batch", "2", "--dropout", "0", "--learning-rate", "3e-3")
    more = (*sizes, "--steps", "10", "--out")
    assert cli.main(train_arguments(tmp_path, *more, str(tmp_path / "one"))) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = train_arguments(tmp_path, *more, str(tmp_path / kind), "--parallel", kind)
    result = subprocess.run([*torchrun, "-m", "gptkernels", *arguments], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = log(tmp_path / "one"), log(tmp_path / kind)
    assert one[-1, 0] < one[0, 0] - 0.3
    assert two[:, 0] == pytest.approx(one[:, 0], rel=2e-5)
    assert two[:, 1] == pytest.approx(one[:, 1], rel=5e-4)
    # Its checkpoint is one of a single process, too, which goes on as if it had been alone.
    for folder in ("one", kind):
        arguments = train_arguments(tmp_path, *sizes, "--steps", "12", "--resume", "--out", str(tmp_path / folder))
        assert cli.main(arguments) == 0
    one, two = log(tmp_path / "one"), log(tmp_path / kind)
    assert len(two) == 12
    assert two[:, 0] == pytest.approx(one[:, 0], rel=2e-5)


def test_parallel_needs_torchrun(tmp_path, capsys):
    assert cli.main(train_arguments(tmp_path, "--parallel", "ddp")) == 2
    assert "needs torchrun" in capsys.readouterr().err


def test_from_the_command_line_to_text(tmp_path, capsys):
    """Train, go on, generate: what the README shows, smaller."""
    arguments = train_arguments(tmp_path, "--learning-rate", "3e-3", "--out", str(tmp_path / "run"))
    evaluate = ["--evaluate-every", "20", "--checkpoint-every", "10"]
    assert cli.main([*arguments, *evaluate, "--steps", "40"]) == 0
    assert cli.main([*arguments, "--steps", "40"]) == 2
    assert "has a checkpoint" in capsys.readouterr().err
    assert cli.main([*arguments, *evaluate, "--steps", "120", "--resume"]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 121))
    assert records[119]["validation_loss"] < records[19]["validation_loss"] < 6
    capsys.readouterr()
    generate = ["generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "the quick", "--temperature", "0"]
    assert cli.main([*generate, "--tokens", "16"]) == 0
    assert capsys.readouterr().out == "the quick brown fox jumps\n"
    assert cli.main([*generate[:-4], "--prompt", "x" * 40]) == 2
    assert "--prompt must be shorter than the context of 32" in capsys.readouterr().err


def test_dry_run_tells_every_preset(capsys):
    assert cli.main(["train", "--model", "gpt3-1.3b", "--dry-run"]) == 0
    out = capsys.readouterr().out
    config = GPTConfig.preset("gpt3-1.3b")
    assert f"{cost.training_flops_per_token(config, 2048):.3e}" in out
    for word in ("gpt2", "albert", "1,315,723", "optimizer", "activations"):
        assert word in out


def test_tokenizer_json_and_bin(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "."]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate([*words, "?"])}, unk_token="?")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    out = str(tmp_path / "words")
    arguments = train_arguments(tmp_path, "--steps", "60", "--learning-rate", "3e-3", "--out", out)
    assert cli.main([*arguments, "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    capsys.readouterr()
    assert (
        cli.main(["generate", "--checkpoint", out, "--prompt", "the quick", "--tokens", "3", "--temperature", "0"]) == 0
    )
    assert capsys.readouterr().out.split() == ["the", "quick", "brown", "fox", "jumps"]

    tokens = np.array(inner.encode((tmp_path / "text.txt").read_text()).ids, dtype="<u2")
    tokens.tofile(tmp_path / "text.bin")
    assert np.array_equal(read_tokens(tmp_path / "text.bin", None), tokens)
    binary = ["--data", str(tmp_path / "text.bin"), "--steps", "2", "--out", str(tmp_path / "bin")]
    assert cli.main([*train_arguments(tmp_path), *binary]) == 0
    assert cli.main(["generate", "--checkpoint", str(tmp_path / "bin"), "--prompt", "the"]) == 2
    assert "--tokenizer must name" in capsys.readouterr().err


def test_fine_tunes_weights_of_transformers(tmp_path, capsys):
    GPT(replace(SMALL, vocabulary=256, pattern=("dense",))).to_hf(tmp_path / "hf")
    arguments = train_arguments(tmp_path, "--steps", "3", "--init-from", f"hf:{tmp_path / 'hf'}")
    assert cli.main([*arguments, "--out", str(tmp_path / "tuned")]) == 0
    tuned, state = checkpoint.load_model(tmp_path / "tuned")
    assert (tuned.config.width, state["step"]) == (64, 3)
    again = train_arguments(tmp_path, "--steps", "3", "--init-from", str(tmp_path / "tuned"))
    assert cli.main(again) == 0
    assert cli.main([*again, "--context", "33"]) == 2
    assert "--context must be at most the 32 positions of" in capsys.readouterr().err


def test_masked_text():
    data = MaskedText(Text(np.arange(200) % 100, 32, 100), (100, 101, 102))
    batch = data.batch(3, 64, seed=1)
    tokens, targets, types, order = (batch[name] for name in ("tokens", "targets", "token_types", "order"))
    assert (tokens[:, 0] == 100).all()
    assert ((tokens == 101).sum(1) == 2).all()
    assert (tokens[:, -1] == 101).all()
    asked = targets >= 0
    assert asked.sum(1).float().mean().item() == pytest.approx(0.15 * 29, abs=0.6)
    assert not asked[(tokens == 100) | (tokens == 101)].any()
    assert (tokens[asked] == 102).float().mean().item() == pytest.approx(0.8, abs=0.1)
    assert not (tokens[~asked] == 102).any()
    # With what was masked put back: two pieces of numbers that rise by one, swapped where it says so.
    whole = torch.where(asked, targets, tokens)
    for row, kind, swapped in zip(whole, types, order.tolist(), strict=True):
        first, second = row[(kind == 0) & (row < 100)], row[(kind == 1) & (row < 100)]
        joined = torch.cat((second, first) if swapped else (first, second))
        assert ((joined[1:] - joined[:-1]) % 100 == 1).all()
        assert len(joined) == 29
    assert 16 < order.sum().item() < 48
    assert torch.equal(data.batch(3, 64, seed=1)["tokens"], tokens)


def test_masked_models_train(tmp_path, monkeypatch):
    from gptkernels.models import train

    albert = replace(GPTConfig.preset("albert-base"), layers=2, width=64, heads=4, mlp_width=128, embedding_rank=32)
    monkeypatch.setitem(train.MODELS, "albert-base", albert)
    arguments = ["--model", "albert-base", "--steps", "100", "--batch", "16", "--learning-rate", "3e-3"]
    assert cli.main(train_arguments(tmp_path, *arguments, "--out", str(tmp_path / "albert"))) == 0
    found = log(tmp_path / "albert")[:, 0]
    # log(259) + log(2) to begin with.
    assert found[0] > 5.5
    # How often each letter comes, and which half, is learnt first: 3.0 + 0.7.
    assert found[-10:].mean() < 4.2


def test_llama_trains_goes_on_and_writes(tmp_path, monkeypatch, capsys):
    from gptkernels.models import train

    small = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "mlp_width": 112, "context": 32}
    monkeypatch.setitem(train.MODELS, "tinyllama-1.1b", GPTConfig.preset("tinyllama-1.1b", **small))
    run = ["--model", "tinyllama-1.1b", "--batch", "8", "--learning-rate", "1e-2", "--out", str(tmp_path / "llama")]
    assert cli.main(train_arguments(tmp_path, *run, "--steps", "30")) == 0
    assert cli.main(train_arguments(tmp_path, *run, "--steps", "60", "--resume")) == 0
    found = log(tmp_path / "llama")[:, 0]
    assert len(found) == 60
    assert found[0] > 5
    assert found[-1] < found[29] < found[0] - 1
    capsys.readouterr()
    assert cli.main(["generate", "--checkpoint", str(tmp_path / "llama"), "--prompt", "the", "--tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("the")


def test_characters_of_several_bytes_come_whole():
    from gptkernels.models.generate import pieces

    shown = list(pieces(Tokenizer({"kind": "bytes"}), [], "añ→b".encode()))
    assert "".join(shown) == "añ→b"
    assert "�" not in "".join(shown[:-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "3", "--micro-batch", "2"], "micro_batch must divide"),
        (["--context", "20000"], "the text must have more than the 20000"),
        (["--data", "/nowhere.txt"], "/nowhere.txt: No such file or directory"),
        (["--data", "/"], "/: Is a directory"),
        (["--tokenizer", "/nowhere.json"], "/nowhere.json: No such file"),
        (["--init-from", "/nowhere"], "no checkpoint"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    assert cli.main(train_arguments(tmp_path, *arguments)) == 1
    assert message in capsys.readouterr().err


def test_bad_data(tmp_path):
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="even number of bytes"):
        read_tokens(tmp_path / "odd.bin", None)
    with pytest.raises(ValueError, match="below the vocabulary of 50, not"):
        replace(counting_text(), vocabulary=50).batch(0, 100, 0)
    (tmp_path / checkpoint.NAME).write_bytes(b"abc")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        checkpoint.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
