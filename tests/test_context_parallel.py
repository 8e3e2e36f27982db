"""Context parallelism: attention of a sequence cut between 2, 4 and 8 processes is that of one, to the gradient, and
what travels is what the formulas say, to the byte."""

from functools import cache

import numpy as np
import pytest
import torch
from conftest import Where
from context_cases import FAULTS, SHAPE, split_case, tensors_of
from gang import Gang
from parity import check

from gptkernels import parity
from gptkernels.ops.attention import reference
from gptkernels.ops.attention.visibility import sides, visible
from gptkernels.ops.dropout import draw_seed
from gptkernels.parallel.layout import Layout, plan_of

BANDED = [
    {"window": 8},
    {"window": 8, "dtype": "bfloat16"},
    {"window": 1},
    {"window": 20, "layout": "zigzag"},
    {"window": 30, "kv_heads": 1},
    {"window": 33, "layout": "zigzag", "dtype": "bfloat16"},
    {"window": 5, "causal": False},
    {"window": (9, 4), "causal": False, "layout": "zigzag"},
    {"window": (0, 7), "causal": False},
    {"window": (7, 0), "causal": False},
    {"window": 12, "softcap": 5.0, "return_lse": True, "sinks": True},
    {"window": 12, "slopes": (2, 4), "layout": "zigzag"},
    {"window": (6, 6), "causal": False, "slopes": (4,)},
    {"window": 10, "key_start": [0, 37]},
    {"window": 10, "cu_seqlens": [0, 5, 32, 32, 61, 64]},
    {"window": 10, "cu_seqlens": [0, 3, 18, 50, 64], "causal": False, "slopes": (4, 4), "return_lse": True},
    {"window": 10, "cu_seqlens": [0, 9, 50, 64], "layout": "zigzag", "sinks": True},
    {"window": 20, "dropout": 0.4},
    {"window": 10, "cu_seqlens": [0, 9, 50, 64], "layout": "zigzag", "dropout": 0.4},
]
DENSE = [
    {},
    {"dtype": "bfloat16"},
    {"layout": "zigzag"},
    {"causal": False},
    {"causal": False, "slopes": (2, 4)},
    {"layout": "zigzag", "softcap": 5.0, "return_lse": True, "sinks": True, "key_start": [3, 50]},
    {"window": (None, 5), "causal": False, "layout": "zigzag"},
    {"window": (5, -1), "causal": False},
    {"window": 64},
    {"dropout": 0.4, "layout": "zigzag", "key_start": [0, 20]},
    {"cu_seqlens": [0, 40, 64], "layout": "zigzag"},
    {"cu_seqlens": [0, 7, 9, 64], "causal": False, "dtype": "bfloat16"},
]
RING = [
    {},
    {"dtype": "bfloat16", "layout": "zigzag"},
    {"causal": False, "kv_heads": 1, "dropout": 0.4},
    {"layout": "zigzag", "softcap": 5.0, "return_lse": True, "sinks": True, "key_start": [3, 50]},
]
CASES = [case | {"seed": number} for number, case in enumerate(BANDED + DENSE)]
RING = [case | {"method": "ring", "seed": number} for number, case in enumerate(RING)]
SIZES = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def gangs():
    """size -> a gang of it, started when it is first wanted"""
    found = {}

    @cache
    def of_size(size: int) -> Gang:
        found[size] = Gang(size)
        return found[size]

    yield of_size
    for gang in found.values():
        gang.close()


def whole(shards: list[np.ndarray], dim: int, layout: Layout) -> torch.Tensor:
    tokens = shards[0].shape[dim]
    pieces = {}
    for rank, shard in enumerate(shards):
        at = 0
        for start, stop in layout.spans(rank, tokens):
            pieces[start] = np.take(shard, range(at, at + stop - start), axis=dim)
            at += stop - start
    return torch.from_numpy(np.concatenate([pieces[start] for start in sorted(pieces)], axis=dim))


def assert_equals_one_process(case: dict, size: int, ranks: list[dict]) -> None:
    shape, _ = split_case(case)
    leaves, options, cotangents = tensors_of(case)
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    layout, packed = Layout(size, shape["layout"]), "cu_seqlens" in options
    for name, (truth, ordinary) in expected(leaves, options, cotangents, shape["seed"]).items():
        found = [rank["tensors"][name] for rank in ranks]
        if name == "sinks":
            value = torch.from_numpy(np.sum(found, axis=0, dtype=np.float32))
        else:
            value = whole(found, (0 if packed else 2) if name != "output 1" else -1, layout)
        check(f"{case}: {name} of {size}", value.to(ordinary.dtype), truth, ordinary)


def expected(leaves, options, cotangents, seed):
    """-> by name: in float64, and as the reference has it in the dtypes of the leaves"""
    if options.get("dropout"):
        torch.manual_seed(seed)
        options = {**options, "seed": draw_seed(torch.device("cpu"))}
    found = []
    for dtype in (torch.float64, None):
        given = parity.converted(leaves, dtype, "cpu")
        outputs, grads = parity.run(reference.attention, given, cotangents, **options)
        found.append({f"output {i}": x.detach() for i, x in enumerate(outputs)} | grads)
    return {name: (truth, found[1][name]) for name, truth in found[0].items()}


def assert_sends_what_is_seen(case: dict, size: int, ranks: list[dict]) -> None:
    """Forward, each key goes once to each rank with a query that sees it and does not have it; backward, its gradient
    comes back."""
    shape, options = split_case(case)
    tokens, spans = (
        shape["tokens"],
        [Layout(size, shape["layout"]).spans(r, shape["tokens"] // size) for r in range(size)],
    )
    seen = visible(tokens, tokens, options.get("causal", True), options.get("window"))
    if "cu_seqlens" in options:
        number = torch.bucketize(torch.arange(tokens), torch.tensor(options["cu_seqlens"][1:]), right=True)
        seen &= number.unsqueeze(0) == number.unsqueeze(1)
    of_rank = [[token for span in own for token in range(*span)] for own in spans]
    needed = [seen[own].any(0) for own in of_rank]
    batch = 1 if "cu_seqlens" in options else shape["batch"]
    itemsize = getattr(torch, shape["dtype"]).itemsize
    key = 2 * batch * shape["kv_heads"] * shape["size"] * itemsize
    pairs = [[0 if a == b else int(needed[b][of_rank[a]].sum()) for b in range(size)] for a in range(size)]
    for rank, found in enumerate(ranks):
        sent, returned = pairs[rank], [pairs[other][rank] for other in range(size)]
        for count, keys in ((found["forward"], sent), (found["backward"], returned)):
            assert count.get("point_to_point", 0) == key * sum(keys), (case, size, rank)
            assert count.get("messages", 0) == sum(n > 0 for n in keys)
            assert set(count) <= {"point_to_point", "messages"}


def assert_sends_all(case: dict, size: int, ranks: list[dict]) -> None:
    shape, _ = split_case(case)
    itemsize = getattr(torch, shape["dtype"]).itemsize
    whole = 2 * shape["batch"] * shape["tokens"] * shape["kv_heads"] * shape["size"] * itemsize
    for found in ranks:
        assert found["forward"] == {"all_gather": whole * (size - 1) // size}
        assert found["backward"] == {"all_to_all": whole * (size - 1) // size}


def assert_sends_around(case: dict, size: int, ranks: list[dict]) -> None:
    """A ring passes on as much as a gather brings; backward again, and the sums in float32, which come home besides."""
    shape, _ = split_case(case)
    shard = 2 * shape["batch"] * shape["tokens"] // size * shape["kv_heads"] * shape["size"]
    keys = shard * getattr(torch, shape["dtype"]).itemsize * (size - 1)
    for found in ranks:
        assert found["forward"] == {"point_to_point": keys, "messages": size - 1}
        assert found["backward"] == {"point_to_point": keys + shard * 4 * size, "messages": 2 * size - 1}


def is_banded(case: dict) -> bool:
    left, right = sides(case.get("causal", True), case.get("window"))
    inside = [side is not None and side < SHAPE["tokens"] - 1 for side in (left, right)]
    return all(inside) or "cu_seqlens" in case


@pytest.mark.parametrize("size", SIZES)
def test_attention_equals_one_process(gangs, size):
    cases = CASES + RING
    ranks = gangs(size).run("context_cases:attention_of_shards", cases)
    for number, case in enumerate(cases):
        found = [rank[number] for rank in ranks]
        assert_equals_one_process(case, size, found)
        if size == 1:
            assert all(not rank["forward"] and not rank["backward"] for rank in found)
        elif "method" in case:
            assert_sends_around(case, size, found)
        elif is_banded(case):
            assert_sends_what_is_seen(case, size, found)
        else:
            assert_sends_all(case, size, found)


@pytest.mark.parametrize("window", [2, 9, 16])
def test_a_band_costs_its_keys_and_no_more(gangs, window):
    """2 B (w - 1) Hkv D elements from each rank to the next one, in one message; and the gradients back"""
    case = {"window": window, "dtype": "bfloat16", "kv_heads": 1}
    ranks = gangs(4).run("context_cases:attention_of_shards", [case])
    band = {"point_to_point": 2 * 2 * (window - 1) * 1 * 16 * 2, "messages": 1}
    assert [rank[0]["forward"] for rank in ranks] == [band, band, band, {}]
    assert [rank[0]["backward"] for rank in ranks] == [{}, band, band, band]


def test_documents_that_end_with_shards_send_nothing(gangs):
    case = {"window": 9, "cu_seqlens": [0, 16, 32, 48, 64]}
    for rank in gangs(4).run("context_cases:attention_of_shards", [case]):
        assert rank[0]["forward"] == rank[0]["backward"] == {}


KERNELS = [
    {"window": (5, 3), "causal": False, "dropout": 0.4},
    {"window": (5, 3), "causal": False},
    {"window": 9, "layout": "zigzag", "return_lse": True},
    {"layout": "zigzag", "sinks": True},
    {"method": "ring", "layout": "zigzag"},
    {"window": 10, "cu_seqlens": [0, 9, 50, 64]},
    {"window": 10, "key_start": [0, 37]},
]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_take_parts_of_shards(gangs, backend):
    Where("simulator", 90).require(backend)
    # Triton compiles anew for each kind of mask, which takes long: only the one with queries of nothing.
    kinds = KERNELS[1:] if backend == "cuda" else KERNELS[:1]
    cases = [case | {"backend": backend, "dtype": "bfloat16", "seed": n} for n, case in enumerate(kinds)]
    ranks = gangs(2).run("context_cases:simulated_attention", cases, timeout_s=240)
    for number, case in enumerate(cases):
        assert_equals_one_process(case, 2, [rank[number] for rank in ranks])


@pytest.mark.parametrize("fault", FAULTS)
def test_bugs_are_caught(gangs, fault):
    case = {"window": 9}
    ranks = [rank[0] for rank in gangs(4).run("context_cases:attention_with", fault, [case])]
    with pytest.raises(parity.ParityError):
        assert_equals_one_process(case, 4, ranks)
    if fault == "halo_one_short":
        with pytest.raises(AssertionError):
            assert_sends_what_is_seen(case, 4, ranks)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_zigzag_gives_every_rank_as_much(size):
    """Of the key blocks that the causal mask of a long sequence visits"""
    tokens, block = 8192, 128

    def visited(rank: int, kind: str) -> int:
        plan = plan_of(Layout(size, kind), rank, tokens // size, (0, tokens), None, 0)
        rows = [row for part in plan.parts for row in range(*part.queries, block)]
        return sum(-(-(row + block) // block) for row in rows)

    assert max(visited(r, "zigzag") for r in range(size)) - min(visited(r, "zigzag") for r in range(size)) <= 1
    assert visited(size - 1, "contiguous") > 1.4 * visited(0, "contiguous")
