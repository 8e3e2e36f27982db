"""README's tables and pictures of results/*-bench.json, which are made by `gptkernels bench --json`, a file per device,
and of results/*-profile*.json, made by `gptkernels profile --json`.
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PICTURES = RESULTS / "pictures"
PASSES = {"fwd": "forward", "bwd": "backward", "both": "both"}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def documents(pattern: str) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))}


def seconds(microseconds: float) -> str:
    unit, scale = next(
        (u, s) for u, s in (("us", 1.0), ("ms", 1e3), ("s", 1e6)) if microseconds < 999.5 * s or u == "s"
    )
    return f"{microseconds / scale:.3g} {unit}"


def where(document: dict) -> str:
    device, versions, git = document["device"], document["versions"], document["git"]
    threads = f", {device['threads']} thread(s)" if "threads" in device else ""
    commit = f", commit {git['commit'][:10]}" + (" with changes" if git["dirty"] else "") if git["commit"] else ""
    return f"{device['name']}{threads}, torch {versions['torch']}{commit}"


def bench_tables() -> str:
    """One per file: the fastest of ours against the fastest other library, case by case"""
    made = []
    for name, document in documents("*-bench.json").items():
        ceilings = document["ceilings"]
        rates = ", ".join(f"{rate:.3g} TFLOP/s ({dtype})" for dtype, rate in ceilings["gemm_tflops"].items())
        heading = (
            f"On {where(document)}; a large matrix product reaches {rates} there, a copy {ceilings['copy_gbps']:.3g} "
            "GB/s:"
        )
        header = ["", "pass", "ours", "of the ceiling", "fastest other", "ours is"]
        made.append("\n\n".join(filter(None, [heading, table(header, bench_rows(document)), pictures(name)])))
    return "\n\n".join(made) or "Nothing has been measured yet."


def bench_rows(document: dict) -> list[list[str]]:
    groups: dict[tuple, list[dict]] = {}
    for row in document["cases"]:
        if row["status"] == "ok":
            groups.setdefault((f"{row['op']} {row['label']}, {row['dtype']}", row["pass"]), []).append(row)
    found = []
    for (case, which), rows in groups.items():
        best = {
            kind: min((r for r in rows if r["kind"] == kind), key=lambda r: r["median_us"], default=None)
            for kind in ("ours", "peer")
        }
        ours, peer = best["ours"], best["peer"]
        if ours is None:
            continue
        share = max(ours["percent_of_gemm"], ours["percent_of_copy"])
        of = "product" if share == ours["percent_of_gemm"] else "copy"
        other = ["none", ""]
        if peer is not None:
            times = f"{peer['median_us'] / ours['median_us']:.2f} times as fast"
            other = [f"{seconds(peer['median_us'])}, {peer['contender']}", times]
        found.append(
            [case, PASSES[which], f"{seconds(ours['median_us'])}, {ours['contender']}", f"{share:.0f}%, {of}", *other]
        )
    return found


def pictures(name: str) -> str:
    """Links to what draw() has drawn"""
    return "\n".join(
        f"![{path.stem.replace('-', ' ')}]({path.relative_to(RESULTS.parent.parent).as_posix()})"
        for path in sorted((PICTURES / name).glob("*.svg"))
    )


def draw() -> None:
    sys.path.insert(0, str(RESULTS.parent.parent))
    from gptkernels.bench import plots

    for name, document in documents("*-bench.json").items():
        plots.draw(document, PICTURES / name, kinds=("svg",))


def profile_tables() -> str:
    """A row per file and twin"""
    rows = []
    for document in documents("*-profile*.json").values():
        what = (
            f"{document['model']}, {'inference' if document['infer'] else 'training'}, "
            f"{document['batch']} x {document['seq']} tokens, {document['dtype']}"
        )
        for name, label in (("plain", "plain PyTorch"), ("ours", "gptkernels")):
            one = document[name]
            if one is None or one["status"] != "ok":
                continue
            used, peak = one["utilisation"], one["peak_bytes"]
            rows.append(
                [
                    what if name == "plain" or document["plain"] is None else "",
                    label,
                    f"{one['tokens_per_second']:,.0f}",
                    "N/A" if used["mfu"] is None else f"{100 * used['mfu']:.1f}%",
                    f"{100 * used['of_measured_gemm']:.0f}%",
                    "" if peak is None else f"{peak / 2**30:.2f} GiB",
                    where(document) if name == "plain" or document["plain"] is None else "",
                ]
            )
    header = ["", "", "tokens/s", "MFU", "of a large product", "peak memory", "on"]
    return table(header, rows) if rows else "No model has been profiled yet."
