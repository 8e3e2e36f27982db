"""Weights of transformers: the same logits and gradients there and here, there and back, and bad files."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from parity import check

from gptkernels.models import GPT, GPTConfig, hf_config

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)


def gpt2(**kw):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=101,
            n_positions=48,
            n_embd=64,
            n_layer=3,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="eager",
            **kw,
        )
    )


def gpt1():
    return transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=101, n_positions=48, n_embd=64, n_layer=3, n_head=4)
    )


def gpt_neo():
    return transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=101,
            max_position_embeddings=48,
            hidden_size=64,
            num_layers=4,
            num_heads=4,
            attention_types=[[["global", "local"], 2]],
            window_size=5,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def albert():
    return transformers.AlbertForPreTraining(
        transformers.AlbertConfig(
            vocab_size=101,
            embedding_size=24,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=48,
            attn_implementation="eager",
        )
    )


def llama(layers=4, **kw):
    settings = {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}} | kw
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=101,
            max_position_embeddings=48,
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="eager",
            **settings,
        )
    )


FAMILIES = {"gpt1": gpt1, "gpt2": gpt2, "gpt2-untied": lambda: gpt2(tie_word_embeddings=False)}
FAMILIES |= {"gpt_neo": gpt_neo, "albert": albert, "llama": llama}
FAMILIES["llama-tied-biased"] = lambda: llama(3, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)


@pytest.fixture(params=FAMILIES)
def theirs(request):
    torch.manual_seed(3)
    model = FAMILIES[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from the initial values, where biases are zero and norms are one.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def their_logits(model, tokens, key_start=None):
    """tokens: (B, T) -> (B, T, V)"""
    if key_start is None:
        out = model(input_ids=tokens)
    else:
        position = torch.arange(tokens.shape[1]) - key_start.unsqueeze(1)
        out = model(input_ids=tokens, attention_mask=(position >= 0).long(), position_ids=position.clamp(min=0))
    return out.prediction_logits if "Albert" in type(model).__name__ else out.logits


def targets_of(tokens, key_start=None):
    real = torch.arange(tokens.shape[1]) >= (torch.zeros(2) if key_start is None else key_start).unsqueeze(1)
    return tokens.roll(-1, 1).masked_fill(~real, -100)


def their_gradients(theirs, tokens, key_start=None):
    """-> name of a parameter of ours -> their gradient in its shape"""
    theirs.zero_grad()
    loss = F.cross_entropy(
        their_logits(theirs, tokens, key_start).flatten(0, 1), targets_of(tokens, key_start).flatten()
    )
    loss.backward()
    # Loading their gradients as if they were weights puts them into our names and shapes.
    grads = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in theirs.named_parameters()}
    tied = {
        name: grads.get(name, grads.get(twin_name(name), torch.zeros_like(x)))
        for name, x in theirs.state_dict().items()
    }
    return dict(GPT.from_hf(Holder(theirs.config, tied)).named_parameters())


def our_gradients(ours, tokens, key_start=None):
    ours(tokens, targets_of(tokens, key_start), key_start=key_start).backward()
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in ours.named_parameters()}


def twin_name(name):
    return {"predictions.decoder.bias": "predictions.bias"}.get(name)


class Holder:
    def __init__(self, config, tensors):
        self.config, self.tensors = config, tensors

    def state_dict(self):
        return self.tensors


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
def test_logits_and_gradients_in_float32(theirs, padded):
    ours = GPT.from_hf(theirs).eval()
    tokens = torch.randint(101, (2, 33))  # GPT-Neo's window is 5: long past it
    key_start = torch.tensor([0, 9], dtype=torch.int32) if padded else None
    expected, actual = their_logits(theirs, tokens, key_start), ours(tokens, key_start=key_start)
    real = torch.arange(33) >= (key_start.unsqueeze(1) if padded else torch.zeros(2, 1))
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    compared, expected = 0, their_gradients(theirs, tokens, key_start)
    for name, a in our_gradients(ours, tokens, key_start).items():
        largest = expected[name].abs().max().item()
        assert (a - expected[name]).abs().max() <= 1e-5 * max(largest, 1e-3), name
        compared += largest > 0
    assert compared >= 30 or len(ours.blocks) == 1


def test_logits_and_gradients_in_bfloat16(theirs):
    """By the rule of all parity checks: at most twice as far from float64 as transformers' own model is."""
    tokens = torch.randint(101, (2, 33))
    theirs = theirs.to(torch.bfloat16).double()  # the same weights in both
    truth, true_grads = their_logits(theirs, tokens), their_gradients(theirs, tokens)
    theirs = theirs.to(torch.bfloat16)
    ours = GPT.from_hf(theirs)
    actual = ours(tokens)
    assert actual.dtype == torch.bfloat16
    check("logits", actual, truth, their_logits(theirs, tokens))
    ordinary = their_gradients(theirs, tokens)
    for name, grad in our_gradients(ours, tokens).items():
        # The rule allows half a unit in the last place of 1: brought there, which rounds nothing.
        largest = true_grads[name].abs().max().item()
        unit = 2.0 ** -math.floor(math.log2(largest)) if largest > 1e-9 else 1.0
        check(name, grad * unit, true_grads[name] * unit, ordinary[name] * unit)


def test_there_and_back(theirs, tmp_path):
    ours = GPT.from_hf(theirs).eval()
    tokens = torch.randint(101, (2, 20))
    expected = ours(tokens)
    torch.testing.assert_close(their_logits(ours.to_hf(), tokens), expected, rtol=1e-5, atol=1e-4)
    ours.to_hf(tmp_path)
    read = type(theirs).from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(their_logits(read, tokens), expected, rtol=1e-5, atol=1e-4)
    again = GPT.from_hf(tmp_path)
    assert again.config == ours.config
    assert torch.equal(again(tokens), expected)


def test_what_transformers_saves(theirs, tmp_path):
    tokens = torch.randint(101, (2, 20))
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    torch.testing.assert_close(GPT.from_hf(tmp_path).eval()(tokens), their_logits(theirs, tokens), rtol=1e-5, atol=1e-4)


def test_pickles_and_files_of_the_base_model(tmp_path):
    model = gpt2().eval()
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    torch.save(model.transformer.state_dict(), tmp_path / "pytorch_model.bin")
    tokens = torch.randint(101, (2, 20))
    torch.testing.assert_close(GPT.from_hf(str(tmp_path))(tokens), model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_generation_as_transformers():
    for make in (gpt2, gpt_neo, llama):
        torch.manual_seed(5)
        model = make().eval()
        tokens = torch.randint(101, (1, 9))
        expected = model.generate(tokens, max_new_tokens=30, do_sample=False, pad_token_id=0)
        assert torch.equal(GPT.from_hf(model).generate(tokens, 30, temperature=0), expected)


def test_banded_gpt_goes_to_gpt_neo():
    config = GPTConfig(
        vocabulary=101,
        context=48,
        layers=3,
        width=64,
        heads=4,
        pattern=("banded", "dense"),
        window=4,
        qkv_bias=False,
        init_std=0.1,
    )
    ours = GPT(config).eval()
    twin = ours.to_hf().eval()
    assert twin.config.attention_layers == ["local", "global", "local"]
    tokens = torch.randint(101, (2, 20))
    torch.testing.assert_close(twin(tokens).logits, ours(tokens), rtol=1e-5, atol=1e-5)


def saved(tmp_path):
    gpt2().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("keep", [0, 4, 100, 2000])
def test_truncated_safetensors(tmp_path, keep):
    path = saved(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        GPT.from_hf(tmp_path)


def test_truncated_pickle(tmp_path):
    path = saved(tmp_path) / "pytorch_model.bin"
    torch.save(gpt2().state_dict(), path)
    (tmp_path / "model.safetensors").unlink()
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        GPT.from_hf(tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle ran code",))


def test_pickles_run_no_code(tmp_path):
    (saved(tmp_path) / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        GPT.from_hf(tmp_path)


def test_wrong_files(tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, n_layer=4)
    with pytest.raises(ValueError, match=r"must have transformer\.h\.3\.ln_1\.weight.* and 7 more"):
        GPT.from_hf(tmp_path)
    edit_config(tmp_path, n_layer=3, n_positions=47)
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight must have shape \(47, 64\).*not \(48, 64\)"):
        GPT.from_hf(tmp_path)
    edit_config(tmp_path, n_positions=48, activation_function="mish")
    with pytest.raises(ValueError, match="activation_function must be one of"):
        GPT.from_hf(tmp_path)
    edit_config(tmp_path, activation_function="gelu_new", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx must be False"):
        GPT.from_hf(tmp_path)
    edit_config(tmp_path, model_type="opt")
    with pytest.raises(ValueError, match="type must be one of"):
        GPT.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        GPT.from_hf(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        GPT.from_hf(tmp_path)


def test_index_stays_in_its_folder(tmp_path):
    (saved(tmp_path) / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="its own folder"):
        GPT.from_hf(tmp_path)


def test_no_weights(tmp_path):
    (saved(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must have model\.safetensors"):
        GPT.from_hf(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        GPT.from_hf(tmp_path / "nothing")


LLAMA = {"norm": "rms", "gated": True, "rotary": 1e4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": False}, "bias must be True"),
        ({"pattern": ("banded",), "window": 4}, "qkv_bias must be False"),
        ({"share_layers": True}, "share_layers"),
        ({"norm": "post", "mlp_width": 100 * 8}, "mlp_width must be"),
        ({"objective": "masked"}, "a masked model must be ALBERT's"),
        ({"norm": "rms"}, "gated must be True for a Llama"),
        ({"kv_heads": 2}, "norm must be 'rms' for a Llama"),
        (LLAMA | {"rotary": None}, "rotary must be a base for a Llama.*, not None"),
        (LLAMA | {"qk_norm": True}, "qk_norm must be False for a Llama"),
        (LLAMA | {"attention_scale": 1.0}, r"attention_scale must be None or 0\.25 for a Llama.*, not 1\.0"),
        (LLAMA | {"dropout": 0.1}, r"dropout must be 0\.0 for a Llama"),
        (LLAMA | {"pattern": ("banded",), "window": 4}, r"pattern must be \('dense',\) for a Llama"),
        (LLAMA | {"qkv_bias": False}, "qkv_bias must be True for a Llama"),
    ],
)
def test_models_that_transformers_lacks(changes, message):
    config = GPTConfig(vocabulary=101, context=48, layers=2, width=64, heads=4, **changes)
    with pytest.raises(ValueError, match=message):
        GPT(config).to_hf()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "mlp_bias must be True, not False"),
        ({"mlp_bias": True}, "mlp_bias must be False, not True"),
        ({"head_dim": 32}, "head_dim must be .*, not 32"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type must be 'default'.*not 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type .*not 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1.0, not 0.5"),
        ({"hidden_act": "mish"}, "hidden_act must be one of"),
    ],
)
def test_llamas_that_are_not_ours(changes, message, tmp_path):
    llama().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        GPT.from_hf(tmp_path)


def test_llama_configs_of_older_transformers(tmp_path):
    llama().save_pretrained(tmp_path)
    expected = GPT.from_hf(tmp_path).config
    assert (expected.rotary, expected.kv_heads) == (500.0, 2)
    edit_config(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=None)
    assert GPT.from_hf(tmp_path).config == expected


def test_tinyllama_is_the_preset():
    """Its config.json, as published"""
    settings = {"hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632}
    settings |= {"max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 22}
    settings |= {"num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None}
    settings |= {"tie_word_embeddings": False, "vocab_size": 32000}
    assert hf_config.from_llama(settings) == GPTConfig.preset("tinyllama-1.1b")


def test_albert_for_masked_tokens_alone():
    config = albert().config
    theirs = transformers.AlbertForMaskedLM(config).eval()
    with pytest.warns(UserWarning, match="starts as a new one"):
        ours = GPT.from_hf(theirs)
    tokens = torch.randint(101, (2, 20))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(ours.masked_head.order.weight).all()


def test_sentence_order_as_transformers():
    theirs = albert().eval()
    tokens, types = torch.randint(101, (2, 20)), (torch.arange(20) >= 11).long().expand(2, -1)
    targets = tokens.masked_fill(torch.rand(2, 20) < 0.8, -100)
    order = torch.tensor([0, 1])
    out = theirs(input_ids=tokens, token_type_ids=types, labels=targets, sentence_order_label=order)
    loss = GPT.from_hf(theirs).eval()(tokens, targets, token_types=types, order=order)
    torch.testing.assert_close(loss, out.loss)
