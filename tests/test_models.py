"""The reference GPT: published sizes, its options, its twin in plain PyTorch, and what it costs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gptkernels.bench.memory import kept_for_backward, storage_bytes
from gptkernels.models import GPT, PRESETS, GPTConfig, cost
from gptkernels.models.plain import PlainLayerNorm, PlainRMSNorm, plain_twin

SMALL = GPTConfig(vocabulary=101, context=40, layers=3, width=64, heads=4)
BANDED = {"pattern": ("dense", "banded"), "window": 5}
ALBERT = {
    "norm": "post",
    "share_layers": True,
    "embedding_rank": 24,
    "token_types": 2,
    "objective": "masked",
    "scale_residual_init": False,
}
LLAMA = {"norm": "rms", "rotary": 10000.0, "kv_heads": 2, "gated": True, "activation": "silu"}
LLAMA |= {"bias": False, "tied": False, "scale_residual_init": False}
LLAMAS = [LLAMA, LLAMA | {"qk_norm": True}, LLAMA | {"save": "input"}, LLAMA | {"save": "all"}]
OPTIONS = {
    "gpt1": {"norm": "post", "scale_residual_init": False},
    "gpt2": {},
    "gpt3": BANDED,
    "albert": ALBERT,
    "untied, no bias": {"tied": False, "bias": False},
    "factorised": {"embedding_rank": 16},
    "relu2, recomputed": {"activation": "relu2", "save": "input"},
    "scaled": {"attention_scale": 1.0, "qkv_bias": False},
    "llama": LLAMA,
    "llama, alternating": LLAMA | BANDED | {"tied": True, "save": "input", "bias": True},
    "llama, shared, masked": LLAMA | {"share_layers": True, "objective": "masked", "token_types": 2},
    "llama, factorised": LLAMA | {"tied": True, "embedding_rank": 16},
    "qwen3": LLAMA | {"qk_norm": True},
    "albert, rotary, gated": ALBERT | {"rotary": 500.0, "qk_norm": True, "kv_heads": 1, "gated": True},
}
# Of the papers and their released weights, without ALBERT's heads for masked tokens and sentence order.
PUBLISHED = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "albert-base": 11_683_584,
    "albert-large": 17_683_968,
    "albert-xlarge": 58_724_864,
    "albert-xxlarge": 222_595_584,
    "tinyllama-1.1b": 1_100_048_384,
}
ROUNDED = {"125m": 125e6, "350m": 350e6, "760m": 760e6, "1.3b": 1.3e9, "2.7b": 2.7e9, "6.7b": 6.7e9, "13b": 13e9}
ROUNDED = {f"gpt3-{name}": count for name, count in ROUNDED.items()} | {"gpt3-175b": 175e9}


def test_every_preset_has_a_published_size():
    assert set(PUBLISHED) | set(ROUNDED) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    heads = ("masked_head.transform", "masked_head.norm", "masked_head.vocabulary_bias", "masked_head.order")
    count = sum(x.numel() for key, x in model.named_parameters() if not key.startswith(heads))
    if name in PUBLISHED:
        assert count == PUBLISHED[name]
    else:
        assert count == pytest.approx(ROUNDED[name], rel=0.025)


def test_gpt3_layers_alternate():
    model = GPT(replace(SMALL, layers=4, **BANDED))
    assert [block.attention.window for block in model.layers()] == [None, 5, None, 5]
    assert GPTConfig.preset("gpt3-1.3b", window=64).layer_window(3) == 64


def test_initial_weights():
    torch.manual_seed(0)
    config = GPTConfig(vocabulary=3000, context=512, layers=8, width=256, heads=4, position_std=0.01)
    block = GPT(config).blocks[5]
    for weight, std in [(block.attention.out.weight, 0.02 / 4), (block.mlp.proj.weight, 0.02 / 4)]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    for weight in (block.attention.qkv.weight, block.mlp.fc.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert GPT(config).embedding.position.weight.std().item() == pytest.approx(0.01, rel=0.05)
    gated = GPT(replace(config, gated=True)).blocks[5].mlp
    assert gated.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert gated.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    unscaled = GPT(replace(config, scale_residual_init=False)).blocks[5]
    assert unscaled.mlp.proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
def test_equals_its_twin_in_plain_pytorch(option, padded):
    model = GPT(replace(SMALL, init_std=0.1, **OPTIONS[option]))
    twin = plain_twin(model)
    tokens = torch.randint(101, (2, 33))
    key_start = torch.tensor([0, 9], dtype=torch.int32) if padded else None
    real = torch.arange(33) >= (torch.zeros(2, 1) if key_start is None else key_start.unsqueeze(1))
    targets = tokens.roll(-1, 1).masked_fill(~real, -100)
    extra = (
        {"order": torch.tensor([0, 1]), "token_types": (tokens > 50).long()} if "token_types" in OPTIONS[option] else {}
    )
    loss, expected = (m(tokens, targets, key_start=key_start, **extra) for m in (model, twin))
    torch.testing.assert_close(loss, expected)
    loss.backward(), expected.backward()
    for (name, x), y in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_twin_calls_none_of_our_ops(monkeypatch):
    twins = [plain_twin(GPT(replace(SMALL, **changes))) for changes in (BANDED, LLAMA | {"qk_norm": True})]

    def called(*args, **kwargs):
        raise AssertionError("the twin called one of the ops that it is there to check")

    for name in ("attention", "layer_norm", "add_layer_norm", "mlp", "rope", "rms_norm", "add_rms_norm", "gated_mlp"):
        monkeypatch.setattr(f"gptkernels.nn.{name}", called)
    monkeypatch.setattr("gptkernels.models.gpt.linear_cross_entropy", called)
    tokens = torch.randint(101, (2, 33))
    for twin, norm in zip(twins, (PlainLayerNorm, PlainRMSNorm), strict=True):
        twin(tokens, tokens).backward()
        assert isinstance(twin.final_norm, norm)
    for changes in ({}, LLAMA):
        with pytest.raises(AssertionError, match="the twin called"):
            GPT(replace(SMALL, **changes))(tokens, tokens)


def test_losses_are_of_the_logits():
    model = GPT(SMALL).eval()
    tokens, targets = torch.randint(101, (2, 33)), torch.randint(101, (2, 33))
    targets[0, :7] = -100
    each = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none").view(2, 33)
    torch.testing.assert_close(model(tokens, targets, reduction="none"), each)
    torch.testing.assert_close(model(tokens, targets), each.sum() / (targets >= 0).sum())


def test_dropout_is_for_training():
    model = GPT(replace(SMALL, dropout=0.5, attention_dropout=0.5))
    tokens = torch.randint(101, (2, 33))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("changes", [BANDED, LLAMA], ids=["gpt3", "llama"])
def test_compiles_whole(changes):
    model = GPT(replace(SMALL, **changes))
    tokens = torch.randint(101, (2, 33))
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, tokens)
    torch.testing.assert_close(loss, model(tokens, tokens))


@pytest.mark.parametrize("changes", [BANDED, LLAMA, ALBERT], ids=["gpt3", "llama", "albert"])
def test_autocast_trains_in_bfloat16(changes):
    model = GPT(replace(SMALL, init_std=0.1, **changes))
    tokens = torch.randint(101, (2, 33))
    order = torch.tensor([0, 1]) if model.masked_head else None
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens, order=order)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(tokens, tokens, order=order), rtol=0.02, atol=0.02)
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 102}, "heads must divide"),
        ({"heads": 8}, "head sizes of 16"),
        ({"layers": 0}, "layers must be a positive int"),
        ({"vocabulary": 3.5}, "vocabulary must be a positive int"),
        ({"norm": "middle"}, "norm must be one of"),
        ({"kv_heads": 3}, "kv_heads must divide the 4 heads, not 3"),
        ({"kv_heads": 0}, "kv_heads must be a positive int"),
        ({"rotary": 1.0}, "rotary must be None or a finite base above 1"),
        ({"rotary": True}, "rotary must be None or a finite base above 1"),
        ({"rotary": 1e4, "width": 68}, "rotary needs an even head size .*, not 17"),
        ({"qk_norm": True}, "qk_norm needs rotary positions"),
        ({"gated": True, "activation": "gpt_oss"}, "activation must be one of"),
        ({"pattern": ("sparse",)}, "pattern must be one of"),
        ({"pattern": ()}, "pattern must name"),
        ({"pattern": ("banded",)}, "window must be given"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"objective": "both"}, "objective must be one of"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_bad_calls():
    with pytest.raises(ValueError, match="preset must be one of gpt1"):
        GPTConfig.preset("gpt5")
    with pytest.raises(ValueError, match="context of 40"):
        GPT(SMALL)(torch.zeros(1, 41, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(B, T\)"):
        GPT(SMALL)(torch.zeros(41, dtype=torch.int64))
    with pytest.raises(ValueError, match="one kind"):
        GPT(replace(SMALL, share_layers=True, **BANDED))
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="order needs"):
        GPT(SMALL)(tokens, tokens, order=torch.tensor([0]))


def test_keys_seen_are_counted_right():
    for changes in ({}, BANDED, ALBERT, {"pattern": ("banded",), "window": 3, "objective": "masked"}):
        config = replace(SMALL, **changes)
        for length in (1, 4, 33):
            for layer in range(2):
                i = torch.arange(length)
                distance = i.unsqueeze(1) - i
                window = config.layer_window(layer) or length
                seen = (distance < window) & ((distance >= 0) if config.causal else (distance > -window))
                assert cost.keys_seen(config, layer, length) == pytest.approx(seen.sum().item() / length)


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "post"}, {"tied": False}, LLAMA], ids=["pre", "post", "untied", "llama"]
)
def test_flops_are_those_that_torch_counts(changes):
    from torch.utils.flop_counter import FlopCounterMode

    config = replace(SMALL, **changes)
    twin = plain_twin(GPT(config))
    with FlopCounterMode(display=False) as counter:
        twin(torch.zeros(2, 40, dtype=torch.int64))
    # torch counts scores above the diagonal too, and the two products of attention on the CPU not at all.
    attention = config.layers * 4 * config.width * cost.keys_seen(config, 0, 40)
    counted = counter.get_total_flops() / 80
    assert cost.forward_flops_per_token(config, 40) - attention == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize(
    "changes", [{}, {"save": "input"}, {"save": "all"}, {"norm": "post"}, BANDED, *LLAMAS], ids=str
)
def test_memory_is_what_training_keeps(changes, mixed):
    config = GPTConfig(vocabulary=512, context=256, layers=3, width=128, heads=4, **changes)
    model, tokens = GPT(config), torch.randint(512, (4, 256))
    with kept_for_backward(model.parameters()) as kept, torch.autocast("cpu", enabled=mixed):
        model(tokens, tokens)
    measured = storage_bytes(kept)
    formula = cost.training_memory(config, 4 * 256, mixed=mixed, on_cpu=True).activations
    assert formula == pytest.approx(measured, rel=0.06)
