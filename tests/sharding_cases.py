"""Calls of every op on DTensors, made in each process of a gang and compared with the op on whole tensors."""

import math
import types
from unittest import mock

import torch
import torch.distributed as dist
from parity import check
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import gptkernels as gk
from gptkernels import simulator
from gptkernels.ops.linear_cross_entropy import eager
from gptkernels.ops.linear_cross_entropy.chunks import Chunk, Options
from gptkernels.parallel import sharding, vocabulary

# Rows and tokens are cut unevenly.
B, T, H, HKV, D, C, F, V = 7, 11, 8, 4, 16, 24, 32, 62
R = Replicate()


def draw(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator).requires_grad_(grad)


def heads(kv: int = HKV) -> dict[str, Tensor]:
    return {"q": draw(B, H, T, D), "k": draw(B, kv, T, D, seed=1), "v": draw(B, kv, T, D, seed=2)}


def norm(**others) -> dict[str, Tensor]:
    return {"x": draw(B, T, C), **others, "weight": draw(C, seed=3)}


def mlp() -> dict[str, Tensor]:
    weights = {"fc_weight": draw(F, C), "fc_bias": draw(F), "proj_weight": draw(C, F), "proj_bias": draw(C)}
    return {"x": draw(B, T, C), **weights, "residual": draw(B, T, C, seed=4)}


def gated_mlp() -> dict[str, Tensor]:
    weights = {"gate_weight": draw(F, C), "up_weight": draw(F, C, seed=5), "down_weight": draw(C, F)}
    biases = {"gate_bias": draw(F), "up_bias": draw(F, seed=6), "down_bias": draw(C)}
    return {"x": draw(B, T, C), **weights, **biases, "residual": draw(B, T, C, seed=4)}


def loss() -> dict[str, Tensor]:
    targets = torch.arange(B * T).view(B, T) * 7 % V
    targets[0, :3] = targets[2, 5] = -100
    return {"x": draw(B, T, C), "weight": draw(V, C), "targets": targets, "bias": draw(V)}


def distilled() -> dict[str, Tensor]:
    student = {name: x for name, x in loss().items() if name != "bias"}
    teacher = {"teacher_x": draw(B, T, 8, seed=3, grad=False), "teacher_weight": draw(V, 8, seed=4, grad=False)}
    return student | teacher


def rope() -> dict[str, Tensor]:
    angles = torch.arange(T * D // 2).view(T, D // 2) / 7
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    qk = {name: x for name, x in heads().items() if name != "v"}
    return qk | tables | {"q_norm": draw(D), "k_norm": draw(D, seed=7)}


def decode() -> dict[str, Tensor]:
    caches = {"k_cache": draw(B, HKV, T, D, seed=1, grad=False), "v_cache": draw(B, HKV, T, D, seed=2, grad=False)}
    return {"q": draw(B, H, 1, D, grad=False), **caches, "lengths": torch.arange(4, 4 + B, dtype=torch.int32)}


SMOOTH = {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 3.0, "temperature": 1.5}
# op, tensors, options
CALLS = {
    "layer_norm": (gk.layer_norm, lambda: norm(bias=draw(C)), {}),
    "rms_norm": (gk.rms_norm, norm, {}),
    "add_layer_norm": (gk.add_layer_norm, lambda: norm(residual=draw(B, T, C, seed=8), bias=draw(C)), {}),
    "add_rms_norm": (gk.add_rms_norm, lambda: norm(residual=draw(B, T, C, seed=8)), {}),
    "rope": (gk.rope, rope, {"rotary_dim": D}),
    "attention": (gk.attention, lambda: {**heads(), "sinks": draw(H)}, {"window": 3, "return_lse": True}),
    "attention, padded": (
        gk.attention,
        lambda: {**heads(), "key_start": torch.arange(B, dtype=torch.int32) % 4},
        {"softcap": 4.0},
    ),
    "attention, slopes": (gk.attention, lambda: {**heads(H), "alibi_slopes": draw(B, H, grad=False).abs()}, {}),
    "attention, documents": (
        gk.attention,
        lambda: (
            {name: x[0].transpose(0, 1).detach().requires_grad_() for name, x in heads().items()}
            | {"cu_seqlens": torch.tensor([0, 3, T], dtype=torch.int32)}
        ),
        {"return_lse": True},
    ),
    "decode_attention": (gk.decode_attention, decode, {}),
    "mlp": (gk.mlp, mlp, {}),
    "gated_mlp": (gk.gated_mlp, gated_mlp, {}),
    "loss": (gk.linear_cross_entropy, loss, {}),
    "loss, sum": (gk.linear_cross_entropy, loss, {"reduction": "sum", **SMOOTH, "return_z_loss": True}),
    "loss, none": (gk.linear_cross_entropy, loss, {"reduction": "none", **SMOOTH}),
    "loss, smooth": (gk.linear_cross_entropy, loss, SMOOTH),
    "loss, weights": (
        gk.linear_cross_entropy,
        lambda: {**loss(), "class_weight": draw(V, grad=False).abs()},
        {"label_smoothing": 0.1},
    ),
    "log_probs": (gk.linear_log_probs, loss, {"temperature": 0.7}),
    **{
        f"kl_div, {reduction}": (gk.linear_kl_div, distilled, {"reduction": reduction, "temperature": 2.0})
        for reduction in ("mean", "sum", "none")
    },
}


def usual(name: str) -> list[dict[str, Placement]]:
    """Placements of a call's tensors: those that strategies are for, and some that nothing is for. Others: R"""
    norms = [{"x": Shard(d), "residual": Shard(d)} for d in range(3)]
    kind = name.partition(",")[0]
    if kind in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"):
        return [*norms, {"x": Shard(1)}, {"x": Partial(), "weight": Shard(0)}]
    if kind == "rope":
        cuts = [dict.fromkeys(("q", "k"), Shard(d)) for d in range(4)]
        return [*cuts, {"q": Shard(1)}, {"q": Shard(2), "k": Shard(2), "cos": Shard(0), "sin": Shard(0)}]
    if kind in ("attention", "decode_attention"):
        names = ("q", "k", "v", "k_cache", "v_cache")
        by_heads = {**dict.fromkeys(names, Shard(1)), "sinks": Shard(0), "alibi_slopes": Shard(1)}
        by_rows = {**dict.fromkeys(names, Shard(0)), "alibi_slopes": Shard(0), "key_start": Shard(0)}
        return [by_heads, by_rows, dict.fromkeys(names, Shard(2)), {"q": Shard(1)}, {"v": Shard(2), "k": Shard(0)}]
    if kind in ("mlp", "gated_mlp"):
        first = dict.fromkeys(("fc_weight", "fc_bias", "gate_weight", "gate_bias", "up_weight", "up_bias"), Shard(0))
        columns = {**first, "proj_weight": Shard(1), "down_weight": Shard(1)}
        return [columns, {**columns, "x": Shard(1)}, {**columns, "residual": Shard(1)}, *norms, {"x": Partial()}]
    rows = [{"x": Shard(d), "targets": Shard(d), "teacher_x": Shard(d)} for d in range(2)]
    return [{"weight": Shard(0), "bias": Shard(0)}, {"weight": Shard(0)}, *rows, {"x": Shard(2), "weight": Shard(1)}]


def distributed(x: Tensor, mesh: DeviceMesh, placements: list[Placement]):
    """Of what all ranks have alike; a partial one has it on the first rank"""
    if not any(placement.is_partial() for placement in placements):
        return distribute_tensor(x.detach(), mesh, placements, src_data_rank=None).requires_grad_(x.requires_grad)
    local = x.detach() if not any(mesh.get_coordinate()) else torch.zeros_like(x)
    return DTensor.from_local(local, mesh, placements, run_check=False).requires_grad_(x.requires_grad)


def compare(name: str, mesh: DeviceMesh, placements: dict[str, list[Placement]]) -> None:
    op, make, options = CALLS[name]
    plain = make()
    tensors = {key: distributed(x, mesh, placements[key]) for key, x in plain.items()}
    expected, found = (as_tuple(op(**values, **options)) for values in (plain, tensors))
    cotangents = [draw(*x.shape, seed=11, grad=False) for x in expected]
    truths = as_tuple(op_in_double(op, plain, options))
    for number, (a, b, truth) in enumerate(zip(found, expected, truths, strict=True)):
        check(f"{name}, output {number}, {placements}", a.full_tensor(), truth, b)
    wanted = [key for key, x in plain.items() if x.requires_grad]
    pairs = [(a, b, c) for a, b, c in zip(found, expected, cotangents, strict=True) if b.requires_grad]
    if not wanted:
        return
    sum((b * c).sum() for _, b, c in pairs).backward()
    for a, _, c in pairs:
        a.backward(distributed(c, mesh, [R] * mesh.ndim), retain_graph=True)
    for key in wanted:
        got, right = tensors[key].grad.full_tensor(), plain[key].grad
        allowed = 1e-5 * float(right.abs().max()) + 1e-7
        assert float((got - right).abs().max()) <= allowed, f"{name}, gradient of {key}, {placements}"


def op_in_double(op, tensors: dict[str, Tensor], options: dict):
    """The op's own answer is the truth here: it is checked elsewhere."""
    with torch.no_grad():
        return tuple(x.double() for x in as_tuple(op(**tensors, **options)))


def as_tuple(x) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def every_placement(name: str) -> int:
    """On one dimension of all processes -> how many there were"""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    _, make, _ = CALLS[name]
    tensors, number = make(), 0
    for case in [{}, *usual(name)]:
        chosen = {key: [case.get(key, R)] for key in tensors}
        if any(isinstance(p, Shard) and p.dim >= tensors[key].ndim for key, (p,) in chosen.items()):
            continue
        compare(name, mesh, chosen)
        number += 1
    return number


def two_dimensions(name: str) -> None:
    """Rows on one dimension of the mesh, all placements of the first case on the other"""
    size = dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    _, make, _ = CALLS[name]
    tensors = make()
    first = usual(name)[0]
    rows = {"x", "residual", "targets", "q", "k", "v", "k_cache", "v_cache", "lengths", "key_start"}
    packed = "cu_seqlens" in tensors
    of_rows = {key: Shard(0) for key in tensors if key in rows and not packed}
    if tensors.get("alibi_slopes") is not None:
        of_rows["alibi_slopes"] = Shard(0)
    compare(name, mesh, {key: [of_rows.get(key, R), first.get(key, R)] for key in tensors})


def moves_nothing(name: str, placements: dict[str, Placement]) -> list[str]:
    """-> the placements of the results, with no collective in the call"""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    op, make, options = CALLS[name]
    tensors = {key: distributed(x, mesh, [placements.get(key, R)]) for key, x in make().items()}
    with CommDebugMode() as moved:
        results = as_tuple(op(**tensors, **options))
    assert moved.get_total_counts() == 0
    return [str(x.placements[0]) for x in results]


def gradient_of_weight() -> str:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {key: distributed(x, mesh, [Shard(1) if key == "x" else R]) for key, x in norm().items()}
    y = gk.rms_norm(**tensors)
    y.backward(distributed(torch.ones(B, T, C), mesh, [Shard(1)]))
    return str(tensors["weight"].grad.placements[0])


def dropped(placement: Placement, seed: int) -> list[Tensor]:
    """-> a rank's part of what add_layer_norm kept, and of what attention gave"""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(seed * dist.get_rank())
    x, zero, weight = torch.ones(B, T, C), torch.zeros(B, T, C), torch.ones(C)
    placed = [distributed(each, mesh, [p]) for each, p in ((x, placement), (zero, placement), (weight, R))]
    _, h = gk.add_layer_norm(*placed, dropout=0.5)
    qkv = (distributed(each.detach(), mesh, [placement]) for each in heads().values())
    return [h.to_local(), gk.attention(*qkv, dropout=0.5).to_local()]


def refused(name: str) -> str:
    """One call that no placement makes right, by its name -> what it says"""
    size = dist.get_world_size()
    mesh, other = (dist.init_device_mesh("cpu", shape) for shape in ((size,), (2, size // 2)))
    q, k, v = (distributed(x.detach(), mesh, [R]) for x in heads().values())
    calls = {
        "another mesh": lambda: gk.attention(q, k, distributed(draw(B, HKV, T, D, grad=False), other, [R, R])),
        "a plain one": lambda: gk.attention(q, k, draw(B, HKV, T, D)),
        "one vocabulary, twice": lambda: gk.linear_cross_entropy(
            *(distributed(x.detach(), other, [p, p]) for x, p in zip(loss().values(), (R, Shard(0), R), strict=False))
        ),
        "no heads": lambda: gk.attention(*(distributed(draw(T, D, grad=False), mesh, [R]) for _ in range(3))),
        "its own error": lambda: gk.attention(q, k, v, window=0),
    }
    try:
        calls[name]()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


LOSSES = [
    {},
    {"reduction": "none"},
    {"z_loss": 0.01, "softcap": 3.0, "temperature": 1.5},
    {"label_smoothing": 0.2, "reduction": "sum", "return_z_loss": True, "z_loss": 0.1},
    {"ignore_index": 0},
]


def leaving_logits(chunk: Chunk, options: Options) -> None:
    """As the kernels do without a gradient"""
    eager.chunk_loss(chunk if options.with_grad else chunk._replace(logits=chunk.logits.clone()), options)


def losses_of_parts(backend: str, arch: int = 90) -> None:
    """Of a cut vocabulary with a backend whose kernels know only whole ones, against the op"""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    known = types.SimpleNamespace(chunk_loss=leaving_logits)
    kernels = mock.patch.object(vocabulary, "select", return_value=known)
    for options in LOSSES:
        plain = loss()
        plain["targets"] = plain["targets"].clamp(min=options.get("ignore_index", -100))
        cuts = {"weight": [Shard(0)], "bias": [Shard(0)]}
        tensors = {key: distributed(x, mesh, cuts.get(key, [R])) for key, x in plain.items()}
        with kernels if backend == "any" else simulator.use(arch):
            choice = {} if backend == "any" else {"backend": backend}
            found = as_tuple(gk.linear_cross_entropy(**tensors, **options, **choice))[0]
            found.sum().backward()
        expected = as_tuple(gk.linear_cross_entropy(**plain, **options))[0]
        expected.sum().backward()
        torch.testing.assert_close(found.full_tensor(), expected)
        for key in ("x", "weight", "bias"):
            torch.testing.assert_close(tensors[key].grad.full_tensor(), plain[key].grad, msg=f"{key}, {options}")


def whole(placement: Placement) -> Placement:
    return placement if isinstance(placement, Shard) else R


def is_caught(bug: str) -> bool:
    """Whether an op with this mistake is told from the right one"""
    patches = {
        "the residual on every rank": (sharding.Once, "apply", lambda x: x),
        "no partial gradients": (sharding.Call, "gradient", lambda call, placement, strategy: whole(placement)),
        "every rank's own mean": (sharding, "mean_loss", lambda op, local, groups: op(**local)),
    }
    with mock.patch.object(*patches[bug]):
        try:
            for name in ("mlp", "rms_norm", "loss"):
                every_placement(name)
        except AssertionError:
            return True
    return False
