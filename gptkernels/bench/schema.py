"""The JSON that `gptkernels bench --json` writes, version 1: what each field is, and whether a document is one.

A document has the fields of DOCUMENT; `cases` is a list of rows, one per case, pass and contender, with the fields of
ROW. Fields may be added within a version; a field that changes its meaning makes a new version.
"""

from typing import Any

VERSION = 1
NUMBER = (int, float)
TEXT = (str,)
OPTIONAL_TEXT = (str, type(None))
OPTIONAL_NUMBER = (int, float, type(None))
STATUSES = ("ok", "wrong", "unsupported", "out of memory", "failed", "skipped", "started")

DOCUMENT = {
    "schema": ((int,), "version of this layout"),
    "argv": ((list,), "the command's arguments"),
    "started": (TEXT, "when, in UTC, ISO 8601"),
    "suite": (OPTIONAL_TEXT, "quick, headline or full; null: a shape from the command line"),
    "seed": ((int,), "of the random inputs"),
    "git": ((dict,), "commit, and dirty: whether the checkout had changes; null where it is no checkout"),
    "versions": ((dict,), "of gptkernels, python, torch, triton, cuda, cudnn, driver"),
    "device": ((dict,), "type, name, and sms, l2_mib, memory_gib, compute_capability or threads, cores"),
    "ceilings": (
        (dict,),
        "measured at the start: gemm_tflops by dtype, copy_gbps, timer_floor_us (of an almost empty kernel)",
    ),
    "telemetry": ((dict,), "before, after: sm_mhz, memory_mhz, temperature_c, power_w, power_limit_w, throttle"),
    "tuned": ((dict,), "what `gptkernels tune` knew of the device: classes (of calls), first and last (when)"),
    "peers": ((dict,), "by name: status (available, missing), version, detail, install"),
    "cases": ((list,), "rows, as below"),
}
ROW = {
    "op": (
        TEXT,
        "attention, decode_attention, layer_norm, add_layer_norm, rms_norm, add_rms_norm, rope, mlp, "
        "gated_mlp, linear_cross_entropy, linear_log_probs, linear_kl_div",
    ),
    "label": (TEXT, "the shape in short"),
    "shape": ((dict,), "every dimension by its letter"),
    "window": ((int, type(None)), "keys that a query sees; null: all, or no attention"),
    "dtype": (TEXT, "of inputs and outputs"),
    "pass": (TEXT, "fwd, bwd or both"),
    "contender": (TEXT, "cuda, triton, eager, or a peer"),
    "kind": (TEXT, "ours, peer, or yardstick (work of the same size that is not the same function)"),
    "seed": ((int,), "of these inputs"),
    "status": (TEXT, "ok (right, and timed), " + ", ".join(STATUSES[1:])),
    "detail": (TEXT, "why the status is not ok"),
    "in_force": (OPTIONAL_TEXT, "launch settings that `gptkernels tune` found for our contenders; null: none"),
    "error_ratio": (OPTIONAL_NUMBER, "largest error over what our own kernels are allowed"),
    "checked": (TEXT, "what was compared with the float64 reference"),
    "timer": (OPTIONAL_TEXT, "graph, events or wall"),
    "calls_per_sample": (OPTIONAL_NUMBER, "calls that one sample is the mean of"),
    "cold": ((bool, type(None)), "whether inputs were out of the L2"),
    "samples_us": ((list,), "time of a call, in the order of measurement"),
    "rounds": ((list,), "how many samples each round of turns has, of `samples_us` in order"),
    "median_us": (OPTIONAL_NUMBER, "of the samples"),
    "p20_us": (OPTIONAL_NUMBER, "of the samples"),
    "p80_us": (OPTIONAL_NUMBER, "of the samples"),
    "host_us": (OPTIONAL_NUMBER, "median wall time of the call on the host, not waiting for the GPU"),
    "flops": ((int,), "useful ones"),
    "bytes": ((int,), "least traffic with memory"),
    "tflops": (OPTIONAL_NUMBER, "flops over median time"),
    "gbps": (OPTIONAL_NUMBER, "bytes over median time"),
    "percent_of_gemm": (OPTIONAL_NUMBER, "tflops over ceilings.gemm_tflops"),
    "percent_of_copy": (OPTIONAL_NUMBER, "gbps over ceilings.copy_gbps"),
    "suspect": ((bool,), "whether either is above 100"),
    "peak_bytes": (OPTIONAL_NUMBER, "memory that the call needs at its peak beyond what was there"),
    "sm_mhz": (OPTIONAL_NUMBER, "median clock while it ran"),
    "throttle": ((list,), "reasons for which the GPU slowed down while it ran"),
}


# Within this version: documents from before do not have them.
ADDED = ("tuned", "in_force")


def problems(document: Any) -> list[str]:
    """What is wrong with a document, in words; empty: nothing."""
    if not isinstance(document, dict):
        return [f"a document must be an object, not {type(document).__name__}"]
    if document.get("schema") != VERSION:
        return [f"schema must be {VERSION}, not {document.get('schema')!r}"]
    found = mismatches("", document, DOCUMENT)
    for number, row in enumerate(document.get("cases") or []):
        found += mismatches(f"cases[{number}].", row, ROW)
        if isinstance(row, dict) and row.get("status") not in STATUSES:
            found.append(f"cases[{number}].status must be one of {', '.join(STATUSES)}, not {row.get('status')!r}")
        if isinstance(row, dict) and row.get("status") == "ok" and not row.get("samples_us"):
            found.append(f"cases[{number}].samples_us must not be empty where the status is ok")
    return found


def mismatches(where: str, value: Any, fields: dict) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where} must be an object"]
    found = [f"{where}{name} is missing" for name in fields if name not in value and name not in ADDED]
    for name, (types, _) in fields.items():
        # In Python True is an int.
        if name in value and (
            not isinstance(value[name], types) or (isinstance(value[name], bool) and bool not in types)
        ):
            found.append(f"{where}{name} must be {' or '.join(t.__name__ for t in types)}, not {value[name]!r}")
    return found
