"""The masks that transformers carries around for us, against the masks it makes for SDPA."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from gptkernels.swap import masks
from gptkernels.swap.attention_interface import exact_mask, gptkernels_mask

ROWS, TOKENS = 3, 11
DEVICE = torch.device("cpu")
PATTERNS = {
    "causal": causal_mask_function,
    "sliding": sliding_window_causal_mask_function(4),
    "full": bidirectional_mask_function,
    "full sliding": sliding_window_bidirectional_mask_function(3),
}
# Real tokens of each row, out of TOKENS.
PADDING = {
    "none": [range(0, 11)] * 3,
    "left": [range(0, 11), range(4, 11), range(10, 11)],
    "right": [range(0, 11), range(0, 5), range(0, 1)],
    "both": [range(2, 11), range(3, 6), range(0, 11)],
    "an empty row": [range(0, 11), range(0, 0), range(5, 11)],
    "holes": [[0, 1, 4, 5, 6, 7, 8, 9, 10], range(0, 11), [2, 3, 8, 9, 10]],
}
# queries, slots of the cache, and the slot after the newest key: a dynamic cache is full, a static one is not
CACHES = {"no cache": (11, 11, 11), "grown": (3, 11, 11), "static": (3, 16, 11), "static prefill": (11, 16, 11)}


def padding_of(name: str) -> Tensor:
    mask = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    for row, real in enumerate(PADDING[name]):
        mask[row, list(real)] = True
    return mask


def dense_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0) @ v


# transformers has no cache without causality.
CASES = [(p, c) for p in PATTERNS for c in CACHES if c == "no cache" or not p.startswith("full")]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(("pattern", "cache"), CASES)
def test_every_real_query_sees_what_it_should(pattern, padding, cache):
    queries, keys, end = CACHES[cache]
    real = None if padding == "none" else padding_of(padding)
    sizes = {"q_length": queries, "kv_length": keys, "q_offset": end - queries, "kv_offset": 0}
    arguments = {**sizes, "mask_function": PATTERNS[pattern], "attention_mask": real}
    try:
        made = gptkernels_mask(ROWS, **arguments, device=DEVICE)
    except NotImplementedError:
        # The cases that are refused, and no others.
        banded = "sliding" in pattern
        hidden_in_between = padding == "holes" or (
            pattern == "full sliding" and padding in ("right", "both", "an empty row")
        )
        assert hidden_in_between
        assert banded or queries == TOKENS
        return
    assert masks.is_ours(made)
    mask = masks.read(made)
    expected = sdpa_mask(ROWS, **arguments, allow_is_causal_skip=False, device=DEVICE)
    is_real = torch.ones(ROWS, queries, dtype=torch.bool) if real is None else real[:, end - queries : end]
    seen = masks.visible_keys(mask, ROWS, queries, keys, DEVICE).expand(expected.shape)
    assert torch.equal(seen[:, 0][is_real], expected[:, 0][is_real])
    q, k, v = torch.randn(ROWS, 4, queries, 16), torch.randn(ROWS, 2, keys, 16), torch.randn(ROWS, 2, keys, 16)
    # What lies in unused slots must not matter.
    k[:, :, end:], v[:, :, end:] = torch.nan, torch.nan
    out = masks.attend(q, k, v, mask, scale=None, dropout=0.0, backend="auto")
    k, v = (x.nan_to_num(0).repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(
        out.transpose(1, 2)[is_real], dense_attention(q, k, v, expected).transpose(1, 2)[is_real], rtol=1e-5, atol=1e-5
    )
    assert out.isfinite().all()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("window", "slots", "end"), [(4, 5, 4), (4, 6, 5), (6, 6, 5), (None, 6, 5)])
def test_caches_that_decode_attention_cannot_read_in_place(window, slots, end, gradient):
    """Too few slots for three tokens and a window, or gradients: the cache is brought into order instead."""
    queries = 3
    pattern = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    mask = masks.read(exact_mask(queries, slots, end - queries, 0, pattern, None, DEVICE))
    assert mask.kind == "cache"
    q, k, v = (torch.randn(ROWS, 2, n, 16, requires_grad=gradient) for n in (queries, slots, slots))
    out = masks.attend(q, k, v, mask, scale=None, dropout=0.0, backend="auto")
    expected = dense_attention(q, k, v, masks.visible_keys(mask, ROWS, queries, slots, DEVICE))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if gradient:
        grads = [torch.autograd.grad(each.square().sum(), (q, k, v)) for each in (out, expected)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "padding"),
    [("full", "left"), ("full", "right"), ("full", "holes"), ("cache", "left"), ("cache", "right")],
)
def test_gradients_of_keys_in_another_order(kind, padding):
    real = padding_of(padding)
    keys, end = (TOKENS, TOKENS) if kind == "full" else (16, TOKENS)
    pattern = PATTERNS["full" if kind == "full" else "causal"]
    made = exact_mask(8, keys, end - 8, 0, pattern, real, DEVICE)
    q, k, v = (torch.randn(ROWS, 2, n, 16, requires_grad=True) for n in (8, keys, keys))
    expected = sdpa_mask(ROWS, 8, keys, end - 8, 0, pattern, real, allow_is_causal_skip=False)
    weights = torch.randn(ROWS, 2, 8, 16) * real[:, None, end - 8 : end, None]
    found = masks.attend(q, k, v, masks.read(made), scale=None, dropout=0.0, backend="auto")
    grads = torch.autograd.grad((found * weights).sum(), (q, k, v))
    truths = torch.autograd.grad((dense_attention(q, k, v, expected) * weights).sum(), (q, k, v))
    torch.testing.assert_close(grads, truths, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_documents(window):
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2], [0] * 11, [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3]])
    base = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    pattern = and_masks(base, packed_sequence_mask_function(documents))
    mask = masks.read(exact_mask(TOKENS, TOKENS, 0, 0, pattern, None, DEVICE))
    assert (mask.kind, mask.window) == ("documents", window)
    expected = sdpa_mask(ROWS, TOKENS, TOKENS, 0, 0, pattern, None, allow_is_causal_skip=False)
    assert torch.equal(masks.visible_keys(mask, ROWS, TOKENS, TOKENS, DEVICE), expected)
    q, k, v = torch.randn(3, ROWS, 2, TOKENS, 16)
    out = masks.attend(q, k, v, mask, scale=None, dropout=0.0, backend="auto")
    torch.testing.assert_close(out, dense_attention(q, k, v, expected), rtol=1e-5, atol=1e-5)


def test_one_document_per_row_is_no_document():
    pattern = and_masks(causal_mask_function, packed_sequence_mask_function(torch.zeros(ROWS, TOKENS)))
    assert masks.read(exact_mask(TOKENS, TOKENS, 0, 0, pattern, None, DEVICE)).kind == "causal"


def test_patterns_that_the_kernels_do_not_have_are_refused():
    pattern = chunked_causal_mask_function(4, torch.zeros(ROWS, dtype=torch.long))
    with pytest.raises(
        NotImplementedError, match=r"pattern chunked_overlay.* of this model is not one the kernels have"
    ):
        gptkernels_mask(ROWS, TOKENS, TOKENS, mask_function=pattern, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"pattern .*lambda.* of this model"):
        gptkernels_mask(ROWS, TOKENS, TOKENS, mask_function=lambda b, h, q, k: k <= q, device=DEVICE)


def test_masks_survive_what_transformers_does_to_them():
    """A kind and a window in the shape; columns in memory."""
    columns = torch.tensor([[3], [0]])
    for window in (None, 1, 4096):
        mask = masks.write("full", window, columns)
        for moved in (mask, mask.to("cpu", non_blocking=True), mask.contiguous(), mask.clone(), mask.detach()):
            read = masks.read(moved)
            assert (read.kind, read.window) == ("full", window)
            assert torch.equal(read.columns, columns.int())
    for other in (
        torch.zeros(2, 1, 5, 5),
        torch.ones(2, 1, 5, 5, dtype=torch.bool),
        torch.ones(2, 5, dtype=torch.int32),
    ):
        assert not masks.is_ours(other)
    assert not masks.is_ours(torch.ones(2, 1, 5, 5, dtype=torch.int32))
