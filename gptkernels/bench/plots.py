"""Pictures of a benchmark, each as PNG and as SVG: speed and memory against T, window or width, and the roofline.

Transparent, in colours that can be read on white and on black.
"""

from collections.abc import Iterable
from pathlib import Path

from .cases import label_of
from .report import MEMORY_BOUND

GREY = "#808080"
OURS = {"cuda": "#e5484d", "triton": "#3b82f6", "eager": "#22a06b"}
PEERS = ("#e8710a", "#9b6fe0", "#14a3a8", "#d6409f", "#a8803a", "#7c8ba1", "#c25e5e", "#5f8f3e", "#4f7bd0", "#b55fc4")
MARKERS = "oDsv^<>Xph"
PASSES = {"fwd": "forward", "bwd": "backward", "both": "forward + backward"}
# Dimension -> what the axis says, and the dimensions that may change along with it (a batch that keeps B T constant).
SWEEPS = {
    "T": ("tokens T", ("B",)),
    "W": ("window (keys seen)", ()),
    "N": ("width N", ("F", "M")),
}


def draw(document: dict, folder: Path, kinds: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """-> the files written; sweeps with a single point are left out"""
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in document["cases"] if row["status"] == "ok"]
    paths = []
    with matplotlib.rc_context(style()):
        for dimension in SWEEPS:
            for key, group in sweeps(rows, dimension).items():
                name = "-".join((key[0], *key[1].split(), key[2], "against", dimension))
                paths += save(sweep_figure(document, group, key, dimension, speed), folder / f"speed-{name}", kinds)
                if dimension == "T" and any(row["peak_bytes"] for row in group):
                    paths += save(
                        sweep_figure(document, group, key, dimension, memory), folder / f"memory-{name}", kinds
                    )
        if rows:
            paths += save(roofline_figure(document, rows), folder / "roofline", kinds)
    return paths


def style() -> dict:
    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return dict.fromkeys(coloured, GREY) | {
        "font.size": 11,
        "axes.grid": True,
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.labelcolor": GREY,
        "lines.linewidth": 2,
        "lines.markersize": 6,
        "savefig.transparent": True,
        "svg.hashsalt": "gptkernels",
    }


def save(figure, stem: Path, kinds: tuple[str, ...]) -> list[Path]:
    from matplotlib import pyplot

    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in kinds]
    for path in paths:
        figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return paths


def sweeps(rows: list[dict], dimension: str) -> dict[tuple, list[dict]]:
    """Rows that differ in `dimension` and what goes with it: (op, the other dimensions, dtype) -> rows"""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        shape = row["shape"]
        if not shape.get(dimension):
            continue
        free = (dimension, *SWEEPS[dimension][1])
        groups.setdefault((row["op"], label_of(shape, without=free), row["dtype"]), []).append(row)
    return {key: group for key, group in groups.items() if passes_of(group, dimension)}


def passes_of(group: list[dict], dimension: str) -> list[str]:
    """Those that were measured at more than one size"""
    sizes = {which: {row["shape"][dimension] for row in group if row["pass"] == which} for which in PASSES}
    return [which for which in PASSES if len(sizes[which]) > 1]


def contender_style(name: str, rows: Iterable[dict]) -> dict:
    """The same colour and marker for a contender in every picture of a document"""
    if name in OURS:
        return {"color": OURS[name], "marker": "o", "linewidth": 2.6, "zorder": 3}
    peers = sorted({row["contender"] for row in rows if row["contender"] not in OURS})
    place = peers.index(name)
    return {"color": PEERS[place % len(PEERS)], "marker": MARKERS[1 + place % (len(MARKERS) - 1)], "linestyle": "--"}


def rate(row: dict, document: dict) -> float:
    """In rate_unit: what matters for the op"""
    if row["op"] in MEMORY_BOUND:
        return row["gbps"]
    return row["tflops"] * (1 if document["device"]["type"] == "cuda" else 1e3)


def rate_unit(op: str, document: dict) -> str:
    return "GB/s" if op in MEMORY_BOUND else "TFLOP/s" if document["device"]["type"] == "cuda" else "GFLOP/s"


def highest_rate(row: dict, document: dict) -> float:
    """What the measured ceilings allow this row to reach"""
    ceilings = document["ceilings"]
    gemm, copy = ceilings["gemm_tflops"][row["dtype"]], ceilings["copy_gbps"]
    seconds = max(row["flops"] / gemm / 1e12, row["bytes"] / copy / 1e9)
    best = {**row, "tflops": row["flops"] / seconds / 1e12, "gbps": row["bytes"] / seconds / 1e9}
    return rate(best, document)


def speed(axes, points: dict[int, dict], document: dict, **options) -> None:
    axes.plot(list(points), [rate(row, document) for row in points.values()], **options)
    axes.set_ylabel(f"useful {rate_unit(next(iter(points.values()))['op'], document)}")


def memory(axes, points: dict[int, dict], document: dict, **options) -> None:
    found = {x: row["peak_bytes"] / 2**20 for x, row in points.items() if row["peak_bytes"]}
    axes.plot(list(found), list(found.values()), **options)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set_ylabel("peak memory beyond the inputs, MiB")


def sweep_figure(document: dict, group: list[dict], key: tuple, dimension: str, curve):
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    passes = passes_of(group, dimension)
    figure, grid = pyplot.subplots(1, len(passes), figsize=(1 + 5 * len(passes), 4), squeeze=False)
    for axes, which in zip(grid[0], passes, strict=True):
        here = [row for row in group if row["pass"] == which]
        for name in dict.fromkeys(row["contender"] for row in here):
            mine = sorted((row for row in here if row["contender"] == name), key=lambda row: row["shape"][dimension])
            points = {row["shape"][dimension]: row for row in mine}
            curve(axes, points, document, label=name, **contender_style(name, document["cases"]))
        sizes = sorted({row["shape"][dimension] for row in here})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
        axes.set_xlabel(SWEEPS[dimension][0])
        axes.set_title(PASSES[which])
        if curve is speed:
            roof = {row["shape"][dimension]: highest_rate(row, document) for row in here}
            axes.plot(sizes, [roof[size] for size in sizes], color=GREY, linestyle=":", label="measured ceiling")
            axes.set_ylim(bottom=0)
    entries = {label: line for axes in grid[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{' '.join(filter(None, key[:2]))}, {key[2]}: {document['device']['name']}", fontsize=12)
    figure.tight_layout()
    return figure


def roofline_figure(document: dict, rows: list[dict]):
    """Each op's fastest of ours (filled) and fastest peer (hollow), under what the device was measured to reach."""
    import numpy as np
    from matplotlib import pyplot

    ceilings = document["ceilings"]
    unit, scale = ("TFLOP/s", 1.0) if document["device"]["type"] == "cuda" else ("GFLOP/s", 1e3)
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    intensities = [row["flops"] / row["bytes"] for row in rows]
    xs = np.geomspace(min(intensities) / 3, max(intensities) * 3, 200)
    for dtype, gemm in ceilings["gemm_tflops"].items():
        roof = np.minimum(gemm, xs * ceilings["copy_gbps"] / 1e3) * scale
        axes.plot(xs, roof, color=GREY)
        axes.annotate(
            f"{gemm * scale:.0f} {unit}, a large product in {dtype}",
            (xs[-1], roof[-1]),
            (0, 5),
            textcoords="offset points",
            ha="right",
        )
    slope = ceilings["copy_gbps"] / 1e3 * scale
    axes.text(
        xs[5],
        xs[5] * slope * 1.1,
        f"{ceilings['copy_gbps']:.0f} GB/s, a copy",
        rotation=np.degrees(np.arctan(slope)),
        rotation_mode="anchor",
        transform_rotates_text=True,
        va="bottom",
    )
    ops = sorted({row["op"] for row in rows})
    for number, op in enumerate(ops):
        colour = (*OURS.values(), *PEERS)[number]
        for kind, face in (("ours", colour), ("peer", "none")):
            points = fastest(row for row in rows if row["op"] == op and row["kind"] == kind)
            axes.scatter(
                [row["flops"] / row["bytes"] for row in points],
                [row["tflops"] * scale for row in points],
                s=45,
                marker=MARKERS[number],
                facecolors=face,
                edgecolors=colour,
                label=op + (", fastest peer" if kind == "peer" else ""),
                zorder=3,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("useful FLOPs per byte that has to be moved")
    axes.set_ylabel(f"useful {unit}")
    axes.set_title(f"every op under the measured roofline: {document['device']['name']}", fontsize=12)
    figure.legend(loc="center left", bbox_to_anchor=(0.91, 0.5))
    return figure


def fastest(rows: Iterable[dict]) -> list[dict]:
    """Of each case and pass"""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = row["label"], row["dtype"], row["pass"]
        if key not in best or row["median_us"] < best[key]["median_us"]:
            best[key] = row
    return list(best.values())
