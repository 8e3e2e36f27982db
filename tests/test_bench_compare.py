"""`gptkernels compare` on made-up samples, whose truth is known."""

import json

import numpy as np
import pytest

from gptkernels import cli
from gptkernels.bench import schema
from gptkernels.bench.compare import compare as compare_documents
from gptkernels.bench.compare import judge

ROUNDS, PER_ROUND = 5, 6


def row(generator, median: float = 100.0, noise: float = 0.01, drift: float = 0.0, outliers: float = 0.0) -> dict:
    """noise: of each sample; drift: of each round; outliers: the share of samples that take three times as long"""
    levels = median * (1 + drift * generator.standard_normal((ROUNDS, 1)))
    samples = levels * np.exp(noise * generator.standard_normal((ROUNDS, PER_ROUND)))
    samples[generator.random(samples.shape) < outliers] *= 3
    return {"samples_us": samples.ravel().tolist(), "rounds": [PER_ROUND] * ROUNDS, "status": "ok"}


@pytest.mark.parametrize(
    "noise",
    [
        {"noise": 0.01},
        {"noise": 0.05, "outliers": 0.05},
        {"noise": 0.02, "drift": 0.03},
        {"noise": 0.3, "drift": 0.05, "outliers": 0.1},
    ],
    ids=str,
)
def test_the_same_is_never_called_slower(noise):
    generator = np.random.default_rng(0)
    verdicts = [judge(row(generator, **noise), row(generator, **noise)).name for _ in range(200)]
    assert set(verdicts) <= {"SAME", "AMBIGUOUS"}
    if noise == {"noise": 0.01}:
        assert verdicts.count("SAME") == 200


@pytest.mark.parametrize(("ratio", "verdict"), [(1.1, "SLOWER"), (0.9, "FASTER"), (1.0, "SAME"), (1.03, "AMBIGUOUS")])
def test_verdicts(ratio, verdict):
    generator = np.random.default_rng(1)
    found = [judge(row(generator), row(generator, median=100 * ratio)) for _ in range(20)]
    assert {one.name for one in found} == {verdict}
    assert all(one.low <= one.ratio <= one.high for one in found)
    assert np.mean([one.ratio for one in found]) == pytest.approx(ratio, rel=0.01)


def test_few_samples_say_nothing():
    generator = np.random.default_rng(2)
    few = {"samples_us": [100.0, 101.0, 99.0, 100.0, 100.0], "rounds": [1] * 5}
    many = {"samples_us": [300.0] * 60, "rounds": [60]}  # in one go: nobody knows how far the clocks drift
    assert judge(row(generator), few).name == "AMBIGUOUS"
    assert judge(row(generator), many).name == "AMBIGUOUS"


def document(rows: list[dict]) -> dict:
    empty = {name: (types[0]() if type(None) not in types else None) for name, (types, _) in schema.DOCUMENT.items()}
    return empty | {"schema": schema.VERSION, "cases": rows}


def full(label: str, samples: dict, **changes) -> dict:
    empty = {name: (types[0]() if type(None) not in types else None) for name, (types, _) in schema.ROW.items()}
    return empty | {"op": "attention", "label": label, "contender": "triton", **samples, "median_us": 100.0} | changes


def compare(tmp_path, before: list[dict], after: list[dict], *arguments: str) -> int:
    paths = []
    for name, rows in (("a", before), ("b", after)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(document(rows)))
    return cli.main(["compare", *map(str, paths), *arguments])


def test_the_command(tmp_path, capsys):
    generator = np.random.default_rng(3)
    before = [full(name, row(generator)) for name in ("same", "slow", "fast", "gone")]
    same, fast = full("same", row(generator)), full("fast", row(generator, 80.0))
    slow = full("slow", row(generator, 120.0))
    assert compare(tmp_path, before, [same, fast]) == 0
    assert "1 SAME, 1 FASTER" in capsys.readouterr().out
    assert compare(tmp_path, before, [same, fast, slow]) == 1
    out = capsys.readouterr().out
    assert "1 SAME, 1 FASTER, 1 SLOWER" in out
    assert compare(tmp_path, before, [same, fast, slow], "--matters", "30") == 0
    capsys.readouterr()
    broken = full("gone", {"samples_us": [], "rounds": []}, status="wrong", median_us=None)
    assert compare(tmp_path, before, [same, broken]) == 1
    assert "1 BROKEN" in capsys.readouterr().out
    skipped = full("gone", {"samples_us": [], "rounds": []}, status="skipped", median_us=None)
    assert compare(tmp_path, before, [same, skipped]) == 0


def test_a_file_is_the_same_as_itself(tmp_path, capsys):
    generator = np.random.default_rng(5)
    rows = [full(f"row {i}", row(generator, noise=0.3, drift=0.2, outliers=0.1)) for i in range(30)]
    rows.append(full("few", {"samples_us": [1.0, 2.0], "rounds": [2], "status": "ok"}))
    assert compare(tmp_path, rows, rows) == 0
    assert capsys.readouterr().out == "31 SAME\n"


@pytest.mark.parametrize("known_by", ["ceilings", "others"])
def test_a_slower_machine_is_no_slower_kernel(known_by, tmp_path, capsys):
    """Everything took 1.5 times as long, and one kernel twice that."""
    generator = np.random.default_rng(6)
    before = [full(f"row {i}", row(generator), kind="ours") for i in range(20)]
    slow = [full(f"row {i}", row(generator, 150.0), kind="ours", median_us=150.0) for i in range(19)]
    slow.append(full("row 19", row(generator, 300.0), kind="ours", median_us=300.0))
    documents = [document(before), document(slow)]
    if known_by == "ceilings":
        for one, rate in zip(documents, (3.0, 2.0), strict=True):
            one["ceilings"] = {"gemm_tflops": {"": rate}, "copy_gbps": 100.0}
    else:
        for one, median in zip(documents, (100.0, 150.0), strict=True):
            labels = [row["label"] for row in one["cases"]]
            one["cases"] += [
                full(label, row(generator, median), contender="naive", kind="peer", median_us=median)
                for label in labels
            ]
    verdicts = {(found["label"], found["kind"]): one.name for found, one in compare_documents(*documents)}
    assert verdicts["row 19", "ours"] == "SLOWER"
    assert {verdicts[f"row {i}", "ours"] for i in range(19)} == {"AMBIGUOUS"}
    if known_by == "others":  # by which they are judged in turn
        assert {verdicts[f"row {i}", "peer"] for i in range(20)} == {"AMBIGUOUS"}
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, one in zip(paths, documents, strict=True):
        path.write_text(json.dumps(one))
    cli.main(["compare", *map(str, paths)])
    said = "the machine itself: a large matrix product in  took 1.50 times as long" in capsys.readouterr().out
    assert said == (known_by == "ceilings")


def test_what_cannot_be_compared(tmp_path, capsys):
    generator = np.random.default_rng(4)
    one, another = [full("one", row(generator))], [full("another", row(generator))]
    assert compare(tmp_path, one, another) == 2
    assert "no case in common" in capsys.readouterr().err
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": 0}))
    assert cli.main(["compare", str(path), str(path)]) == 2
    assert "no result of gptkernels bench: schema must be 1" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path / "none.json"), str(path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
