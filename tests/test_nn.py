"""The drop-in modules against torch's own."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import gptkernels as gk


def test_layer_norm():
    ours, theirs = gk.nn.LayerNorm(48, eps=1e-3), torch.nn.LayerNorm(48, eps=1e-3)
    with torch.no_grad():
        ours.weight.uniform_(), ours.bias.uniform_()
    theirs.load_state_dict(ours.state_dict())
    x, residual = torch.randn(2, 3, 48), torch.randn(2, 3, 48)
    torch.testing.assert_close(ours(x), theirs(x))
    y, h = ours(x, residual)
    torch.testing.assert_close(h, x + residual)
    torch.testing.assert_close(y, theirs(h))
    ours.eval()
    torch.testing.assert_close(ours(x, residual, dropout=0.9)[1], x + residual)
    assert (ours.train()(x, residual, dropout=0.9)[1] == residual).float().mean() > 0.8
    assert gk.nn.LayerNorm(48, bias=False).bias is None


def test_rms_norm():
    ours, theirs = gk.nn.RMSNorm(48, eps=1e-3), torch.nn.RMSNorm(48, eps=1e-3)
    with torch.no_grad():
        ours.weight.uniform_()
    theirs.load_state_dict(ours.state_dict())
    x, residual = torch.randn(2, 3, 48), torch.randn(2, 3, 48)
    torch.testing.assert_close(ours(x), theirs(x))
    y, h = ours(x, residual)
    torch.testing.assert_close(h, x + residual)
    torch.testing.assert_close(y, theirs(h))
    assert (ours(x, residual, dropout=0.9)[1] == residual).float().mean() > 0.8
    torch.testing.assert_close(ours.eval()(x, residual, dropout=0.9)[1], x + residual)
    gemma = gk.nn.RMSNorm(48, eps=1e-3, offset=1.0, cast="gemma")
    torch.testing.assert_close(gemma(x), torch.nn.RMSNorm(48, eps=1e-3)(x))


@pytest.mark.parametrize("hidden", [None, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp(hidden, bias):
    ours = gk.nn.MLP(24, hidden, bias=bias, activation="gelu")
    assert ours.fc.out_features == (hidden or 96)
    x, residual = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    expected = ours.proj(F.gelu(ours.fc(x)))
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(ours(x, residual), expected + residual)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_attention_as_multihead_attention(causal):
    ours = gk.nn.CausalSelfAttention(64, 4, causal=causal)
    theirs = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    theirs.in_proj_weight, theirs.in_proj_bias = ours.qkv.weight, ours.qkv.bias
    theirs.out_proj.weight, theirs.out_proj.bias = ours.out.weight, ours.out.bias
    x = torch.randn(2, 9, 64)
    mask = torch.ones(9, 9).triu(1).bool() if causal else None
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("window", [None, 3])
def test_grouped_heads_and_windows(window):
    ours = gk.nn.CausalSelfAttention(64, 4, kv_heads=2, window=window, scale=0.3, bias=False, out_bias=True)
    x = torch.randn(2, 9, 64)
    q, k, v = ours.qkv(x).view(2, 9, 8, 16).transpose(1, 2).split((4, 2, 2), 1)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    seen = torch.ones(9, 9).tril().bool()
    seen = seen if window is None else seen & torch.ones(9, 9).triu(1 - window).bool()
    expected = F.scaled_dot_product_attention(q, k, v, seen, scale=0.3).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours(x), ours.out(expected))
    assert ours.qkv.bias is None
    assert ours.out.bias is not None


def test_dropout_is_for_training():
    module, x = gk.nn.CausalSelfAttention(64, 4, dropout=0.5), torch.randn(1, 9, 64)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_copies_and_pickles():
    x = torch.randn(1, 9, 64)
    for module in (gk.nn.CausalSelfAttention(64, 4, window=3), gk.nn.MLP(64), gk.nn.LayerNorm(64), gk.nn.RMSNorm(64)):
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x), module(x))


def test_bad_heads():
    with pytest.raises(ValueError, match="heads must divide the width of 64, not 5"):
        gk.nn.CausalSelfAttention(64, 5)


def test_rotated_attention_sees_distances_and_no_places():
    ours, x = gk.nn.CausalSelfAttention(64, 4, kv_heads=2), torch.randn(2, 9, 64)
    positions = torch.stack((torch.arange(9), torch.arange(9) + 100))
    shifted = gk.nn.rotary_tables(positions, 16, 1e4)
    y = ours(x, rotary=gk.nn.rotary_tables(torch.arange(9), 16, 1e4))
    torch.testing.assert_close(ours(x, rotary=shifted), y, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours(x), y, atol=1e-3)


def test_norms_of_queries_and_keys():
    ours, x = gk.nn.CausalSelfAttention(64, 4, kv_heads=2, qk_norm=True, eps=1e-3, bias=False), torch.randn(2, 9, 64)
    tables = gk.nn.rotary_tables(torch.arange(9), 16, 1e4)
    expected = ours(x, rotary=tables)
    with torch.no_grad():
        ours.qkv.weight[:96] *= 1000  # of queries and keys
        ours.q_norm.eps = ours.k_norm.eps = 1e3
    torch.testing.assert_close(ours(x, rotary=tables), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="rotary must be cos and sin"):
        ours(x)


def test_rotary_tables():
    cos, sin = gk.nn.rotary_tables(torch.tensor([[0, 3]]), 8, 100.0)
    angles = 3 * torch.tensor([1.0, 100**-0.25, 100**-0.5, 100**-0.75])
    torch.testing.assert_close(cos, torch.stack((torch.ones(4), angles.cos())).unsqueeze(0))
    torch.testing.assert_close(sin, torch.stack((torch.zeros(4), angles.sin())).unsqueeze(0))


@pytest.mark.parametrize("bias", [True, False])
def test_gated_mlp(bias):
    ours = gk.nn.GatedMLP(24, 40, bias=bias, activation="gelu_tanh")
    x, residual = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    expected = ours.down(F.gelu(ours.gate(x), approximate="tanh") * ours.up(x))
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(ours(x, residual), expected + residual)
