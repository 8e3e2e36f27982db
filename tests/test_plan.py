"""The planner: its memory against a GPT's on this machine, its traffic by hand, its times against published runs."""

import json
from dataclasses import replace

import pytest
import torch

from gptkernels import cli
from gptkernels.models import GPT, GPTConfig
from gptkernels.models.config import PRESETS
from gptkernels.models.training import TrainOptions, make_optimizer
from gptkernels.plan import facts, rates, report, search
from gptkernels.plan.batch import cost_of, critical_batch
from gptkernels.plan.memory import activation_bytes, step_memory
from gptkernels.plan.model import model_size
from gptkernels.plan.published import BOUND, MISSED, runs
from gptkernels.plan.split import Split, splits
from gptkernels.plan.step import step_times
from gptkernels.plan.traffic import Step, gathered_bytes, halo_bytes, transfer, transfers

SMALL = GPTConfig(vocabulary=500, context=128, layers=6, width=128, heads=4, pattern=("dense", "banded"), window=16)
LLAMA = replace(SMALL, norm="rms", rotary=1e4, gated=True, kv_heads=2, bias=False, tied=False)
H100 = facts.GPUS["h100"]


def step_of(config: GPTConfig, split: Split, micro: int = 1, times: int = 1, length: int | None = None) -> Step:
    return Step(config, model_size(config), length or config.context, micro, times, split, H100)


def job_of(config: GPTConfig, gpus: int = 8, gpu: str = "h100", batch: float = 2**19) -> search.Job:
    return search.Job(config, config.context, facts.GPUS[gpu], gpus, batch, 300e9, 2.0)


def rates_for(job: search.Job) -> rates.Rates:
    return rates.rates_of(job.gpu, job.config.head_size, job.length, job.config.window)


@pytest.mark.parametrize("name", ["gpt2", "gpt1", "albert-base", "tinyllama-1.1b"])
def test_a_model_is_as_large_as_it_is(name):
    with torch.device("meta"):
        assert model_size(PRESETS[name]).parameters == GPT(PRESETS[name]).parameter_count()


def test_weights_gradients_and_moments_to_the_byte():
    torch.manual_seed(0)
    model = GPT(SMALL)
    optimizer = make_optimizer(model, TrainOptions())
    tokens = torch.randint(500, (1, 33))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()

    def size(tensors) -> int:
        return sum(x.nbytes for x in tensors)

    memory = step_memory(step_of(SMALL, Split()))
    assert memory.weights == size(model.parameters())
    assert memory.gradients == size(x.grad for x in model.parameters())
    assert memory.optimizer == size(x for state in optimizer.state.values() for x in state.values() if x.ndim)


@pytest.mark.parametrize("count", [2, 8])
def test_shards_are_shares(count):
    whole, shard = (step_memory(step_of(SMALL, split)) for split in (Split(1), Split(count)))
    assert count * shard.weights == whole.weights
    assert count * shard.gradients == whole.gradients
    assert count * shard.optimizer == whole.optimizer


def kept_bytes(model: GPT, tokens: torch.Tensor, autocast: bool) -> int:
    """What forward keeps for backward beside weights and their 16-bit copies"""
    weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
    shapes = {x.shape for x in model.parameters()} | {x.shape[::-1] for x in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights and x.shape not in shapes:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.hidden(tokens)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("save", ["all", "preact", "input"])
@pytest.mark.parametrize("autocast", [True, False])
def test_activations_as_autograd_keeps_them(config, save, autocast):
    if not autocast and save != "input":
        pytest.skip("without autocast a CPU's MLPs are PyTorch's, which keep more")
    config = replace(config, save=save)
    torch.manual_seed(0)
    model = GPT(config)
    kept = kept_bytes(model if autocast else model.bfloat16(), torch.randint(500, (5, 128)), autocast)
    # FSDP has its weights in 16 bits, and so is the residual stream.
    formula = activation_bytes(config, 5 * 128, Split(1 if autocast else 2))
    assert kept == pytest.approx(formula, rel=0.04)


def test_a_halo_is_its_window_whatever_the_length():
    split = Split(1, 1, 8)
    config = replace(SMALL, layers=1, width=512, heads=8, window=128)
    assert halo_bytes(config, 1, 128, 2**17, split) == 2 * 127 * 8 * 64 * 2
    assert halo_bytes(config, 3, 128, 2**20, replace(split, tensor=2)) == 3 * 2 * 127 * 4 * 64 * 2
    assert gathered_bytes(config, 1, 2**17, split) == 2 * 2**17 * 7 / 8 * 8 * 64 * 2
    # A window that reaches over all earlier shards needs no more than those.
    assert halo_bytes(config, 1, 2**17, 2**17, split) == gathered_bytes(config, 1, 2**17, split)


def test_what_context_parallelism_moves():
    step = step_of(replace(SMALL, context=1024), Split(1, 1, 4, "none"), micro=2, times=3)
    moved = {each.name: each.nvlink for each in transfers(step)}
    dense, banded = 3, 3  # layers
    # Two pieces of a sequence, one from each end, have two halos, whose gradients go back.
    assert moved["halo of banded layers"] == 3 * banded * 2 * 2 * halo_bytes(SMALL, 2, 16, 1024, step.split)
    assert moved["all-gather of keys and values"] == 3 * dense * 3 * gathered_bytes(SMALL, 2, 1024, step.split)
    assert moved["all-reduce of gradients"] == 2 * 3 / 4 * step.size.parameters * 4
    only_banded = replace(step, config=replace(step.config, pattern=("banded",)))
    assert only_banded.halo(16) == halo_bytes(SMALL, 2, 16, 1024, step.split)
    assert not any("keys and values" in each.name for each in transfers(only_banded))


def test_many_keys_go_around_in_a_ring():
    config = replace(SMALL, context=2**20, width=512, heads=8)
    few, many = (step_of(replace(config, context=length), Split(1, 1, 8)) for length in (2**16, 2**20))
    assert "all-gather of keys and values" in {each.name for each in transfers(few)}
    assert "ring of keys and values" in {each.name for each in transfers(many)}
    # One other rank's keys and values, the next one's, and both gradients in float32: six shards, not seven gathered.
    whole = (
        step_memory(many).workspace - step_memory(replace(many, config=replace(config, pattern=("banded",)))).workspace
    )
    assert whole == pytest.approx(6 * many.gathered / 7)


def test_a_group_across_nodes_shares_their_ports():
    inside = transfer("", "waits", H100, 8, 1, 8e9)
    assert (inside.nvlink, inside.network, inside.seconds) == (8e9, 0, 8e9 / 450e9)
    across = transfer("", "waits", H100, 16, 1, 8e9)
    assert (across.nvlink, across.network, across.seconds) == (7e9, 1e9, 8e9 / 400e9)
    assert transfer("", "waits", H100, 16, 1, 8e9, one_port=True).seconds == 8e9 / 50e9
    # Of eight groups side by side each has one port of a node.
    apart = transfer("", "waits", H100, 4, 8, 8e9)
    assert (apart.nvlink, apart.network, apart.seconds) == (0, 8e9, 8e9 / 50e9)


@pytest.mark.parametrize("gpus", [1, 6, 8, 24, 1024])
def test_every_split_is_one_of_all_gpus(gpus):
    found = list(splits(gpus, H100))
    assert found
    assert all(split.gpus == gpus and split.pipeline == 1 for split in found)
    assert len({split.parallel for split in found}) == len(found)


def test_more_of_anything_is_not_less():
    constants = rates.Constants.load()
    base = step_of(PRESETS["gpt3-1.3b"], Split(8), micro=4, times=2)
    known = rates.fitted(H100, constants)
    before = step_times(base, known)
    assert step_times(replace(base, times=4), known).compute == pytest.approx(2 * before.compute)
    for more in (
        replace(base, micro=8),
        replace(base, length=4096),
        replace(base, recompute=True),
        replace(base, config=replace(base.config, pattern=("dense",))),
        replace(base, config=replace(base.config, save="input")),
    ):
        assert step_times(more, known).total > before.total
    assert step_times(base, replace(known, product=2 * known.product)).total < before.total
    by_save = [step_memory(replace(base, config=replace(base.config, save=x))).activations for x in ("all", "preact")]
    assert by_save[0] > by_save[1] > step_memory(replace(base, config=replace(base.config, save="input"))).activations


def test_infeasible_splits_say_why():
    job = job_of(PRESETS["gpt3-175b"], gpus=64)
    plans, others = search.search(job, rates_for(job))
    reasons = {each.split.parallel: each.reason for each in others}
    assert "of the 76 GB that a h100 can give" in reasons["ddp"]
    assert not any(plan.memory.total > 76e9 for plan in plans)
    job = replace(job_of(PRESETS["gpt2-xl"]), batch=4096.0)
    _, others = search.search(job, rates_for(job))
    reasons = {each.split.parallel: each.reason for each in others}
    assert reasons["ddp"] == "a batch of 4 sequences does not go into 8 shares of the same size"
    assert reasons["fsdp,tp=2"] == "tp=2 must divide the 25 heads and 25 of keys and values"


def test_the_fastest_comes_first():
    job = job_of(PRESETS["gpt3-1.3b"])
    plans, _ = search.search(job, rates_for(job))
    speeds = [plan.tokens_per_second for plan in plans]
    assert speeds == sorted(speeds, reverse=True)
    assert 0.3 < plans[0].mfu < 0.7
    assert plans[0].days == pytest.approx(300e9 / plans[0].tokens_per_second / 86400)
    assert plans[0].money == pytest.approx(plans[0].days * 24 * 8 * 2.0)


def test_the_batch_that_costs_twice():
    at = cost_of(1e6, 1e6)
    assert (at.steps, at.tokens) == (2, 2)
    assert cost_of(1e5, 1e6).tokens == pytest.approx(1.1)
    # Kaplan et al. give about 1 to 2 million tokens for the best models of their time.
    assert 1e6 < critical_batch(2.7) < 3e6
    assert critical_batch(2.0) > critical_batch(3.0)


def test_measured_ceilings_come_first(tmp_path):
    document = {
        "device": {"name": "NVIDIA H100 80GB HBM3"},
        "ceilings": {"gemm_tflops": {"bfloat16": 700.0}, "copy_gbps": 3000.0},
    }
    (tmp_path / "h100-bench.json").write_text(json.dumps(document))
    found = rates.rates_of(H100, 64, 2048, None, tmp_path)
    assert (found.product, found.copy) == (700e12, 3000e9)
    assert "measured" in found.says[0]
    assert "fitted" in found.says[1]
    (tmp_path / "h100-bench.json").write_text(json.dumps(document | {"device": {"name": "NVIDIA H100 PCIe"}}))
    assert "data sheet" in rates.rates_of(H100, 64, 2048, None, tmp_path).says[0], "that is another GPU"
    assert "data sheet" in rates.rates_of(facts.GPUS["a100-80"], 64, 2048, None, tmp_path).says[0]


def test_the_clock_is_named_where_it_is_asked():
    if not (rates.RESULTS / rates.CLOCK).exists():
        pytest.skip("an installed package has no predictions of the clock")
    known = rates.rates_of(H100, 64, 8192, 128)
    assert "clock" in known.says[1]
    assert known.dense[0] == 421e12
    assert known.banded == (95e12, 109e12)


@pytest.mark.parametrize("run", list(runs()), ids=lambda run: "-".join(map(str, (*run.key, run.micro))))
def test_published_runs(run):
    error = run.error(rates.Constants.load())
    if run.key in MISSED:
        assert BOUND < abs(error) < 0.25, "a known reason is only for a run that misses"
    else:
        assert abs(error) <= BOUND


def test_two_thirds_are_held_out():
    found = list(runs())
    fitted = [run for run in found if run.is_fitted]
    assert 3 * len(fitted) <= len(found) + 2
    assert facts.read("constants.json")["fitted_runs"] == len(fitted)
    assert len(MISSED) <= len(found) // 50


def test_megatron_steps_are_as_long_as_it_says():
    run = next(run for run in runs() if run.source == "megatron-175b")
    assert run.seconds == pytest.approx(32, rel=0.02), "its README says about 32 seconds"


def plan(capsys, *words: str) -> tuple[int, str]:
    status = cli.main(["plan", *words])
    return status, capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "gpt3-175b", "--gpus", "1024", "--batch", "3.2e6"],
        ["--model", "gpt3-1.3b", "--gpus", "64", "--context", "1048576", "--all"],
        ["--layers", "24", "--width", "2048", "--heads", "16", "--window", "128", "--gpu", "a100-40"],
        ["--model", "gpt3-175b", "--gpus", "4"],
        ["--check-published"],
    ],
    ids=" ".join,
)
def test_fits_80_columns(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out = plan(capsys, *words)
    assert out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


def test_the_command_line_is_one_that_train_takes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    _, out = plan(capsys, "--model", "gpt3-2.7b", "--gpus", "16", "--context", "4096")
    line = next(line for line in out.splitlines() if line.startswith("run: "))
    assert line.startswith("run: torchrun --nnodes 2 --nproc-per-node 8 -m gptkernels train --model gpt3-2.7b")
    assert "--context 4096" in line
    assert "--parallel " in line
    # Where training under that name would be of another model, there is none.
    for words in (["--model", "gpt2", "--window", "64"], ["--layers", "2", "--width", "64", "--heads", "4"]):
        assert "has no name for this model" in plan(capsys, *words)[1]
    assert "run: gptkernels train --model gpt3-1.3b " in plan(capsys, "--gpus", "1")[1]


def test_json_says_the_same(capsys):
    status, out = plan(capsys, "--json", "--gpus", "8", "--noise-scale", "1e6")
    found = json.loads(out)
    assert status == 0
    assert found["noise_scale"]["tokens"] == 1e6
    assert found["batch"]["steps_to_fewest"] == pytest.approx(1 + 1e6 / 2**19)
    best = found["plans"][0]
    parts = best["seconds"]
    assert parts["total"] == pytest.approx(parts["compute"] + parts["exposed"] + parts["bubble"] + parts["optimizer"])
    assert best["memory_bytes"]["total"] == pytest.approx(
        sum(size for kind, size in best["memory_bytes"].items() if kind != "total")
    )


def test_nothing_that_fits_is_a_failure(capsys):
    status, out = plan(capsys, "--model", "gpt3-175b", "--gpus", "1")
    assert status == 1
    assert "not none: needs" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layers", "2"], "a model of your own needs --width, --heads as well"),
        (["--model", "gpt2", "--width", "100"], "--heads must divide the width of 100"),
        (["--batch", "100"], "--batch must be at least the 2048 tokens of a sequence, not 100"),
    ],
)
def test_bad_input(words, said, capsys):
    assert cli.main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--gpus", "0"], ["--gpu", "v100"], ["--tokens", "nan"], ["--price", "-1"]])
def test_bad_values(words, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["plan", *words])
    assert error.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_every_kind_of_memory_has_a_name():
    assert set(report.KINDS) == set(step_memory(step_of(SMALL, Split())).__dict__)
