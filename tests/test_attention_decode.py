"""Decoding against the reference and against attention over the whole sequence."""

from unittest import mock

import pytest
import torch
from parity import assert_parity

from gptkernels.ops.attention import attention, decode_attention, reference

BACKENDS = ["eager", "triton"]


def make(where, batch, heads, kv_heads, tokens, capacity, head_size=64, dtype=torch.float16):
    """q: (B, H, Tq, D), k_cache, v_cache: (B, Hkv, capacity, D)"""
    q = torch.randn(batch, heads, tokens, head_size)
    k_cache, v_cache = torch.randn(2, batch, kv_heads, capacity, head_size)
    return {name: x.to(where.device, dtype) for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache))}


def lengths_of(where, *values):
    return torch.tensor(values, dtype=torch.int32, device=where.device)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "capacity", "window", "lengths"),
    [
        (2, 2, 1, 200, None, (1, 77, 200)),
        (4, 2, 4, 200, None, (2, 78, 200)),
        (8, 1, 16, 300, None, (0, 300, 16)),
        (2, 1, 1, 300, 50, (20, 299, 300)),
        (2, 1, 1, 64, 64, (30, 64, 1001)),
        (2, 1, 3, 66, 64, (2, 66, 1001)),
        (2, 1, 2, 100, 200, (1, 50, 100)),
        (2, 1, 5, 300, 1, (3, 299, 777)),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decode(where, backend, heads, kv_heads, tokens, capacity, window, lengths):
    where.require(backend)
    for dtype in (torch.bfloat16, torch.float32) if where.arch == 90 else (torch.float16,):
        tensors = make(where, 3, heads, kv_heads, tokens, capacity, dtype=dtype)
        tensors["lengths"] = lengths_of(where, *lengths)
        kwargs = {"window": window, "scale": 0.2}
        assert_parity(
            lambda **a: decode_attention(**a, backend=backend),
            reference.decode_attention,
            tensors,
            kwargs=kwargs,
        )


def paged(where, tensors, page, spare=2):
    """-> k_cache and v_cache cut into pages in any order, pages that hold NaN among them, and their block_table"""
    batch, kv_heads, capacity, size = tensors["k_cache"].shape
    each = -(-capacity // page)
    order = torch.randperm(batch * each + spare)[: batch * each]
    found = dict(tensors)
    for name in ("k_cache", "v_cache"):
        pages = tensors[name].new_full((batch * each + spare, kv_heads, page, size), float("nan"))
        filled = torch.nn.functional.pad(tensors[name], (0, 0, 0, each * page - capacity), value=float("nan"))
        cut = filled.unflatten(2, (each, page)).transpose(1, 2).flatten(0, 1)
        pages[order.to(pages.device)] = cut
        found[name] = pages
    found["block_table"] = order.view(batch, each).int().to(where.device)
    return found


EXTRAS = {
    "sinks": {},
    "softcap": {"softcap": 3.0},
    "both ways": {"causal": False},
    "both ways, banded": {"causal": False, "window": 20},
    "padded": {"key_start": (0, 5, 130)},
    "paged": {"page": 16},
    "paged, banded": {"page": 10, "window": 33},
    "all": {"page": 20, "softcap": 2.0, "key_start": (0, 50, 3), "window": 70},
}


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options(anywhere, backend, name):
    """In one split and several, one token and several."""
    anywhere.require(backend)
    kwargs = dict(EXTRAS[name])
    page, start = kwargs.pop("page", None), kwargs.pop("key_start", None)
    for tokens, capacity, lengths in ((1, 160, (160, 77, 130)), (3, 600, (2, 599, 300))):
        tensors = make(anywhere, 3, 4, 2, tokens, capacity, dtype=torch.bfloat16)
        if page is not None:
            tensors = paged(anywhere, tensors, page)
        if start is not None:
            tensors["key_start"] = lengths_of(anywhere, *start)
        if name in ("sinks", "all"):
            tensors["sinks"] = torch.tensor([0.5, -30.0, 3.0, 7.0], device=anywhere.device)
        tensors["lengths"] = lengths_of(anywhere, *lengths)
        assert_parity(
            lambda **a: decode_attention(**a, backend=backend), reference.decode_attention, tensors, kwargs=kwargs
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_are_the_cache_cut_up(anywhere, backend):
    """Whatever stands in the table behind the last page of a row, and with rows that share pages."""
    anywhere.require(backend)
    tensors, lengths = make(anywhere, 2, 4, 2, 1, 64), lengths_of(anywhere, 17, 40)
    before = decode_attention(**tensors, lengths=lengths, backend=backend)
    cut = paged(anywhere, tensors, 8)
    cut["block_table"][0, 3:], cut["block_table"][1, 5:] = -1, 10**6
    after = decode_attention(**cut, lengths=lengths, backend=backend)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    cut["block_table"] = cut["block_table"][1:].expand(2, -1)
    shared = decode_attention(**cut, lengths=lengths_of(anywhere, 40).expand(2), backend=backend)
    torch.testing.assert_close(shared[1:], after[1:])


def test_wrong_pages_and_options_are_named(anywhere):
    good = {**make(anywhere, 2, 4, 2, 1, 64), "lengths": lengths_of(anywhere, 17, 40)}
    cut = paged(anywhere, good, 8)
    for changes, error, words in (
        ({"block_table": cut["block_table"].long()}, TypeError, "block_table must be int32"),
        ({"block_table": cut["block_table"][0]}, ValueError, "block_table must have 2 dimensions"),
        ({"block_table": cut["block_table"][:1]}, ValueError, r"block_table must have shape \(2, 8\)"),
        ({"block_table": cut["block_table"] + 20}, ValueError, "block_table must have pages of 0 ... 17 in row 0"),
        ({"block_table": cut["block_table"][:, :4]}, ValueError, "lengths must be at most the cache's 32 slots"),
        ({"k_cache": cut["k_cache"][:0], "v_cache": cut["v_cache"][:0]}, ValueError, "k_cache must have pages"),
        ({"sinks": torch.zeros(3, device=anywhere.device)}, ValueError, r"sinks must have shape \(4,\)"),
        ({"softcap": -1}, ValueError, "softcap must be > 0"),
        ({"key_start": cut["lengths"][:1]}, ValueError, r"key_start must have shape \(2,\)"),
        ({"causal": None}, TypeError, "causal must be True or False"),
    ):
        with pytest.raises(error, match=words):
            decode_attention(**{**cut, **changes}, backend="eager")


@pytest.mark.parametrize("head_size", [16, 19, 80, 96, 128, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_sizes(anywhere, backend, head_size):
    anywhere.require(backend)
    tensors = make(anywhere, 2, 2, 1, 2, 90, head_size)
    tensors["lengths"] = lengths_of(anywhere, 41, 90)
    assert_parity(lambda **a: decode_attention(**a, backend=backend), reference.decode_attention, tensors)


@pytest.mark.parametrize(("window", "capacity"), [(None, 60), (20, 60), (20, 20)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_by_token_is_the_whole_sequence(anywhere, backend, window, capacity):
    """A cache filled as generation fills it, a ring included, gives what attention gives over everything at once."""
    anywhere.require(backend)
    q, k, v = (x.to(anywhere.device) for x in torch.randn(3, 1, 2, 60, 64))
    expected = reference.attention(q, k, v, window=window)
    k_cache, v_cache = (torch.full((1, 2, capacity, 64), float("nan"), device=anywhere.device) for _ in range(2))
    for position in range(60):
        k_cache[:, :, position % capacity] = k[:, :, position]
        v_cache[:, :, position % capacity] = v[:, :, position]
        if position in (0, 5, 19, 20, 33, 59):
            token = q[:, :, position : position + 1]
            out = decode_attention(
                token, k_cache, v_cache, lengths_of(anywhere, position + 1), window=window, backend=backend
            )
            torch.testing.assert_close(out, expected[:, :, position : position + 1], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_tokens_in_a_ring(anywhere, backend):
    """A ring of window + Tq - 1 slots serves the oldest of Tq queries; each prompt piece is written first."""
    anywhere.require(backend)
    window, tokens, capacity = 30, 4, 33
    q, k, v = (x.to(anywhere.device) for x in torch.randn(3, 1, 2, 60, 64))
    expected = reference.attention(q, k, v, window=window)
    k_cache, v_cache = (torch.full((1, 2, capacity, 64), float("nan"), device=anywhere.device) for _ in range(2))
    for start in range(0, 60, tokens):
        slots = torch.arange(start, start + tokens) % capacity
        k_cache[:, :, slots], v_cache[:, :, slots] = k[:, :, start : start + tokens], v[:, :, start : start + tokens]
        if start in (0, 28, 32, 56):
            queries = q[:, :, start : start + tokens]
            length = lengths_of(anywhere, start + tokens)
            out = decode_attention(queries, k_cache, v_cache, length, window=window, backend=backend)
            torch.testing.assert_close(out, expected[:, :, start : start + tokens], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_end_of_attention(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 2, 4, 2, 3, 50, dtype=torch.float32)
    out = decode_attention(**tensors, lengths=lengths_of(anywhere, 50, 50), window=7, backend=backend)
    expected = attention(tensors["q"], tensors["k_cache"], tensors["v_cache"], window=7, backend="eager")
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cache_order_and_unused_slots(anywhere, backend):
    """Caches kept as (B, capacity, Hkv, D), and slots beyond a row's length that were never written."""
    anywhere.require(backend)
    tensors = make(anywhere, 2, 4, 2, 1, 150)
    lengths = lengths_of(anywhere, 40, 129)
    before = decode_attention(**tensors, lengths=lengths, backend=backend)
    for name in ("k_cache", "v_cache"):
        cache = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
        cache[0, :, 40:], cache[1, :, 129:] = float("nan"), float("inf")
        tensors[name] = cache
    assert torch.equal(decode_attention(**tensors, lengths=lengths, backend=backend), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_decode(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 2, 2, 1, 1, 0)
    assert bool((decode_attention(**tensors, lengths=lengths_of(anywhere, 0, 0), backend=backend) == 0).all())
    tensors = make(anywhere, 0, 2, 1, 1, 9)
    assert decode_attention(**tensors, lengths=lengths_of(anywhere), backend=backend).shape == (0, 2, 1, 64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_narrow_window_on_both_sides(anywhere, backend):
    anywhere.require(backend)
    tensors = make(anywhere, 2, 2, 1, 8, 90, dtype=torch.bfloat16)
    tensors["lengths"] = lengths_of(anywhere, 41, 90)
    kwargs = {"window": 3, "causal": False}
    assert_parity(
        lambda **a: decode_attention(**a, backend=backend), reference.decode_attention, tensors, kwargs=kwargs
    )


def test_unchecked_pages_and_lengths_reach_nothing_outside(anywhere):
    """Where nobody looks at their values, as on a GPU; the simulator would report it."""
    anywhere.require("triton")
    cut = paged(anywhere, make(anywhere, 2, 4, 2, 1, 64), 8)
    cut["block_table"][0, 2], cut["block_table"][1, 1] = -5, 10**6
    with mock.patch("gptkernels.ops.attention.decode.op.check_values"):
        for window in (None, 30):
            decode_attention(**cut, lengths=lengths_of(anywhere, 40, 10**6), window=window, backend="triton")
