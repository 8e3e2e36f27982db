"""accelerate() on every family against the untouched model: what is exact, and why what is not is not.

The table of README.md comes from here: GPTKERNELS_WRITE_TABLES=1 pytest tests/test_swap_families.py writes
benchmarks/results/families.json, and without that the last test compares.
"""

import copy
import io
import json
import os
import pickle
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
from parity import check
from swap_models import (
    BERT,
    FAMILIES,
    GPT2,
    NEOX,
    OPT,
    TOKENS,
    VOCABULARY,
    ModelFamily,
    inputs,
    logits_of,
    made,
    transformers_model,
)
from torch import nn

import gptkernels as gk
from gptkernels import dispatch

pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "families.json"
EXACT = "exact"
FEATURES = ("attention", "rotary", "norm", "mlp", "loss", "left padding", "right padding", "generate", "window")
table: dict[str, dict[str, str]] = {}

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def record(family, feature: str, cell: str) -> None:
    table.setdefault(family.name, {})[feature] = cell


@pytest.fixture
def op_calls():
    """(op, arguments) of each call."""
    with dispatch.recording() as calls:
        yield calls


def gradients(model: nn.Module, arguments: dict, cotangent) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = logits_of(model, **arguments)
    logits.backward(cotangent.to(logits.dtype))
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def cotangent_of(model: nn.Module, arguments: dict, real=None) -> torch.Tensor:
    with torch.no_grad():
        cotangent = torch.randn_like(logits_of(model, **arguments))
    return cotangent if real is None else cotangent * real.unsqueeze(-1)


def assert_same(model: nn.Module, fast: nn.Module, arguments: dict, real=None) -> None:
    """Logits of real tokens and every gradient within 1e-5 in float32."""
    cotangent = cotangent_of(model, arguments, real)
    expected, found = gradients(model, arguments, cotangent), gradients(fast, arguments, cotangent)
    assert expected.keys() == found.keys()
    for name in expected:
        value, truth = found[name], expected[name]
        assert value.isfinite().all(), name
        if name == "logits" and real is not None:
            value, truth = value[real], truth[real]
        size = max(1.0, truth.abs().max().item())
        assert (value - truth).abs().max() <= 1e-5 * size, (name, (value - truth).abs().max(), size)


def padded(side: str) -> torch.Tensor:
    """(2, TOKENS): the second row has 7 tokens of padding"""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, slice(0, 7) if side == "left" else slice(TOKENS - 7, None)] = 0
    return mask


@each_family
def test_logits_gradients_and_calls(family, op_calls):
    model = made(family)
    fast = copy.deepcopy(model)
    report = gk.accelerate(fast)
    arguments = inputs(family)
    op_calls.clear()
    with torch.no_grad():
        logits_of(fast, **arguments)
    counts = Counter(op for op, _ in op_calls)
    assert {op: counts[op] for op in family.calls} == family.calls
    assert_same(model, fast, arguments)
    for part, ops in (
        ("attention", ("attention",)),
        ("norm", ("layer_norm", "rms_norm")),
        ("mlp", ("mlp", "gated_mlp")),
    ):
        reasons = {row.reason for row in report.left if row.part == part}
        made_of_it = sum(family.calls[op] for op in ops)
        assert len(reasons) == (0 if made_of_it else 1), reasons
        record(family, part, EXACT if made_of_it else f"left: {reasons.pop()}")
    rotates = "rotary" in repr(getattr(model, "config", ""))
    assert bool(report.counts().get("rotary")) == bool(family.calls["rope"])
    record(family, "rotary", EXACT if family.calls["rope"] else "its own" if rotates else "has none")


@each_family
def test_bfloat16_is_at_most_twice_as_far_from_the_truth(family):
    model = made(family)
    arguments = inputs(family)
    bfloat16 = copy.deepcopy(model).to(torch.bfloat16)
    model = copy.deepcopy(bfloat16).double()
    fast = copy.deepcopy(bfloat16)
    gk.accelerate(fast)

    def typed(dtype):
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in arguments.items()}

    cotangent = cotangent_of(model, typed(torch.float64)).to(torch.bfloat16)
    truths = gradients(model, typed(torch.float64), cotangent)
    ordinary = gradients(bfloat16, typed(torch.bfloat16), cotangent)
    found = gradients(fast, typed(torch.bfloat16), cotangent)
    check("logits", found["logits"], truths["logits"], ordinary["logits"])
    errors = [by_module(found, truths), by_module(ordinary, truths)]
    for name, error in errors[0].items():
        assert error <= 2 * errors[1][name], (name, error / errors[1][name])


def by_module(gradients: dict[str, torch.Tensor], truths: dict[str, torch.Tensor]) -> dict[str, float]:
    """The root mean square error of the gradients of each layer, weight and bias together.

    Not the largest error: after some layers that is one element's chance (a ReLU that a rounding has switched), and
    more than twice eager PyTorch's for PyTorch's own fused attention too. Not the bias alone: the true gradient of a
    key's bias is zero, which is no measure of how far off anybody is."""
    squares: dict[str, list[torch.Tensor]] = {}
    for name, value in gradients.items():
        squares.setdefault(name.rpartition(".")[0], []).append((value - truths[name]).double().square().flatten())
    return {name: torch.cat(values).mean().sqrt().item() for name, values in squares.items()}


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family, side):
    if not family.pads:
        return record(family, f"{side} padding", "takes none")
    model = made(family)
    fast = copy.deepcopy(model)
    gk.accelerate(fast)
    mask = padded(side)
    real = None if family.encodes_first else mask.bool()
    assert_same(model, fast, {**inputs(family), "attention_mask": mask}, real)
    record(family, f"{side} padding", EXACT)


VARIANTS = {
    "OPT with the norms after": ("OPTForCausalLM", "OPTConfig", OPT | {"do_layer_norm_before": False}),
    "OPT with projections": ("OPTForCausalLM", "OPTConfig", OPT | {"word_embed_proj_dim": 32}),
    "GPT-NeoX one after the other": ("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX | {"use_parallel_residual": False}),
    "GPT-2 with scales by layer": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "GPT-2 with relu": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"activation_function": "relu", "n_inner": 96}),
    "GPT-2 without scales": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"scale_attn_weights": False}),
    "BERT as a decoder": ("BertLMHeadModel", "BertConfig", BERT | {"is_decoder": True}),
    "ALBERT in groups": ("AlbertForMaskedLM", "AlbertConfig", BERT | {"inner_group_num": 2, "num_hidden_groups": 3}),
    "GPT-J turned whole": ("GPTJForCausalLM", "GPTJConfig", GPT2 | {"rotary_dim": 16}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, op_calls):
    model = made(ModelFamily(variant, transformers_model(*VARIANTS[variant][:2], **VARIANTS[variant][2])))
    fast = copy.deepcopy(model)
    report = gk.accelerate(fast)
    assert {"attention", "norm", "mlp"} <= set(report.counts())
    tokens = torch.randint(1, VOCABULARY, (2, TOKENS))
    assert_same(model, fast, {"input_ids": tokens, "attention_mask": padded("left")}, padded("left").bool())


def test_an_activation_that_the_mlp_does_not_have():
    model = transformers_model("GPT2LMHeadModel", "GPT2Config", **GPT2, activation_function="quick_gelu")()
    reasons = {row.reason for row in gk.accelerate(model).left}
    assert reasons == {"gptkernels.mlp has no activation QuickGELUActivation"}


@each_family
def test_greedy_generation_is_the_same(family):
    if not family.generates:
        return record(family, "generate", "has none")
    model = made(family)
    fast = copy.deepcopy(model)
    gk.accelerate(fast)
    options = {"max_new_tokens": 40, "do_sample": False}
    if family.pads:
        options["attention_mask"] = padded("left")
    if not family.caches:
        options["use_cache"] = False
    tokens = inputs(family)[family.takes]
    expected = model.generate(tokens, **options)
    assert expected.shape[1] >= (0 if family.encodes_first else TOKENS) + 40
    assert torch.equal(expected, fast.generate(tokens, **options))
    record(family, "generate", EXACT if family.caches else f"{EXACT}, it has no cache")


@each_family
def test_window_on_odd_layers(family):
    """The kernels are asked for that window in those layers, and far tokens do not matter any more."""
    fast = made(family)
    if not family.calls["attention"]:
        with pytest.raises(ValueError, match="not all of its attention can have one"):
            gk.accelerate(fast, window=3)
        return record(family, "window", "left, with the attention")
    own = windows_of(made(family), inputs(family))
    if family.name == "ALBERT":
        with pytest.raises(ValueError, match="layers must choose an attention, but 'odd' has none"):
            gk.accelerate(fast, window=3, layers="odd")
    report = gk.accelerate(fast, window=3, layers="even" if family.name == "ALBERT" else "odd")
    chosen = chosen_layers(report, family.calls["attention"])
    assert windows_of(fast, inputs(family)) == [3 if layer in chosen else window for layer, window in enumerate(own)]
    report.undo()
    gk.accelerate(fast, window=3)
    assert set(windows_of(fast, inputs(family))) == {3}
    if family.takes in ("input_ids", "tokens") and not family.encodes_first:
        ((name, tokens),) = inputs(family).items()
        changed = tokens.clone()
        changed[:, 0] = changed[:, 0] % (VOCABULARY - 1) + 1
        before, after = (logits_of(fast, **{name: x}) for x in (tokens, changed))
        moved = (before != after).any(-1).any(0)
        reach = family.calls["attention"] * 2
        assert moved[: reach + 1].all()
        assert not moved[reach + 1 :].any()
    record(family, "window", EXACT)


def chosen_layers(report, calls: int) -> list[int]:
    """Which calls of a forward pass have the window; ALBERT's one attention is called for every layer."""
    rows = [row for row in report.replaced if row.part == "attention"]
    return [layer for layer in range(calls) if "window 3" in rows[layer % len(rows)].became]


def windows_of(model, arguments) -> list:
    """Of each attention in a forward pass, on our kernels."""
    replaced = any("gptkernels_original" in vars(type(module)) for module in model.modules())
    report = None if replaced else gk.accelerate(model)
    with dispatch.recording() as calls, torch.no_grad():
        logits_of(model, **arguments)
    if report:
        report.undo()
    return [call.window for op, call in calls if op == "attention"]


@each_family
def test_training_gives_the_same_losses(family, op_calls):
    model = made(family)
    fast = copy.deepcopy(model)
    report = gk.accelerate(fast)
    fused = any(row.part == "loss" for row in report.replaced)
    op_calls.clear()
    losses = [train(each, family) for each in (model, fast)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.1
    assert [op for op, _ in op_calls].count("linear_cross_entropy") == (20 if fused else 0)
    reasons = [row.reason for row in report.left if row.part == "loss"]
    record(family, "loss", EXACT if fused else f"left: {reasons[0]}" if reasons else "its own")


def train(model: nn.Module, family) -> torch.Tensor:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    arguments = inputs(family, rows=4)
    labels = torch.randint(0, VOCABULARY, (4, TOKENS), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(20):
        if family.generates:
            loss = model(**arguments, labels=labels).loss
        else:
            logits = logits_of(model, **arguments)
            targets = labels if logits.ndim == 3 else labels[:, 0]
            loss = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


@each_family
def test_state_dict_deepcopy_pickle_and_undo(family):
    model = made(family)
    fast = copy.deepcopy(model)
    parameters = dict(fast.named_parameters())
    classes = {name: type(module) for name, module in fast.named_modules()}
    settings = {name: dict(vars(module)) for name, module in fast.named_modules()}
    report = gk.accelerate(fast, window=3 if family.calls["attention"] else None)
    arguments = inputs(family)
    expected = logits_of(fast, **arguments)
    # The very same parameters, under the same names.
    assert all(parameter is parameters[name] for name, parameter in fast.named_parameters())
    assert list(fast.state_dict()) == list(model.state_dict())
    fast.load_state_dict(model.state_dict())
    copies = copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), saved_and_loaded(fast)
    for each in copies:
        assert torch.equal(logits_of(each, **arguments), expected)
        assert {type(module).__name__ for module in each.modules()} == {cls.__name__ for cls in classes.values()}
        assert sum("gptkernels_original" in vars(type(module)) for module in each.modules()) == len(
            [module for module in fast.modules() if "gptkernels_original" in vars(type(module))]
        )
    report.undo()
    assert {name: type(module) for name, module in fast.named_modules()} == classes
    assert all(vars(module).keys() == settings[name].keys() for name, module in fast.named_modules())
    assert torch.equal(logits_of(fast, **arguments), logits_of(model, **arguments))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_table_of_the_readme(monkeypatch):
    """What this run has found is what README.md says."""
    if set(table) != {family.name for family in FAMILIES} or any(set(row) != set(FEATURES) for row in table.values()):
        pytest.skip("only where all tests of this file have run and passed")
    found = json.dumps({name: {feature: row[feature] for feature in FEATURES} for name, row in table.items()}, indent=1)
    if os.environ.get("GPTKERNELS_WRITE_TABLES") == "1":
        RESULTS.write_text(found + "\n")
    assert RESULTS.read_text() == found + "\n", "GPTKERNELS_WRITE_TABLES=1 pytest tests/test_swap_families.py writes it"
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
    assert report["families"]() in (ROOT / "README.md").read_text(), "python benchmarks/report.py fills it in"
