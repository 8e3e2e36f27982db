"""attn_implementation="gptkernels" in transformers, against its own eager attention."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from swap_models import FAMILIES, TOKENS, VOCABULARY, inputs, llama_like, made
from torch import nn

import gptkernels as gk
from gptkernels import dispatch

pytest.importorskip("transformers")

ON_INTERFACE = [f for f in FAMILIES if f.name in ("GPT-2", "GPT-NeoX", "OPT", "Llama", "Mistral", "Qwen2", "Gemma")]
each_family = pytest.mark.parametrize("family", ON_INTERFACE, ids=lambda family: family.name)


@pytest.fixture(autouse=True)
def registered():
    gk.hf.register()
    yield
    gk.hf.register()


@pytest.fixture
def attention_calls():
    """(op, record) of each attention that runs on our kernels."""
    with dispatch.recording() as calls:
        yield calls


@pytest.fixture
def compiled_calls(monkeypatch):
    """The ops that torch.compile has traced."""
    calls, choose = [], dispatch.choose

    def noting(call, record):
        calls.append(call.op)
        return choose(call, record)

    monkeypatch.setattr(dispatch, "choose", noting)
    return calls


def pair(family) -> tuple[nn.Module, nn.Module]:
    model = made(family)
    fast = copy.deepcopy(model)
    fast.set_attn_implementation("gptkernels")
    return model, fast


def named(name: str, make, **changes):
    return type(FAMILIES[0])(name, make, **changes)


def test_importing_gptkernels_does_not_import_transformers():
    code = "import sys, gptkernels as gk; gk.hf, gk.swap, gk.accelerate; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@each_family
def test_every_way_to_ask_for_it(family, attention_calls, tmp_path):
    model = made(family)
    config = copy.deepcopy(model.config)
    model.save_pretrained(tmp_path)
    cls = type(model)
    loaded = cls.from_pretrained(tmp_path, attn_implementation="gptkernels").eval()
    config._attn_implementation = "gptkernels"
    built = cls(config).eval()
    built.load_state_dict(model.state_dict())
    model_set = copy.deepcopy(model)
    model_set.set_attn_implementation("gptkernels")
    arguments = inputs(family)
    expected = model(**arguments).logits
    for fast in (loaded, built, model_set):
        attention_calls.clear()
        torch.testing.assert_close(fast(**arguments).logits, expected, rtol=1e-5, atol=1e-5)
        assert len(attention_calls) == family.calls["attention"]
    model_set.set_attn_implementation("eager")
    attention_calls.clear()
    assert torch.equal(model_set(**arguments).logits, expected)
    assert not attention_calls


@each_family
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_left_padding_and_a_cache(family, cache, attention_calls):
    """Static caches have room after the newest token, which nobody may see; sliding ones are shorter than the text."""
    model, fast = pair(family)
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[1, :9], mask[2, :3] = 0, 0
    tokens = inputs(family, rows=3)["input_ids"]
    options = {"max_new_tokens": 40, "do_sample": False, "attention_mask": mask, "cache_implementation": cache}
    expected = model.generate(tokens, **options)
    assert torch.equal(expected, fast.generate(tokens, **options))
    assert len(attention_calls) == 40 * family.calls["attention"]


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mistral", "Qwen2"])
def test_static_cache_without_padding_is_read_in_place(name, attention_calls):
    """Mistral's window and cache are longer than the prompt and shorter than the text."""
    family = next(f for f in FAMILIES if f.name == name)
    if name == "Mistral":
        family = named(name, llama_like(name, sliding_window=TOKENS + 4))
    model, fast = pair(family)
    tokens = inputs(family)["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, cache_implementation="static", **options)
    assert torch.equal(expected, fast.generate(tokens, cache_implementation="static", **options))
    assert "decode_attention" in {op for op, *_ in attention_calls}


def test_a_hole_in_the_prompt_of_a_cached_generation(attention_calls):
    """Right padding, and then new tokens: the hidden keys lie between visible ones."""
    model, fast = pair(named("Llama", llama_like("Llama")))
    tokens = torch.randint(1, VOCABULARY, (2, TOKENS))
    mask = torch.ones(2, TOKENS + 4, dtype=torch.long)
    mask[1, TOKENS - 7 : TOKENS] = 0
    logits = []
    for each in (model, fast):
        first = each(tokens, attention_mask=mask[:, :TOKENS], use_cache=True)
        more = torch.arange(1, 5).expand(2, 4)
        logits.append(each(more, attention_mask=mask, past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_packed_documents(name, how, attention_calls):
    model, fast = pair(named(name, llama_like(name, **({"sliding_window": 5} if name == "Mistral" else {}))))
    bounds = [0, 5, 6, 17, TOKENS]
    lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    tokens = torch.randint(1, VOCABULARY, (1, TOKENS))
    packed = {"position_ids": positions, "use_cache": False}
    expected = model(tokens, **packed).logits
    if how == "cu_seq_lens":
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        packed |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        packed |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    torch.testing.assert_close(fast(tokens, **packed).logits, expected, rtol=1e-5, atol=1e-5)
    assert [call.cu_seqlens.tolist() for _, call in attention_calls] == [bounds] * 3


@each_family
def test_gradient_checkpointing(family):
    model, fast = pair(family)
    arguments = {**inputs(family), "attention_mask": torch.ones(2, TOKENS).index_fill(1, torch.arange(3), 0)}
    gradients = []
    for each in (model, fast):
        each.gradient_checkpointing_enable({"use_reentrant": False})
        each.train()
        each(**arguments, use_cache=False).logits[:, 3:].square().mean().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_dropout_reaches_the_kernels_in_training_only(attention_calls):
    family = named("Llama", llama_like("Llama", attention_dropout=0.25))
    _, fast = pair(family)
    fast(**inputs(family))
    fast.train()(**inputs(family))
    assert [call.dropout for _, call in attention_calls] == [0.0] * 3 + [0.25] * 3


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_compiled(name, padded, compiled_calls):
    family = next(f for f in FAMILIES if f.name == name)
    model, fast = pair(family)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, : 5 if padded else 0] = 0
    arguments = {**inputs(family), "attention_mask": mask, "use_cache": False}
    # A sliding window is read out of transformers' closures, which cannot be compiled.
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=name != "Mistral")
    gradients = []
    for each in (model, compiled):
        logits = each(**arguments).logits[mask.bool()]
        logits.square().mean().backward()
        gradients.append([logits.detach(), *(p.grad.clone() for p in each.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert compiled_calls


def test_compiled_without_a_mask(compiled_calls):
    model, fast = pair(next(f for f in FAMILIES if f.name == "Llama"))
    arguments = {**inputs(FAMILIES[0]), "use_cache": False}
    compiled = torch.compile(fast, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments).logits, model(**arguments).logits, rtol=1e-5, atol=1e-5)
    assert compiled_calls


def test_compiled_holes_are_refused():
    family = next(f for f in FAMILIES if f.name == "Llama")
    _, fast = pair(family)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, 5:7] = 0
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="hidden keys between visible ones are not compiled"):
        compiled(**inputs(family), attention_mask=mask, use_cache=False)


def refused_calls():
    def holes(model):
        mask = torch.ones(2, TOKENS, dtype=torch.long)
        mask[1, 5:7] = 0
        return {"attention_mask": mask}

    def dense(model):
        return {"attention_mask": torch.zeros(2, 1, TOKENS, TOKENS).masked_fill(torch.rand(TOKENS, TOKENS) < 0.3, -1e9)}

    return {
        "holes among the tokens": (holes, "hides keys between visible ones, among the tokens of this very call"),
        "a mask of scores": (dense, r"attention_mask of shape \(2, 1, 24, 24\) made by the caller"),
    }


@pytest.mark.parametrize("case", refused_calls())
def test_what_cannot_be_exact_is_refused_or_falls_back(case):
    make, reason = refused_calls()[case]
    model, fast = pair(next(f for f in FAMILIES if f.name == "Llama"))
    arguments = {**inputs(FAMILIES[0]), **make(model)}
    with pytest.raises(NotImplementedError, match=reason):
        fast(**arguments)
    gk.hf.register(fallback="sdpa")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            expected, found = model(**arguments).logits, fast(**arguments).logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert sum("gptkernels: " in str(each.message) for each in caught) == 1


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_attention_weights_are_refused(name):
    _, fast = pair(next(f for f in FAMILIES if f.name == name))
    with pytest.raises(
        NotImplementedError, match="output_attentions=True: the kernels never have the attention weights"
    ):
        fast(**inputs(FAMILIES[0]), output_attentions=True)


def test_softcap_and_sinks_never_fall_back():
    """SDPA cannot do them: a mask that the kernels cannot take is an error even where it would run."""
    gk.hf.register(fallback="sdpa")
    model, fast = pair(named("Gemma2", llama_like("Gemma2", attn_logit_softcapping=0.5, sliding_window=5)))
    arguments = inputs(FAMILIES[0])
    torch.testing.assert_close(fast(**arguments).logits, model(**arguments).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="soft-capped scores or attention sinks"):
        fast(**{**arguments, "attention_mask": torch.zeros(2, 1, 24, 24)})


def test_a_window_is_never_lost():
    """Where the mask says nothing of a window and the layer does, the layer's counts; where they differ, neither."""
    from gptkernels.swap import attention_interface as hf
    from gptkernels.swap import masks

    layer, (q, k, v) = nn.Module(), torch.randn(3, 1, 2, 9, 16)
    none = masks.nothing_hidden(True, None, q.device)
    expected = gk.attention(q, k, v, window=4).transpose(1, 2)
    banded = masks.nothing_hidden(True, 4, q.device)
    for mask, window in ((None, 4), (none, 4), (banded, None), (banded, 4)):
        assert torch.equal(hf.gptkernels_attention(layer, q, k, v, mask, sliding_window=window)[0], expected)
    with pytest.raises(NotImplementedError, match="the mask has a sliding window of 4 keys and the layer one of 3"):
        hf.gptkernels_attention(layer, q, k, v, banded, sliding_window=3)


def test_bad_arguments():
    with pytest.raises(ValueError, match="fallback must be None or \"sdpa\", not 'eager'"):
        gk.hf.register(fallback="eager")


def test_a_window_survives_the_fallback(attention_calls):
    """PyTorch's attention has the window, or nothing runs."""
    gk.hf.register(fallback="sdpa")
    dense = torch.zeros(2, 1, TOKENS, TOKENS)
    for family in (f for f in FAMILIES if f.name in ("Llama", "Mistral", "GPT-2")):
        model = made(family)
        gk.accelerate(model, window=3)
        with pytest.raises(NotImplementedError, match=r"made by the caller.* asked for a window of 3"):
            model(**inputs(family), attention_mask=dense)
        with pytest.warns(UserWarning, match="output_attentions=True"):
            weightless = model(**inputs(family), output_attentions=True)
        torch.testing.assert_close(weightless.logits, model(**inputs(family)).logits, rtol=1e-5, atol=1e-5)
        gk.hf.register(fallback="sdpa")
    padding = torch.ones(2, TOKENS, dtype=torch.long)
    padding[1, 8:] = 0
    model = made(next(f for f in FAMILIES if f.name == "BERT"))
    gk.accelerate(model, window=3)
    with pytest.raises(NotImplementedError, match="hides keys after visible ones, and the layer has a window"):
        model(**inputs(FAMILIES[0]), attention_mask=padding)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mistral"])
def test_generation_with_accelerates_window(name, attention_calls):
    """The same tokens from a growing cache, from one with room, and from no cache."""
    family = next(f for f in FAMILIES if f.name == name)
    model = made(family)
    gk.accelerate(model, window=5, layers="odd")
    tokens = inputs(family)["input_ids"]
    mask = torch.ones_like(tokens)
    texts = []
    for padding in (0, 6):
        mask[1, :padding] = 0
        for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
            options = {**options, "max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
            texts.append(model.generate(tokens, **options))
        assert torch.equal(texts[-1], texts[-2])
        assert torch.equal(texts[-1], texts[-3])
