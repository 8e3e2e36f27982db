"""Small models of every family that accelerate() knows, and what they take."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, LAYERS, TOKENS = 61, 64, 4, 3, 24
TINY = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


@dataclass(frozen=True)
class ModelFamily:
    name: str
    make: Callable[[], nn.Module]
    causal: bool = True
    generates: bool = True
    caches: bool = True
    pads: bool = True
    # The argument that the first tokens are, or the picture or sound
    takes: str = "input_ids"
    encodes_first: bool = False  # and has another argument, decoder_input_ids
    # What accelerate() has to call in each forward pass; a part that is not here has to be left with a reason.
    calls: dict[str, int] = None


def transformers_model(model: str, config: str, **options) -> Callable[[], nn.Module]:
    def make():
        import transformers

        return getattr(transformers, model)(
            getattr(transformers, config)(**TINY, **options, attn_implementation="eager")
        )

    return make


def llama_like(name: str, config: str = "", **options) -> Callable[[], nn.Module]:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    options = {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, **options}
    return transformers_model(f"{name}ForCausalLM", config or f"{name}Config", **sizes, **options)


GPT2 = {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": 128}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NEO = {"hidden_size": WIDTH, "num_layers": 4, "num_heads": HEADS, "max_position_embeddings": 128, "window_size": 6}
NEOX = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 128}
OPT = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "ffn_dim": 128, "dropout": 0.0}
BERT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


SEQ2SEQ = {
    **{"d_model": WIDTH, "dropout": 0.0, "decoder_start_token_id": 1},
    **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 96))},
    **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
}
T5 = {"d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": HEADS, "dropout_rate": 0.0}
PICTURES = {"image_size": 16, "patch_size": 4}


def clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 96}
    config = CLIPVisionConfig(**sizes, **PICTURES, projection_dim=VOCABULARY, attn_implementation="eager")
    return CLIPVisionModelWithProjection(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**BERT, **PICTURES, num_labels=VOCABULARY, attn_implementation="eager")
    return ViTForImageClassification(config)


class NanoLayerNorm(nn.Module):
    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.resid_dropout, self.n_head, self.dropout = nn.Dropout(0.0), heads, 0.0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in self.c_attn(x).split(x.shape[-1], 2))
        scores = (q @ k.mT) * k.shape[-1] ** -0.5
        hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        return self.resid_dropout(self.c_proj(out.transpose(1, 2).flatten(2)))


class NanoMLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.ln_1, self.attn = NanoLayerNorm(width, bias), NanoAttention(width, heads)
        self.ln_2, self.mlp = NanoLayerNorm(width, bias), NanoMLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """The blocks as Karpathy's nanoGPT names them."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(128, WIDTH)
        self.h = nn.ModuleList(NanoBlock(WIDTH, HEADS, bias) for _ in range(LAYERS))
        self.ln_f, self.lm_head = NanoLayerNorm(WIDTH, bias), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 128, dropout=0.0, batch_first=True, **options)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        padding = None if attention_mask is None else attention_mask == 0
        return self.head(self.encoder(self.embedding(tokens), src_key_padding_mask=padding))


def calls(
    layers: int = LAYERS, norms: int = 0, rms_norms: int = 0, gated: bool | None = False, rope: int = 0
) -> dict[str, int]:
    """gated: None where there is no MLP that could be replaced"""
    mlps = {"mlp": layers if gated is False else 0, "gated_mlp": layers if gated else 0}
    return {"attention": layers, "layer_norm": norms, "rms_norm": rms_norms, **mlps, "rope": rope}


PRE_NORM = calls(norms=2 * LAYERS + 1)
GATED = calls(rms_norms=2 * LAYERS + 1, gated=True, rope=LAYERS)
NORMS_AFTER = calls(rms_norms=4 * LAYERS + 1, gated=True, rope=LAYERS)  # or of queries and keys
FAMILIES = [
    ModelFamily("GPT-2", transformers_model("GPT2LMHeadModel", "GPT2Config", **GPT2, **NO_DROPOUT), calls=PRE_NORM),
    ModelFamily(
        "GPT-1",
        transformers_model("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", **GPT2, **NO_DROPOUT),
        caches=False,
        calls=calls(norms=2 * LAYERS),
    ),
    ModelFamily(
        "GPT-Neo",
        transformers_model("GPTNeoForCausalLM", "GPTNeoConfig", **NEO, attention_types=[[["global", "local"], 2]]),
        calls=calls(4, 9),
    ),
    ModelFamily(
        "GPT-J",
        transformers_model("GPTJForCausalLM", "GPTJConfig", **GPT2, **NO_DROPOUT, rotary_dim=8),
        calls=calls(norms=LAYERS + 1),
    ),
    ModelFamily(
        "GPT-NeoX",
        transformers_model("GPTNeoXForCausalLM", "GPTNeoXConfig", **NEOX),
        calls=calls(norms=2 * LAYERS + 1, rope=LAYERS),
    ),
    ModelFamily(
        "GPT-BigCode",
        transformers_model("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **GPT2, **NO_DROPOUT),
        calls=PRE_NORM,
    ),
    ModelFamily(
        "OPT", transformers_model("OPTForCausalLM", "OPTConfig", **OPT, word_embed_proj_dim=WIDTH), calls=PRE_NORM
    ),
    ModelFamily("Llama", llama_like("Llama"), calls=GATED),
    ModelFamily("Mistral", llama_like("Mistral", sliding_window=7), calls=GATED),
    ModelFamily(
        "Qwen2",
        llama_like("Qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1),
        calls=GATED,
    ),
    ModelFamily("Qwen3", llama_like("Qwen3"), calls=NORMS_AFTER),
    ModelFamily("Gemma", llama_like("Gemma"), calls=GATED),
    ModelFamily(
        "Gemma 2",
        llama_like("Gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0, sliding_window=7),
        calls=NORMS_AFTER,
    ),
    ModelFamily(
        "Gemma 3",
        llama_like("Gemma3", sliding_window=7, config="Gemma3TextConfig"),
        calls=calls(rms_norms=6 * LAYERS + 1, gated=True, rope=LAYERS),
    ),
    ModelFamily("OLMo 2", llama_like("Olmo2"), calls=NORMS_AFTER),
    ModelFamily("Granite", llama_like("Granite", logits_scaling=3.0), calls=GATED),
    ModelFamily("Phi", llama_like("Phi"), calls=calls(norms=LAYERS + 1, rope=LAYERS)),
    ModelFamily("Phi-3", llama_like("Phi3"), calls=GATED),
    ModelFamily(
        "StarCoder2", llama_like("Starcoder2", residual_dropout=0.0), calls=calls(norms=2 * LAYERS + 1, rope=LAYERS)
    ),
    ModelFamily(
        "Cohere", llama_like("Cohere", logit_scale=0.3), calls=calls(norms=LAYERS + 1, gated=True, rope=LAYERS)
    ),
    ModelFamily(
        "Mixtral",
        llama_like("Mixtral", num_local_experts=4, experts_implementation="eager"),
        calls=calls(rms_norms=2 * LAYERS + 1, gated=None, rope=LAYERS),
    ),
    ModelFamily(
        "gpt-oss",
        llama_like("GptOss", num_local_experts=4, sliding_window=7, experts_implementation="eager"),
        calls=calls(rms_norms=2 * LAYERS + 1, gated=None, rope=LAYERS),
    ),
    ModelFamily(
        "BERT",
        transformers_model("BertForMaskedLM", "BertConfig", **BERT),
        causal=False,
        generates=False,
        calls=calls(norms=2 * LAYERS + 2),
    ),
    ModelFamily(
        "ALBERT",
        transformers_model("AlbertForMaskedLM", "AlbertConfig", **BERT, embedding_size=32),
        causal=False,
        generates=False,
        calls=calls(norms=2 * LAYERS + 2),
    ),
    ModelFamily(
        "RoBERTa",
        transformers_model("RobertaForMaskedLM", "RobertaConfig", **BERT),
        causal=False,
        generates=False,
        calls=calls(norms=2 * LAYERS + 2),
    ),
    ModelFamily(
        "DistilBERT",
        transformers_model(
            *("DistilBertForMaskedLM", "DistilBertConfig"),
            **{"dim": WIDTH, "hidden_dim": 96, "n_layers": LAYERS, "n_heads": HEADS},
            **{"dropout": 0.0, "attention_dropout": 0.0},
        ),
        causal=False,
        generates=False,
        calls=calls(norms=2 * LAYERS + 2),
    ),
    ModelFamily(
        "ViT", vit, causal=False, generates=False, pads=False, takes="pixel_values", calls=calls(norms=2 * LAYERS + 1)
    ),
    ModelFamily(
        "CLIP",
        clip,
        causal=False,
        generates=False,
        pads=False,
        takes="pixel_values",
        calls=calls(norms=2 * LAYERS + 2, gated=None),
    ),
    ModelFamily(
        "BART",
        transformers_model("BartForConditionalGeneration", "BartConfig", **SEQ2SEQ),
        encodes_first=True,
        calls=calls(6, norms=2 * 2 + 3 * 2 + 2, gated=None),
    ),
    ModelFamily(
        "Whisper",
        transformers_model(
            *("WhisperForConditionalGeneration", "WhisperConfig"),
            **SEQ2SEQ,
            **{"max_source_positions": 16, "max_target_positions": 128, "num_mel_bins": 16},
        ),
        pads=False,
        takes="input_features",
        encodes_first=True,
        calls=calls(6, norms=2 * 2 + 3 * 2 + 2, gated=None),
    ),
    ModelFamily(
        "T5",
        transformers_model("T5ForConditionalGeneration", "T5Config", **T5, decoder_start_token_id=1),
        encodes_first=True,
        calls={**calls(0, rms_norms=2 * 2 + 3 * 2 + 2), "mlp": 4},
    ),
    ModelFamily(
        "BLOOM",
        transformers_model(
            *("BloomForCausalLM", "BloomConfig"),
            **{"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
        ),
        calls={**calls(0, norms=2 * LAYERS + 2), "mlp": LAYERS},
    ),
    ModelFamily(
        "MPT",
        transformers_model("MptForCausalLM", "MptConfig", d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS),
        calls={**calls(0, norms=2 * LAYERS + 1), "mlp": LAYERS},
    ),
    ModelFamily(
        "Falcon",
        transformers_model(
            *("FalconForCausalLM", "FalconConfig"),
            **{"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS},
        ),
        calls=calls(0, norms=LAYERS + 1, rope=LAYERS),
    ),
    ModelFamily("nanoGPT", NanoGPT, generates=False, pads=False, takes="tokens", calls=PRE_NORM),
    ModelFamily(
        "TransformerEncoder", Encoder, causal=False, generates=False, takes="tokens", calls=calls(norms=2 * LAYERS)
    ),
]


def inputs(family: ModelFamily, rows: int = 2, tokens: int = TOKENS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = {"pixel_values": (rows, 3, 16, 16), "input_features": (rows, 16, 32)}.get(family.takes)
    words = torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)
    first = words if shape is None else torch.randn(shape, generator=generator)
    return {family.takes: first, **({"decoder_input_ids": words} if family.encodes_first else {})}


def made(family: ModelFamily) -> nn.Module:
    """In evaluation, with weights large enough for every token to matter."""
    torch.manual_seed(0)
    model = family.make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits_of(model: nn.Module, **arguments) -> Tensor:
    out = model(**arguments)
    return out if isinstance(out, Tensor) else out.image_embeds if hasattr(out, "image_embeds") else out.logits
