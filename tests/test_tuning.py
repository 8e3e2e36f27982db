"""`gptkernels tune`: what is measured, proved and kept, what is taken from it, and what goes wrong meanwhile."""

import errno
import json
import os
import stat
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

import gptkernels as gk
from gptkernels import cli, cuda_build, dispatch, files, simulator, triton_calls
from gptkernels.bench.cases import Case
from gptkernels.failures import UsageError
from gptkernels.ops.attention.record import AttentionCall
from gptkernels.tuning import candidates, choices, classes, model_cases, store, tune
from gptkernels.tuning.classes import CallClass
from gptkernels.tuning.workers import Compilers, Workers

CPU = torch.device("cpu")
LIBRARIES = os.environ.get("GPTKERNELS_CACHE")  # where the CUDA library may be
SMALL = "B1,H2,T192,D16,W24"
CASE = Case.of("attention", "float32", ("fwd", "bwd"), B=1, H=2, T=192, D=16, W=24)
FAULTY = (sys.executable, str(Path(__file__).parent / "faulty_tuning_worker.py"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(tune.SECONDS, "cpu", 0.02)
    choices.reload()
    yield tmp_path / "cache"
    choices.reload()


def entry(order=(("eager", 10.0),), **settings) -> dict:
    order = [list(row) for row in order]
    return {"order": order, "settings": settings, "failed": {}, "tried": 1, "when": "2026-11-21T00:00:00+00:00"}


def keep(found: CallClass, kept: dict) -> Path:
    with store.writing(CPU) as writer:
        writer.keep(found, kept)
    choices.reload()
    return writer.path


def heads(tokens: int = 192) -> list[torch.Tensor]:
    return [torch.randn(1, 2, tokens, 16) for _ in range(3)]


def banded(tokens: int = 192) -> CallClass:
    return CallClass("attention", ("float32", "D16", "banded"), {"T": tokens, "W": 24, "heads": 2})


def test_the_command(cache, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["tune", "--device", "cpu", "--op", "attention", "--shape", SMALL]
    assert cli.main([*arguments, "--json", str(out)]) == 0
    assert "attention float32 D16 banded" in capsys.readouterr().out
    (path,) = (cache / "tuning").glob("*.json")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for document in (store.opened(out.read_text()), store.opened(path.read_text())):
        ((found, kept),) = store.entries_of(document).items()
        assert found == banded()
        assert [name for name, _ in kept["order"]] == ["eager"]
        assert kept["tried"] == 5
        assert not kept["failed"]
    told = str(gk.explain(gk.attention, *heads(), window=24))
    assert "measured here on 20" in told
    assert cli.main(["info"]) == 0
    assert "1 classes of calls" in capsys.readouterr().out
    assert cli.main([*arguments, "--reset", "--budget", "0.0001"]) == 0
    assert "no time was left for 1 of 1" in capsys.readouterr().out
    assert not path.exists()
    choices.reload()
    assert "measured" not in str(gk.explain(gk.attention, *heads(), window=24))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "norm"], "--op must be one of"),
        (["--model", "gpt9"], "--model must be one of"),
        (["--model", "gpt2", "--shape", SMALL], "give one"),
        (["--hf", "/nowhere"], "--hf /nowhere cannot be loaded"),
        (["--shape", "Z3"], "--shape"),
        (["--import", "/nowhere.json"], "No such file"),
        (["--budget", "0"], None),
    ],
)
def test_what_makes_no_sense(arguments, words, capsys):
    try:
        status = cli.main(["tune", "--device", "cpu", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == (1 if words == "No such file" else 2)
    assert (words or "--budget") in capsys.readouterr().err


def test_dry_run_lists_and_measures_nothing(cache, capsys):
    assert cli.main(["tune", "--device", "cpu", "--dry-run"]) == 0
    assert "eager_rows: 4" in capsys.readouterr().out
    assert cli.main(["tune", "--device", "cuda", "--dry-run", "--model", "gpt3-1.3b"]) == 0
    out = capsys.readouterr().out
    assert "cuda, triton, eager, torch" in out
    assert "attention_dkdv_tma" in out
    assert not cache.exists()


def test_what_was_measured_is_in_force():
    x = torch.randn(8, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    assert gk.explain(gk.layer_norm, *x).backend == "eager"
    with dispatch.recording() as calls:
        gk.layer_norm(*x)
    keep(classes.of(*calls[0]), entry([("torch", 1.0), ("eager", 2.0)]))
    assert gk.explain(gk.layer_norm, *x).backend == "torch"
    assert torch.equal(gk.layer_norm(*x), torch.layer_norm(x[0], (64,), x[1]))
    assert gk.explain(gk.layer_norm, *x, backend="eager").backend == "eager"
    keep(banded(), entry(eager_rows=48))
    call = AttentionCall(*heads(), left=23)
    assert choices.setting("eager_rows", "attention", call, 0) == 48
    assert choices.setting("other", "attention", call, (1, 2)) == (1, 2)
    with choices.trying({"eager_rows": 7}):
        assert choices.setting("eager_rows", "attention", call, 0) == 7


def test_benchmarks_say_what_was_in_force(tmp_path):
    arguments = ["--device", "cpu", "--json", str(tmp_path / "out.json")]
    command = ["bench", "--op", "attention", "--shape", SMALL, "--dtype", "float32", "--pass", "fwd", *arguments]
    for kept, wanted, count in (({}, None, 0), (entry(), "as shipped", 1), (entry(eager_rows=48), "eager_rows 48", 1)):
        if kept:
            keep(banded(), kept)
        assert cli.main([*command, "--seconds", "0.01"]) == 0
        document = json.loads((tmp_path / "out.json").read_text())
        assert document["tuned"]["classes"] == count
        assert {row["contender"]: row["in_force"] for row in document["cases"]} == {
            row["contender"]: wanted if row["kind"] == "ours" else None for row in document["cases"]
        }


def test_the_nearest_class_counts():
    known = {banded(tokens): entry(eager_rows=tokens) for tokens in (256, 2048)}
    for tokens, expected in ((200, 256), (300, 256), (1500, 2048), (8192, 2048), (10**6, None)):
        found = classes.nearest(banded(tokens), known)
        assert (found and found["settings"]["eager_rows"]) == expected
    for other in (
        CallClass("attention", ("float16", "D16", "banded"), banded().sizes),
        CallClass("attention", ("float32", "D16", "dense"), banded().sizes),
        CallClass("mlp", ("float32", "D16", "banded"), banded().sizes),
    ):
        assert classes.nearest(other, known) is None


def test_wrong_crashing_and_hanging_candidates(monkeypatch):
    monkeypatch.setattr(tune, "LIMIT_S", 15.0)
    with Workers("cpu", FAULTY) as workers:
        trial = tune.Trial(CASE, "cpu", workers, deadline=float("inf"))
        trial.run()
    found = trial.entry()
    assert trial.tried == 5
    reasons = {name.rsplit(" ", 1)[-1].rstrip(")"): why for name, why in found["failed"].items()}
    assert reasons.keys() == {"64", "128", "512"}
    assert reasons["64"].startswith("wrong: output 0")
    assert reasons["128"] == "crashed: the process ended: SIGABRT"
    assert reasons["512"] == "hung: no answer in 15 s"
    assert found["settings"].get("eager_rows") in (None, 1024)
    assert [name for name, _ in found["order"]] == ["eager"]


def test_a_worker_that_does_not_start():
    with Workers("cpu", (sys.executable, "-c", "raise SystemExit(3)")) as workers, pytest.raises(RuntimeError) as error:
        workers.ask({}, 5.0)
    assert "exit status 3" in str(error.value)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "older"])
def test_a_file_that_cannot_be_read_is_set_aside(damage):
    path = keep(banded(), entry(eager_rows=48))
    text = path.read_text()
    damaged = {"flipped": text.replace("48", "96"), "cut": text[:-20], "empty": "", "older": '{"version": 0}'}
    path.write_text(damaged[damage])
    choices.reload()
    call = AttentionCall(*heads(), left=23)
    with pytest.warns(UserWarning, match="is not used, and becomes .*unreadable"):
        assert choices.setting("eager_rows", "attention", call, 0) == 0
    assert not path.exists()
    assert path.with_suffix(".unreadable").exists()
    keep(banded(), entry(eager_rows=32))
    assert choices.setting("eager_rows", "attention", call, 0) == 32


def test_a_folder_that_others_may_write_to_is_not_used():
    path = keep(banded(), entry(eager_rows=48))
    path.parent.chmod(0o777)
    choices.reload()
    with pytest.warns(UserWarning, match="writable by others"):
        assert choices.order("attention", AttentionCall(*heads(), left=23)) == []


def test_other_kernels_and_devices_have_files_of_their_own():
    path = keep(banded(), entry())
    for name in ("sources", "device", "torch", "units"):
        with mock.patch.object(store, "facts", return_value=store.facts(CPU) | {name: "another"}):
            assert store.load(CPU) == {}
    assert store.load(CPU) == {banded(): entry()}
    assert path == store.path_of(store.facts(CPU))


def test_two_tuners_at_once():
    holding, done = threading.Event(), threading.Event()

    def first():
        with store.writing(CPU) as writer:
            holding.set()
            done.wait(20)
            writer.keep(banded(), entry())

    thread = threading.Thread(target=first)
    thread.start()
    holding.wait(20)
    with pytest.raises(UsageError, match="another gptkernels tune has held"), store.writing(CPU, timeout_s=0.3):
        pass
    done.set()
    thread.join()
    with store.writing(CPU) as writer:
        assert writer.entries == {banded(): entry()}


def test_a_full_disk_leaves_what_was_there(capsys, monkeypatch):
    path = keep(banded(64), entry())
    before = path.read_text()

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "tuning")

    monkeypatch.setattr(files.os, "fsync", full)
    assert cli.main(["tune", "--device", "cpu", "--op", "attention", "--shape", SMALL]) == 1
    assert "No space left" in capsys.readouterr().err
    assert path.read_text() == before
    assert not list(path.parent.glob(".*.json.*"))


def test_ctrl_c_keeps_what_was_found(capsys, monkeypatch):
    monkeypatch.setattr(candidates, "settings", lambda case, where: iter(()))
    real, calls = tune.Trial.run, []

    def run(trial):
        calls.append(trial)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(trial)

    monkeypatch.setattr(tune.Trial, "run", run)
    assert (
        cli.main(["tune", "--device", "cpu", "--op", "layer_norm", "--op", "add_layer_norm", "--shape", "M8,N64"])
        == 130
    )
    assert len(store.load(CPU)) == 1
    assert "layer_norm float32 M8 N64" in capsys.readouterr().out


def test_export_and_import(cache, tmp_path, capsys):
    path = keep(banded(), entry(eager_rows=48))
    exported = tmp_path / "exported.json"
    assert cli.main(["tune", "--device", "cpu", "--export", str(exported)]) == 0
    path.unlink()
    assert cli.main(["tune", "--device", "cpu", "--import", str(exported)]) == 0
    assert store.load(CPU) == {banded(): entry(eager_rows=48)}
    document = json.loads(exported.read_text())
    document["facts"]["device"] = "another"
    exported.write_text(json.dumps(document | {"checksum": store.checksum(document)}))
    capsys.readouterr()
    assert cli.main(["tune", "--device", "cpu", "--import", str(exported)]) == 2
    assert "is of a another, this is a" in capsys.readouterr().err


def test_what_is_shipped_serves_until_something_is_measured(tmp_path, monkeypatch):
    """Of GPUs of the same name, whatever their driver and torch."""
    gpu = mock.Mock(type="cuda", index=0)
    found = dict.fromkeys(("units", "driver", "torch", "triton", "sources"), "then") | {"device": "NVIDIA H100"}
    monkeypatch.setattr(store, "SHIPPED", tmp_path)
    (tmp_path / "h100.json").write_text(json.dumps(store.sealed(found, {banded(): entry(eager_rows=48)})))
    properties = mock.Mock(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for name, count in (("NVIDIA H100", 1), ("NVIDIA A100", 0)):
        properties.name = name
        choices.reload()
        assert len(choices.known(gpu)) == count
        assert choices.summary(gpu)["classes"] == 0
    properties.name = "NVIDIA H100"
    choices.reload()
    call = mock.Mock(
        first=mock.Mock(device=gpu, dtype=torch.float32), traits=lambda: (banded().kind[1:], banded().sizes)
    )
    assert choices.told("attention", call).startswith("measured on a GPU like this one, not here, on 2026-11-21")
    monkeypatch.setattr(store, "load", lambda device: {banded(): entry(eager_rows=7)})
    choices.reload()
    assert choices.setting("eager_rows", "attention", call, 0) == 7


def test_models(tmp_path):
    cases = model_cases.cases_of_model("gpt2", "bfloat16")
    assert {(case.op, case.label) for case in cases} >= {
        ("attention", "B16 H12 T1024 D64"),
        ("add_layer_norm", "M16384 N768"),
        ("linear_cross_entropy", "M16384 N768 V50257"),
        ("mlp", "M16384 N768"),
    }
    llama = {case.op for case in model_cases.cases_of_model("tinyllama-1.1b", "bfloat16")}
    assert llama == {"rms_norm", "add_rms_norm", "rope", "attention", "gated_mlp", "linear_cross_entropy"}
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=100).save_pretrained(tmp_path)
    found = {(case.op, case.label) for case in model_cases.cases_of_hf(str(tmp_path), "bfloat16")}
    assert found == {
        ("attention", "B8 H4 G2 T2048 D16"),
        ("rope", "B8 H4 G2 T2048 D16"),
        ("rms_norm", "M16384 N64"),
        ("gated_mlp", "M16384 N64 F128"),
        ("linear_cross_entropy", "M16384 N64 V100"),
    }


def test_a_case_has_its_calls_options():
    """So that what is tuned belongs to the kind of calls that asked for it."""
    options = {"S": 1, "C": 30, "A": 1}
    shapes = {
        "attention": ({}, {"W": 33}, *({name: size} for name, size in options.items()), options),
        "decode_attention": ({}, {"W": 33}, {"S": 1}, {"P": 16}, {"S": 1, "P": 16, "W": 33}),
    }
    for op, several in shapes.items():
        for shape in several:
            case = Case.of(op, "bfloat16", B=2, H=4, G=2, T=64, D=16, **shape)
            with torch.no_grad(), dispatch.recording() as calls:
                case.spec.function(**case.tensors(torch.device("cpu"), 0), **case.kwargs)
            assert [(found.op, found.label) for found in model_cases.distinct(calls)] == [(op, case.label)]


def test_a_model_and_a_batch():
    config = gk.GPTConfig(layers=1, heads=2, width=32, context=32, vocabulary=64)
    model = gk.GPT(config).bfloat16()
    found = gk.tune(model, torch.randint(64, (2, 32)), budget=60)
    assert {each.op for each in found} >= {"attention", "mlp"}
    assert found.keys() == store.load(CPU).keys()
    with pytest.raises(ValueError, match="calls no op of gptkernels"):
        gk.tune(torch.nn.Linear(3, 3), torch.zeros(1, 3))


class Told:
    """Workers and compilers at once, that answer by what they were told. first, really: microseconds by rows,
    when measured alone and in a race; 0 is the usual value. spilled: bytes by the same, None: does not compile"""

    workers = (None,)

    def __init__(self, first: dict, really: dict, spilled: dict | None = None):
        self.first, self.really, self.spilled, self.jobs = first, really, spilled or {}, []

    def ask(self, job, limit_s):
        self.jobs.append(job)
        name = {"op": "attention", "kind": ["float32"], "sizes": {"T": 1}}

        def us(candidate, times):
            both = times[candidate["settings"].get("rows", 0)]
            return {"fwd": both, "bwd": both}

        if job["job"] == "measure":
            return {"status": "ok", "us": us(job["candidate"], self.first), "class": name}
        return {"status": "ok", "us": [us(candidate, self.really) for candidate in job["candidates"]]}

    def ask_all(self, jobs, limit_s, deadline):
        found = [self.spilled.get(job["candidate"]["settings"]["rows"], 0) for job in jobs]
        return [{"status": "failed", "detail": "no"} if n is None else {"status": "ok", "spilled": n} for n in found]


def told(monkeypatch, first, really, spilled=None):
    """-> the trial of one setting, its values in the order of `first`, and the values that were measured"""
    values = tuple(value for value in first if value)
    monkeypatch.setattr(candidates, "backends", lambda case, where: [candidates.Candidate("triton")])
    setting = candidates.Setting("rows", "triton", "fwd", values)
    monkeypatch.setattr(candidates, "settings", lambda case, where: iter([setting]))
    workers = Told(first, really, spilled)
    trial = tune.Trial(CASE, "cuda", workers, deadline=float("inf"), compilers=workers)
    trial.run()
    measured = [job["candidate"]["settings"] for job in workers.jobs if job["job"] == "measure"]
    return trial, [settings.get("rows", 0) for settings in measured]


def test_the_faster_half_races_again(monkeypatch):
    """A first look is not trusted: what it puts second is first in turns, and slower ones are not run again."""
    first = {0: 10.0, 1: 5.0, 2: 5.5, 3: 9.0, 4: 20.0, 5: 30.0}
    trial, measured = told(monkeypatch, first, really=first | {1: 9.9, 2: 6.0, 3: 7.0})
    assert measured == [0, 1, 2, 3, 4, 5]
    assert trial.entry()["settings"] == {"rows": 2}
    races = [job["candidates"] for job in trial.workers.jobs if job["job"] == "race"]
    rows = [[candidate["settings"].get("rows", 0) for candidate in race] for race in races]
    assert rows == [[1, 2, 3], [2, 3], [0, 2]]
    assert trial.fastest["triton"][1]["fwd"] == 6.0


def test_what_is_no_faster_in_turns_is_not_taken(monkeypatch):
    trial, _ = told(monkeypatch, {0: 10.0, 1: 5.0}, really={0: 8.0, 1: 7.9})
    assert trial.entry()["settings"] == {}


def test_what_spills_is_not_measured(monkeypatch):
    times = {0: 10.0, 1: 5.0, 2: 6.0, 3: 7.0}
    trial, measured = told(monkeypatch, times, times, spilled={1: 8, 3: None})
    assert measured == [0, 2]
    assert (trial.entry()["pruned"], trial.entry()["settings"]) == (1, {"rows": 2})
    assert list(trial.failed.values()) == ["failed: no"]
    trial, measured = told(monkeypatch, times, times, spilled={1: 8, 2: 8, 3: 4})
    assert measured == [0, 1, 2, 3]  # better than none


@pytest.mark.skipif(simulator.unavailable() is not None, reason="the simulator is not installed")
def test_kernels_are_compiled_and_not_launched():
    x, weight = torch.randn(8, 64).bfloat16().requires_grad_(), torch.ones(64).bfloat16()
    with simulator.use(arch=90) as driver:
        gk.layer_norm(x, weight, backend="triton")
        launched = driver.total_stats.warp_instructions
        with triton_calls.compiling() as kernels:
            gk.layer_norm(x, weight, backend="triton").sum().backward()
        assert driver.total_stats.warp_instructions == launched
    assert [kernel.metadata.name for kernel in kernels] == [
        "layer_norm_fwd_kernel",
        "layer_norm_bwd_kernel",
        "layer_norm_bwd_reduce_kernel",
    ][: len(kernels)]


@pytest.mark.skipif(simulator.unavailable() is not None, reason="the simulator is not installed")
def test_on_the_simulator(monkeypatch):
    """Triton's kernels by the instructions that they execute, each row of the launch table proved right before."""
    if LIBRARIES is None:
        monkeypatch.delenv("GPTKERNELS_CACHE")
    else:
        monkeypatch.setenv("GPTKERNELS_CACHE", LIBRARIES)
    settings = [candidates.Setting("layer_norm_fwd", "triton", "fwd", ((4, 0, 16), (1, 0, 1), (1, 0, 8)))]
    monkeypatch.setattr(candidates, "settings", lambda case, where: iter(settings))
    case = Case.of("layer_norm", "bfloat16", ("fwd", "bwd"), M=5, N=64)
    with Workers("simulator") as workers, Compilers("simulator") as compilers:
        trial = tune.Trial(case, "simulator", workers, float("inf"), compilers)
        trial.run()
    found = trial.entry()
    assert not found["failed"]
    times = dict(found["order"])
    assert times.keys() == {"triton", "eager", "torch"} | (set() if simulator.cuda_unavailable() else {"cuda"})
    assert found["settings"] == {"layer_norm_fwd": (1, 0, 1)}  # one warp to a row has the least to do
    assert trial.of == CallClass("layer_norm", ("bfloat16",), {"M": 5, "N": 64})


def test_the_lock_is_not_the_builds():
    with store.writing(CPU), cuda_build.locked(cuda_build.cache_root() / "lock", 0.1):
        pass
