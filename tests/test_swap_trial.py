"""Models of transformers that no family names: what accelerate() promises for them was tried, and runs."""

import copy

import pytest
import torch

import gptkernels as gk

transformers = pytest.importorskip("transformers")

TOKENS = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
DECODER = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64},
}
BOTH = {
    **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "dropout": 0.0},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "decoder_start_token_id": 0},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
NO_WINDOW = {"shared_expert_intermediate_size": 32, "use_sliding_window": False, "sliding_window": 0}
WHISPER = {"max_source_positions": 16, "max_target_positions": 32, "num_mel_bins": 16}
GPT = {"vocab_size": 61, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0}

# Model, configuration, options, and what has to be replaced.
REPLACED = {
    "bart": ("BartForConditionalGeneration", "BartConfig", {**TOKENS, **BOTH}, {"attention": 6}),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", {**TOKENS, **BOTH}, {"attention": 6}),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", {**TOKENS, **BOTH}, {"attention": 6}),
    "marian": ("MarianMTModel", "MarianConfig", {**TOKENS, **BOTH, "decoder_vocab_size": 61}, {"attention": 6}),
    "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Config", {**TOKENS, **BOTH}, {"attention": 6}),
    "blenderbot": ("BlenderbotForConditionalGeneration", "BlenderbotConfig", {**TOKENS, **BOTH}, {"attention": 6}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {**TOKENS, **BOTH, **WHISPER}, {"attention": 6}),
    "biogpt": ("BioGptForCausalLM", "BioGptConfig", {**TOKENS, **DECODER}, {"attention": 2}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {**TOKENS, **DECODER}, {"attention": 2, "loss": 1}),
    "qwen2_moe": (
        *("Qwen2MoeForCausalLM", "Qwen2MoeConfig"),
        *({**TOKENS, **DECODER, **EXPERTS, **NO_WINDOW}, {"attention": 2, "loss": 1}),
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TOKENS, **DECODER, "head_dim": 16}, {"attention": 2, "loss": 1}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {**TOKENS, **DECODER}, {"attention": 2, "loss": 1}),
    "granite": (
        *("GraniteForCausalLM", "GraniteConfig"),
        *({**TOKENS, **DECODER, "logits_scaling": 3.0}, {"attention": 2, "loss": 1}),
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**TOKENS, **DECODER, "logit_scale": 0.3}, {"loss": 1}),
    "gemma2": (
        *("Gemma2ForCausalLM", "Gemma2Config"),
        *({**TOKENS, **DECODER, "head_dim": 16, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.2},),
        {"attention": 2, "loss": 1},
    ),
    "gpt_oss": (
        *("GptOssForCausalLM", "GptOssConfig"),
        *({**TOKENS, **DECODER, "head_dim": 16, "num_local_experts": 4, "sliding_window": 4}, {"attention": 2}),
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", {**TOKENS, **DECODER}, {"attention": 2, "loss": 1}),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 8}, {"loss": 1}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT, {"attention": 2, "loss": 1}),
}
# What is left, and the reason.
LEFT = {
    "falcon": ("FalconForCausalLM", "FalconConfig", {"alibi": True}, "attention", "it adds ALiBi or a position bias"),
    "bloom": ("BloomForCausalLM", "BloomConfig", {}, "attention", "it adds ALiBi or a position bias"),
    "mpt": ("MptForCausalLM", "MptConfig", {"d_model": 64, "n_heads": 4}, "attention", "it adds ALiBi"),
    "codegen": (
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {**GPT, "rotary_dim": 8},
        "attention",
        "it writes its attention",
    ),
    "xglm": ("XGLMForCausalLM", "XGLMConfig", {"attention_heads": 4}, "attention", "it writes its attention out"),
    "xlnet": ("XLNetLMHeadModel", "XLNetConfig", {}, "attention", "it adds relative positions to its scores"),
}


def made(model: str, config: str, options: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, config)(**options)
    config._attn_implementation = "eager"
    found = getattr(transformers, model)(config).eval()
    for name, parameter in found.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    return found


def arguments(model) -> dict:
    tokens = torch.randint(3, 61, (2, 10))
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": tokens}
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})}


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_promised_runs_and_agrees(name):
    model_name, config, options, expected = REPLACED[name]
    model = made(model_name, config, options)
    fast = copy.deepcopy(model)
    report = gk.accelerate(fast)
    counts = report.counts()
    assert {part: counts.get(part) for part in expected} == expected
    given = arguments(model)
    with torch.no_grad():
        before, after = model(**given).logits, fast(**given).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    if "loss" in expected:
        for each in (model, fast):
            for module in each.modules():  # dropout draws other numbers
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        found = fast.train()(**given, labels=given["input_ids"])
        assert found.logits is None
        loss = model.train()(**given, labels=given["input_ids"]).loss
        torch.testing.assert_close(found.loss, loss, rtol=1e-4, atol=1e-5)
    report.undo()
    with torch.no_grad():
        assert torch.equal(fast.eval()(**given).logits, before)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_says_what_is_missing(name):
    model_name, config, options, part, reason = LEFT[name]
    sizes = {"vocab_size": 61, "hidden_size": 64, "d_model": 64, "n_layer": 1, "n_layers": 1, "num_layers": 1}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "n_head": 4, "d_inner": 96, "ffn_dim": 96}
    known = getattr(transformers, config)()
    usual = {key: value for key, value in {**sizes, **heads}.items() if hasattr(known, key)}
    if config in ("MptConfig", "XGLMConfig", "XLNetConfig", "CodeGenConfig"):
        usual = {key: value for key, value in usual.items() if key not in ("hidden_size", "num_hidden_layers")}
        usual = {key: value for key, value in usual.items() if key != "num_attention_heads"}
    model = made(model_name, config, {**usual, **options})
    report = gk.accelerate(torch.nn.Sequential(model, torch.nn.LayerNorm(4)))
    reasons = {row.reason for row in report.left if row.part == part}
    assert len(reasons) == 1
    assert reason in reasons.pop()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_modernbert_with_padding(padding):
    """Its local layers have windows, and its ordinary input is padded on the right."""
    options = {**TOKENS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    options |= {"local_attention": 6, "max_position_embeddings": 64, "cls_token_id": 0, "sep_token_id": 1}
    model = made("ModernBertForMaskedLM", "ModernBertConfig", options)
    fast = copy.deepcopy(model)
    assert gk.accelerate(fast).counts()["attention"] == 4
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[1, 12:], mask[2, 1:] = 0, 0
    mask = mask.flip(1) if padding == "left" else mask
    tokens = torch.randint(3, 61, mask.shape)
    outputs = [each(input_ids=tokens, attention_mask=mask).logits[mask.bool()] for each in (model, fast)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    grads = [
        torch.autograd.grad(out.square().sum(), each.parameters())
        for out, each in zip(outputs, (model, fast), strict=True)
    ]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)


def test_hooks_do_not_notice_the_trial():
    model, seen = made("BioGptForCausalLM", "BioGptConfig", {**TOKENS, **DECODER}), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
        module.register_forward_pre_hook(lambda *_: seen.append(2))
    modes = [module.training for module in model.train().modules()]
    gk.accelerate(model)
    assert not seen
    assert [module.training for module in model.modules()] == modes
    model(input_ids=torch.zeros((1, 3), dtype=torch.int64))
    assert seen


def test_a_model_that_only_looks_right_is_left(monkeypatch):
    """Its attention computes something else than it says."""
    from transformers.models.biogpt import modeling_biogpt

    model = made("BioGptForCausalLM", "BioGptConfig", {**TOKENS, **DECODER})
    monkeypatch.setattr(
        modeling_biogpt,
        "eager_attention_forward",
        lambda module, query, key, value, *rest, **options: (2 * value.transpose(1, 2), None),
    )
    left = {row.reason for row in gk.accelerate(model).left if row.part == "attention"}
    assert left == {"it computes something else with other attentions than its own"}
