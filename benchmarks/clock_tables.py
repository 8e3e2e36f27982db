"""README's tables of what the simulator's clock predicts, from results/clock_*.json."""

import json
from pathlib import Path

from measured import seconds, table

RESULTS = Path(__file__).resolve().parent / "results"
PASSES = {"fwd": "forward", "bwd": "backward"}


def percent(value: float) -> str:
    return f"{100 * value:+.1f}%"


def calibration() -> str:
    """From `python -m ptxemu.timing calibrate`."""
    found = json.loads((RESULTS / "clock_calibration.json").read_text())
    kernels: dict[tuple[str, bool], list[str]] = {}
    for row in found["rows"]:
        shape = row["shape"].split(", ")[-1]
        kernels.setdefault((row["kernel"], row["held_out"]), []).append(f"{shape}: {percent(row['error'])}")
    rows = [
        [kernel, "held out" if held_out else "fitted", ", ".join(errors)]
        for (kernel, held_out), errors in kernels.items()
    ]
    return table(["kernel", "", "predicted time against the published one"], rows)


def predictions() -> str:
    """From `python benchmarks/predict.py --table`."""
    found = json.loads((RESULTS / "clock_predictions.json").read_text())
    held_out = json.loads((RESULTS / "clock_calibration.json").read_text())["summary"]["held out"]
    intro = (
        f"Predicted by the simulator's clock for an H100 SXM at {found['mhz']} MHz, bfloat16, causal; not measured. On "
        f"{held_out['rows']} held-out figures of other kernels the clock is {held_out['mean']:.1%} off on average and "
        f"{held_out['worst']:.1%} at most. The limit is the tensor cores' time or HBM's."
    )
    rows = []
    for row in found["rows"]:
        shape = " ".join(f"{name}{value}" for name, value in row["shape"].items())
        peer = f"{row['peer_us'] / row['predicted_us']:.2f} of {row['peer']}'s speed" if "peer" in row else ""
        limit = f"{100 * row['limit_us'] / row['predicted_us']:.0f}%"
        name = f"{row['op']} {shape}, {row['backend']}"
        rows.append([name, PASSES[row["pass"]], seconds(row["predicted_us"]), row["rate"], limit, peer])
    header = ["kernel", "pass", "predicted", "", "of the limit", "in the same model"]
    return f"{intro}\n\n" + table(header, rows)
