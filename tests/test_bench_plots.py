"""The pictures of `gptkernels bench --plot`, drawn from made-up results."""

import random
from xml.etree import ElementTree

import pytest

from gptkernels.bench import plots, report
from gptkernels.bench.cases import Case
from gptkernels.bench.measure import Timing

pytest.importorskip("matplotlib")
CEILINGS = {"gemm_tflops": {"bfloat16": 800.0}, "copy_gbps": 3000.0}


def results() -> dict:
    generator = random.Random(0)
    cases = [Case.of("attention", "bfloat16", B=16384 // t, H=16, T=t, D=128) for t in (1024, 4096, 16384)]
    cases += [Case.of("attention", "bfloat16", B=1, H=32, T=32768, D=64, W=w) for w in (256, 1024)]
    cases += [Case.of("layer_norm", "bfloat16", M=16384, N=n) for n in (768, 4096)]
    cases += [Case.of("decode_attention", "bfloat16")]
    rows = []
    for case in cases:
        for which in case.passes:
            for contender, kind in (("cuda", "ours"), ("triton", "ours"), ("sdpa-cudnn", "peer"), ("naive", "peer")):
                row = {"op": case.op, "label": case.label, "shape": case.shape, "dtype": case.dtype, "pass": which}
                row |= {"contender": contender, "kind": kind, "flops": case.flops(which), "bytes": case.bytes(which)}
                row["peak_bytes"] = case.shape.get("T", 1) * 1000 * (1 + len(contender))
                floor = max(row["flops"] / 800e12, row["bytes"] / 3000e9) * 1e6
                timing = Timing("events", 1, 1, cold=True, samples_us=[floor * generator.uniform(1.1, 4)] * 5)
                rows.append(row | report.figures(timing, row, CEILINGS))
    return {"device": {"type": "cuda", "name": "a made-up GPU"}, "ceilings": CEILINGS, "cases": rows}


def test_pictures(tmp_path):
    document = results()
    paths = plots.draw(document, tmp_path)
    stems = {path.stem for path in paths}
    assert stems == {
        "speed-attention-H16-D128-bfloat16-against-T",
        "memory-attention-H16-D128-bfloat16-against-T",
        "speed-attention-B1-H32-T32768-D64-bfloat16-against-W",
        "speed-layer_norm-bfloat16-against-N",
        "roofline",
    }
    for path in paths:
        assert path.stat().st_size > 5000
        assert path.read_bytes()[:4] == b"\x89PNG" if path.suffix == ".png" else ElementTree.parse(path)
    assert {path.suffix for path in paths} == {".png", ".svg"}
    # The same results give the same file, so that a picture in a repository only changes when they do.
    before = (tmp_path / "roofline.svg").read_bytes()
    plots.draw(document, tmp_path)
    assert (tmp_path / "roofline.svg").read_bytes() == before


def test_rows_without_a_time_are_not_drawn(tmp_path):
    document = results()
    for row in document["cases"]:
        row["status"] = "wrong"
    assert plots.draw(document, tmp_path) == []


def test_the_ceiling():
    row = next(row for row in results()["cases"] if row["op"] == "attention" and row["shape"]["T"] == 16384)
    assert plots.highest_rate(row, {"ceilings": CEILINGS, "device": {"type": "cuda"}}) == pytest.approx(800)
    row = next(row for row in results()["cases"] if row["op"] == "layer_norm")
    assert plots.highest_rate(row, {"ceilings": CEILINGS, "device": {"type": "cuda"}}) == pytest.approx(3000)
