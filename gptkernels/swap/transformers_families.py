"""The modules of transformers that are replaced by name, and the methods that replace theirs."""

from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from . import masks
from .modules import FAMILIES, Family, original
from .parts import mlp_forward, mlp_reason, run_mlp

MODELS = "transformers.models."
# name: (class, attributes of the two linear layers, of the activation between them and of the dropout after)
MLPS = {
    "GPT-2 MLP": ("gpt2.modeling_gpt2.GPT2MLP", "c_fc", "act", "c_proj", "dropout"),
    "GPT-1 MLP": ("openai.modeling_openai.MLP", "c_fc", "act", "c_proj", "dropout"),
    "GPT-Neo MLP": ("gpt_neo.modeling_gpt_neo.GPTNeoMLP", "c_fc", "act", "c_proj", "dropout"),
    "GPT-J MLP": ("gptj.modeling_gptj.GPTJMLP", "fc_in", "act", "fc_out", "dropout"),
    "GPT-NeoX MLP": ("gpt_neox.modeling_gpt_neox.GPTNeoXMLP", "dense_h_to_4h", "act", "dense_4h_to_h", None),
    "Falcon MLP": ("falcon.modeling_falcon.FalconMLP", "dense_h_to_4h", "act", "dense_4h_to_h", None),
    "ViT MLP": ("vit.modeling_vit.ViTMLP", "fc1", "activation_fn", "fc2", None),
}


def is_a(module: nn.Module, name: str, *methods: str) -> bool:
    """Whether the module is of that class of transformers, and runs that class's own methods."""
    for cls in type(module).__mro__:
        if f"{cls.__module__}.{cls.__qualname__}" == MODELS + name:
            return all(getattr(type(module), method) is getattr(cls, method) for method in methods)
    return False


def gpt_neo_scores(module, query: Tensor, key: Tensor, value: Tensor, attention_mask=None):
    window = module.config.window_size if module.attention_type == "local" else None
    return on_interface(module, query, key, value, attention_mask, scaling=1.0, sliding_window=window)


def gptj_scores(module, query: Tensor, key: Tensor, value: Tensor, attention_mask=None):
    return on_interface(module, query, key, value, attention_mask, scaling=module.head_dim**-0.5)


def openai_scores(module, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, output_attentions=False):
    """key: (B, H, D, T); attention_mask: (B, 1, 1, T), 0 for real tokens"""
    scaling = value.shape[-1] ** -0.5 if module.scale else 1.0
    mask = None if attention_mask is None else padding_mask(attention_mask)
    options = {"scaling": scaling, "is_causal": True, "output_attentions": output_attentions}
    return [on_interface(module, query, key.mT, value, mask, **options)[0]]


def on_interface(module, query, key, value, attention_mask, **options) -> tuple[Tensor, None]:
    """-> (B, H, T, D), None, as the methods that this replaces return it"""
    from .attention_interface import gptkernels_attention

    dropout = module.attn_dropout.p if module.training else 0.0
    out, _ = gptkernels_attention(module, query, key, value, attention_mask, dropout=dropout, **options)
    return out.transpose(1, 2), None


# The same mask goes to every layer: it is read once.
_padding_masks = WeakIdKeyDictionary()


def padding_mask(scores: Tensor) -> Tensor:
    """(B, 1, 1, T), 0 for real tokens -> one of gptkernels.swap.masks"""
    if not torch.compiler.is_compiling() and scores in _padding_masks:
        return _padding_masks[scores]
    tokens = scores.shape[-1]
    mask = masks.causal_mask(tokens, tokens, tokens, None, scores[:, 0, 0] == 0, scores.device)
    if not torch.compiler.is_compiling():
        _padding_masks[scores] = mask
    return mask


def refuses_weights(module, *args, output_attentions=False, **kwargs):
    from .attention_interface import fall_back

    if output_attentions:
        fall_back("output_attentions=True: the kernels never have the attention weights as a whole")
    return original(module, "forward")(*args, **kwargs)


def opt_layer(
    module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values=None,
    use_cache: bool | None = False,
    position_ids: Tensor | None = None,
    **kwargs,
) -> Tensor:
    first = module.do_layer_norm_before
    x = module.self_attn_layer_norm(hidden_states) if first else hidden_states
    x, _ = module.self_attn(
        hidden_states=x,
        past_key_values=past_key_values,
        position_ids=position_ids,
        attention_mask=attention_mask,
        **kwargs,
    )
    residual = hidden_states + F.dropout(x, module.dropout, module.training)
    residual = residual if first else module.self_attn_layer_norm(residual)
    x = module.final_layer_norm(residual) if first else residual
    out = run_mlp(module, x, module.fc1, module.activation_fn, module.fc2)
    if out is None:
        out = module.fc2(module.activation_fn(module.fc1(x)))
    out = residual + F.dropout(out, module.dropout, module.training)
    return out if first else module.final_layer_norm(out)


def bert_chunk(module, attention_output: Tensor) -> Tensor:
    fc, after = module.intermediate, module.output
    out = run_mlp(module, attention_output, fc.dense, fc.intermediate_act_fn, after.dense)
    if out is None:
        return original(module, "feed_forward_chunk")(attention_output)
    return after.LayerNorm(after.dropout(out) + attention_output)


def distilbert_chunk(module, input: Tensor) -> Tensor:
    out = run_mlp(module, input, module.lin1, module.activation, module.lin2)
    return original(module, "ff_chunk")(input) if out is None else module.dropout(out)


def t5_mlp(module, hidden_states: Tensor) -> Tensor:
    """With a dropout before the second layer"""
    out = None
    if not (module.training and module.dropout.p > 0) and module.wo.weight.dtype == module.wi.weight.dtype:
        out = run_mlp(module, hidden_states, module.wi, module.act, module.wo)
    return original(module, "forward")(hidden_states) if out is None else out


def with_residual(fc: str, activation: str, proj: str):
    """The forward of a module residual + dropout(proj(activation(fc(x)))), as BLOOM and MPT have it."""

    def forward(module, hidden_states: Tensor, residual: Tensor) -> Tensor:
        first, between, second = (getattr(module, name) for name in (fc, activation, proj))
        dropped = module.training and module.hidden_dropout > 0
        out = run_mlp(module, hidden_states, first, between, second, None if dropped else residual)
        if out is None:
            return original(module, "forward")(hidden_states, residual)
        return residual + F.dropout(out, module.hidden_dropout) if dropped else out

    return forward


def albert_chunk(module, attention_output: Tensor) -> Tensor:
    out = run_mlp(module, attention_output, module.ffn, module.activation, module.ffn_output)
    return original(module, "ff_chunk")(attention_output) if out is None else out


def is_mlp(name: str, method: str, *attributes: str):
    """attributes: dotted, of the first linear layer, the activation and the second linear layer"""

    def matches(module: nn.Module) -> bool | str:
        if not is_a(module, name, method):
            return False
        fc, activation, proj = (attrgetter(path)(module) for path in attributes)
        return mlp_reason(fc, activation, proj) or True

    return matches


def add(name: str, part: str, matches, **methods) -> None:
    FAMILIES[name] = Family(name, part, matches, methods)


def add_all() -> None:
    for name, (cls, fc, activation, proj, dropout) in MLPS.items():
        add(
            name,
            "mlp",
            is_mlp(cls, "forward", fc, activation, proj),
            forward=mlp_forward(fc, activation, proj, dropout),
        )
    opt, albert = "opt.modeling_opt.OPTDecoderLayer", "albert.modeling_albert.AlbertLayer"
    add("OPT MLP", "mlp", is_mlp(opt, "forward", "fc1", "activation_fn", "fc2"), forward=opt_layer)
    bert_path = ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense")
    for name, cls in (("BERT", "bert.modeling_bert.BertLayer"), ("RoBERTa", "roberta.modeling_roberta.RobertaLayer")):
        chunk = is_mlp(cls, "feed_forward_chunk", *bert_path)
        add(f"{name} MLP", "mlp", chunk, feed_forward_chunk=bert_chunk)
    distilbert = "distilbert.modeling_distilbert.FFN"
    add(
        "DistilBERT MLP", "mlp", is_mlp(distilbert, "ff_chunk", "lin1", "activation", "lin2"), ff_chunk=distilbert_chunk
    )
    add("T5 MLP", "mlp", is_mlp("t5.modeling_t5.T5DenseActDense", "forward", "wi", "act", "wo"), forward=t5_mlp)
    for name, cls, *layers in (
        ("BLOOM", "bloom.modeling_bloom.BloomMLP", "dense_h_to_4h", "gelu_impl", "dense_4h_to_h"),
        ("MPT", "mpt.modeling_mpt.MptMLP", "up_proj", "act", "down_proj"),
    ):
        add(f"{name} MLP", "mlp", is_mlp(cls, "forward", *layers), forward=with_residual(*layers))
    add("ALBERT MLP", "mlp", is_mlp(albert, "ff_chunk", "ffn", "activation", "ffn_output"), ff_chunk=albert_chunk)
    for name, cls, scores in (
        ("GPT-Neo attention", "gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention", gpt_neo_scores),
        ("GPT-J attention", "gptj.modeling_gptj.GPTJAttention", gptj_scores),
    ):
        add(name, "attention", matcher(cls, "forward", "_attn"), _attn=scores, forward=refuses_weights)
    add(
        "GPT-1 attention",
        "attention",
        matcher("openai.modeling_openai.Attention", "forward", "_attn"),
        _attn=openai_scores,
    )


def matcher(name: str, *methods: str):
    def matches(module: nn.Module) -> bool | str:
        return is_a(module, name, *methods)

    return matches
