"""Modules that accelerate() recognises by what they are made of: nanoGPT's, torch's encoder layers, and taught ones."""

import copy
import re
from collections import Counter

import pytest
import torch
from swap_models import (
    HEADS,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Encoder,
    NanoAttention,
    NanoGPT,
    NanoLayerNorm,
)
from torch import nn

import gptkernels as gk
from gptkernels import dispatch

pytest.importorskip("transformers")


class Scaled(NanoAttention):
    """The same attributes, another computation."""

    def forward(self, x):
        return super().forward(x) * 2


class DropsSilently(NanoAttention):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class TakesMore(NanoAttention):
    def forward(self, x, rotation):
        return super().forward(x) * rotation


class GivesMore(NanoAttention):
    def forward(self, x):
        return super().forward(x), None


class WithNorm(NanoAttention):
    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.q_norm = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Scaled, "it computes something else than what it looks like"),
        (DropsSilently, "it drops something out in training that is not in one of its nn.Dropout modules"),
        (TakesMore, r"it could not be called with a tensor alone \(TypeError"),
        (GivesMore, r"it could not be called with a tensor alone \(TypeError: it returns tuple"),
        (WithNorm, "it also has q_norm"),
    ],
)
def test_what_only_looks_like_nanogpt_is_left(cls, reason):
    model = NanoGPT()
    model.h[1].attn = cls(WIDTH, HEADS)
    modes = [module.training for module in model.train().modules()]
    report = gk.accelerate(model)
    assert report.counts()["attention"] == 2
    (left,) = report.left
    assert left.path == "h.1.attn"
    assert re.search(reason, left.reason), left.reason
    assert [module.training for module in model.modules()] == modes


def test_nanogpt_without_biases_and_other_epsilons():
    model = NanoGPT(bias=False)
    assert gk.accelerate(model).counts() == {"attention": 3, "norm": 7, "mlp": 3}

    class OtherNorm(NanoLayerNorm):
        def forward(self, x):
            return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6)

    model = NanoGPT()
    model.ln_f = OtherNorm(WIDTH, True)
    assert [row.reason for row in gk.accelerate(model).left] == ["it computes something else than what it looks like"]


@pytest.fixture
def forgets_families():
    from gptkernels.swap.modules import FAMILIES as KNOWN

    before = dict(KNOWN)
    yield
    KNOWN.clear()
    KNOWN.update(before)


class OwnMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.act, self.w2 = nn.Linear(WIDTH, 96), nn.SiLU(), nn.Linear(96, WIDTH)

    def forward(self, x):
        return self.w2(self.act(self.w1(x)))


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def heads(self, x):
        return (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))

    def forward(self, x):
        q, k, v = self.heads(x)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def own_attention(module, x):
    settings = gk.swap.settings_of(module)
    q, k, v = module.heads(x)
    return gk.attention(q, k, v, window=settings.window, backend=settings.backend).transpose(1, 2).flatten(2)


def test_families_of_ones_own(forgets_families):
    model, x = nn.Sequential(OwnAttention(), OwnMLP()), torch.randn(2, 9, WIDTH)
    with pytest.raises(ValueError, match="Sequential has none"):
        gk.accelerate(model)
    gk.swap.family("own MLP", "mlp", OwnMLP, forward=gk.swap.mlp_forward("w1", "act", "w2"))
    gk.swap.family("own attention", "attention", OwnAttention, forward=own_attention)
    expected = model(x)
    report = gk.accelerate(model)
    assert report.counts() == {"attention": 1, "mlp": 1}
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=1e-5, atol=1e-5)
    report.undo()
    gk.accelerate(model, window=2)
    assert not torch.allclose(model(x), expected)
    gk.swap.family("no MLP", "mlp", lambda module: isinstance(module, OwnMLP) and "why not", forward=lambda *_: None)
    assert [row.reason for row in gk.accelerate(nn.Sequential(OwnAttention(), OwnMLP())).left] == ["why not"]


def test_bad_families(forgets_families):
    with pytest.raises(ValueError, match="part must be one of attention, norm, mlp, loss, not 'head'"):
        gk.swap.family("x", "head", OwnMLP, forward=print)
    with pytest.raises(ValueError, match="name must be new, but there is a family 'LayerNorm'"):
        gk.swap.family("LayerNorm", "norm", OwnMLP, forward=print)
    with pytest.raises(ValueError, match="methods must not be empty"):
        gk.swap.family("x", "mlp", OwnMLP)
    with pytest.raises(ValueError, match="methods must be of OwnMLP, which has no forwards"):
        gk.swap.family("x", "mlp", OwnMLP, forwards=print)
    with pytest.raises(TypeError, match="matches must be a class or a function of a module, not str"):
        gk.swap.family("x", "mlp", "OwnMLP", forward=print)


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}])
@pytest.mark.parametrize("training", [False, True])
def test_encoder_layers(options, training):
    torch.manual_seed(0)
    model = Encoder(**options).train(training)
    fast = copy.deepcopy(model)
    gk.accelerate(fast)
    tokens = torch.randint(0, VOCABULARY, (2, TOKENS))
    mask = torch.ones(2, TOKENS)
    mask[0, -3:] = 0
    causal = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    arbitrary = torch.rand(TOKENS, TOKENS).masked_fill(torch.eye(TOKENS, dtype=torch.bool), 0.0) > 0.8
    for each in (model, fast):
        each.embedded = each.embedding(tokens)
    for arguments in (
        {},
        {"src_key_padding_mask": mask == 0},
        {"mask": causal},
        {
            "mask": causal,
            "is_causal": True,
            "src_key_padding_mask": torch.zeros(2, TOKENS).masked_fill(mask == 0, -torch.inf),
        },
        {"mask": arbitrary},
    ):
        real = mask.bool() if "src_key_padding_mask" in arguments else torch.ones_like(mask, dtype=torch.bool)
        expected, found = (each.encoder(each.embedded, **arguments)[real] for each in (model, fast))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_padded_inference_runs_our_kernels_in_every_layer():
    """torch would take its shortcut through nested tensors."""
    torch.manual_seed(0)
    model = Encoder().eval()
    fast = copy.deepcopy(model)
    gk.accelerate(fast)
    mask = torch.ones(2, TOKENS)
    mask[1, -5:] = 0
    tokens = torch.randint(0, VOCABULARY, (2, TOKENS))
    with torch.no_grad(), dispatch.recording() as calls:
        expected, found = (each(tokens, attention_mask=mask)[mask.bool()] for each in (model, fast))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert Counter(op for op, _ in calls) == {"attention": 3, "layer_norm": 6, "mlp": 3}


def test_encoder_layers_never_lose_a_window():
    model, x = nn.TransformerEncoderLayer(WIDTH, HEADS, 128, batch_first=True).eval(), torch.randn(2, 9, WIDTH)
    gk.accelerate(model, window=3)
    with pytest.raises(NotImplementedError, match="asked for a window of 3, and this call has a mask of its own"):
        model(x, src_mask=torch.zeros(9, 9))
    with pytest.raises(NotImplementedError, match="hides keys between visible ones, and a window counts hidden keys"):
        model(x, src_key_padding_mask=torch.arange(9).expand(2, 9) % 3 == 1)
    # Padding on the right is fine: nobody sees beyond it, and the window counts from each token.
    out = model(x, src_key_padding_mask=torch.arange(9).expand(2, 9) > 6)
    torch.testing.assert_close(out[:, :7], model(x[:, :7]))


def test_encoder_layers_with_the_batch_second_and_dropout():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 128, dropout=0.1)
    fast = copy.deepcopy(layer)
    gk.accelerate(fast)
    x = torch.randn(TOKENS, 3, WIDTH)
    torch.testing.assert_close(fast.eval()(x), layer.eval()(x), rtol=1e-5, atol=1e-5)
    fast.train()
    assert not torch.equal(fast(x), fast(x))
