"""Whom `gptkernels bench` compares with: that they compute the same, and say what they do not have."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from gptkernels.bench import peers, truth
from gptkernels.bench.cases import Case
from gptkernels.ops.attention import attention, decode_attention
from gptkernels.parity import ParityError

CPU = torch.device("cpu")


@pytest.mark.parametrize("options", [{}, {"W": 33}, {"C": 5, "A": 1}, {"W": 33, "S": 1, "C": 5, "A": 1}], ids=str)
def test_flex_computes_it(options):
    """As it is compiled on a GPU, here step by step and, as it has no gradients on a CPU, forward"""
    case = Case.of("attention", "float32", B=2, H=4, G=2, T=80, D=16, **options)
    tensors = case.tensors(CPU, 0, gradients=False)
    truth.check(case, peers.flex_call(case, CPU), tensors, truth.truth_of(case, tensors), ours=False)


def test_what_peers_do_not_have_they_refuse():
    refused = {
        "S": {"sdpa-flash", "flash-attn-2", "flash-attn-4", "xformers"},
        "C": {"sdpa-flash", "xformers"},
        "A": {"sdpa-flash", "flash-attn-4", "xformers"},
    }
    for dimension, names in refused.items():
        case = Case.of("attention", T=64, **{dimension: 1})
        for name in names:
            contender = next(c for c in peers.CONTENDERS if c.name == name)
            with pytest.raises(peers.UnfitError, match=f"it has no {peers.EXTRAS[dimension]}"):
                contender.make(case, CPU)
    with pytest.raises(peers.UnfitError, match="multiples of 256"):
        peers.flash_attn_decode(Case.of("decode_attention", P=64), CPU)


def test_what_flash_attn_is_called_with(monkeypatch):
    """By names that are flash-attn's: a softcap, slopes, and pages as (pages, page, heads, D)."""

    def flash_attn_func(q, k, v, *, causal, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):
        window = None if window_size == (-1, -1) else window_size[0] + 1
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = attention(q, k, v, causal=causal, window=window, softcap=softcap or None, alibi_slopes=alibi_slopes)
        return out.transpose(1, 2)

    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, causal, block_table=None):
        caches = (x.transpose(1, 2) for x in (k_cache, v_cache))
        return decode_attention(q.transpose(1, 2), *caches, cache_seqlens, block_table=block_table).transpose(1, 2)

    functions = {"flash_attn_func": flash_attn_func, "flash_attn_with_kvcache": flash_attn_with_kvcache}
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(**functions))
    for make, case in (
        (peers.flash_attn, Case.of("attention", B=2, H=4, G=2, T=80, D=16, W=33, C=5, A=1)),
        (peers.flash_attn_decode, Case.of("decode_attention", B=2, H=4, G=2, T=300, D=16, P=256)),
    ):
        tensors = case.tensors(CPU, 0)
        truth.check(case, make(case, CPU), tensors, truth.truth_of(case, tensors), ours=False)


def test_peers_may_be_less_exact_but_not_wrong():
    case = Case.of("layer_norm", "float32", M=64, N=64)
    tensors = case.tensors(CPU, 0)
    facts = truth.truth_of(case, tensors)

    def inexact(x, weight, bias):
        return F.layer_norm(x, (64,), weight, bias) * (1 + 4e-6)

    assert 1 < truth.check(case, inexact, tensors, facts, ours=False) < truth.PEERS_AT_MOST
    with pytest.raises(ParityError):
        truth.check(case, inexact, tensors, facts, ours=True)
    with pytest.raises(ParityError):
        truth.check(case, lambda x, weight, bias: x * weight + bias, tensors, facts, ours=False)
