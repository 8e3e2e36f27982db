"""flash-attn's functions against attention written out. (flash-attn's own tests run on them too, imported in place of
flash_attn's.)"""

import math

import pytest
import torch
from torch import Tensor

import gptkernels as gk
from gptkernels import flash_attn

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "left": {"window_size": (7, -1)},
    "both sides": {"window_size": (5, 3)},
    "causal window": {"causal": True, "window_size": (9, 4)},
    "softcap": {"softcap": 3.0, "causal": True},
    "scaled": {"softmax_scale": 0.3, "softcap": -1.0},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]), "causal": True},
}


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
) -> tuple[Tensor, Tensor]:
    """q: (B, Tq, H, D), k, v: (B, Tk, Hkv, D) -> out, weights: (B, H, Tq, Tk)"""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or 1 / math.sqrt(q.shape[-1]))
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    ahead = torch.arange(k.shape[1]) - torch.arange(q.shape[1]).unsqueeze(1) - (k.shape[1] - q.shape[1])
    if alibi_slopes is not None:
        slopes = alibi_slopes if alibi_slopes.ndim == 2 else alibi_slopes.unsqueeze(0)
        scores = scores - slopes[..., None, None] * ahead.abs()
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if left >= 0:
        hidden = hidden | (ahead < -left)
    if right >= 0:
        hidden = hidden | (ahead > right)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), weights


def heads(*sizes: int) -> Tensor:
    return torch.randn(*sizes, requires_grad=True)


def assert_same(found: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn_like(expected)
    grads = [torch.autograd.grad(out, leaves, cotangent, retain_graph=True) for out in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_func(name):
    q, k, v = heads(2, 20, 4, 24), heads(2, 33, 2, 24), heads(2, 33, 2, 24)
    expected, _ = written_out(q, k, v, **OPTIONS[name])
    assert_same(flash_attn.flash_attn_func(q, k, v, **OPTIONS[name]), expected, (q, k, v))
    kv = torch.stack((k, v), 2)
    assert_same(flash_attn.flash_attn_kvpacked_func(q, kv, deterministic=True, **OPTIONS[name]), expected, (q, k, v))
    out, lse, weights = flash_attn.flash_attn_func(q, k, v, 0.0, return_attn_probs=True, **OPTIONS[name])
    assert_same(out, expected, (q, k, v))
    assert lse.shape == (2, 4, 20)
    assert weights is None


def test_qkvpacked_in_the_order_of_flash_attn_s_arguments():
    qkv = heads(2, 20, 3, 4, 24)
    expected, _ = written_out(*qkv.unbind(2), 0.4, True, (6, 0), 2.0, OPTIONS["alibi"]["alibi_slopes"])
    found = flash_attn.flash_attn_qkvpacked_func(qkv, 0.0, 0.4, True, (6, 0), 2.0, OPTIONS["alibi"]["alibi_slopes"])
    assert_same(found, expected, (qkv,))
    assert found.is_contiguous()


@pytest.mark.parametrize("name", OPTIONS)
def test_varlen(name):
    bounds, key_bounds = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 5, 25], [0, 11, 14, 30]))
    q, kv = heads(25, 4, 16), heads(30, 2, 2, 16)
    documents = [slice(*bounds[n : n + 2].tolist()) for n in range(3)]
    of_keys = [slice(*key_bounds[n : n + 2].tolist()) for n in range(3)]
    expected = torch.cat(
        [
            written_out(q[a].unsqueeze(0), *kv[b].unsqueeze(0).unbind(2), **OPTIONS[name])[0][0]
            for a, b in zip(documents, of_keys, strict=True)
        ]
    )
    arguments = bounds, key_bounds, 20, 16
    found = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *arguments, **OPTIONS[name])
    assert_same(found, expected, (q, kv))
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q, *kv.unbind(1), *arguments, return_attn_probs=True, **OPTIONS[name]
    )
    assert_same(out, expected, (q, kv))
    assert lse.shape == (4, 25)
    # The keys in pages of 8, in any order
    table = torch.tensor([[5, 1], [0, 7], [3, 2]], dtype=torch.int32)
    pages = torch.full((8, 8, 2, 2, 16), torch.nan)
    for n, b in enumerate(of_keys):
        for place, token in enumerate(range(b.start, b.stop)):
            pages[table[n, place // 8], place % 8] = kv[token].detach()
    found = flash_attn.flash_attn_varlen_func(q, *pages.unbind(2), *arguments, **OPTIONS[name], block_table=table)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    qkv = heads(25, 3, 4, 16)
    found = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, bounds, 20, **OPTIONS[name])
    expected = torch.cat([written_out(*qkv[a].unsqueeze(0).unbind(2), **OPTIONS[name])[0][0] for a in documents])
    assert_same(found, expected, (qkv,))


def test_weights_tell_what_was_dropped():
    """As flash-attn's tests make probabilities of them, which give the output."""
    q, k, v = heads(2, 70, 4, 100), heads(2, 70, 4, 100), heads(2, 70, 4, 100)
    out, lse, weights = flash_attn.flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 10
    scores = scores.masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf)
    peaks = torch.stack([block.amax(-1) for block in scores.split(32, -1)], -1).flip(-1).cummax(-1).values.flip(-1)
    largest = peaks.repeat_interleave(32, -1)[..., :70]
    probabilities = weights.abs() * (largest - lse.unsqueeze(-1)).exp()
    torch.testing.assert_close(probabilities, written_out(q, k, v, causal=True)[1], rtol=1e-3, atol=1e-5)
    kept = probabilities * (weights >= 0) / 0.7
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", kept, v), rtol=1e-3, atol=1e-5)
    assert 0.2 < (weights < 0).sum() / (weights != 0).sum() < 0.4
    qkv, bounds = torch.stack((q, k, v), 2).flatten(0, 1), torch.tensor([0, 60, 140], dtype=torch.int32)
    out, _, weights = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, bounds, 80, 0.3, return_attn_probs=True)
    assert weights.shape == (2, 4, 80, 80)
    assert not weights[0, :, 60:].any()


CACHES = {
    "decode": {"tokens": 1},
    "several": {"tokens": 3, "causal": True},
    "both ways": {"tokens": 3},
    "many": {"tokens": 20, "causal": True},
    "window": {"tokens": 1, "window_size": (6, 2)},
    "causal window": {"tokens": 4, "causal": True, "window_size": (20, 0)},
    "two-sided window of several": {"tokens": 4, "window_size": (6, 2)},
    "alibi": {"tokens": 2, "causal": True, "alibi_slopes": torch.rand(2, 4)},
    "softcap": {"tokens": 2, "causal": True, "softcap": 2.0},
    "scaled": {"tokens": 1, "softmax_scale": 0.1},
}


@pytest.mark.parametrize("layout", ["rows", "chosen rows", "pages", "padded", "appended", "rotated"])
@pytest.mark.parametrize("name", CACHES)
def test_kvcache(name, layout):
    options = dict(CACHES[name])
    tokens, capacity = options.pop("tokens"), 48
    q, caches = torch.randn(2, tokens, 4, 32), torch.randn(2, 2, capacity, 2, 32)
    lengths, starts = torch.tensor([21, 24], dtype=torch.int32), [0, 0]
    arguments = {"cache_seqlens": lengths}
    stored = caches.clone()
    if layout == "chosen rows":
        rows = torch.tensor([4, 1])
        stored = torch.randn(2, 5, capacity, 2, 32)
        stored[:, rows] = caches
        arguments["cache_batch_idx"] = rows.int()
    if layout == "pages":
        table = torch.tensor([[3, 0, 7], [6, 2, 1]])
        stored = torch.randn(2, 8, 16, 2, 32)
        stored[:, table] = caches.unflatten(2, (3, 16))
        arguments["block_table"] = table.int()
    if layout == "padded":
        starts = [3, 11]
        arguments["cache_leftpad"] = torch.tensor(starts, dtype=torch.int32)
    new, turned = torch.randn(2, 2, 5, 2, 32), q
    ends = lengths.tolist()
    if layout in ("appended", "rotated"):
        arguments |= {"k": new[0], "v": new[1]}
        ends = [end + 5 for end in ends]
    inserted = new.clone()
    if layout == "rotated":
        angles = torch.rand(capacity + 20, 8) * 6
        arguments |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
        follow = options.get("causal") or "window_size" in options
        turned = torch.stack([turn(q[b], angles, int(lengths[b]), follow) for b in range(2)])
        inserted[0] = torch.stack([turn(new[0, b], angles, int(lengths[b]), True) for b in range(2)])
    before = stored.clone()
    found = flash_attn.flash_attn_with_kvcache(q, *stored, **arguments, **options)
    for b in range(2):
        seen = caches[:, b : b + 1, starts[b] : ends[b]].clone()
        if "k" in arguments:
            seen[:, :, -5:] = inserted[:, b : b + 1]
            torch.testing.assert_close(stored[:, b, ends[b] - 5 : ends[b]], inserted[:, b])
        of_row = {n: x[b : b + 1] if n == "alibi_slopes" else x for n, x in options.items()}
        expected, _ = written_out(turned[b : b + 1], *seen, **of_row)
        torch.testing.assert_close(found[b : b + 1], expected, rtol=1e-4, atol=1e-5)
    if "k" not in arguments:
        assert torch.equal(stored, before)
        out, lse = flash_attn.flash_attn_with_kvcache(q, *stored, **arguments, **options, return_softmax_lse=True)
        torch.testing.assert_close(out, found, rtol=1e-4, atol=1e-5)
        assert lse.shape == (2, 4, tokens)


def turn(x: Tensor, angles: Tensor, start: int, follow: bool) -> Tensor:
    """x: (T, H, D), of which the first 16 dimensions are rotated, neighbours together"""
    position = start + torch.arange(len(x)) * follow
    cos, sin = angles[position].cos().unsqueeze(1), angles[position].sin().unsqueeze(1)
    one, two = x[..., :16:2], x[..., 1:16:2]
    return torch.cat((torch.stack((one * cos - two * sin, two * cos + one * sin), -1).flatten(-2), x[..., 16:]), -1)


def test_one_length_for_all_rows():
    q, caches = torch.randn(2, 1, 4, 32), torch.randn(2, 2, 30, 2, 32)
    found = flash_attn.flash_attn_with_kvcache(q, *caches, cache_seqlens=12)
    torch.testing.assert_close(found, written_out(q, *caches[:, :, :12])[0], rtol=1e-4, atol=1e-5)
    found = flash_attn.flash_attn_with_kvcache(q, *caches)
    torch.testing.assert_close(found, written_out(q, *caches)[0], rtol=1e-4, atol=1e-5)


Q, CACHE, LENGTHS = torch.randn(2, 1, 4, 32), torch.randn(2, 30, 2, 32), torch.tensor([5, 30], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": CACHE[:, :1]}, ValueError, "k and v must be given both"),
        ({"k": CACHE[:, :1], "v": CACHE[:, :1]}, RuntimeError, "cache_seqlens must leave room .*block_table"),
        ({"rotary_cos": torch.ones(9, 8)}, ValueError, "rotary_cos and rotary_sin must be given both"),
        (
            {"rotary_cos": torch.ones(9, 8), "rotary_sin": torch.ones(9, 8)},
            ValueError,
            "k must be given with rotary_cos",
        ),
        ({"cache_seqlens": LENGTHS + 1}, ValueError, "cache_seqlens must leave room"),
        ({"q": Q[:1]}, ValueError, "k_cache must have shape"),
        ({"q": Q[0]}, ValueError, "q must have 4 dimensions"),
        (
            {"cache_batch_idx": LENGTHS, "block_table": LENGTHS.view(2, 1)},
            gk.UnsupportedError,
            "cache_batch_idx and block_table do not go together",
        ),
    ],
)
def test_bad_input(change, error, words):
    good = {"q": Q, "k_cache": CACHE.clone(), "v_cache": CACHE.clone(), "cache_seqlens": LENGTHS}
    with pytest.raises(error, match=words):
        flash_attn.flash_attn_with_kvcache(**{**good, **change})
