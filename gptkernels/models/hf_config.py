"""transformers' configurations of the families and ours, both ways; what the other side cannot express is an error."""

from .config import GPTConfig

BASICS = {"tie_word_embeddings": True}
# Theirs by default are of the published vocabularies.
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
ACTIVATIONS |= {"relu2": "relu2", "silu": "silu", "swish": "silu"}
BACK = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "relu2": "relu2", "silu": "silu"}
# GPT-1's own table, in which gelu is the tanh form.
GPT1_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
GPT1_BACK = {"gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}


def choice(settings: dict, key: str, table: dict[str, str]) -> str:
    if settings.get(key) not in table:
        raise ValueError(f"config.json: {key} must be one of {', '.join(table)}, not {settings.get(key)!r}")
    return table[settings[key]]


def require(settings: dict, **wanted) -> None:
    for key, value in wanted.items():
        if settings.get(key, value) != value:
            raise ValueError(f"config.json: {key} must be {value!r}, not {settings[key]!r}")


def same(settings: dict, *keys: str) -> float:
    """The one value of these keys: our config has one dropout for them."""
    values = {settings.get(key, 0.0) for key in keys}
    if len(values) > 1:
        raise ValueError(f"config.json: {', '.join(keys)} must be equal, not {[settings.get(key) for key in keys]}")
    return values.pop()


def common(settings: dict) -> dict:
    """The fields of ours that all causal families call the same."""
    return {
        "vocabulary": settings["vocab_size"],
        "tied": settings.get("tie_word_embeddings", True),
        "eps": settings["layer_norm_epsilon"],
        "init_std": settings.get("initializer_range", 0.02),
    }


def common_back(config: GPTConfig) -> dict:
    return {
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tied,
        "layer_norm_epsilon": config.eps,
        "initializer_range": config.init_std,
    }


def sizes(settings: dict) -> dict:
    """What GPT-1 and GPT-2 call the same."""
    return common(settings) | {
        "context": settings["n_positions"],
        "layers": settings["n_layer"],
        "width": settings["n_embd"],
        "heads": settings["n_head"],
        "dropout": same(settings, "resid_pdrop", "embd_pdrop"),
        "attention_dropout": settings.get("attn_pdrop", 0.0),
    }


def sizes_back(config: GPTConfig) -> dict:
    return common_back(config) | {
        "n_positions": config.context,
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
    }


def from_gpt2(settings: dict) -> GPTConfig:
    require(settings, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return GPTConfig(
        **sizes(settings),
        mlp_width=settings.get("n_inner"),
        activation=choice(settings, "activation_function", ACTIVATIONS),
    )


def to_gpt2(config: GPTConfig) -> dict:
    return (
        sizes_back(config)
        | NO_SPECIAL
        | {
            "n_inner": config.mlp_width,
            "activation_function": BACK[config.activation],
        }
    )


def from_openai_gpt(settings: dict) -> GPTConfig:
    return GPTConfig(
        **sizes(settings),
        norm="post",
        activation=choice(settings, "afn", GPT1_ACTIVATIONS),
        scale_residual_init=False,
    )


def to_openai_gpt(config: GPTConfig) -> dict:
    if config.mlp_width not in (None, 4 * config.width):
        raise ValueError(f"mlp_width must be 4 * width for a GPT-1 of transformers, not {config.mlp_width}")
    if config.activation not in GPT1_BACK:
        raise ValueError(
            f"activation must be one of {', '.join(GPT1_BACK)} for a GPT-1 of transformers, not {config.activation}"
        )
    return sizes_back(config) | {"afn": GPT1_BACK[config.activation]}


def from_gpt_neo(settings: dict) -> GPTConfig:
    kinds = settings.get("attention_layers") or [
        kind for pattern, times in settings["attention_types"] for _ in range(times) for kind in pattern
    ]
    pattern = tuple("banded" if kind == "local" else "dense" for kind in kinds)
    if len(pattern) != settings["num_layers"]:
        raise ValueError(f"config.json: attention_types must name {settings['num_layers']} layers, not {len(pattern)}")
    return GPTConfig(
        **common(settings),
        context=settings["max_position_embeddings"],
        layers=settings["num_layers"],
        width=settings["hidden_size"],
        heads=settings["num_heads"],
        mlp_width=settings.get("intermediate_size"),
        pattern=shortest_period(pattern),
        window=settings["window_size"],
        attention_scale=1.0,
        activation=choice(settings, "activation_function", ACTIVATIONS),
        qkv_bias=False,
        dropout=same(settings, "resid_dropout", "embed_dropout"),
        attention_dropout=settings.get("attention_dropout", 0.0),
    )


def to_gpt_neo(config: GPTConfig) -> dict:
    if config.qkv_bias:
        raise ValueError("qkv_bias must be False for a GPT-Neo of transformers, the only GPT there with banded layers")
    kinds = ["local" if config.layer_window(layer) else "global" for layer in range(config.layers)]
    return (
        common_back(config)
        | NO_SPECIAL
        | {
            "max_position_embeddings": config.context,
            "num_layers": config.layers,
            "hidden_size": config.width,
            "num_heads": config.heads,
            "intermediate_size": config.mlp_width,
            "attention_types": [[[kind], 1] for kind in kinds],
            "window_size": config.window or 256,
            "activation_function": BACK[config.activation],
            "resid_dropout": config.dropout,
            "embed_dropout": config.dropout,
            "attention_dropout": config.attention_dropout,
        }
    )


def from_albert(settings: dict) -> GPTConfig:
    require(settings, num_hidden_groups=1, inner_group_num=1, tie_word_embeddings=True)
    require(settings, position_embedding_type="absolute")
    return GPTConfig(
        vocabulary=settings["vocab_size"],
        context=settings["max_position_embeddings"],
        layers=settings["num_hidden_layers"],
        width=settings["hidden_size"],
        heads=settings["num_attention_heads"],
        mlp_width=settings["intermediate_size"],
        norm="post",
        activation=choice(settings, "hidden_act", ACTIVATIONS),
        dropout=settings.get("hidden_dropout_prob", 0.0),
        attention_dropout=settings.get("attention_probs_dropout_prob", 0.0),
        share_layers=True,
        embedding_rank=settings["embedding_size"],
        token_types=settings["type_vocab_size"],
        objective="masked",
        eps=settings["layer_norm_eps"],
        init_std=settings.get("initializer_range", 0.02),
        scale_residual_init=False,
    )


def to_albert(config: GPTConfig) -> dict:
    return {
        "vocab_size": config.vocabulary,
        "embedding_size": config.embedding_rank,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_hidden_groups": 1,
        "inner_group_num": 1,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": BACK[config.activation],
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "max_position_embeddings": config.context,
        "type_vocab_size": config.token_types,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.eps,
    }


def from_llama(settings: dict) -> GPTConfig:
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    bias = settings.get("attention_bias", False)
    # Either all of our projections have a bias or none.
    require(settings, mlp_bias=bias, pretraining_tp=1)
    if settings.get("head_dim") not in (None, width // heads):
        raise ValueError(f"config.json: head_dim must be hidden_size / num_attention_heads, not {settings['head_dim']}")
    return GPTConfig(
        vocabulary=settings["vocab_size"],
        context=settings["max_position_embeddings"],
        layers=settings["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=settings.get("num_key_value_heads"),
        mlp_width=settings["intermediate_size"],
        norm="rms",
        rotary=rotary_base(settings),
        activation=choice(settings, "hidden_act", ACTIVATIONS),
        gated=True,
        bias=bias,
        tied=settings.get("tie_word_embeddings", False),
        attention_dropout=settings.get("attention_dropout", 0.0),
        eps=settings.get("rms_norm_eps", 1e-6),
        init_std=settings.get("initializer_range", 0.02),
        scale_residual_init=False,
    )


def rotary_base(settings: dict) -> float:
    """Of rope_parameters, or of rope_theta and rope_scaling as older files have them"""
    rope = {"rope_theta": settings.get("rope_theta") or 10000.0}
    rope |= settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json: rope_type must be 'default', rotary positions without scaling, not {kind!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor must be 1.0, not {rope['partial_rotary_factor']}")
    return float(rope["rope_theta"])


def to_llama(config: GPTConfig) -> dict:
    wanted = {"norm": "rms", "gated": True, "pattern": ("dense",), "share_layers": False, "embedding_rank": None}
    wanted |= {"token_types": 0, "objective": "next_token", "dropout": 0.0, "qk_norm": False}
    wanted |= {"qkv_bias": True} if config.bias else {}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name} must be {value!r} for a Llama of transformers, not {getattr(config, name)!r}")
    if config.rotary is None:
        raise ValueError("rotary must be a base for a Llama of transformers, not None")
    if not default_scale(config):
        scale = config.head_size**-0.5
        raise ValueError(
            f"attention_scale must be None or {scale} for a Llama of transformers, not {config.attention_scale}"
        )
    return NO_SPECIAL | {
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_size,
        "intermediate_size": config.hidden,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary},
        "hidden_act": BACK[config.activation],
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tied,
        "attention_dropout": config.attention_dropout,
        "rms_norm_eps": config.eps,
        "initializer_range": config.init_std,
    }


def default_scale(config: GPTConfig) -> bool:
    return config.attention_scale in (None, config.head_size**-0.5)


def family_of(config: GPTConfig) -> str:
    """The family of transformers that has such a model, if one has; ValueError where none has."""
    if config.norm == "rms" or config.gated or config.rotary is not None or config.kv_width != config.width:
        return "llama"
    if not config.bias:
        raise ValueError("bias must be True for a model of transformers: its GPTs have biases")
    if config.objective == "masked":
        complete = config.share_layers and config.embedding_rank and config.token_types and config.norm == "post"
        if not (complete and config.tied and config.qkv_bias and default_scale(config)) or config.pattern != ("dense",):
            raise ValueError("a masked model must be ALBERT's (shared dense post-norm layers) for transformers")
        return "albert"
    if config.share_layers or config.embedding_rank or config.token_types:
        raise ValueError("share_layers, embedding_rank and token_types have no causal model in transformers")
    banded = any(config.layer_window(layer) for layer in range(config.layers))
    if config.norm == "post":
        if banded or not config.qkv_bias or not default_scale(config):
            raise ValueError("a post-norm model must be GPT-1's (dense, with biases, default scale) for transformers")
        return "openai-gpt"
    return "gpt_neo" if banded or not config.qkv_bias or not default_scale(config) else "gpt2"


def shortest_period(pattern: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest sequence whose repetition gives the pattern."""
    for length in range(1, len(pattern)):
        if all(pattern[i] == pattern[i % length] for i in range(len(pattern))):
            return pattern[:length]
    return pattern
