"""benchmarks/gpu_suite.py, tried out with steps that crash, hang and take too long."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_suite.py"
if not SCRIPT.exists():
    pytest.skip("benchmarks/ is only there in a checkout", allow_module_level=True)


@pytest.fixture
def suite_module(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_suite", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_suite", module)
    spec.loader.exec_module(module)
    return module


def run(module, tmp_path, steps, budget_s: float = 60.0) -> tuple[int, dict]:
    options = Namespace(out=tmp_path, budget_s=budget_s, cache=None)
    status = module.Suite(options, steps).run()
    return status, json.loads((tmp_path / "suite.json").read_text())["steps"]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_plan(suite_module, tmp_path, capsys, monkeypatch):
    arguments = ["gpu_suite.py", "--out", str(tmp_path), "--only", "check,profile", "--budget-s", "100", "--dry-run"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert suite_module.main() == 0
    out = capsys.readouterr().out
    for step in ("check", "profile-gpt2", "profile-gpt2-xl", "profile-gpt3-1.3b", "about 185 s of 100 s", "no time"):
        assert step in out
    assert "build" not in out
    steps = suite_module.plan(tmp_path, "cuda")
    assert sum(step.expected_s for step in steps if step.group != "tune") <= 540  # tuning takes a run of its own
    assert [step.group for step in steps][:3] == ["build", "check", "bench"]


def test_a_failing_step_does_not_stop_the_others(suite_module, tmp_path):
    steps = [
        suite_module.Step("bad", python("raise SystemExit(1)"), 1, 20),
        suite_module.Step("good", python("print('it ran')"), 1, 20),
    ]
    status, found = run(suite_module, tmp_path, steps)
    assert status == 1
    assert (found["bad"]["status"], found["good"]["status"]) == ("failed", "done")
    assert "it ran" in (tmp_path / "log.txt").read_text()


def test_a_second_run_does_what_is_left(suite_module, tmp_path):
    def steps(code):
        return [
            suite_module.Step("first", python(f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"), 1, 20),
            suite_module.Step("second", python(code), 1, 20),
        ]

    assert run(suite_module, tmp_path, steps("raise SystemExit(1)"))[0] == 1
    status, found = run(suite_module, tmp_path, steps("pass"))
    assert status == 0
    assert found["second"]["status"] == "done"
    assert (tmp_path / "ran").read_text() == "x"


def test_what_no_longer_fits_is_skipped(suite_module, tmp_path):
    steps = [
        suite_module.Step("long", python("import time; time.sleep(60)"), 1, 1.5),
        suite_module.Step("later", python("pass"), 100, 100),
    ]
    _, found = run(suite_module, tmp_path, steps, budget_s=5.0)
    assert found["long"]["status"] == "cut off"
    assert found["long"]["seconds"] < 10
    assert found["later"]["status"] == "skipped"
    assert "s are left" in found["later"]["detail"]


def test_a_step_that_crashes_goes_on_where_it_was(suite_module, tmp_path):
    """Each life of the process does one more case and dies in the next."""
    path = tmp_path / "work.json"
    code = (
        "import json, os, pathlib\n"
        f"path = pathlib.Path({str(path)!r})\n"
        "done = json.loads(path.read_text())['results'] if path.exists() else []\n"
        "done.append({'status': 'right'})\n"
        "path.write_text(json.dumps({'complete': len(done) == 3, 'results': done}))\n"
        "os.abort() if len(done) < 3 else None\n"
    )
    _, found = run(suite_module, tmp_path, [suite_module.Step("work", python(code), 1, 50, "work.json")])
    assert found["work"]["status"] == "done"
    assert len(json.loads(path.read_text())["results"]) == 3


def test_a_step_that_gets_nowhere_is_given_up(suite_module, tmp_path):
    (tmp_path / "work.json").write_text("{}")
    steps = [suite_module.Step("work", python("import os; os.abort()"), 1, 50, "work.json")]
    status, found = run(suite_module, tmp_path, steps)
    assert status == 1
    assert found["work"]["status"] == "failed"


def test_a_hang_is_ended(suite_module, tmp_path, monkeypatch):
    monkeypatch.setattr(suite_module, "STALL_S", 1)
    steps = [suite_module.Step("work", python("import time; time.sleep(60)"), 1, 50, "work.json")]
    _, found = run(suite_module, tmp_path, steps)
    assert found["work"]["status"] == "failed"
    assert "nothing new" in found["work"]["detail"]
    assert found["work"]["seconds"] < 10


def test_the_check_stops_in_time_and_resumes(suite_module, tmp_path, monkeypatch):
    from gptkernels import check

    layer_norm = check.CASES["layer_norm"]
    monkeypatch.setattr(check, "CASES", {"layer_norm": lambda small: list(layer_norm(small=True))[:1]})
    options = Namespace(out=tmp_path, budget_s=-1.0, device="cpu")
    assert suite_module.check_worker(options) == 0
    assert json.loads((tmp_path / "check.json").read_text()) == {"complete": False, "results": []}
    started = {"op": "layer_norm", "case": "5 x 63", "backend": "eager", "dtype": "float16", "status": "started"}
    (tmp_path / "check.json").write_text(json.dumps({"complete": False, "results": [started]}))
    options.budget_s = 60.0
    assert suite_module.check_worker(options) == 1
    found = json.loads((tmp_path / "check.json").read_text())
    statuses = {result["dtype"]: result["status"] for result in found["results"]}
    assert statuses == {"float16": "WRONG", "float32": "right", "bfloat16": "right"}
    assert found["complete"]


def test_in_turns(suite_module):
    def cases(*names):
        return lambda small: [name.upper() for name in names] if not small else list(names)

    jobs = suite_module.in_turns({"a": cases("1", "2", "3"), "b": cases("4")}, True)
    assert jobs == [("a", "1"), ("b", "4"), ("a", "2"), ("a", "3")]


def test_what_was_cut_off_is_tried_again(suite_module, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"cases": [{"status": "ok"}, {"status": "started"}]}))
    steps = [suite_module.Step("work", python("import time; time.sleep(60)"), 1, 1.0, "bench.json")]
    _, found = run(suite_module, tmp_path, steps)
    assert found["work"]["status"] == "cut off"
    assert [row["status"] for row in json.loads(path.read_text())["cases"]] == ["ok", "skipped"]
