"""Wrong calls get an error that names the argument, what it was and what is accepted."""

import re

import pytest
import torch

import gptkernels as gk
from gptkernels.ops.attention import attention, decode_attention

Q = torch.randn(2, 4, 6, 32)
K = torch.randn(2, 2, 6, 32)
PACKED = torch.randn(6, 4, 32)
PACKED_K = torch.randn(6, 2, 32)
INT = torch.int32
STARTS = torch.tensor([0, 2], dtype=INT)
TOKEN = torch.randn(2, 4, 1, 32)
CACHE = torch.randn(2, 2, 8, 32)
LENGTHS = torch.tensor([3, 8], dtype=INT)
SINKS = torch.ones(4)
SPARSE = torch.eye(32).to_sparse()


def dense(q=Q, k=K, v=K, **options):
    return attention(q, k, v, **options)


def packed(q=PACKED, k=PACKED_K, v=PACKED_K, cu_seqlens=(0, 2, 6), **options):
    cu_seqlens = torch.tensor(cu_seqlens, dtype=INT) if isinstance(cu_seqlens, tuple) else cu_seqlens
    return attention(q, k, v, cu_seqlens=cu_seqlens, **options)


def decode(q=TOKEN, k_cache=CACHE, v_cache=CACHE, lengths=LENGTHS, **options):
    return decode_attention(q, k_cache, v_cache, lengths, **options)


def lengths(*values):
    return torch.tensor(values, dtype=INT)


# (op, arguments, exception, words of the message)
CASES = [
    (dense, {"q": Q.tolist()}, TypeError, "q must be a tensor, not list"),
    (dense, {"q": None}, TypeError, "q must be a tensor, not NoneType"),
    (dense, {"k": None}, TypeError, "k must be a tensor, not NoneType"),
    (dense, {"v": 1.0}, TypeError, "v must be a tensor, not float"),
    (dense, {"q": Q.double()}, TypeError, "q must be float16, bfloat16, float32, not float64"),
    (dense, {"q": Q.int()}, TypeError, "q must be .* not int32"),
    (dense, {"q": Q.to(torch.complex64)}, TypeError, "q must be .* not complex64"),
    (dense, {"q": SPARSE}, TypeError, "q must be a dense .* not torch.sparse_coo"),
    (dense, {"k": K.half()}, TypeError, "k must be float32, not float16"),
    (dense, {"v": K.bfloat16()}, TypeError, "v must be float32, not bfloat16"),
    (dense, {"q": Q.half()}, TypeError, "k must be float16, not float32"),
    (dense, {"k": K.to("meta")}, ValueError, "k must be on cpu like the other tensors, not on meta"),
    (dense, {"v": K.to("meta")}, ValueError, "v must be on cpu like the other tensors, not on meta"),
    (dense, {"q": Q[0]}, ValueError, r"q must have shape \(B, heads, T, D\), not \(4, 6, 32\)"),
    (dense, {"k": K[0]}, ValueError, r"k must have shape \(B, heads, T, D\), not \(2, 6, 32\)"),
    (dense, {"v": K[None]}, ValueError, r"v must have shape \(B, heads, T, D\), not \(1, 2, 2, 6, 32\)"),
    (dense, {"q": torch.randn(())}, ValueError, r"q must have shape .* not \(\)"),
    (dense, {"q": Q[..., :0]}, ValueError, r"q must have a head size \(last dimension\) of 1 ... 256, not 0"),
    (dense, {"q": torch.randn(2, 4, 6, 264)}, ValueError, "q must have a head size .* not 264"),
    (dense, {"q": Q[..., :0]}, ValueError, "q must have a head size .* not 0"),
    (dense, {"k": K[..., :16]}, ValueError, r"k must have shape \(2, 2, 6, 32\) .* not \(2, 2, 6, 16\)"),
    (dense, {"k": K[:1]}, ValueError, r"k must have shape \(2, 2, 6, 32\) \(batch .* as q\), not \(1, 2, 6, 32\)"),
    (dense, {"v": K[:, :, :5]}, ValueError, r"v must have shape \(2, 2, 6, 32\) \(k's shape\), not \(2, 2, 5, 32\)"),
    (dense, {"v": Q}, ValueError, r"v must have shape \(2, 2, 6, 32\) \(k's shape\), not \(2, 4, 6, 32\)"),
    (dense, {"k": torch.randn(2, 3, 6, 32)}, ValueError, "k must have a number of heads that divides q's 4, not 3"),
    (dense, {"k": torch.randn(2, 8, 6, 32)}, ValueError, "k must have a number of heads that divides q's 4, not 8"),
    (dense, {"k": K[:, :0]}, ValueError, "k must have a number of heads that divides q's 4, not 0"),
    (dense, {"q": Q[:, :0]}, ValueError, "k must have a number of heads that divides q's 0, not 2"),
    (dense, {"causal": 1}, TypeError, "causal must be True or False, not 1"),
    (dense, {"causal": None}, TypeError, "causal must be True or False, not None"),
    (dense, {"window": 0}, ValueError, r"window must be at least 1 \(a query sees itself\), not 0; None sees all"),
    (dense, {"window": -1}, ValueError, "window must be at least 1 .* not -1"),
    (dense, {"window": 4.0}, TypeError, "window must be None or an int, the number of keys seen, or a pair .* not 4.0"),
    (dense, {"window": True}, TypeError, "window must be None or an int, .* not True"),
    (dense, {"window": [4, 0]}, TypeError, r"window must be None or an int, .* pair \(left, right\), not \[4, 0\]"),
    (dense, {"window": (4,)}, TypeError, r"window must be a pair \(left, right\) of ints or None, .* not \(4,\)"),
    (dense, {"window": (4, 0.0)}, TypeError, r"window must be a pair .* not \(4, 0.0\)"),
    (dense, {"window": (True, 0)}, TypeError, r"window must be a pair .* not \(True, 0\)"),
    (dense, {"window": (-2, 0)}, ValueError, r"window must be a pair of at least 0, or -1 or None .* not \(-2, 0\)"),
    (
        dense,
        {"window": (4, 1)},
        ValueError,
        r"window must have 0, -1 or None on the right with causal=True, not \(4, 1",
    ),
    (decode, {"window": (4, 0)}, TypeError, r"window must be None or an int, the number of keys seen, not \(4, 0\)"),
    (dense, {"softcap": 0}, ValueError, "softcap must be > 0, not 0"),
    (dense, {"softcap": -3.0}, ValueError, "softcap must be > 0, not -3.0"),
    (dense, {"softcap": "50"}, TypeError, "softcap must be a number, not str"),
    (dense, {"return_lse": 1}, TypeError, "return_lse must be True or False, not 1"),
    (dense, {"sinks": 1.0}, TypeError, "sinks must be a tensor, not float"),
    (dense, {"sinks": SINKS.half()}, TypeError, "sinks must be float32, not float16"),
    (dense, {"sinks": SINKS[:3]}, ValueError, r"sinks must have shape \(4,\) \(q's heads\), not \(3,\)"),
    (dense, {"sinks": SINKS[None]}, ValueError, r"sinks must have 1 dimension, not shape \(1, 4\)"),
    (dense, {"sinks": SINKS.to("meta")}, ValueError, "sinks must be on cpu .* not on meta"),
    (dense, {"alibi_slopes": 0.5}, TypeError, "alibi_slopes must be a tensor, not float"),
    (dense, {"alibi_slopes": SINKS.half()}, TypeError, "alibi_slopes must be float32, not float16"),
    (dense, {"alibi_slopes": SINKS[:3]}, ValueError, r"alibi_slopes must have shape \(4,\) or \(2, 4\) .* not \(3,\)"),
    (dense, {"alibi_slopes": torch.ones(3, 4)}, ValueError, r"alibi_slopes must have shape .* not \(3, 4\)"),
    (dense, {"alibi_slopes": SINKS.clone().requires_grad_()}, ValueError, "alibi_slopes must not require gradients"),
    (dense, {"cu_seqlens_k": STARTS}, ValueError, "cu_seqlens_k must be None without cu_seqlens"),
    (packed, {"cu_seqlens_k": [0, 2, 6]}, TypeError, "cu_seqlens_k must be a tensor, not list"),
    (
        packed,
        {"cu_seqlens_k": STARTS},
        ValueError,
        r"cu_seqlens_k must have shape \(3,\) \(cu_seqlens's shape\), not \(2",
    ),
    (packed, {"cu_seqlens_k": lengths(0, 3, 5)}, ValueError, r"cu_seqlens_k must rise from 0 to 6 \(k's tokens\), not"),
    (
        packed,
        {"alibi_slopes": torch.ones(6, 4)},
        ValueError,
        r"alibi_slopes must have shape \(4,\) or \(2, 4\) .* \(6, 4",
    ),
    (dense, {"window": torch.tensor(4)}, TypeError, r"window must be None or an int, .* not tensor\(4\)"),
    (dense, {"scale": 0}, ValueError, "scale must be > 0, not 0"),
    (dense, {"scale": -0.1}, ValueError, "scale must be > 0, not -0.1"),
    (dense, {"scale": float("nan")}, ValueError, "scale must be > 0, not nan"),
    (dense, {"scale": float("inf")}, ValueError, "scale must be > 0, not inf"),
    (dense, {"scale": "0.1"}, TypeError, "scale must be a number, not str"),
    (dense, {"scale": True}, TypeError, "scale must be a number, not bool"),
    (dense, {"dropout": -0.1}, ValueError, "dropout must be >= 0 and < 1, not -0.1"),
    (dense, {"dropout": 1.0}, ValueError, "dropout must be >= 0 and < 1, not 1.0"),
    (dense, {"dropout": float("nan")}, ValueError, "dropout must be >= 0 and < 1, not nan"),
    (dense, {"dropout": None}, TypeError, "dropout must be a number, not NoneType"),
    (dense, {"key_start": [0, 2]}, TypeError, "key_start must be a tensor, not list"),
    (dense, {"key_start": STARTS.long()}, TypeError, "key_start must be int32, not int64"),
    (dense, {"key_start": STARTS.float()}, TypeError, "key_start must be int32, not float32"),
    (dense, {"key_start": STARTS[:1]}, ValueError, r"key_start must have shape \(2,\) \(q's batch\), not \(1,\)"),
    (dense, {"key_start": STARTS[:, None]}, ValueError, r"key_start must have 1 dimension, not shape \(2, 1\)"),
    (dense, {"key_start": STARTS.to("meta")}, ValueError, "key_start must be on cpu .* not on meta"),
    (dense, {"cu_seqlens": STARTS}, ValueError, r"q must have shape \(T, heads, D\), as packed documents are, not \(2"),
    (dense, {"backend": "cudnn"}, ValueError, "backend must be one of auto, .* not 'cudnn'"),
    (dense, {"backend": None}, ValueError, "backend must be one of .* not None"),
    (dense, {"backend": "triton"}, gk.UnsupportedError, "triton: runs on CUDA tensors, not cpu"),
    (packed, {"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be a tensor, not list"),
    (packed, {"cu_seqlens": torch.tensor([0, 6])}, TypeError, "cu_seqlens must be int32, not int64"),
    (packed, {"cu_seqlens": torch.tensor(6, dtype=INT)}, ValueError, r"cu_seqlens must have 1 dimension, .* \(\)"),
    (packed, {"cu_seqlens": ()}, ValueError, r"cu_seqlens must have at least 1 element \(documents \+ 1\), not 0"),
    (packed, {"cu_seqlens": (1, 6)}, ValueError, r"cu_seqlens must rise from 0 to 6 \(q's tokens\), not \[1, 6\]"),
    (packed, {"cu_seqlens": (0, 5)}, ValueError, r"cu_seqlens must rise from 0 to 6 .* not \[0, 5\]"),
    (packed, {"cu_seqlens": (0, 7)}, ValueError, r"cu_seqlens must rise from 0 to 6 .* not \[0, 7\]"),
    (packed, {"cu_seqlens": (0, 4, 2, 6)}, ValueError, r"cu_seqlens must rise from 0 to 6 .* not \[0, 4, 2, 6\]"),
    (packed, {"cu_seqlens": STARTS.to("meta")}, ValueError, "cu_seqlens must be on cpu .* not on meta"),
    (packed, {"key_start": STARTS}, ValueError, "key_start must be None with cu_seqlens"),
    (packed, {"k": PACKED_K[:5]}, ValueError, r"k must have shape \(6, 2, 32\) \(tokens .* as q\), not \(5, 2, 32\)"),
    (packed, {"q": Q}, ValueError, r"q must have shape \(T, heads, D\), .* not \(2, 4, 6, 32\)"),
    (decode, {"q": TOKEN.double()}, TypeError, "q must be float16, bfloat16, float32, not float64"),
    (decode, {"q": torch.randn(2, 4, 17, 32)}, ValueError, r"q must have 1 ... 16 tokens .* not 17"),
    (decode, {"q": torch.randn(2, 4, 0, 32)}, ValueError, r"q must have 1 ... 16 tokens .* not 0"),
    (decode, {"q": TOKEN[0]}, ValueError, r"q must have shape \(B, heads, T, D\), not \(4, 1, 32\)"),
    (decode, {"k_cache": CACHE.half()}, TypeError, "k_cache must be float32, not float16"),
    (decode, {"k_cache": CACHE[:1]}, ValueError, r"k_cache must have shape \(2, 2, 8, 32\) .* not \(1, 2, 8, 32\)"),
    (
        decode,
        {"v_cache": CACHE[:, :, :7]},
        ValueError,
        r"v_cache must have shape .* \(k_cache's shape\), not \(2, 2, 7",
    ),
    (
        decode,
        {"k_cache": torch.randn(2, 3, 8, 32)},
        ValueError,
        "k_cache must have a number of heads that divides q's 4",
    ),
    (decode, {"lengths": None}, TypeError, "lengths must be a tensor, not NoneType"),
    (decode, {"lengths": LENGTHS.long()}, TypeError, "lengths must be int32, not int64"),
    (decode, {"lengths": LENGTHS[:1]}, ValueError, r"lengths must have shape \(2,\) \(q's batch\), not \(1,\)"),
    (decode, {"lengths": lengths(-1, 3)}, ValueError, "lengths must be at least 0, not -1"),
    (decode, {"lengths": lengths(3, 9)}, ValueError, "lengths must be at most the cache's 8 slots, not 9"),
    (decode, {"lengths": lengths(3, 9), "window": 9}, ValueError, "lengths must be at most the cache's 8 slots, not 9"),
    (decode, {"window": 0}, ValueError, "window must be at least 1 .* not 0"),
    (decode, {"window": 2.5}, TypeError, "window must be None or an int, .* not 2.5"),
    (decode, {"scale": 0.0}, ValueError, "scale must be > 0, not 0.0"),
    (
        decode,
        {"q": Q[:, :, :3], "window": 7},
        ValueError,
        r"k_cache must have at least window \+ Tq - 1 = 9 slots .* 8",
    ),
    (
        decode,
        {"q": TOKEN.clone().requires_grad_()},
        ValueError,
        "q, k_cache, v_cache and sinks must not require",
    ),
    (decode, {"backend": "triton"}, gk.UnsupportedError, "triton: runs on CUDA tensors, not cpu"),
    (decode, {"backend": "fast"}, ValueError, "backend must be one of .* not 'fast'"),
]


def test_the_calls_are_right_otherwise():
    for op in (dense, packed, decode):
        assert op().isfinite().all()
    assert decode(lengths=lengths(3, 900), window=8).isfinite().all()
    assert decode(q=Q[:, :, :3], window=6).isfinite().all()


def test_there_are_many():
    assert len(CASES) >= 60


@pytest.mark.parametrize(("op", "arguments", "exception", "words"), CASES)
def test_bad_input(op, arguments, exception, words):
    with pytest.raises(exception) as caught:
        op(**arguments)
    assert re.search(words, str(caught.value)), str(caught.value)
