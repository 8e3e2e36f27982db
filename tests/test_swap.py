"""What accelerate() does to a model beside its numbers: the report, the undo, hooks, adapters, losses, and refusals."""

import copy
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from swap_models import (
    FAMILIES,
    TOKENS,
    VOCABULARY,
    WIDTH,
    NanoAttention,
    NanoGPT,
    inputs,
    made,
)
from torch import nn

import gptkernels as gk

pytest.importorskip("transformers")
TESTS = Path(__file__).parent


def family(name: str):
    return next(each for each in FAMILIES if each.name == name)


def test_report_says_what_happened_and_why():
    model = made(family("Llama"))
    report = gk.accelerate(model, window=4, layers=[1])
    assert report.counts() == {"loss": 1, "attention": 3, "rotary": 3, "norm": 7, "mlp": 3}
    text = str(report)
    for part in (
        "gptkernels replaced 1 loss, 3 attention, 3 rotary, 3 mlp, 7 norm; left 0",
        "model.layers.0.self_attn",
        "gptkernels.attention, window 4",
        "eager",
        "gptkernels.rms_norm",
        "gptkernels.gated_mlp",
        "gptkernels.rope",
    ):
        assert part in text, part
    assert text.count("window 4") == 1
    assert [row.path for row in report.replaced if "window" in row.became] == ["model.layers.1.self_attn"]


def test_parts_can_be_left_alone():
    for part, op in (("attention", "attention"), ("norm", "norm"), ("mlp", "mlp"), ("loss", "loss")):
        report = gk.accelerate(made(family("GPT-2")), **{part: False})
        assert op not in report.counts()
        assert len(report.counts()) == 3


def test_a_backend_that_cannot_run_says_so():
    model = made(family("GPT-2"))
    report = gk.accelerate(model, backend="cuda", norm=False, mlp=False, loss=False)
    assert {row.backend[:10] for row in report.replaced} == {"none: cuda"}
    with pytest.raises(gk.UnsupportedError):
        model(**inputs(family("GPT-2")))


def test_models_of_the_same_configuration_are_not_touched():
    from transformers import GPT2LMHeadModel

    one = made(family("GPT-2"))
    other = GPT2LMHeadModel(one.config).eval()
    assert other.config is one.config
    report = gk.accelerate(one)
    assert other.config._attn_implementation == "eager"
    assert one.config is one.transformer.config is one.transformer.h[0].attn.config
    assert one.config._attn_implementation == "gptkernels"
    report.undo()
    assert one.config is one.transformer.config is one.transformer.h[0].attn.config is other.config


def test_undo_and_again():
    model = made(family("GPT-2"))
    report = gk.accelerate(model)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has none(.|\n)*it is replaced already; undo that first"):
        gk.accelerate(model)
    report.undo()
    with pytest.raises(RuntimeError, match="undone already"):
        report.undo()
    gk.accelerate(model, window=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": 2.0}, TypeError, "window must be None or an int"),
        ({"window": 2, "attention": False}, ValueError, "window must be None with attention=False"),
        ({"layers": "odd"}, ValueError, "layers must be None without a window"),
        ({"window": 2, "layers": "third"}, ValueError, 'layers must be "odd", "even", indices or None, not \'third\''),
        ({"window": 2, "layers": [3]}, ValueError, r"layers must be 0 ... 2 \(the model's attentions\), not 3"),
        ({"window": 2, "layers": ["1"]}, TypeError, "layers must be ints, not '1'"),
        ({"norm": 1}, TypeError, "norm must be True or False, not 1"),
        ({"backend": "tpu"}, ValueError, "backend must be one of auto, cuda, triton, eager, not 'tpu'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    model = made(family("GPT-2"))
    with pytest.raises(error, match=message):
        gk.accelerate(model, **arguments)
    assert not any("gptkernels_original" in vars(type(module)) for module in model.modules())


def test_models_with_nothing_to_replace():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not dict"):
        gk.accelerate({})
    with pytest.raises(ValueError, match=r"but Sequential has none; gptkernels.swap.family\(\) teaches it one"):
        gk.accelerate(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"LayerNorm has none(.|\n)*it has no weight"):
        gk.accelerate(nn.LayerNorm(4, elementwise_affine=False))
    with pytest.raises(ValueError, match=r"it normalises 2 dimensions, and the kernel the last one"):
        gk.accelerate(nn.LayerNorm((4, 4)))
    with pytest.raises(ValueError, match=r"it is float64"):
        gk.accelerate(nn.LayerNorm(4).double())
    with pytest.raises(ValueError, match="window must be None for this model"):
        gk.accelerate(nn.LayerNorm(4), window=3)


def test_soft_capped_attention_of_which_nothing_is_told_is_left():
    """The number in a configuration is no sign that the attention function gets it."""
    from swap_models import llama_like

    model = llama_like("Llama")()
    model.config.attn_logit_softcapping = 30.0
    report = gk.accelerate(model)
    assert "attention" not in report.counts()
    reasons = [row.reason for row in report.left if row.part == "attention"]
    assert reasons
    assert all("its scores are soft-capped" in reason for reason in reasons)
    report.undo()
    with pytest.raises(ValueError, match=r"window must be None for this model(.|\n)*its scores are soft-capped"):
        gk.accelerate(nn.Sequential(model, nn.LayerNorm(4)), window=3)


@pytest.mark.parametrize(
    ("model", "config", "changes", "reason"),
    [
        ("LlamaForCausalLM", "LlamaConfig", {"head_dim": 264}, "its heads have a size of 264, and .* takes 1 ... 256"),
        ("Llama4ForCausalLM", "Llama4TextConfig", {"attention_chunk_size": 4}, "it attends within chunks"),
        ("T5EncoderModel", "T5Config", {"d_model": 64}, "its scores have a position bias"),
    ],
)
def test_attention_that_is_left(model, config, changes, reason):
    import transformers

    sizes = {"vocab_size": 61, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, **changes}
    left_alone = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    before = left_alone.config._attn_implementation
    report = gk.accelerate(nn.Sequential(left_alone, nn.LayerNorm(4)))
    reasons = {row.reason for row in report.left if row.part == "attention"}
    assert len(reasons) == 1
    assert re.search(reason, reasons.pop())
    assert left_alone.config._attn_implementation == before


def test_small_heads():
    """Of 8 elements, and of 2"""
    model, tokens = NanoGPT().eval(), torch.randint(0, VOCABULARY, (2, TOKENS))
    model.h[0].attn, model.h[1].attn = NanoAttention(WIDTH, 8), NanoAttention(WIDTH, 32)
    expected = model(tokens)
    assert gk.accelerate(model).left == []
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)


def test_report_on_the_meta_device():
    with torch.device("meta"):
        model = family("GPT-2").make()
    report = gk.accelerate(model)
    assert {row.backend for row in report.replaced} == {"not known on the meta device"}


def test_our_own_modules_are_as_fast_as_they_get():
    with pytest.raises(ValueError, match="Sequential has none"):
        gk.accelerate(nn.Sequential(gk.nn.CausalSelfAttention(64, 4), gk.nn.LayerNorm(64), gk.nn.MLP(64)))


def test_hooks_and_adapters_keep_working():
    model = made(family("GPT-2"))
    block, seen = model.transformer.h[1], []
    expected = model(**inputs(family("GPT-2"))).logits
    for name in ("ln_1", "attn", "mlp"):
        getattr(block, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    gk.accelerate(model)
    torch.testing.assert_close(model(**inputs(family("GPT-2"))).logits, expected, rtol=1e-5, atol=1e-5)
    assert seen == ["ln_1", "attn", "mlp"]
    # Inside of what is one kernel now: the module does what it did before.
    block.mlp.c_fc.register_forward_hook(lambda *_: seen.append("c_fc"))
    torch.testing.assert_close(model(**inputs(family("GPT-2"))).logits, expected, rtol=1e-5, atol=1e-5)
    assert seen[3:] == ["ln_1", "attn", "c_fc", "mlp"]

    class Adapted(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.bias = linear, linear.bias

        def forward(self, x):
            return self.linear(x) + 1

    for adapted in (model.transformer.h[0].mlp, model):
        name = "lm_head" if adapted is model else "c_fc"
        before = model(**inputs(family("GPT-2"))).logits
        setattr(adapted, name, Adapted(getattr(adapted, name)))
        assert not torch.allclose(model(**inputs(family("GPT-2"))).logits, before)
    labels = torch.randint(0, VOCABULARY, (2, TOKENS))
    assert model.train()(**inputs(family("GPT-2")), labels=labels).logits is not None


def test_adapted_layers_are_left_with_the_reason():
    model = made(family("BERT"))
    layer = model.bert.encoder.layer[0]
    layer.output.dense = nn.Sequential(layer.output.dense)
    report = gk.accelerate(model)
    assert [row.path for row in report.left if row.part == "mlp"] == ["bert.encoder.layer.0"]
    assert "Sequential with hooks or weights of its own kind" in next(row.reason for row in report.left)


def test_a_pickle_loads_in_a_new_process(tmp_path):
    model = made(family("Llama"))
    gk.accelerate(model, window=3)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model(**inputs(family("Llama"))).logits, tmp_path / "logits.pt")
    code = f"""
import torch
from swap_models import FAMILIES, inputs
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
logits = model(**inputs(FAMILIES[0])).logits
assert torch.equal(logits, torch.load({str(tmp_path / "logits.pt")!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=TESTS)


FSDP = """
import copy, os, torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from swap_models import FAMILIES, inputs, made
import gptkernels as gk

init_process_group("gloo", init_method="file://STORE", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
tokens = inputs(FAMILIES[0])["input_ids"]
for first in ("accelerate", "shard"):
    model = made(FAMILIES[0]).train()
    fast = copy.deepcopy(model)
    report = gk.accelerate(fast) if first == "accelerate" else None
    for block in fast.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(fast, mesh=mesh)
    report = report or gk.accelerate(fast)
    assert report.counts() == {"loss": 1, "attention": 3, "norm": 7, "mlp": 3}
    losses = [each(tokens, labels=tokens).loss for each in (model, fast)]
    [loss.backward() for loss in losses]
    torch.testing.assert_close(*losses)
    for mine, theirs in zip(fast.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-5)
    try:
        report.undo()
        assert first == "shard"
    except RuntimeError as error:
        assert first == "accelerate" and "by FSDP?" in str(error)
destroy_process_group()
"""


def test_fsdp_before_and_after(tmp_path):
    subprocess.run([sys.executable, "-c", FSDP.replace("STORE", str(tmp_path / "store"))], check=True, cwd=TESTS)


def training_outputs(model, **arguments):
    model.zero_grad()
    out = model(**arguments)
    (out[0] if isinstance(out, tuple) else out.loss).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "OPT", "GPT-1"])
@pytest.mark.parametrize("extra", ["", "num_items_in_batch", "shift_labels", "tuple"])
def test_loss_without_logits(name, extra):
    model = made(family(name)).train()
    fast = copy.deepcopy(model)
    gk.accelerate(fast)
    labels = torch.randint(0, VOCABULARY, (2, TOKENS))
    labels[0, 5:9] = -100
    arguments = {**inputs(family(name)), "labels": labels}
    if extra == "num_items_in_batch":
        arguments[extra] = torch.tensor(7)
    if extra == "shift_labels":
        arguments[extra] = labels.roll(-1, 1)
    if extra == "tuple":
        arguments["return_dict"] = False
    (expected, grads), (found, fast_grads) = training_outputs(model, **arguments), training_outputs(fast, **arguments)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast_grads, grads, rtol=1e-4, atol=1e-5)
    if extra != "tuple":
        assert found.logits is None
    # In evaluation, or without labels, everything is there.
    for arguments in ({**inputs(family(name)), "labels": labels}, inputs(family(name))):
        fast.train("labels" not in arguments)
        expected, found = model(**arguments), fast(**arguments)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
        if "labels" in arguments:
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_signatures_and_names_stay():
    model = made(family("GPT-2"))
    names = [(type(m).__name__, str(inspect.signature(m.forward))) for m in model.modules()]
    shown = repr(model)
    gk.accelerate(model)
    assert [(type(m).__name__, str(inspect.signature(m.forward))) for m in model.modules()] == names
    assert repr(model) == shown


def test_a_loss_of_ones_own_is_kept():
    model = made(family("GPT-2")).train()
    gk.accelerate(model)
    model.loss_function = lambda logits, labels, **_: logits.sum()
    out = model(**inputs(family("GPT-2")), labels=torch.zeros(2, TOKENS, dtype=torch.long))
    torch.testing.assert_close(out.loss, out.logits.sum())


@pytest.mark.parametrize("name", ["GPT-2", "GPT-Neo", "GPT-J", "BERT"])
def test_autocast(name):
    model = made(family(name))
    fast = copy.deepcopy(model)
    gk.accelerate(fast)
    truth = model(**inputs(family(name))).logits
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (each(**inputs(family(name))).logits for each in (model, fast))
    error, allowed = ((x.float() - truth).square().mean().sqrt() for x in (found, expected))
    assert error <= 2 * allowed


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "nanoGPT", "TransformerEncoder"])
def test_compiled(name):
    model = made(family(name))
    fast = copy.deepcopy(model)
    gk.accelerate(fast)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    arguments = inputs(family(name))
    if name in ("GPT-2", "BERT"):
        arguments["attention_mask"] = torch.ones(2, TOKENS)
    for each in (model, fast):
        each.train()
    if name == "GPT-2":
        arguments |= {"labels": arguments["input_ids"], "use_cache": False}
    out = [each(**arguments) for each in (model, compiled)]
    pick = (lambda x: x.loss) if name == "GPT-2" else lambda x: x if isinstance(x, torch.Tensor) else x.logits
    torch.testing.assert_close(*map(pick, out), rtol=1e-5, atol=1e-5)
    [pick(x).square().mean().backward() for x in out]
    grads = [[p.grad for p in each.parameters() if p.grad is not None] for each in (model, fast)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
